"""What one step tells attention: built once a step, shared by all layers of a KV group.

The engine fills it from its static buffers; kernels read the device tensors, the CPU path and the
planner read the host copies. Derived, per-step things that layers share (gather indices, masks,
workspaces) live in `scratch`, so that they are computed by the first layer and reused by the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

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
        context_lens_host: host copy of `context_lens`; None likewise. The CPU path needs both.
        deterministic: a sequence's result must not depend on what else is in the batch: decode cuts
            contexts at fixed positions, at some cost in speed.
        scratch: per-step things that layers share, keyed by whoever computes them.
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
    scratch: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_seqs(self) -> int:
        """Sequences of the step, padded rows included."""
        return self.block_tables.shape[0]

    @property
    def num_decodes(self) -> int:
        """Leading sequences with exactly one query, as far as the host knows."""
        if self.max_query_len <= 1:
            return self.num_seqs
        if self.query_lens is None:
            return 0
        for index, query_len in enumerate(self.query_lens):
            if query_len != 1:
                return index
        return len(self.query_lens)

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
