"""The GPU's half of `dispatch`: which Triton kernel attends which sequences of a step."""

from __future__ import annotations

from typing import Any

import torch

from litecache.kernels.metadata import AttentionMetadata
from litecache.kernels.triton_decode import MAX_QUERIES, decode
from litecache.kernels.triton_prefill import prefill
from litecache.kernels.triton_store import copy_blocks, store_kv
from litecache.kernels.tuning import decode_config, prefill_config

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
    if out is None:
        out = query.new_empty(query.shape[0], query.shape[1], v_cache.shape[3])
    group = query.shape[1] // k_cache.shape[1]
    dim, itemsize = max(k_cache.shape[3], v_cache.shape[3]), k_cache.dtype.itemsize
    short = metadata.max_query_len <= MAX_QUERIES
    if short and metadata.max_query_len * group <= _MAX_DECODE_ROWS:
        decodes = metadata.num_seqs
    else:
        decodes = metadata.num_decodes
    extras: dict[str, Any] = {
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    if decodes:
        config = decode_config(query.device, dim, itemsize)
        decode(query, k_cache, v_cache, metadata, decodes, out, config, **extras)
    if decodes < metadata.num_seqs:
        tile = prefill_config(query.device, dim, itemsize)
        prefill(query, k_cache, v_cache, metadata, decodes, out, tile, **extras)
    return out
