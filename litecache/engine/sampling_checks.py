"""What sampling settings an engine accepts; whatever driver sent them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from litecache.errors import ConfigError
from litecache.types import LogitRules, SamplingParams


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Refuse settings that no step could honour.

    Args:
        sampling: of one request.
        vocab_size: token ids are below it.

    Raises:
        ConfigError: names the first bad field, its value and what is valid.
    """
    if not sampling.temperature >= 0:
        raise ConfigError("temperature", sampling.temperature, "0 (greedy) or positive")
    if not 0 < sampling.top_p <= 1:
        raise ConfigError("top_p", sampling.top_p, "a number in (0, 1]")
    if not 0 <= sampling.min_p <= 1:
        raise ConfigError("min_p", sampling.min_p, "a number in [0, 1]")
    if sampling.top_k < 0:
        raise ConfigError("top_k", sampling.top_k, "0 (off) or positive")
    count = sampling.logprobs
    if count is not None and not 0 <= count <= vocab_size:
        raise ConfigError("logprobs", count, f"None, or from 0 to {vocab_size}")
    _check_rules(sampling, vocab_size)


def _check_rules(rules: LogitRules, vocab_size: int) -> None:
    penalty = rules.repetition_penalty
    if not (penalty > 0 and math.isfinite(penalty)):
        raise ConfigError("repetition_penalty", penalty, "a positive finite number")
    for name in ("presence_penalty", "frequency_penalty"):
        if not math.isfinite(getattr(rules, name)):
            raise ConfigError(name, getattr(rules, name), "a finite number")
    if rules.no_repeat_ngram_size < 0:
        raise ConfigError("no_repeat_ngram_size", rules.no_repeat_ngram_size, "0 (off) or positive")
    for ids, bias in rules.sequence_bias:
        if math.isnan(bias) or bias == math.inf:
            raise ConfigError("sequence_bias", bias, "a finite number or -inf")
        _check_ids("sequence_bias", ids, vocab_size)
    for ids in rules.bad_words_ids:
        _check_ids("bad_words_ids", ids, vocab_size)
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        for token in getattr(rules, name):
            _check_ids(name, (token,), vocab_size)
    forbidden = set(rules.suppress_tokens)
    forbidden |= {ids[0] for ids in rules.bad_words_ids if len(ids) == 1}
    if len(forbidden) >= vocab_size:
        raise ConfigError("suppress_tokens", len(forbidden), f"fewer than all {vocab_size} tokens")


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    ids = tuple(ids)
    if not ids:
        raise ConfigError(name, ids, "at least one token id")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ConfigError(name, token, f"token ids from 0 to {vocab_size - 1}")
