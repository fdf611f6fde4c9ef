"""From Hugging Face's generation settings to `SamplingParams`.

The order is HF's: keyword arguments, then the given `GenerationConfig`, then the model's own, then
the library's defaults. Lengths count as in HF, where the padded width of the input is the prompt's
length. What the engine loop does not do makes a call one of the driver loop
(`adapter/driver_loop.py`), or is refused by name before anything leaves the driver: a setting that
is silently ignored would return tokens that the caller did not ask for.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import Cache, CompileConfig, GenerationConfig
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from litecache.adapter.prompts import as_list, check_input_ids, split_rows
from litecache.checks import (
    FLOAT32_MAX,
    INT64_MAX,
    check_flag,
    check_integer,
    check_real,
    check_text,
)
from litecache.errors import ConfigError, outline, shown
from litecache.token_ids import TokenIds
from litecache.types import SamplingParams

_DEFAULTS: dict[str, Any] = {
    "min_length": 0, "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
    "num_return_sequences": 1, "return_dict_in_generate": False, "min_p": 0,
    "repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0,
    "no_repeat_ngram_size": 0,
}  # fmt: skip
"""Of settings that must have a value: None, as an argument too, means "not given"."""
DEFAULT_MAX_NEW_TOKENS = 20
_SAMPLING_ONLY = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "min_p": None}
_MOST_PAD_ID = 2**31 - 1
_TAKES_OTHERS = "generate(..., loop='driver') takes others"

LOOPS = ("auto", "engine", "driver")
"""Which loop draws the tokens: see `KVCacheAdapter.generate`."""

OWN_ARGUMENTS = (
    "frequency_penalty", "logit_bias", "logprobs", "presence_penalty", "stop_token_ids",
)  # fmt: skip
"""Arguments of `generate` that transformers does not have, with the meaning they have elsewhere."""

_ABSENT = (
    "assistant_early_exit", "constraints", "dola_layers",
    "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id",
    "forced_eos_token_id", "prompt_lookup_num_tokens", "speculation_type",
    "watermarking_config",
)  # fmt: skip
_OFF = (
    "low_memory", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "remove_invalid_values", "renormalize_logits", "token_healing", "use_mtp",
)  # fmt: skip
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_ABSENT, (None,)),
    **dict.fromkeys(_OFF, (None, False)),
    **dict.fromkeys(("diversity_penalty", "penalty_alpha"), (None, 0.0)),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), (None, 1.0)),
    **dict.fromkeys(("num_beam_groups", "num_beams"), (None, 1)),
    "encoder_no_repeat_ngram_size": (None, 0),
}
"""Fields of GenerationConfig, and the values at which the engine loop does what they say."""

NEUTRAL_WHEN_SAMPLING: dict[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
}
"""The same, for settings that only matter while sampling."""

DRIVER_ARGUMENTS = (
    "assistant_model", "assistant_tokenizer", "cache_position", "custom_generate",
    "logits_processor", "negative_prompt_attention_mask", "negative_prompt_ids", "past_key_values",
    "position_ids", "prefix_allowed_tokens_fn", "stopping_criteria", "synced_gpus",
    "trust_remote_code",
)  # fmt: skip
"""Arguments of transformers' `generate` that its own loop takes in the driver."""

BY_PLACE = (
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus",
    "assistant_model",
)  # fmt: skip
"""Of these the ones that may be given by place, behind `generation_config`."""

_NO_LAYERS = "left out: the layers are in another process; run the model with transformers"
_NO_DRAFTS = "left out: take an assistant_model or prompt_lookup_num_tokens for drafts"
_NO_ENCODER = "left out: LiteCache serves models that are decoders alone"
NEITHER_LOOP: dict[str, str] = {
    **dict.fromkeys(("output_attentions", "output_hidden_states"), _NO_LAYERS),
    **dict.fromkeys(("assistant_early_exit", "speculation_type", "use_mtp"), _NO_DRAFTS),
    **dict.fromkeys(("decoder_input_ids", "encoder_outputs"), _NO_ENCODER),
    "inputs_embeds": "input_ids instead: KV is found by token ids, and the replicas embed them",
    "token_type_ids": "left out, or zeros: a row has tokens alone",
}
"""What neither loop takes, and what to do instead."""

_CACHES = (*ALL_CACHE_IMPLEMENTATIONS, "paged")
WAYS_TO_COMPUTE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "cache_implementation": (
        lambda value: isinstance(value, str) and value in _CACHES and value != "quantized",
        "None, or a name other than 'quantized'; CacheConfig.kv_dtype says how KV is kept",
    ),
    "compile_config": (lambda value: isinstance(value, CompileConfig), "a CompileConfig or None"),
    "prefill_chunk_size": (lambda value: type(value) is int and value > 0, "an integer from 1"),
    "use_cache": (lambda value: isinstance(value, bool), "True or False"),
}
"""Fields that say how transformers computes and not what, with the values that are all the same."""


@dataclass(frozen=True)
class GenerationSettings:
    """One call's settings, checked.

    Attributes:
        sampling: of every sequence, but for lengths, seed and index.
        do_sample: draw instead of taking the likeliest token.
        max_new_tokens, max_length: the bound that applies is the first that is not None; with
            neither, 20 new tokens, at most the model's positions.
        min_new_tokens, min_length: the same.
        pad_token_id: fills shorter rows; the first end token where there is none.
        mask_pad_token: without an attention mask this token of the input is taken for padding.
        num_return_sequences: samples per prompt.
        return_dict: return a `ModelOutput`.
        use_cache: with a cache for the next turn.
        max_time_s: bound on the time of a sequence.
        stop_strings: texts that end a sequence as soon as one is complete.
        bos_token_id: the whole prompt of a call without one; None = there is no such token.
    """

    sampling: SamplingParams
    do_sample: bool
    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    min_length: int
    pad_token_id: int | None
    mask_pad_token: int | None
    num_return_sequences: int
    return_dict: bool
    use_cache: bool
    max_time_s: float | None
    stop_strings: tuple[str, ...]
    bos_token_id: int | None

    def seeing(self, row: npt.NDArray[np.int64], real: npt.NDArray[np.bool_]) -> GenerationSettings:
        """For one row of a batch: what looks for runs of tokens sees its padding, as in
        transformers, where padding behind it counts as padding before it.

        Args:
            row: `[tokens]`.
            real: `[tokens]`, False = padding.
        """
        if real.all() or not self.sampling.any_runs:
            return self
        behind = int(real[::-1].argmax())
        row, real = np.roll(row, behind), np.roll(real, behind)
        # an id of padding may be anything; no token is above these
        columns = np.where((row < 0) | (row > _MOST_PAD_ID), _MOST_PAD_ID, row)
        sampling = dataclasses.replace(
            self.sampling, columns=tuple(columns.tolist()), padding=int(real.argmax())
        )
        return dataclasses.replace(self, sampling=sampling)

    def check_padding(self, rows: int) -> None:
        """Refuse a batch whose shorter rows could only be filled with a token of the text.

        Raises:
            ConfigError: there is no pad token, and the rows may end one by one.
        """
        ends = self.sampling.eos_token_ids or self.stop_strings
        if rows > 1 and self.pad_token_id is None and ends:
            valid = "a token id to fill the rows with that end before others, as in transformers"
            raise ConfigError("pad_token_id", None, valid)

    def sampling_params(
        self, prompt_width: int, *, max_positions: int | None, seed: int, sample_index: int
    ) -> SamplingParams:
        """Parameters of one sequence.

        `prompt_width` counts the tokens of the input row with its padding, as HF does;
        `max_positions` of the model bounds the default length only.

        Raises:
            ConfigError: the input is as long as `max_length` or longer.
        """
        max_new, min_new = self.max_new_tokens, self.min_new_tokens
        if max_new is None:
            max_length = self.max_length
            if max_length is None:
                max_length = prompt_width + DEFAULT_MAX_NEW_TOKENS
                max_length = min(max_length, max_positions or max_length)
            max_new = max_length - prompt_width
            if max_new < 1:
                valid = f"more than the {prompt_width} tokens of the input; or set max_new_tokens"
                raise ConfigError("max_length", max_length, valid)
        if min_new is None:
            min_new = max(0, self.min_length - prompt_width)
        return dataclasses.replace(
            self.sampling,
            max_new_tokens=max_new,
            min_new_tokens=min(min_new, max_new),
            seed=seed,
            sample_index=sample_index,
        )


def draw_seed(seed: int | None, *, sampling: bool) -> int:
    """The call's seed: given, or one int64 of torch's default generator; 0 when not sampling."""
    if seed is not None:
        return check_integer("seed", seed, 0, valid="an integer from 0 to 2**63 - 1")
    if not sampling:
        return 0
    return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu"))


def translate(
    given: GenerationConfig | None,
    overrides: dict[str, Any],
    defaults: GenerationConfig,
    vocab_size: int = INT64_MAX + 1,
) -> GenerationSettings:
    """Merge, check and translate the settings of one call.

    Args:
        given: the caller's `generation_config`.
        overrides: the caller's keyword arguments; those that are no settings must have no effect.
        defaults: the model's generation config.
        vocab_size: token ids are below it.

    Raises:
        ConfigError: a value is invalid or not supported.
    """
    fields, rest = merge_settings(given, overrides, defaults)
    refuse_everywhere(fields, rest)
    refuse_arguments(rest)

    def integer(name: str, low: int, **limits: Any) -> Any:
        value = fields.get(name)
        return None if value is None else check_integer(name, value, low, **limits)

    def real(name: str, low: float, high: float = FLOAT32_MAX, **limits: Any) -> float:
        return check_real(name, fields[name], low, high, **limits)

    do_sample = check_flag("do_sample", fields["do_sample"])
    for name, value, neutral in _beyond_engine(fields):
        raise refusal(name, value, f"{neutral} in the engine loop; {_TAKES_OTHERS}")
    filters: dict[str, Any] = {}
    if do_sample:
        filters["temperature"] = real("temperature", 0, above=True)
        filters["top_k"] = integer("top_k", 0)
        filters["top_p"] = real("top_p", 0, 1)
        filters["min_p"] = real("min_p", 0, 1)
    else:
        _warn_ignored(given, overrides)
    samples = integer("num_return_sequences", 1)
    if samples > 1 and not do_sample:
        raise ConfigError("num_return_sequences", samples, "1, unless do_sample=True")
    eos = end_ids(fields, vocab_size)
    pad = integer("pad_token_id", 0, high=_MOST_PAD_ID)
    words = _sequences("bad_words_ids", fields.get("bad_words_ids"))
    sampling = SamplingParams(
        max_new_tokens=1,
        eos_token_ids=eos + token_ids("stop_token_ids", fields, vocab_size),
        logprobs=integer("logprobs", 0),
        sequence_bias=(*sequence_biases(fields), *logit_biases(fields, vocab_size)),
        # As in transformers, a bad word that is an end token alone is left out.
        bad_words_ids=tuple(w for w in words if len(w) > 1 or w[0] not in eos),
        suppress_tokens=token_ids("suppress_tokens", fields),
        begin_suppress_tokens=token_ids("begin_suppress_tokens", fields),
        repetition_penalty=real("repetition_penalty", 0, above=True),
        presence_penalty=real("presence_penalty", -FLOAT32_MAX),
        frequency_penalty=real("frequency_penalty", -FLOAT32_MAX),
        no_repeat_ngram_size=integer("no_repeat_ngram_size", 0),
        **filters,
    )
    return GenerationSettings(
        sampling=sampling,
        do_sample=do_sample,
        max_new_tokens=integer("max_new_tokens", 1),
        max_length=integer("max_length", 1),
        min_new_tokens=integer("min_new_tokens", 0),
        min_length=integer("min_length", 0),
        pad_token_id=pad if pad is not None else (eos[0] if eos else None),
        mask_pad_token=pad if pad not in eos else None,
        num_return_sequences=samples,
        return_dict=check_flag("return_dict_in_generate", fields["return_dict_in_generate"]),
        use_cache=fields.get("use_cache") is not False,
        max_time_s=None if fields.get("max_time") is None else real("max_time", 0, above=True),
        stop_strings=_texts("stop_strings", fields.get("stop_strings")),
        bos_token_id=integer("bos_token_id", 0),
    )


def needs_driver(
    given: GenerationConfig | None, overrides: dict[str, Any], defaults: GenerationConfig
) -> bool:
    """Whether a call asks for something that the engine loop does not do.

    Args:
        given, overrides, defaults: as in `translate`.

    Raises:
        ConfigError: neither loop does it.
    """
    fields, rest = merge_settings(given, overrides, defaults)
    refuse_everywhere(fields, rest)
    asked = any(k in DRIVER_ARGUMENTS and not _changes_nothing(k, v) for k, v in rest.items())
    return asked or any(True for _ in _beyond_engine(fields))


def prompts_to_score(
    inputs: Any,
    mask: Any,
    given: GenerationConfig | None,
    overrides: dict[str, Any],
    defaults: GenerationConfig,
) -> list[TokenIds]:
    """The tokens of each prompt whose log-probabilities a call asks for.

    Args:
        inputs, mask: of the call.
        given, overrides, defaults: as in `translate`.

    Raises:
        ConfigError: there are none, or the result could not hold them.
    """
    fields, _ = merge_settings(given, overrides, defaults)
    if fields["return_dict_in_generate"] is not True:
        raise ConfigError("prompt_logprobs", "given", "with return_dict_in_generate=True")
    pad, ends = fields.get("pad_token_id"), end_ids(fields)
    return split_rows(check_input_ids(inputs), mask, None if pad in ends else pad)


def merge_settings(
    given: GenerationConfig | None, overrides: dict[str, Any], defaults: GenerationConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All settings by name, and the arguments that are none.

    Args:
        given, overrides, defaults: as in `translate`.

    Raises:
        ConfigError: `given` is something else.
    """
    if given is not None and not isinstance(given, GenerationConfig):
        raise ConfigError("generation_config", given, "a transformers.GenerationConfig or None")

    # Not to_dict(): that copies deeply, and leaves out what does not serialise.
    fields = dict(vars(given if given is not None else GenerationConfig()))
    model = vars(defaults).items()
    fields |= {k: v for k, v in model if v is not None and fields.get(k) is None}
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    rest = {k: v for k, v in overrides.items() if k not in fields and k not in OWN_ARGUMENTS}
    fields |= {k: v for k, v in overrides.items() if k not in rest}
    fields |= {k: v for k, v in _DEFAULTS.items() if fields.get(k) is None}
    return fields, rest


def _warn_ignored(given: GenerationConfig | None, overrides: dict[str, Any]) -> None:
    """Only for what the caller set: models' own configs carry sampling settings for later."""
    ignored = []
    for name, neutral in _SAMPLING_ONLY.items():
        value = overrides.get(name, getattr(given, name, None))
        if value is not None and not (isinstance(value, (int, float)) and value == neutral):
            ignored.append(f"{name}={shown(value)}")
    if ignored:
        warnings.warn(
            f"{', '.join(ignored)} has no effect without do_sample=True", UserWarning, stacklevel=4
        )


def _beyond_engine(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Name and value of the settings that are not the engine loop's, and what is."""
    sampling = settings.get("do_sample") is True
    tables = (NEUTRAL_VALUES, NEUTRAL_WHEN_SAMPLING) if sampling else (NEUTRAL_VALUES,)
    for table in tables:
        for name, neutral in table.items():
            value = settings.get(name)
            if not any(value is n or (_comparable(value, n) and value == n) for n in neutral):
                yield name, value, " or ".join(repr(n) for n in neutral)


def by_name(others: Sequence[Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of transformers' `generate` behind `generation_config`, by name.

    Args:
        others: given by place.
        arguments: given by name.

    Raises:
        ConfigError: too many, or one in both ways.
    """
    if len(others) > len(BY_PLACE):
        what = f"{2 + len(others)} arguments by place"
        raise ConfigError("generate", what, f"at most {2 + len(BY_PLACE)}, others by name")
    named = dict(zip(BY_PLACE, others, strict=False))
    for name in named.keys() & arguments.keys():
        raise ConfigError(name, "given twice", "by place or by name")
    return named


def refuse_everywhere(settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Refuse what neither loop takes.

    Args:
        settings, arguments: of `merge_settings`.

    Raises:
        ConfigError: says what to do instead.
    """
    for name, value in arguments.items():
        if name in NEITHER_LOOP and not _changes_nothing(name, value):
            raise refusal(name, outline(value), "")
    for name, value, _ in _beyond_engine(settings):
        if name in NEITHER_LOOP:
            raise refusal(name, value, "")
    for name, (fits, valid) in WAYS_TO_COMPUTE.items():
        value = settings.get(name)
        if value is not None and not fits(value):
            raise ConfigError(name, value, valid)


def refusal(name: str, value: Any, valid: str) -> ConfigError:
    """The error of a setting or an argument; `valid` unless neither loop takes it."""
    return ConfigError(name, value, NEITHER_LOOP.get(name, valid))


def _comparable(value: Any, neutral: Any) -> bool:
    """A tensor is not, and 1 == True is a count for a switch."""
    plain = isinstance(value, (int, float, str))
    return plain and isinstance(value, bool) == isinstance(neutral, bool)


def refuse_arguments(arguments: Mapping[str, Any], *, forward: bool = False) -> None:
    """Refuse arguments that are neither settings nor inputs, unless they change nothing.

    Args:
        arguments: those that are left.
        forward: they are of a forward pass, not of `generate`.
    """
    for name, value in arguments.items():
        if _changes_nothing(name, value):
            continue
        if name in DRIVER_ARGUMENTS and not forward:
            raise ConfigError(
                f"generate({name}=...) is not supported by the engine loop; {_TAKES_OTHERS}"
            )
        # it may be a prompt under a wrong name
        valid = "an argument of generate or a field of GenerationConfig"
        if forward:
            valid = (
                "left out: a forward takes whole rows, and finds by itself what is cached of them"
            )
        raise refusal(name, outline(value), valid)


def _changes_nothing(name: str, value: Any) -> bool:
    """None, False, an empty list, or token types of a plain text."""
    if value is None or value is False:
        return True
    try:
        if hasattr(value, "any") and hasattr(value, "shape"):
            return name == "token_type_ids" and not bool(value.any())
        return hasattr(value, "__len__") and not isinstance(value, Cache) and len(value) == 0
    except Exception:  # a tensor without numbers, an object of the caller's
        return False


def sequence_biases(fields: Mapping[str, Any]) -> list[tuple[tuple[int, ...], float]]:
    """A dict from tuples of ids to biases, or a list of [ids, bias], as transformers takes both."""
    value = fields.get("sequence_bias")
    if value is None:
        return []
    pairs = list(value.items()) if isinstance(value, dict) else value
    fits = isinstance(pairs, (list, tuple)) and pairs
    if not fits or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        valid = "{(ids...): bias} or [[ids, bias], ...], not empty"
        raise ConfigError("sequence_bias", value, valid)
    sequences = _sequences("sequence_bias", [ids for ids, _ in pairs])
    # Of two biases for the same ids the later one counts, as in transformers.
    biases = [_bias("sequence_bias", bias) for _, bias in pairs]
    return list(dict(zip(sequences, biases, strict=True)).items())


def logit_biases(fields: Mapping[str, Any], vocab_size: int) -> list[tuple[tuple[int, ...], float]]:
    """A dict from ids below `vocab_size` to biases."""
    value = fields.get("logit_bias")
    if value is None:
        return []
    if not isinstance(value, Mapping):
        raise ConfigError("logit_bias", value, "{token id: bias}")
    ids = [(check_integer("logit_bias", token, 0, vocab_size - 1),) for token in value]
    return list(zip(ids, (_bias("logit_bias", bias) for bias in value.values()), strict=True))


def _bias(name: str, value: Any) -> float:
    if isinstance(value, float) and value == -math.inf:
        return value
    return check_real(name, value, -FLOAT32_MAX, valid="a finite number or -inf as bias")


def _sequences(name: str, value: Any) -> list[tuple[int, ...]]:
    if value is None:
        return []
    value = as_list(name, value)
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigError(name, value, "lists of token ids, at least one")
    for ids in value:
        if not isinstance(ids, (list, tuple)) or not ids:
            raise ConfigError(name, ids, "a list of at least one token id")
    return [tuple(check_integer(name, token, 0) for token in ids) for ids in value]


def token_ids(
    name: str, fields: Mapping[str, Any], vocab_size: int = INT64_MAX + 1
) -> tuple[int, ...]:
    """One token id below `vocab_size`, or several in a list, a tuple or a tensor; None = none."""
    value = fields.get(name)
    value = () if value is None else as_list(name, value)
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(check_integer(name, token, 0, vocab_size - 1) for token in values)


def end_ids(fields: Mapping[str, Any], vocab_size: int = INT64_MAX + 1) -> tuple[int, ...]:
    """`token_ids` of `eos_token_id`; -1 is no token, and so nothing ends, as in transformers."""
    value = fields.get("eos_token_id")
    if isinstance(value, np.ndarray):
        value = value.ravel().tolist()
    value = () if value is None else as_list("eos_token_id", value)
    values = value if isinstance(value, (list, tuple)) else [value]
    known = [each for each in values if not (isinstance(each, numbers.Integral) and each == -1)]
    return token_ids("eos_token_id", {"eos_token_id": known}, vocab_size)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    values = () if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) and v for v in values):
        raise ConfigError(name, value, "a text or a list of texts, none of them empty")
    return tuple(check_text(name, text) for text in values)
