"""The GPU's half of `dispatch`: which Triton kernel attends which sequences of a step."""

from __future__ import annotations

from typing import Any

import torch
from triton import next_power_of_2

from litecache.kernels import library_prefill
from litecache.kernels.metadata import AttentionMetadata
from litecache.kernels.triton_decode import MAX_QUERIES, decode
from litecache.kernels.triton_prefill import prefill
from litecache.kernels.triton_store import copy_blocks, store_kv
from litecache.kernels.tuning import Shape, decode_config, prefill_config

__all__ = ["copy_blocks", "paged_attention", "store_kv"]

_MAX_DECODE_ROWS = 128
"""Queries times heads of a group that the decode kernel keeps in registers."""


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
    """Attention of packed queries over paged KV; see `litecache.kernels.paged_attention`."""
    group = query.shape[1] // k_cache.shape[1]
    dim, itemsize = max(k_cache.shape[3], v_cache.shape[3]), k_cache.dtype.itemsize
    decodes, queries = metadata.num_decodes, metadata.max_query_len
    short = queries <= MAX_QUERIES and queries * group <= _MAX_DECODE_ROWS
    extras: dict[str, Any] = {
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
    }
    scales: dict[str, Any] = {"scale": scale, "k_scale": k_scale, "v_scale": v_scale}
    rest = decodes < metadata.num_seqs
    by_library = (
        rest and not short and library_prefill.usable(query, v_cache, metadata, decodes, **extras)
    )
    if out is None and (decodes or not by_library):
        out = query.new_empty(query.shape[0], query.shape[1], v_cache.shape[3])
    # Sequences of one query and those of a few are two launches: rows cost registers.
    for seqs, most in ((slice(0, decodes), 1), (slice(decodes, metadata.num_seqs), queries)):
        if seqs.start == seqs.stop or (most > 1 and not short):
            continue
        assert out is not None
        rows = max(16, next_power_of_2(most * group))
        fp8 = k_cache.dtype == torch.float8_e4m3fn
        shape = Shape(itemsize, next_power_of_2(dim), group > 1, rows, fp8)
        config = decode_config(query.device, shape)
        decode(query, k_cache, v_cache, metadata, seqs, most, out, config, **extras, **scales)
    if by_library:
        return library_prefill.attend(
            query, k_cache, v_cache, metadata, decodes, out, key=key, value=value, **scales
        )
    assert out is not None
    if rest and not short:
        tile = prefill_config(query.device, dim, itemsize)
        prefill(query, k_cache, v_cache, metadata, decodes, out, tile, **extras, **scales)
    return out
