"""What an engine is: the facts its callers need, the keys of its blocks, what it accepts."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from litecache.checks import check_integer, check_real
from litecache.engine.kv_layout import LAYOUT_VERSION
from litecache.engine.request_checks import check_ids, check_sampling, check_text
from litecache.errors import CapacityError, ConfigError
from litecache.hashing import BlockKey, root_key
from litecache.storage.namespaces import label_of
from litecache.token_ids import TokenIds
from litecache.types import (
    CACHE_USES,
    MESSAGE_VERSION,
    RETENTIONS,
    Guidance,
    Request,
    mask_bytes,
)

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
        check_text("request_id", request.request_id)
        check_text("client_id", request.client_id)
        check_text("cache_salt", request.cache_salt, empty=True)
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
        check_text("request_id", guidance.request_id)
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
