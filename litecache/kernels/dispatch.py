"""The one point that chooses who computes: Triton on a GPU, torch elsewhere.

`LITECACHE_KERNELS=reference|triton` forces a backend (`triton` on a CPU needs
`TRITON_INTERPRET=1`). Arguments are checked here, once for every backend; the backends trust them.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

from litecache.errors import KernelError
from litecache.kernels.checks import check_attention, check_copy, check_store
from litecache.kernels.metadata import AttentionMetadata

_BACKENDS = {
    "reference": "litecache.kernels.reference",
    "triton": "litecache.kernels.triton_backend",
}


def backend(device: torch.device) -> ModuleType:
    """The module that computes on `device`.

    Raises:
        KernelError: `LITECACHE_KERNELS` names no backend.
    """
    name = os.environ.get("LITECACHE_KERNELS") or (
        "triton" if device.type == "cuda" else "reference"
    )
    if name not in _BACKENDS:
        raise KernelError(f"LITECACHE_KERNELS={name!r} is invalid: one of {sorted(_BACKENDS)}")
    return importlib.import_module(_BACKENDS[name])


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Writes the step's keys and values of one layer into the pool.

    Args:
        key: `[T, kv_heads, k_dim]`, any strides with a contiguous last dimension.
        value: `[T, kv_heads, v_dim]`, likewise.
        k_cache: `[num_blocks, kv_heads, block_size, k_dim]`, a layer's view of the pool: float32,
            float16, bfloat16, or int8 / float8_e4m3fn, which are quantised on the way.
        v_cache: `[num_blocks, kv_heads, block_size, v_dim]`.
        slot_mapping: int64 `[T]`, `block * block_size + offset`. Slots are distinct, except those
            of the trash block, where any of the writers may win.
        k_scale: float32 `[num_blocks, kv_heads, block_size]` of a quantised pool, else None.
        v_scale: likewise.

    Raises:
        KernelError: naming the argument that is wrong.
    """
    check_store(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    if slot_mapping.shape[0]:
        backend(k_cache.device).store_kv(
            key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale
        )


def paged_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of packed queries over the paged KV of one layer.

    `store_kv` has already written the step's own tokens.

    Args:
        query: `[T, num_heads, k_dim]`, sequences of `metadata` one after the other.
        k_cache: `[num_blocks, kv_heads, block_size, k_dim]`; query head `h` reads KV head
            `h // (num_heads // kv_heads)`.
        v_cache: `[num_blocks, kv_heads, block_size, v_dim]`.
        metadata: the step; see `AttentionMetadata`.
        scale: factor of the scores.
        window: a key is visible iff `kpos > qpos - window`; None for all earlier keys.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma-2).
        sinks: `[num_heads]`, a logit per head that takes probability and has no value (gpt-oss).
        alibi_slopes: `[num_heads]`, adds `-slope * (qpos - kpos)` to the scores.
        key: the step's own keys `[T, kv_heads, k_dim]` as given to `store_kv`, so that a batch
            without prefixes need not read them back; optional.
        value: the step's own values, likewise.
        k_scale: float32 `[num_blocks, kv_heads, block_size]` of a quantised pool, else None.
        v_scale: likewise.
        out: `[T, num_heads, v_dim]` to write into; allocated when None.

    Returns:
        `[T, num_heads, v_dim]` in query's dtype; zeros for sequences of context length 0.

    Raises:
        KernelError: naming the argument that is wrong.
    """
    check_attention(
        query, k_cache, v_cache, metadata, window, softcap, sinks, alibi_slopes,
        key, value, k_scale, v_scale, out,
    )  # fmt: skip
    if query.shape[0] == 0:
        return query.new_empty(0, query.shape[1], v_cache.shape[3]) if out is None else out
    result: torch.Tensor = backend(query.device).paged_attention(
        query,
        k_cache,
        v_cache,
        metadata,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        key=key,
        value=value,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
    )
    return result


def copy_blocks(pool: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copies whole blocks inside a pool (copy-on-write).

    Args:
        pool: uint8 `[num_blocks, block_bytes]`, contiguous.
        src: int64 `[n]`, blocks to read; none of them is in `dst`.
        dst: int64 `[n]`, distinct blocks to write.

    Raises:
        KernelError: naming the argument that is wrong.
    """
    check_copy(pool, src, dst)
    if src.shape[0]:
        backend(pool.device).copy_blocks(pool, src, dst)
