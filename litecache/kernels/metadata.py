"""What attention is told: the step, one for all layers of a KV group, and the arguments of a layer.

The engine fills a step from its static buffers; kernels read the device tensors, the CPU path and
the planner read the host copies. Whatever layers of one geometry share is in the plan that a
backend makes of a step, once for all of them (`litecache.kernels.plan_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from litecache.kernels.decode_copies import DecodeCopies

TRASH_BLOCK = 0
"""The block that padded rows write to and padded table entries point at."""


@dataclass
class AttentionMetadata:
    """The packed batch of one step: sequences one after the other, decodes (one query) first.

    Query `i` of a sequence with `q` queries and `c` visible tokens sits at position `c - q + i`.

    Attributes:
        slot_mapping: int64 `[T]`, `block * block_size + offset` each new token is written to.
        block_tables: int32 `[S, max_blocks]`; entries that the window has left behind, and
            entries past the context, may be `TRASH_BLOCK`.
        context_lens: int32 `[S]`, visible tokens of each sequence, this step's included. 0 gives
            zeros.
        cu_seqlens_q: int32 `[S + 1]`, where each sequence's queries start in the packed batch.
        block_size: tokens a block holds.
        max_query_len: largest number of queries of a sequence (an upper bound under graphs).
        max_context_len: largest context (an upper bound under graphs).
        query_lens: host copy of the query counts; None when a graph replays with other lengths.
        context_lens_host: host copy of `context_lens`; None likewise.
        deterministic: a sequence's result must not depend on what else is in the batch: decode cuts
            contexts at fixed positions, at some cost in speed.
        lives: a number for each sequence that no other sequence ever has.
        copies: what the CPU path keeps of running decodes, by lives; None = nothing.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    block_size: int
    max_query_len: int
    max_context_len: int
    query_lens: tuple[int, ...] | None = None
    context_lens_host: tuple[int, ...] | None = None
    deterministic: bool = False
    lives: tuple[int, ...] = ()
    copies: DecodeCopies | None = None

    @property
    def num_seqs(self) -> int:
        """Sequences of the step, padded rows included."""
        return self.block_tables.shape[0]

    @property
    def num_decodes(self) -> int:
        """Leading sequences with exactly one query, as far as the host knows."""
        if self.max_query_len <= 1:
            return self.num_seqs
        lens = self.query_lens or ()
        return next((i for i, count in enumerate(lens) if count != 1), len(lens))

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionMetadata:
        """Makes the metadata of a step from host lists; the slots follow from the tables.

        Args:
            query_lens: queries of each sequence, those with one first.
            context_lens: visible tokens of each sequence, this step's included; a query that
                would lie before its sequence (context 0) gets a slot of the trash block.
            block_tables: blocks of each sequence, ragged.
            block_size: tokens a block holds.
            device: where the tensors go.
        """
        width = max(1, max((len(table) for table in block_tables), default=1))
        tables = torch.full((len(block_tables), width), TRASH_BLOCK, dtype=torch.int32)
        slots: list[int] = []
        starts = [0]
        for row, (queries, context, table) in enumerate(
            zip(query_lens, context_lens, block_tables, strict=True)
        ):
            tables[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
            slots += [
                table[position // block_size] * block_size + position % block_size
                if position >= 0
                else TRASH_BLOCK
                for position in range(context - queries, context)
            ]
            starts.append(starts[-1] + queries)
        return cls(
            slot_mapping=torch.tensor(slots, dtype=torch.int64).to(device),
            block_tables=tables.to(device),
            context_lens=torch.tensor(list(context_lens), dtype=torch.int32).to(device),
            cu_seqlens_q=torch.tensor(starts, dtype=torch.int32).to(device),
            block_size=block_size,
            max_query_len=max(query_lens, default=0),
            max_context_len=max(context_lens, default=0),
            query_lens=tuple(query_lens),
            context_lens_host=tuple(context_lens),
        )


class Geometry(NamedTuple):
    """What a plan depends on beside the step: equal for all layers that share one."""

    num_heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    """Of the pool's elements."""
    window: int | None = None

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.num_heads // self.kv_heads


class Attention(NamedTuple):
    """Causal attention of packed queries over the paged KV of one layer.

    `store_kv` has already written the step's own tokens.

    Attributes:
        query: `[T, num_heads, k_dim]`, the step's sequences one after the other.
        k_cache: `[num_blocks, kv_heads, block_size, k_dim]`; query head `h` reads KV head
            `h // (num_heads // kv_heads)`.
        v_cache: `[num_blocks, kv_heads, block_size, v_dim]`.
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
    """

    query: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    out: torch.Tensor | None = None

    @property
    def geometry(self) -> Geometry:
        """What a plan for this layer depends on."""
        kv_heads, _, k_dim = self.k_cache.shape[1:]
        heads, v_dim, dtype = self.query.shape[1], self.v_cache.shape[3], self.k_cache.dtype
        return Geometry(heads, kv_heads, k_dim, v_dim, dtype, self.window)

    @property
    def bare(self) -> bool:
        """Nothing but scale and window touches the scores."""
        return self.softcap is None and self.sinks is None and self.alibi_slopes is None

    def output(self) -> torch.Tensor:
        """`out`, allocated when there is none."""
        if self.out is not None:
            return self.out
        return self.query.new_empty(*self.query.shape[:2], self.v_cache.shape[3])


class AttentionPlan(Protocol):
    """What a backend makes of a step for the layers of one geometry, once for all of them."""

    @property
    def metadata(self) -> AttentionMetadata:
        """The step."""
        ...

    def attend(self, layer: Attention) -> torch.Tensor:
        """Attention of one layer, `[T, num_heads, v_dim]` in the query's dtype."""
        ...
