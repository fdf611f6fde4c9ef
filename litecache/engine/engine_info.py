"""What an engine tells its callers: limits, shapes and the keys of its blocks; and what it accepts.

A message may come from anybody who can reach the engine: every field is checked, its type first,
so that nothing later can raise on it or index a tensor with it.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from litecache.checks import FLOAT32_MAX, INT64_MAX, check_integer, check_real, check_text
from litecache.engine.kv_layout import LAYOUT_VERSION, KVLayout
from litecache.errors import CapacityError, ConfigError
from litecache.hashing import BlockKey, root_key
from litecache.storage.namespaces import label_of
from litecache.token_ids import TokenIds
from litecache.types import (
    CACHE_USES,
    MESSAGE_VERSION,
    RETENTIONS,
    Guidance,
    LogitRules,
    Request,
    SamplingParams,
    mask_bytes,
)

if TYPE_CHECKING:
    from litecache.config import CacheConfig
    from litecache.engine.loading.model_loader import LoadedModel
    from litecache.engine.loading.model_source import ModelSource

MAX_PRIORITY = 1 << 31
MAX_LOGITS_BYTES = 32 << 20
"""Of one request's logits in float32; half of what a frame between processes may hold."""


@dataclass(frozen=True)
class EngineInfo:
    """Facts of a running engine, fixed for its life.

    Attributes:
        model: name for people.
        fingerprint: digest of the model's config and all its weights.
        dtype, kv_dtype: of activations and of the pool, by name.
        tier_codec: dtype of the blocks in the lower tiers; None = that of the pool.
        device: "cpu" or "cuda:N".
        block_size: tokens per block.
        num_blocks: blocks per KV group, the trash block not counted.
        group_shapes: one text per KV group (layers, heads, dims, window): part of its keys.
        block_bytes: of a block in the lower tiers, per KV group.
        max_model_len: longest sequence in tokens.
        max_requests, max_batch_tokens: limits of a step.
        vocab_size: valid token ids are below it.
        num_threads: of torch on CPU.
        attention: "paged" or "gathered", see `LoadedModel`.
    """

    model: str
    fingerprint: str
    dtype: str
    kv_dtype: str
    device: str
    block_size: int
    num_blocks: int
    group_shapes: tuple[str, ...]
    block_bytes: tuple[int, ...]
    max_model_len: int
    max_requests: int
    max_batch_tokens: int
    vocab_size: int
    num_threads: int
    tier_codec: str | None = None
    attention: str = "paged"

    @classmethod
    def of(
        cls,
        source: ModelSource,
        config: CacheConfig,
        loaded: LoadedModel,
        layout: KVLayout,
        num_blocks: int,
        num_threads: int,
    ) -> EngineInfo:
        """Of a model that was loaded, with a pool of `num_blocks`."""
        shapes = tuple(
            f"layers={group.layers} spec={group.spec} bytes={group.block_bytes}"
            for group in layout.groups
        )
        return cls(
            model=source.name,
            fingerprint=loaded.fingerprint,
            dtype=str(loaded.dtype).removeprefix("torch."),
            kv_dtype=layout.groups[0].spec.dtype,
            device=str(loaded.device),
            block_size=config.block_size,
            num_blocks=num_blocks,
            group_shapes=shapes,
            block_bytes=tuple(group.tier_bytes for group in layout.groups),
            max_model_len=loaded.max_model_len,
            max_requests=config.max_requests,
            max_batch_tokens=config.max_batch_tokens,
            vocab_size=loaded.vocab_size,
            num_threads=num_threads,
            tier_codec=config.tier_codec,
            attention=loaded.attention,
        )

    @property
    def capacity_tokens(self) -> int:
        """Tokens of one KV group's pool."""
        return self.num_blocks * self.block_size

    @property
    def max_logits(self) -> int:
        """Positions whose logits one request may ask for: a reply holds them all."""
        return max(1, MAX_LOGITS_BYTES // (4 * self.vocab_size))

    @property
    def label(self) -> str:
        """Readable name of what the blocks belong to."""
        form = f"{self.kv_dtype}:{self.tier_codec}" if self.tier_codec else self.kv_dtype
        details = f"@{self.fingerprint[:12]}/{form}/{self.block_size}"
        return label_of(self.model, details)

    def roots(self, cache_salt: str) -> tuple[BlockKey, ...]:
        """Root key of every KV group: all that changes KV bytes goes into it."""
        return _roots(self, cache_salt)

    def check(self, request: Request) -> None:
        """Refuse a request that cannot be served, before anything is queued.

        Raises:
            ConfigError: a field of a wrong type or out of range, an empty prompt.
            CapacityError: longer than the model or the pool can ever hold.
        """
        if not isinstance(request, Request):
            raise ConfigError("request", request, "a litecache.types.Request")
        check_integer("version", request.version, MESSAGE_VERSION, MESSAGE_VERSION)
        check_short_text("request_id", request.request_id)
        check_short_text("client_id", request.client_id)
        check_short_text("cache_salt", request.cache_salt, empty=True)
        for name, valid in (("cache", CACHE_USES), ("retention", RETENTIONS)):
            value = getattr(request, name)
            if not isinstance(value, str) or value not in valid:
                raise ConfigError(name, value, f"one of {', '.join(valid)}")
        check_integer("expires_s", request.expires_s, 0, (1 << 32) - 1)
        check_integer("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if request.max_time_s is not None:
            check_real("max_time", request.max_time_s, 0, above=True)
        self._check_prompt(request.prompt)
        check_integer("logits", request.logits, 0, len(request.prompt))
        check_sampling(request.sampling, self.vocab_size, draws=not request.logits)
        if request.logits and request.sampling.logprobs is None:
            check_integer("logits", request.logits, 0, self.max_logits)
        if request.mask is not None:
            check_integer("logits", request.logits, 0, 0, valid="0 for a guided request")
            self._check_mask(request.mask)
        resumed = request.num_resumed_tokens
        most = 0 if request.logits else len(request.prompt) - 1
        check_integer("num_resumed_tokens", resumed, 0, most)
        columns = len(request.sampling.columns)
        if columns and not len(request.prompt) - resumed <= columns <= self.max_model_len:
            fits = f"at most {self.max_model_len} with padding, where rules look at runs of tokens"
            raise ConfigError("input_ids", f"{columns} columns", fits)
        new = request.sampling.max_new_tokens - resumed
        if new < 1 and not request.logits:
            raise ConfigError("max_new_tokens", request.sampling.max_new_tokens, "at least 1")
        total = len(request.prompt) + new
        if total > self.max_model_len:
            raise CapacityError(
                f"prompt of {len(request.prompt)} tokens + max_new_tokens={new} is {total} tokens: "
                f"the model takes {self.max_model_len}"
            )
        if total > self.capacity_tokens:
            raise CapacityError(
                f"prompt of {len(request.prompt)} tokens + max_new_tokens={new} is {total} tokens: "
                f"the pool holds {self.capacity_tokens} ({self.num_blocks} blocks of "
                f"{self.block_size}); raise num_blocks or gpu_memory_fraction"
            )

    def check_guidance(self, guidance: Guidance) -> None:
        """Refuse what no guided request could go on by.

        Raises:
            ConfigError: a field of a wrong type or out of range.
        """
        if not isinstance(guidance, Guidance):
            raise ConfigError("guidance", guidance, "a litecache.types.Guidance")
        check_short_text("request_id", guidance.request_id)
        check_integer("num_tokens", guidance.num_tokens, 1)
        check_ids("token_ids", guidance.token_ids, self.vocab_size)
        if guidance.mask != b"":
            self._check_mask(guidance.mask)

    def _check_mask(self, mask: bytes) -> None:
        size = mask_bytes(self.vocab_size)
        if not isinstance(mask, bytes) or len(mask) != size or not any(mask):
            shown = len(mask) if isinstance(mask, bytes) else type(mask).__name__
            raise ConfigError("mask", shown, f"{size} bytes, of which one allows a token")

    def _check_prompt(self, prompt: TokenIds) -> None:
        if not isinstance(prompt, TokenIds):
            raise ConfigError("input_ids", type(prompt).__name__, "TokenIds")
        if not prompt:
            raise ConfigError("input_ids", [], "at least one token")
        low, high = int(prompt.array.min()), int(prompt.array.max())
        if low < 0 or high >= self.vocab_size:
            value = low if low < 0 else high
            raise ConfigError("input_ids", value, f"token ids from 0 to {self.vocab_size - 1}")


@functools.lru_cache(maxsize=1024)
def _roots(info: EngineInfo, cache_salt: str) -> tuple[BlockKey, ...]:
    return tuple(
        root_key(
            {
                "fingerprint": info.fingerprint,
                "dtype": info.dtype,
                "kv_dtype": info.kv_dtype,
                "codec": info.tier_codec or "raw",
                "layout": LAYOUT_VERSION,
                "block_size": info.block_size,
                "group": group,
                "shape": shape,
                "adapter": None,
                "tp": (1, 0),
                "salt": cache_salt,
            }
        )
        for group, shape in enumerate(info.group_shapes)
    )


MAX_TEXT = 4096
MAX_RULE_TOKENS = 1 << 22
"""Of all biased and forbidden sequences of a request, each as long as the longest."""


def check_short_text(name: str, value: Any, *, empty: bool = False) -> None:
    """Refuse what is no text, or one that cannot be hashed and sent as UTF-8."""
    least = 0 if empty else 1
    valid = f"a text of {least} to {MAX_TEXT} characters"
    if not least <= len(check_text(name, value, valid)) <= MAX_TEXT:
        raise ConfigError(name, value, valid)


def check_texts(name: str, values: Any) -> list[str]:
    """Refuse what is no list of non-empty texts; a single text is none."""
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, set, frozenset)):
        raise ConfigError(name, values, "a list of texts")
    for value in values:
        check_short_text(name, value)
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
    check_ids("columns", rules.columns, 1 << 31)
    check_integer("padding", rules.padding, 0, len(rules.columns))
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
