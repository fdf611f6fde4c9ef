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


def attend_wide(
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
    """`attend` with heads and queries at once, for contexts the plain one is too slow for."""
    device = query.device
    kv_heads = k_cache.shape[1]
    out = torch.zeros(*query.shape[:2], v_cache.shape[3], dtype=torch.float64, device=device)
    starts = metadata.cu_seqlens_q.tolist()
    for seq, context in enumerate(metadata.context_lens.tolist()):
        first, end = starts[seq], starts[seq + 1]
        if context == 0 or first == end:
            continue
        blocks = metadata.block_tables[seq, : -(-context // metadata.block_size)].long().cpu()
        k, v = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context].to(device).double()
            for cache in (k_cache, v_cache)
        )
        positions = torch.arange(context - end + first, context, device=device)
        distance = positions[:, None] - torch.arange(context, device=device)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        unseen = hidden.all(0)
        k, v = k.masked_fill(unseen[:, None], 0), v.masked_fill(unseen[:, None], 0)
        q = query[first:end].double().unflatten(1, (kv_heads, -1))
        scores = torch.einsum("qhgd,hkd->hgqk", q, k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            slopes = alibi_slopes.double().view(kv_heads, -1, 1, 1)
            scores = scores - slopes * distance
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            sink = sinks.double().view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sink), -1)
        weights = torch.softmax(scores, -1)[..., :context]
        out[first:end] = torch.einsum("hgqk,hkd->qhgd", weights, v).flatten(1, 2)
    return out.cpu()
