"""The GPU's half of `dispatch`: which Triton kernel attends which sequences of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from litecache.kernels import library_prefill
from litecache.kernels.metadata import Attention, AttentionMetadata, Geometry
from litecache.kernels.triton_chunks import ChunkPlan, most_queries, plan_chunks
from litecache.kernels.triton_decode import MAX_QUERIES, decode
from litecache.kernels.triton_plan import DecodePlan, plan_decode
from litecache.kernels.triton_prefill import attend_chunks, prefill
from litecache.kernels.triton_store import copy_blocks, store_kv

__all__ = ["copy_blocks", "plan_attention", "store_kv"]

_MAX_DECODE_ROWS = 128
"""Queries times heads of a group that the decode kernel keeps in registers."""


def plan_attention(metadata: AttentionMetadata, geometry: Geometry) -> TritonPlan:
    """Shares out the step's sequences; see `litecache.kernels.plan_attention`."""
    decodes, queries = metadata.num_decodes, metadata.max_query_len
    short = queries <= MAX_QUERIES and queries * geometry.group <= _MAX_DECODE_ROWS
    # What else is in the batch says whether it is short: that must not choose a kernel.
    short = short and not metadata.deterministic
    ends = [(0, decodes, 1)]
    if short:
        # Sequences of one query and those of a few are two launches: rows cost registers.
        ends.append((decodes, metadata.num_seqs, queries))
    plans = [
        plan_decode(metadata, geometry, slice(first, end), most)
        for first, end, most in ends
        if first < end
    ]
    first = metadata.num_seqs if short else decodes
    if library_prefill.suits(metadata, first, geometry):
        return TritonPlan(metadata, plans, first, by_library=True)
    most = most_queries(metadata.context_lens.device, geometry)
    known = metadata.query_lens if metadata.context_lens_host is not None else None
    fewest = 0 if known is None else min(known[first:], default=most + 1)
    chunks = None
    if first < metadata.num_seqs and fewest <= most > 0:
        chunks = plan_chunks(metadata, geometry, first)
    return TritonPlan(metadata, plans, first, chunks=chunks, least=most + 1, longer=queries > most)


@dataclass(frozen=True)
class TritonPlan:
    """Who attends a step.

    Attributes:
        metadata: the step.
        decodes: plans of the sequences that the decode kernel attends.
        first: the sequences from here on are left to prefill.
        by_library: they suit the library, where nothing special is asked of them.
        chunks: plan of those whose keys are cut into pieces, if there may be such.
        least: queries from which a sequence is not.
        longer: there may be such.
    """

    metadata: AttentionMetadata
    decodes: list[DecodePlan]
    first: int
    by_library: bool = False
    chunks: ChunkPlan | None = None
    least: int = 1
    longer: bool = True

    def attend(self, layer: Attention) -> torch.Tensor:
        """Attention of one layer; see `litecache.kernels.paged_attention`."""
        by_library = self.by_library and library_prefill.usable(layer)
        out = layer.out
        if out is None and (self.decodes or not by_library):
            out = layer.output()
        for plan in self.decodes:
            assert out is not None
            decode(layer, plan, out)
        if by_library:
            return library_prefill.attend(layer, self.metadata, self.first, out)
        assert out is not None
        if self.chunks is not None:
            attend_chunks(layer, self.chunks, out)
        if self.longer and self.first < self.metadata.num_seqs:
            prefill(layer, self.metadata, self.first, out, least=self.least)
        return out
