"""The torch path: what runs on CPU, and the meaning of every kernel.

Attention gathers the visible blocks of a batch into a workspace laid out heads first
(`[kv_heads, seqs, tokens, dim]`, one memcpy per block and head) and hands it to torch's SDPA. For
decodes the query heads of a KV head are packed as rows, so that GQA expands nothing. Which blocks
and masks are involved depends on the step alone: a `Plan` keeps that for all layers; decodes of
similar length form one vectorised task of it, a longer run of queries is a task of its own. A
caller that names its sequences spares a batch of decodes the gathering (`decode_copies`).
Softcap, sinks, ALiBi and a V dimension of its own take an explicit float32 softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from litecache.kernels.decode_copies import SCRATCH, DecodeCopies
from litecache.kernels.metadata import AttentionMetadata
from litecache.kernels.quantise import dequantise, quantise

_WORTHWHILE_PADDING = 0.75
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
    """

    token_rows: torch.Tensor
    whole: bool
    blocks: torch.Tensor
    first_key: torch.Tensor
    end_key: torch.Tensor
    window: int | None
    block_size: int
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

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

    def tokens(self) -> slice | torch.Tensor:
        """The task's rows of the packed batch: a slice where they are neighbours."""
        if "tokens" not in self._cache:
            rows = self.token_rows.reshape(-1)
            first, count = int(rows[0]), rows.numel()
            neighbours = bool((rows == torch.arange(first, first + count)).all())
            self._cache["tokens"] = slice(first, first + count) if neighbours else rows
        tokens: slice | torch.Tensor = self._cache["tokens"]
        return tokens

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
        if name not in self._cache:
            distance = self.distance(queries)
            hidden = distance < 0
            if self.window is not None:
                hidden |= distance >= self.window
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
            self._cache[name] = mask if bool(hidden.any()) else None
        mask_or_none: torch.Tensor | None = self._cache[name]
        return mask_or_none

    def decode_mask(self, kv_heads: int, group: int, dtype: torch.dtype) -> torch.Tensor | None:
        """`mask` of a task with one query, as `[kv_heads, n, group, keys]`.

        Spelt out: SDPA takes twice the time over a mask that is broadcast.
        """
        name = ("decode_mask", kv_heads, group, dtype)
        if name not in self._cache:
            mask = self.mask(slice(0, 1), dtype)
            if mask is not None:
                mask = mask.unsqueeze(0).repeat(kv_heads, 1, group, 1)
            self._cache[name] = mask
        found: torch.Tensor | None = self._cache[name]
        return found

    def gather(
        self,
        cache: torch.Tensor,
        scale: torch.Tensor | None,
        dtype: torch.dtype,
        scratch: dict[Any, Any],
        name: str,
    ) -> torch.Tensor:
        """Copies the task's blocks out of a strided layer view.

        Args:
            cache: `[num_blocks, kv_heads, block_size, dim]`, a view of the pool.
            scale: float32 `[num_blocks, kv_heads, block_size]` of a quantised pool.
            dtype: of the result.
            scratch: the step's scratch, which lends the workspace called `name`.
            name: of the workspace; keys and values need one each.

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
        count = index.numel()
        space = _workspace(scratch, name, count * self.block_size * dim, rows.dtype)
        gathered = torch.index_select(
            rows, 0, index, out=space.view(count, self.block_size * dim)
        ).view(cache.dtype)
        tokens = gathered.view(kv_heads, self.num_seqs, self.num_keys, dim)
        if scale is not None:
            scales = scale[self.blocks].permute(2, 0, 1, 3)
            tokens = dequantise(tokens, scales.reshape(tokens.shape[:3]), dtype)
        elif tokens.dtype != dtype:
            tokens = tokens.to(dtype)
        hidden = self._hidden_tokens()
        if hidden is not None:
            tokens.view(kv_heads, -1, dim).index_fill_(1, hidden, 0)
        return tokens

    def _row_index(self, cache: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Rows of `block_size * dim` elements to fetch, in units that divide both strides."""
        block_stride, head_stride = cache.stride(0), cache.stride(1)
        name = ("rows", block_stride, head_stride, cache.shape[1])
        if name not in self._cache:
            unit = math.gcd(block_stride, head_stride)
            heads = torch.arange(cache.shape[1]).view(-1, 1, 1) * (head_stride // unit)
            index = heads + self.blocks * (block_stride // unit)
            self._cache[name] = (unit, index.reshape(-1))
        found: tuple[int, torch.Tensor] = self._cache[name]
        return found

    def _hidden_tokens(self) -> torch.Tensor | None:
        """Flat `[n * keys]` columns that belong to no visible token of their sequence."""
        if "hidden" not in self._cache:
            column = torch.arange(self.num_keys)
            hidden = column < self.first_key.view(-1, 1)
            hidden |= column >= self.end_key.view(-1, 1)
            flat = hidden.view(-1).nonzero().view(-1)
            self._cache["hidden"] = flat if flat.numel() else None
        found: torch.Tensor | None = self._cache["hidden"]
        return found


@dataclass
class Plan:
    """Tasks of a step, and the rows of the packed batch that see nothing."""

    tasks: list[Task]
    empty_rows: torch.Tensor


def plan_step(metadata: AttentionMetadata, window: int | None) -> Plan:
    """The step's plan for one window, made by the first layer that asks."""
    name = ("reference", window)
    if name not in metadata.scratch:
        metadata.scratch[name] = _make_plan(metadata, window)
    plan: Plan = metadata.scratch[name]
    return plan


def _make_plan(metadata: AttentionMetadata, window: int | None) -> Plan:
    query_lens, contexts = metadata.query_lens, metadata.context_lens_host
    starts = metadata.cu_seqlens_q.tolist()
    if query_lens is None:
        query_lens = tuple(end - start for start, end in pairwise(starts))
    if contexts is None:
        contexts = tuple(metadata.context_lens.tolist())
    first_visible = [
        0 if window is None else max(0, context - queries + 1 - window)
        for queries, context in zip(query_lens, contexts, strict=True)
    ]
    empty = [
        row
        for seq, queries in enumerate(query_lens)
        if contexts[seq] == 0
        for row in range(starts[seq], starts[seq] + queries)
    ]
    size = metadata.block_size
    spans = {
        seq: -(-contexts[seq] // size) - first_visible[seq] // size
        for seq, queries in enumerate(query_lens)
        if queries and contexts[seq]
    }
    tasks = []
    for members in _group(spans, query_lens):
        first_block = torch.tensor([first_visible[seq] // size for seq in members])
        columns = first_block.view(-1, 1) + torch.arange(max(spans[seq] for seq in members))
        columns = columns.clamp_(max=metadata.block_tables.shape[1] - 1)
        tables = metadata.block_tables[members].long()
        begin = first_block * size
        tasks.append(
            Task(
                token_rows=torch.tensor(
                    [list(range(starts[s], starts[s] + query_lens[s])) for s in members]
                ),
                whole=len(members) == 1
                and query_lens[members[0]] == contexts[members[0]]
                and (window is None or contexts[members[0]] <= window),
                blocks=tables.gather(1, columns),
                first_key=torch.tensor([first_visible[seq] for seq in members]) - begin,
                end_key=torch.tensor([contexts[seq] for seq in members]) - begin,
                window=window,
                block_size=size,
            )
        )
    return Plan(tasks, torch.tensor(empty, dtype=torch.int64))


def _group(spans: dict[int, int], query_lens: Sequence[int]) -> list[list[int]]:
    """Sequences that share a task: decodes whose lengths differ by little padding."""
    groups: list[list[int]] = []
    decodes = sorted((s for s in spans if query_lens[s] == 1), key=lambda s: -spans[s])
    for seq in decodes:
        if groups and spans[seq] >= _WORTHWHILE_PADDING * spans[groups[-1][0]]:
            groups[-1].append(seq)
        else:
            groups.append([seq])
    # In batch order the task's rows are neighbours more often, and a slice copies nothing.
    return [sorted(group) for group in groups] + [[s] for s in spans if query_lens[s] > 1]


def _workspace(
    scratch: dict[Any, Any], name: str, elements: int, dtype: torch.dtype
) -> torch.Tensor:
    """A flat buffer of the step that layers reuse: fresh large ones cost a page fault a page."""
    place = ("workspace", name, dtype)
    space = scratch.get(place)
    if space is None or space.numel() < elements:
        space = scratch[place] = torch.empty(elements, dtype=dtype)
    lent: torch.Tensor = space[:elements]
    return lent
