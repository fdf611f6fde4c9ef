"""From Hugging Face's generation settings to `SamplingParams`.

The order is HF's: keyword arguments, then the given `GenerationConfig`, then the model's own, then
the library's defaults. Lengths count as in HF, where the padded width of the input is the prompt's
length. What the engine loop cannot do is refused here, before anything leaves the driver.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from litecache.adapter.logit_settings import OWN_ARGUMENTS, logit_rules
from litecache.adapter.refusals import refuse_arguments, refuse_settings
from litecache.adapter.values import (
    check_count,
    check_flag,
    check_number,
    check_text,
    check_token_ids,
)
from litecache.errors import ConfigError, shown
from litecache.types import LogitRules, SamplingParams

_DEFAULTS: dict[str, Any] = {
    "min_length": 0,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
}
_DEFAULT_MAX_NEW_TOKENS = 20
# Of what is counted or waited for; more of it makes no difference and may not fit elsewhere.
_MOST = 1 << 30
_SAMPLING_ONLY = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class GenerationSettings:
    """One call's settings, checked.

    Attributes:
        do_sample: draw instead of taking the likeliest token.
        temperature, top_k, top_p, min_p: as in `SamplingParams`; neutral when not sampling.
        max_new_tokens, max_length: the bound that applies; the other one is None.
        default_length: neither was given: 20 new tokens, at most the model's positions.
        min_new_tokens, min_length: the bound that applies; the other one is None or 0.
        eos_token_ids: any of these ends a sequence.
        pad_token_id: fills shorter rows; the first end token where there is none.
        mask_pad_token: without an attention mask this token of the input is taken for padding.
        num_return_sequences: samples per prompt.
        return_dict: return a `ModelOutput`.
        max_time_s: bound on the time of a sequence.
        rules: what changes logits before a token is drawn.
        logprobs: as in `SamplingParams`.
        stop_strings: texts that end a sequence as soon as one is complete.
    """

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    max_new_tokens: int | None
    max_length: int | None
    default_length: bool
    min_new_tokens: int | None
    min_length: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    mask_pad_token: int | None
    num_return_sequences: int
    return_dict: bool
    max_time_s: float | None
    rules: LogitRules
    logprobs: int | None
    stop_strings: tuple[str, ...]

    def check_padding(self, rows: int) -> None:
        """Refuse a batch whose shorter rows could only be filled with a token of the text.

        Raises:
            ConfigError: there is no pad token, and the rows may end one by one.
        """
        ends = self.eos_token_ids or self.stop_strings
        if rows > 1 and self.pad_token_id is None and ends:
            valid = "a token id to fill the rows with that end before others, as in transformers"
            raise ConfigError("pad_token_id", None, valid)

    def sampling_params(
        self, prompt_width: int, *, max_positions: int | None, seed: int, sample_index: int
    ) -> SamplingParams:
        """Parameters of one sequence.

        Args:
            prompt_width: tokens of the input row, padding included, as HF counts.
            max_positions: the model's `max_position_embeddings`; bounds the default length only.
            seed: of the whole call.
            sample_index: of the sequence in the call.

        Raises:
            ConfigError: the input is as long as `max_length` or longer.
        """
        if self.max_new_tokens is not None:
            max_new = self.max_new_tokens
        elif self.default_length:
            limit = prompt_width + _DEFAULT_MAX_NEW_TOKENS
            max_new = min(limit, max_positions or limit) - prompt_width
        else:
            assert self.max_length is not None
            max_new = self.max_length - prompt_width
        if max_new < 1:
            raise ConfigError(
                "max_length",
                prompt_width + max_new,
                f"more than the {prompt_width} tokens of the input; or set max_new_tokens",
            )
        if self.min_new_tokens is not None:
            min_new = self.min_new_tokens
        else:
            min_new = max(0, self.min_length - prompt_width)
        return SamplingParams(
            max_new_tokens=max_new,
            min_new_tokens=min(min_new, max_new),
            temperature=self.temperature if self.do_sample else 0.0,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=seed,
            sample_index=sample_index,
            eos_token_ids=self.eos_token_ids,
            logprobs=self.logprobs,
            **vars(self.rules),
        )


def draw_seed(seed: int | None, *, sampling: bool) -> int:
    """The call's seed: given, or one int64 of torch's default generator; 0 when not sampling."""
    if seed is not None:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise ConfigError("seed", seed, "an integer from 0 to 2**63 - 1")
        return seed
    if not sampling:
        return 0
    return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))


def translate(
    given: GenerationConfig | None, overrides: dict[str, Any], defaults: GenerationConfig
) -> GenerationSettings:
    """Merge, check and translate the settings of one call.

    Args:
        given: the caller's `generation_config`.
        overrides: the caller's keyword arguments; those that are no settings must have no effect.
        defaults: the model's generation config.

    Raises:
        ConfigError: a value is invalid or not supported.
    """
    own = {name: value for name, value in overrides.items() if name in OWN_ARGUMENTS}
    others = {name: value for name, value in overrides.items() if name not in OWN_ARGUMENTS}
    config, rest = _merge(given, others, defaults)
    refuse_arguments(rest)
    do_sample = check_flag("do_sample", config.do_sample)
    refuse_settings(_own_fields(config), sampling=do_sample)
    if not do_sample:
        _warn_ignored(given, overrides)
    samples = check_count("num_return_sequences", config.num_return_sequences, 1)
    if samples > 1 and not do_sample:
        raise ConfigError("num_return_sequences", samples, "1, unless do_sample=True")
    max_new, max_length = config.max_new_tokens, config.max_length
    min_new = config.min_new_tokens
    eos = check_token_ids("eos_token_id", config.eos_token_id)
    pad = (
        None if config.pad_token_id is None else check_count("pad_token_id", config.pad_token_id, 0)
    )
    if pad is not None and pad > _MOST:
        raise ConfigError("pad_token_id", pad, f"at most {_MOST}")
    max_time = config.max_time
    logprobs = own.get("logprobs")
    if max_time is not None:
        max_time = min(check_number("max_time", max_time, 0.0, math.inf, open_low=True), _MOST)
    return GenerationSettings(
        do_sample=do_sample,
        temperature=check_number("temperature", config.temperature, 0.0, math.inf, open_low=True)
        if do_sample
        else 0.0,
        top_k=min(check_count("top_k", _or_zero(config.top_k), 0), _MOST) if do_sample else 0,
        top_p=check_number("top_p", config.top_p, 0.0, 1.0) if do_sample else 1.0,
        min_p=check_number("min_p", _or_zero(config.min_p), 0.0, 1.0) if do_sample else 0.0,
        max_new_tokens=None if max_new is None else check_count("max_new_tokens", max_new, 1),
        max_length=None if max_length is None else check_count("max_length", max_length, 1),
        default_length=max_new is None and max_length is None,
        min_new_tokens=None if min_new is None else check_count("min_new_tokens", min_new, 0),
        min_length=check_count("min_length", config.min_length, 0),
        eos_token_ids=eos + check_token_ids("stop_token_ids", own.get("stop_token_ids")),
        pad_token_id=pad if pad is not None else (eos[0] if eos else None),
        mask_pad_token=pad if pad not in eos else None,
        num_return_sequences=samples,
        return_dict=check_flag("return_dict_in_generate", config.return_dict_in_generate),
        max_time_s=max_time,
        rules=logit_rules(vars(config), own, eos),
        logprobs=None if logprobs is None else check_count("logprobs", logprobs, 0),
        stop_strings=_texts("stop_strings", config.stop_strings),
    )


def _or_zero(value: Any) -> Any:
    return 0 if value is None else value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) and v for v in values):
        raise ConfigError(name, value, "a text or a list of texts, none of them empty")
    return tuple(check_text(name, text) for text in values)


def _own_fields(config: GenerationConfig) -> dict[str, Any]:
    # Not to_dict(): that copies deeply, and leaves out what does not serialise.
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def _merge(
    given: GenerationConfig | None, overrides: dict[str, Any], defaults: GenerationConfig
) -> tuple[GenerationConfig, dict[str, Any]]:
    if given is not None and not isinstance(given, GenerationConfig):
        raise ConfigError("generation_config", given, "a transformers.GenerationConfig or None")
    # Fields are set, what they hold is not changed: no deep copy, which takes longer than the rest.
    config = copy.copy(given) if given is not None else GenerationConfig()
    for source in (_own_fields(defaults), _DEFAULTS):
        for name, value in source.items():
            if value is not None and getattr(config, name, None) is None:
                setattr(config, name, value)
    rest: dict[str, Any] = {}
    for name, value in overrides.items():
        if not name.startswith("_") and name in vars(config):
            setattr(config, name, value)
        else:
            rest[name] = value
    # None as an argument means "not given" for a setting that must have a value.
    for name, value in _DEFAULTS.items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    return config, rest


def _warn_ignored(given: GenerationConfig | None, overrides: dict[str, Any]) -> None:
    """Only for what the caller set: models' own configs carry sampling settings for later."""
    ignored = []
    for name in _SAMPLING_ONLY:
        value = overrides.get(name, getattr(given, name, None))
        neutral = {"temperature": 1.0, "top_p": 1.0}.get(name)
        if value is not None and not (isinstance(value, (int, float)) and value == neutral):
            ignored.append(f"{name}={shown(value)}")
    if ignored:
        warnings.warn(
            f"{', '.join(ignored)} has no effect without do_sample=True", UserWarning, stacklevel=4
        )
