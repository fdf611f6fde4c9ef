"""Attention in float64, one query and head at a time: slow, and plain enough to be believed."""

from __future__ import annotations

import math

import torch

from litecache.kernels import AttentionMetadata


def attend(
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
) -> torch.Tensor:
    """What `paged_attention` must return, in float64 on the CPU."""
    query, k_cache, v_cache = (x.detach().cpu().double() for x in (query, k_cache, v_cache))
    num_heads, group = query.shape[1], query.shape[1] // k_cache.shape[1]
    out = torch.zeros(query.shape[0], num_heads, v_cache.shape[3], dtype=torch.float64)
    starts = metadata.cu_seqlens_q.tolist()
    for seq, context in enumerate(metadata.context_lens.tolist()):
        table = metadata.block_tables[seq].tolist()
        first, end = starts[seq], starts[seq + 1]
        for row in range(first, end):
            position = context - (end - first) + row - first
            begin = 0 if window is None else max(0, position - window + 1)
            keys = range(begin, position + 1)
            if not keys:
                continue
            places = [(table[p // metadata.block_size], p % metadata.block_size) for p in keys]
            blocks = torch.tensor([block for block, _ in places])
            offsets = torch.tensor([offset for _, offset in places])
            for head in range(num_heads):
                k = k_cache[blocks, head // group, offsets]
                v = v_cache[blocks, head // group, offsets]
                scores = (k @ query[row, head]) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if alibi_slopes is not None:
                    distance = position - torch.tensor(list(keys), dtype=torch.float64)
                    scores = scores - float(alibi_slopes[head]) * distance
                sink = -math.inf if sinks is None else float(sinks[head])
                peak = max(float(scores.max()), sink)
                weights = torch.exp(scores - peak)
                out[row, head] = weights @ v / (weights.sum() + math.exp(sink - peak))
    return out
