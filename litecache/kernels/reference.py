"""The torch path: what runs on CPU, and the meaning of every kernel.

Attention gathers the visible blocks of a batch into a workspace laid out heads first
(`[kv_heads, seqs, tokens, dim]`, one memcpy per block and head) and hands it to torch's SDPA. For
decodes the query heads of a KV head are packed as rows, so that GQA expands nothing. Which blocks
and masks are involved depends on the step alone: `reference_plan` keeps that for all layers. A
caller that names its sequences spares a batch of decodes the gathering (`decode_copies`).
Softcap, sinks, ALiBi and a V dimension of its own take an explicit float32 softmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from litecache.kernels.decode_copies import SCRATCH, DecodeCopies
from litecache.kernels.metadata import AttentionMetadata
from litecache.kernels.quantise import quantise
from litecache.kernels.reference_plan import Task, plan_step


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Writes each token's key and value to its slot; see `litecache.kernels.store_kv`."""
    block_size = k_cache.shape[2]
    block = slot_mapping // block_size
    offset = slot_mapping - block * block_size
    for tokens, cache, scales in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        if scales is None:
            cache[block, :, offset] = tokens.to(cache.dtype)
        else:
            codes, scale = quantise(tokens, cache.dtype)
            # Not every torch has indexed fp8 writes; the bytes are what matters.
            cache.view(torch.uint8)[block, :, offset] = codes.view(torch.uint8)
            scales[block, :, offset] = scale


def copy_blocks(pool: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copies whole blocks; every source is read before any destination is written."""
    pool[dst] = pool[src]


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
    plan = plan_step(metadata, window)
    if plan.empty_rows.numel():
        out[plan.empty_rows] = 0
    plain = softcap is None and sinks is None and alibi_slopes is None
    plain = plain and v_cache.shape[3] == query.shape[2]
    # A quantised pool is read back even for this step's tokens: hit and miss see the same values.
    if key is not None and value is not None and plain and k_scale is None:
        direct = (key, value)
    else:
        direct = None
    for task in plan.tasks:
        if direct is not None and task.whole:
            _causal(query, direct[0], direct[1], task, scale, out)
            continue
        kept = None
        if direct is not None and key is not None and key.dtype == k_cache.dtype:
            kept = _kept_decodes(task, metadata, k_cache)
        if kept is not None and direct is not None:
            found = kept.extend(direct[0], direct[1])
            if found is not None:
                _decode(query, *found, task, scale, out, kept.equal)
                continue
        keys = task.gather(k_cache, k_scale, query.dtype, metadata.scratch, "keys")
        values = task.gather(v_cache, v_scale, query.dtype, metadata.scratch, "values")
        if kept is not None:
            kept.offer(keys, values)
        if not plain:
            _explicit(query, keys, values, task, scale, softcap, sinks, alibi_slopes, out)
        elif task.num_queries == 1:
            _decode(query, keys, values, task, scale, out)
        else:
            _prefill(query, keys, values, task, scale, out)
    return out


class _KeptDecodes(NamedTuple):
    """One layer's part of the copies that the caller keeps of a batch of decodes."""

    copies: DecodeCopies
    layer: int
    rows: slice | torch.Tensor
    lives: tuple[int, ...]
    contexts: tuple[int, ...]

    @property
    def equal(self) -> bool:
        """All sequences are equally long: nothing is hidden."""
        return min(self.contexts) == max(self.contexts)

    def extend(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `DecodeCopies.extend`."""
        new = (key[self.rows], value[self.rows])
        return self.copies.extend(self.layer, self.lives, self.contexts, *new)

    def offer(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `DecodeCopies.offer`."""
        self.copies.offer(self.layer, self.lives, self.contexts, keys, values)


def _kept_decodes(
    task: Task, metadata: AttentionMetadata, k_cache: torch.Tensor
) -> _KeptDecodes | None:
    """The copies for a task of whole decodes, None for any other, or when the caller keeps none."""
    found = metadata.scratch.get(SCRATCH)
    if found is None or task.num_queries != 1:
        return None
    copies, lives = found
    name = (SCRATCH, id(task))
    if name not in metadata.scratch:
        # Decodes come first, one query each: a row of the batch is the number of its sequence.
        members = task.token_rows[:, 0].tolist()
        contexts = tuple((metadata.context_lens_host or ())[seq] for seq in members)
        # Behind a window the gathered columns do not begin at the sequence's first token.
        whole = task.window is None or max(contexts) <= task.window
        metadata.scratch[name] = (tuple(lives[seq] for seq in members), contexts, whole)
    own, contexts, whole = metadata.scratch[name]
    if not whole:
        return None
    return _KeptDecodes(copies, k_cache.data_ptr(), task.tokens(), own, contexts)


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    task: Task,
    scale: float,
    out: torch.Tensor,
) -> None:
    """One sequence without a prefix: SDPA over the step's own keys, nothing gathered."""
    rows = task.tokens()
    q, k, v = (x[rows].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    heads = functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    out[rows] = heads[0].transpose(0, 1)


def _decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    task: Task,
    scale: float,
    out: torch.Tensor,
    all_visible: bool = False,
) -> None:
    """One query a sequence: KV heads become the batch, the query heads of each its rows."""
    kv_heads, num_seqs, num_keys, dim = keys.shape
    rows = task.tokens()
    packed = query[rows].view(num_seqs, kv_heads, -1, dim).transpose(0, 1)
    mask = None if all_visible else task.decode_mask(kv_heads, packed.shape[2], query.dtype)
    if mask is not None:
        mask = mask[..., :num_keys]
    heads = functional.scaled_dot_product_attention(packed, keys, values, mask, scale=scale)
    out[rows] = heads.transpose(0, 1).reshape(num_seqs, -1, dim)


def _prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    task: Task,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Several queries of one sequence over gathered keys."""
    rows = task.tokens()
    q = query[rows].transpose(0, 1).unsqueeze(0)
    result = out[rows] if isinstance(rows, slice) else out.new_empty(out[rows].shape)
    for part in task.query_slices(num_heads=1):
        mask = task.mask(part, query.dtype)
        heads = functional.scaled_dot_product_attention(
            q[:, :, part],
            keys.transpose(0, 1),
            values.transpose(0, 1),
            None if mask is None else mask.unsqueeze(1),
            scale=scale,
            enable_gqa=q.shape[1] != keys.shape[0],
        )
        result[part] = heads[0].transpose(0, 1)


def _explicit(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    task: Task,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Scores, cap, bias, mask, softmax and sum spelt out, in float32."""
    kv_heads, num_seqs = keys.shape[:2]
    num_heads = query.shape[1]
    group = num_heads // kv_heads
    k, v = keys.float(), values.float()
    for part in task.query_slices(num_heads):
        rows = task.token_rows[:, part]
        # [n, q, kv, g, d] -> [kv, n, g, q, d]
        q = query[rows].float().view(*rows.shape, kv_heads, group, -1).permute(2, 0, 3, 1, 4)
        scores = q.flatten(2, 3) @ k.transpose(2, 3)
        scores = scores.view(kv_heads, num_seqs, group, rows.shape[1], -1) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if alibi_slopes is not None:
            slopes = alibi_slopes.float().view(kv_heads, 1, group, 1, 1)
            scores = scores - slopes * task.distance(part).unsqueeze(1)
        mask = task.mask(part, torch.float32)
        if mask is not None:
            scores = scores + mask.unsqueeze(1)
        if sinks is not None:
            # A sink is a logit without a value: it takes probability and adds nothing.
            sink = sinks.float().view(kv_heads, 1, group, 1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.softmax(torch.cat((scores, sink), -1), -1)[..., :-1]
        else:
            weights = torch.softmax(scores, -1)
        heads = (weights.flatten(2, 3) @ v).view(*weights.shape[:-1], -1)
        heads = heads.permute(1, 3, 0, 2, 4).reshape(*rows.shape, num_heads, -1)
        out[rows] = heads.to(out.dtype)
