"""What requests and sampling settings an engine accepts; whatever driver sent them.

A message may come from anybody who can reach the engine: every field is checked, its type first,
so that nothing later can raise on it or index a tensor with it.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from litecache.checks import FLOAT32_MAX, INT64_MAX, check_integer, check_real
from litecache.errors import ConfigError
from litecache.types import LogitRules, SamplingParams

MAX_TEXT = 4096
MAX_RULE_TOKENS = 1 << 22
"""Of all biased and forbidden sequences of a request, each as long as the longest."""


def check_text(name: str, value: Any, *, empty: bool = False) -> None:
    """Refuse what is no text, or one that cannot be hashed and sent as UTF-8."""
    if not isinstance(value, str) or not (empty or value) or len(value) > MAX_TEXT:
        least = 0 if empty else 1
        raise ConfigError(name, value, f"a text of {least} to {MAX_TEXT} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(name, value, "a text without lone surrogates") from error


def check_texts(name: str, values: Any) -> list[str]:
    """Refuse what is no list of non-empty texts; a single text is none."""
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, set, frozenset)):
        raise ConfigError(name, values, "a list of texts")
    for value in values:
        check_text(name, value)
    return list(values)


def check_sampling(sampling: Any, vocab_size: int, *, draws: bool = True) -> None:
    """Refuse settings that no step could honour.

    Args:
        sampling: of one request.
        vocab_size: token ids are below it.
        draws: the request draws tokens; False = its logits are handed out.

    Raises:
        ConfigError: names the first bad field, its value and what is valid.
    """
    if not isinstance(sampling, SamplingParams):
        raise ConfigError("sampling", sampling, "a litecache.types.SamplingParams")
    if draws:
        check_integer("max_new_tokens", sampling.max_new_tokens, 1)
    else:
        valid = "0 where logits are asked for"
        check_integer("max_new_tokens", sampling.max_new_tokens, 0, 0, valid=valid)
    check_integer("seed", sampling.seed, -INT64_MAX - 1)
    for name in ("min_new_tokens", "top_k", "sample_index"):
        check_integer(name, getattr(sampling, name), 0)
    check_real("temperature", sampling.temperature, 0)
    check_real("top_p", sampling.top_p, 0, 1, above=True)
    check_real("min_p", sampling.min_p, 0, 1)
    if sampling.logprobs is not None:
        check_integer("logprobs", sampling.logprobs, 0, vocab_size)
    check_ids("eos_token_ids", sampling.eos_token_ids, vocab_size)
    _check_rules(sampling, vocab_size)


def _check_rules(rules: LogitRules, vocab_size: int) -> None:
    check_real("repetition_penalty", rules.repetition_penalty, 0, above=True)
    for name in ("presence_penalty", "frequency_penalty"):
        check_real(name, getattr(rules, name), -FLOAT32_MAX)
    check_integer("no_repeat_ngram_size", rules.no_repeat_ngram_size, 0)
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        check_ids(name, getattr(rules, name), vocab_size)
    biased, words = [], _tuple("bad_words_ids", rules.bad_words_ids, "a tuple of tuples of ids")
    for pair in _tuple("sequence_bias", rules.sequence_bias, "a tuple of (ids, bias) pairs"):
        if len(_tuple("sequence_bias", pair, "(ids, bias) pairs")) != 2:
            raise ConfigError("sequence_bias", pair, "(ids, bias) pairs")
        ids, bias = pair
        if not isinstance(bias, float) or bias != float("-inf"):
            check_real("sequence_bias", bias, -FLOAT32_MAX)
        biased.append(check_ids("sequence_bias", ids, vocab_size, least=1))
    for ids in words:
        check_ids("bad_words_ids", ids, vocab_size, least=1)
    longest = max((len(ids) for ids in (*biased, *words)), default=0)
    count = (len(biased) + len(words) + len(rules.suppress_tokens)) * longest
    if count > MAX_RULE_TOKENS:
        valid = f"fewer or shorter sequences: number times longest at most {MAX_RULE_TOKENS}"
        raise ConfigError("bad_words_ids" if words else "sequence_bias", count, valid)
    forbidden = set(rules.suppress_tokens) | {ids[0] for ids in words if len(ids) == 1}
    if len(forbidden) >= vocab_size:
        raise ConfigError("suppress_tokens", len(forbidden), f"fewer than all {vocab_size} tokens")


def _tuple(name: str, value: Any, valid: str) -> Sequence[Any]:
    if not isinstance(value, (tuple, list)):
        raise ConfigError(name, value, valid)
    return value


def check_ids(name: str, ids: Any, vocab_size: int, least: int = 0) -> Sequence[int]:
    """Refuse what is no tuple or list of tokens of the vocabulary."""
    if len(_tuple(name, ids, "a tuple of token ids")) < least:
        raise ConfigError(name, ids, "at least one token id")
    for token in ids:
        if not isinstance(token, numbers.Integral) or not 0 <= int(token) < vocab_size:
            raise ConfigError(name, token, f"token ids from 0 to {vocab_size - 1}")
    return ids  # type: ignore[no-any-return]
