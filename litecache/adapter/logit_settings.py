"""From Hugging Face's settings about logits to `LogitRules`, and LiteCache's own beside them.

`sequence_bias`, `bad_words_ids`, the suppressed tokens, `repetition_penalty` and
`no_repeat_ngram_size` are fields of a `GenerationConfig`; `logit_bias`, `presence_penalty`,
`frequency_penalty`, `logprobs` and `stop_token_ids` are arguments that only LiteCache has, with the
meaning they have elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from litecache.adapter.values import as_list, check_count, check_number, check_token_ids
from litecache.errors import ConfigError
from litecache.types import LogitRules

OWN_ARGUMENTS = (
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "presence_penalty",
    "stop_token_ids",
)
"""Arguments of `generate` that transformers does not have."""


def logit_rules(
    settings: Mapping[str, Any], own: Mapping[str, Any], eos_token_ids: Sequence[int]
) -> LogitRules:
    """The rules of one call.

    Args:
        settings: fields of the merged generation config.
        own: those of `OWN_ARGUMENTS` that were given.
        eos_token_ids: as in transformers, a bad word that is an end token alone is left out.

    Raises:
        ConfigError: names the field, its value and what is valid.
    """
    penalty = settings.get("repetition_penalty")
    penalty = 1.0 if penalty is None else penalty
    bad_words = settings.get("bad_words_ids")
    words = [] if bad_words is None else _sequences("bad_words_ids", bad_words)
    return LogitRules(
        sequence_bias=(*_sequence_bias(settings.get("sequence_bias")), *_logit_bias(own)),
        bad_words_ids=tuple(w for w in words if len(w) > 1 or w[0] not in eos_token_ids),
        suppress_tokens=check_token_ids("suppress_tokens", settings.get("suppress_tokens")),
        begin_suppress_tokens=check_token_ids(
            "begin_suppress_tokens", settings.get("begin_suppress_tokens")
        ),
        repetition_penalty=check_number(
            "repetition_penalty", penalty, 0.0, float("inf"), open_low=True
        ),
        presence_penalty=_penalty("presence_penalty", own),
        frequency_penalty=_penalty("frequency_penalty", own),
        no_repeat_ngram_size=min(
            check_count("no_repeat_ngram_size", _or_zero(settings.get("no_repeat_ngram_size")), 0),
            1 << 30,
        ),
    )


def _or_zero(value: Any) -> Any:
    return 0 if value is None else value


def _penalty(name: str, own: Mapping[str, Any]) -> float:
    value = own.get(name)
    return 0.0 if value is None else check_number(name, value, float("-inf"), float("inf"))


def _sequence_bias(value: Any) -> list[tuple[tuple[int, ...], float]]:
    """A dict from tuples of ids to biases, or a list of [ids, bias], as transformers takes both."""
    if value is None:
        return []
    valid = "{(ids...): bias} or [[ids, bias], ...], not empty"
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, (list, tuple)) or not pairs:
        raise ConfigError("sequence_bias", value, valid)
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ConfigError("sequence_bias", value, valid)
    sequences = _sequences("sequence_bias", [ids for ids, _ in pairs])
    # Of two biases for the same ids the later one counts, as in transformers.
    biases = [_bias("sequence_bias", bias) for _, bias in pairs]
    return list(dict(zip(sequences, biases, strict=True)).items())


def _logit_bias(own: Mapping[str, Any]) -> list[tuple[tuple[int, ...], float]]:
    value = own.get("logit_bias")
    if value is None:
        return []
    if not isinstance(value, Mapping):
        raise ConfigError("logit_bias", value, "{token id: bias}")
    return [
        ((check_count("logit_bias", token, 0),), _bias("logit_bias", bias))
        for token, bias in value.items()
    ]


def _bias(name: str, value: Any) -> float:
    if isinstance(value, float) and value == float("-inf"):
        return value
    try:
        return check_number(name, value, float("-inf"), float("inf"))
    except ConfigError:
        raise ConfigError(name, value, "a finite number or -inf as bias") from None


def _sequences(name: str, value: Any) -> list[tuple[int, ...]]:
    value = as_list(name, value)
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigError(name, value, "lists of token ids, at least one")
    sequences = []
    for ids in value:
        if not isinstance(ids, (list, tuple)) or not ids:
            raise ConfigError(name, ids, "a list of at least one token id")
        sequences.append(tuple(check_count(name, token, 0) for token in ids))
    return sequences
