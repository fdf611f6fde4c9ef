"""The torch path: what runs on CPU, and the meaning of every kernel.

Attention gathers the visible blocks of a batch into a workspace laid out heads first
(`[kv_heads, seqs, tokens, dim]`, one memcpy per block and head) and hands it to torch's SDPA. For
decodes the query heads of a KV head are packed as rows, so that GQA expands nothing. Which blocks
and masks are involved depends on the step alone: a plan keeps that for all layers; decodes of
similar length form one vectorised task of it, a longer run of queries is a task of its own. A
caller that names its sequences spares a batch of decodes the gathering (`decode_copies`).
Softcap, sinks, ALiBi and a V dimension of its own take an explicit float32 softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

from litecache.kernels.metadata import Attention, AttentionMetadata, Geometry
from litecache.kernels.quantise import dequantise, quantise

WORTHWHILE_PADDING = 0.75
"""A sequence joins a longer one's task when it has at least this share of its blocks."""
_MASK_ELEMENTS = 1 << 24
"""Largest mask or score matrix of one slice of queries."""


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


def plan_attention(metadata: AttentionMetadata, geometry: Geometry) -> ReferencePlan:
    """The step's tasks; see `litecache.kernels.plan_attention`."""
    return ReferencePlan(metadata, geometry.window)


class ReferencePlan:
    """The tasks of a step for one window, and the workspaces that layers lend each other.

    Args:
        metadata: the step.
        window: sliding window of the layers, None for full attention.
    """

    def __init__(self, metadata: AttentionMetadata, window: int | None) -> None:
        self.metadata = metadata
        self.tasks, self._empty_rows = _make_tasks(metadata, window)
        self._spaces: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def attend(self, layer: Attention) -> torch.Tensor:
        """Attention of one layer; see `litecache.kernels.paged_attention`."""
        out = layer.output()
        if self._empty_rows.numel():
            out[self._empty_rows] = 0
        query, key, value = layer.query, layer.key, layer.value
        plain = layer.bare and layer.v_cache.shape[3] == query.shape[2]
        # A quantised pool is read back even for this step's tokens: hit and miss see the same.
        at_hand = plain and layer.k_scale is None
        for task in self.tasks:
            rows, copies = task.rows, None
            if at_hand and key is not None and value is not None:
                if task.whole:
                    out[rows] = _causal(query[rows], key[rows], value[rows], layer.scale)
                    continue
                if task.lives and key.dtype == layer.k_cache.dtype:
                    copies = self.metadata.copies
            batch = (layer.k_cache.data_ptr(), task.lives, task.contexts)
            if copies is not None and key is not None and value is not None:
                found = copies.extend(*batch, key[rows], value[rows])
                if found is not None:
                    equal = min(task.contexts) == max(task.contexts)
                    _decode(layer, *found, task, out, all_visible=equal)
                    continue
            keys = task.gather(layer.k_cache, layer.k_scale, query.dtype, self._spaces, "keys")
            values = task.gather(layer.v_cache, layer.v_scale, query.dtype, self._spaces, "values")
            if copies is not None:
                copies.offer(*batch, keys, values)
            if not plain:
                _explicit(layer, keys, values, task, out)
            elif task.num_queries == 1:
                _decode(layer, keys, values, task, out)
            else:
                _prefill(layer, keys, values, task, out)
        return out


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """One sequence without a prefix: SDPA over the step's own keys, nothing gathered."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    heads = functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return heads[0].transpose(0, 1)


def _decode(
    layer: Attention,
    keys: torch.Tensor,
    values: torch.Tensor,
    task: Task,
    out: torch.Tensor,
    all_visible: bool = False,
) -> None:
    """One query a sequence: KV heads become the batch, the query heads of each its rows."""
    kv_heads, num_seqs, num_keys, dim = keys.shape
    query = layer.query
    packed = query[task.rows].view(num_seqs, kv_heads, -1, dim).transpose(0, 1)
    mask = None if all_visible else task.decode_mask(kv_heads, packed.shape[2], query.dtype)
    if mask is not None:
        mask = mask[..., :num_keys]
    heads = functional.scaled_dot_product_attention(packed, keys, values, mask, scale=layer.scale)
    out[task.rows] = heads.transpose(0, 1).reshape(num_seqs, -1, dim)


def _prefill(
    layer: Attention, keys: torch.Tensor, values: torch.Tensor, task: Task, out: torch.Tensor
) -> None:
    """Several queries of one sequence over gathered keys."""
    q = layer.query[task.rows].transpose(0, 1).unsqueeze(0)
    result = out[task.rows]
    for part in task.query_slices(num_heads=1):
        mask = task.mask(part, q.dtype)
        heads = functional.scaled_dot_product_attention(
            q[:, :, part],
            keys.transpose(0, 1),
            values.transpose(0, 1),
            None if mask is None else mask.unsqueeze(1),
            scale=layer.scale,
            enable_gqa=q.shape[1] != keys.shape[0],
        )
        result[part] = heads[0].transpose(0, 1)


def _explicit(
    layer: Attention, keys: torch.Tensor, values: torch.Tensor, task: Task, out: torch.Tensor
) -> None:
    """Scores, cap, bias, mask, softmax and sum spelt out, in float32."""
    kv_heads, num_seqs = keys.shape[:2]
    num_heads = layer.query.shape[1]
    group = num_heads // kv_heads
    k, v = keys.float(), values.float()
    for part in task.query_slices(num_heads):
        rows = task.token_rows[:, part]
        # [n, q, kv, g, d] -> [kv, n, g, q, d]
        q = layer.query[rows].float().view(*rows.shape, kv_heads, group, -1).permute(2, 0, 3, 1, 4)
        scores = q.flatten(2, 3) @ k.transpose(2, 3)
        scores = scores.view(kv_heads, num_seqs, group, rows.shape[1], -1) * layer.scale
        if layer.softcap is not None:
            scores = torch.tanh(scores / layer.softcap) * layer.softcap
        if layer.alibi_slopes is not None:
            slopes = layer.alibi_slopes.float().view(kv_heads, 1, group, 1, 1)
            scores = scores - slopes * task.distance(part).unsqueeze(1)
        mask = task.mask(part, torch.float32)
        if mask is not None:
            scores = scores + mask.unsqueeze(1)
        if layer.sinks is not None:
            # A sink is a logit without a value: it takes probability and adds nothing.
            sink = layer.sinks.float().view(kv_heads, 1, group, 1, 1)
            sink = sink.expand(*scores.shape[:-1], 1)
            weights = torch.softmax(torch.cat((scores, sink), -1), -1)[..., :-1]
        else:
            weights = torch.softmax(scores, -1)
        heads = (weights.flatten(2, 3) @ v).view(*weights.shape[:-1], -1)
        heads = heads.permute(1, 3, 0, 2, 4).reshape(*rows.shape, num_heads, -1)
        out[rows] = heads.to(out.dtype)


@dataclass
class Task:
    """Sequences with the same number of queries, gathered and attended together.

    Positions are relative: column `j` of the gathered tokens is absolute position
    `first_block * block_size + j` of its sequence.

    Attributes:
        token_rows: where the queries lie in the packed batch, int64 `[n, q]`.
        whole: one sequence all of whose visible tokens are of this step.
        blocks: blocks to gather, int64 `[n, num_blocks]`.
        first_key: first visible column, int64 `[n]`.
        end_key: one past the last visible column, int64 `[n]`.
        window: sliding window, None for full attention.
        block_size: tokens a block holds.
        contexts: visible tokens of each sequence.
        lives: of decodes whose gathered keys begin at their first token: the sequences' lives.
    """

    token_rows: torch.Tensor
    whole: bool
    blocks: torch.Tensor
    first_key: torch.Tensor
    end_key: torch.Tensor
    window: int | None
    block_size: int
    contexts: tuple[int, ...]
    lives: tuple[int, ...]
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Masks and indices by what they were made for: the first layer makes them."""

    @property
    def num_seqs(self) -> int:
        """Sequences of the task."""
        return self.token_rows.shape[0]

    @property
    def num_queries(self) -> int:
        """Queries of each sequence."""
        return self.token_rows.shape[1]

    @property
    def num_keys(self) -> int:
        """Columns gathered for each sequence, invisible ones included."""
        return self.blocks.shape[1] * self.block_size

    @cached_property
    def rows(self) -> slice | torch.Tensor:
        """The task's rows of the packed batch: a slice where they are neighbours."""
        rows = self.token_rows.reshape(-1)
        first, count = int(rows[0]), rows.numel()
        neighbours = bool((rows == torch.arange(first, first + count)).all())
        return slice(first, first + count) if neighbours else rows

    def query_slices(self, num_heads: int) -> Iterator[slice]:
        """Cuts the queries so that no score matrix of a slice grows beyond bound."""
        per_query = max(1, self.num_seqs * self.num_keys * num_heads)
        step = max(1, _MASK_ELEMENTS // per_query)
        for start in range(0, self.num_queries, step):
            yield slice(start, min(start + step, self.num_queries))

    def distance(self, queries: slice) -> torch.Tensor:
        """How far each key lies before each query, int64 `[n, q, keys]`; negative is ahead."""
        ends = self.end_key.view(-1, 1, 1) - self.num_queries
        position = ends + torch.arange(queries.start, queries.stop).view(1, -1, 1)
        return position - torch.arange(self.num_keys).view(1, 1, -1)

    def mask(self, queries: slice, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive mask `[n, q, keys]` (0 or -inf), None where every key is visible."""
        name = ("mask", queries.start, queries.stop, dtype)
        if name not in self._made:
            distance = self.distance(queries)
            hidden = distance < 0
            if self.window is not None:
                hidden |= distance >= self.window
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
            self._made[name] = mask if bool(hidden.any()) else None
        found: torch.Tensor | None = self._made[name]
        return found

    def decode_mask(self, kv_heads: int, group: int, dtype: torch.dtype) -> torch.Tensor | None:
        """`mask` of a task with one query, as `[kv_heads, n, group, keys]`.

        Spelt out: SDPA takes twice the time over a mask that is broadcast.
        """
        name = ("decode_mask", kv_heads, group, dtype)
        if name not in self._made:
            mask = self.mask(slice(0, 1), dtype)
            if mask is not None:
                mask = mask.unsqueeze(0).repeat(kv_heads, 1, group, 1)
            self._made[name] = mask
        found: torch.Tensor | None = self._made[name]
        return found

    def gather(
        self,
        cache: torch.Tensor,
        scale: torch.Tensor | None,
        dtype: torch.dtype,
        spaces: dict[tuple[str, torch.dtype], torch.Tensor],
        name: str,
    ) -> torch.Tensor:
        """Copies the task's blocks out of a strided layer view.

        Args:
            cache: `[num_blocks, kv_heads, block_size, dim]`, a view of the pool.
            scale: float32 `[num_blocks, kv_heads, block_size]` of a quantised pool.
            dtype: of the result.
            spaces: flat buffers that all layers reuse: fresh large ones cost a fault a page.
            name: of the buffer to use; keys and values need one each.

        Returns:
            `[kv_heads, n, keys, dim]`; what no query of the sequence may see is zero, so that
            garbage in unused slots cannot reach a sum as `0 * NaN`.
        """
        kv_heads, dim = cache.shape[1], cache.shape[3]
        unit, index = self._row_index(cache)
        rows = cache.as_strided(
            ((cache.shape[0] - 1) * cache.stride(0) // unit
             + (kv_heads - 1) * cache.stride(1) // unit + 1, self.block_size * dim),
            (unit, 1),
        )  # fmt: skip
        if cache.dtype.itemsize == 1:
            rows = rows.view(torch.uint8)
        count, width = index.numel(), self.block_size * dim
        space = spaces.get((name, rows.dtype))
        if space is None or space.numel() < count * width:
            space = spaces[name, rows.dtype] = torch.empty(count * width, dtype=rows.dtype)
        gathered = space[: count * width].view(count, width)
        torch.index_select(rows, 0, index, out=gathered)
        tokens = gathered.view(cache.dtype).view(kv_heads, self.num_seqs, self.num_keys, dim)
        if scale is not None:
            scales = scale[self.blocks].permute(2, 0, 1, 3)
            tokens = dequantise(tokens, scales.reshape(tokens.shape[:3]), dtype)
        elif tokens.dtype != dtype:
            tokens = tokens.to(dtype)
        if self._hidden.numel():
            tokens.view(kv_heads, -1, dim).index_fill_(1, self._hidden, 0)
        return tokens

    def _row_index(self, cache: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Rows of `block_size * dim` elements to fetch, in units that divide both strides."""
        block_stride, head_stride = cache.stride(0), cache.stride(1)
        name = ("rows", block_stride, head_stride, cache.shape[1])
        if name not in self._made:
            unit = math.gcd(block_stride, head_stride)
            heads = torch.arange(cache.shape[1]).view(-1, 1, 1) * (head_stride // unit)
            index = heads + self.blocks * (block_stride // unit)
            self._made[name] = (unit, index.reshape(-1))
        found: tuple[int, torch.Tensor] = self._made[name]
        return found

    @cached_property
    def _hidden(self) -> torch.Tensor:
        """Flat `[n * keys]` columns that belong to no visible token of their sequence."""
        column = torch.arange(self.num_keys)
        hidden = (column < self.first_key.view(-1, 1)) | (column >= self.end_key.view(-1, 1))
        return hidden.view(-1).nonzero().view(-1)


def _make_tasks(metadata: AttentionMetadata, window: int | None) -> tuple[list[Task], torch.Tensor]:
    """The tasks of a step, and the rows of the packed batch that see nothing."""
    starts = metadata.cu_seqlens_q.tolist()
    query_lens, contexts = metadata.query_lens, metadata.context_lens_host
    if query_lens is None:
        query_lens = tuple(end - start for start, end in pairwise(starts))
    if contexts is None:
        contexts = tuple(metadata.context_lens.tolist())
    rows = [range(start, start + count) for start, count in zip(starts, query_lens, strict=False)]
    empty = [row for own, context in zip(rows, contexts, strict=True) if not context for row in own]
    first_visible = [
        0 if window is None else max(0, context - queries + 1 - window)
        for queries, context in zip(query_lens, contexts, strict=True)
    ]
    size = metadata.block_size
    spans = {
        seq: -(-contexts[seq] // size) - first_visible[seq] // size
        for seq, queries in enumerate(query_lens)
        if queries and contexts[seq]
    }
    tasks = []
    for members in _group(spans, query_lens):
        own = tuple(contexts[seq] for seq in members)
        decodes = query_lens[members[0]] == 1
        unbounded = window is None or max(own) <= window
        first_block = torch.tensor([first_visible[seq] // size for seq in members])
        columns = first_block.view(-1, 1) + torch.arange(max(spans[seq] for seq in members))
        columns = columns.clamp_(max=metadata.block_tables.shape[1] - 1)
        begin = first_block * size
        keeps = decodes and unbounded and bool(metadata.lives)
        tasks.append(
            Task(
                token_rows=torch.tensor([list(rows[seq]) for seq in members]),
                whole=len(members) == 1 and query_lens[members[0]] == own[0] and unbounded,
                blocks=metadata.block_tables[members].long().gather(1, columns),
                first_key=torch.tensor([first_visible[seq] for seq in members]) - begin,
                end_key=torch.tensor(own) - begin,
                window=window,
                block_size=size,
                contexts=own,
                lives=tuple(metadata.lives[seq] for seq in members) if keeps else (),
            )
        )
    return tasks, torch.tensor(empty, dtype=torch.int64)


def _group(spans: dict[int, int], query_lens: Sequence[int]) -> list[list[int]]:
    """Sequences that share a task: decodes whose lengths differ by little padding."""
    groups: list[list[int]] = []
    decodes = sorted((s for s in spans if query_lens[s] == 1), key=lambda s: -spans[s])
    for seq in decodes:
        if groups and spans[seq] >= WORTHWHILE_PADDING * spans[groups[-1][0]]:
            groups[-1].append(seq)
        else:
            groups.append([seq])
    # In batch order the task's rows are neighbours more often, and a slice copies nothing.
    return [sorted(group) for group in groups] + [[s] for s in spans if query_lens[s] > 1]
