"""The plan of short chunks over long prefixes: into how many pieces a row tile's keys are cut.

A question of 64 tokens makes two row tiles a KV head: too few programs for a GPU when each walks a
prefix of 32,768 keys alone. So the keys of a row tile are cut into pieces of equal length, a
program each, and `triton_prefill.attend_chunks` merges them (flash-decoding; Dao et al., 2023).

Made on the device once a step, from the lengths that its tensors hold then, so a graph replays at
any length: sequences are cut into chunks of as many queries as a row tile holds, and of all numbers
of pieces of the longest chunk the one is taken whose programs are through first. Where results must
not depend on the batch, a chunk's own length alone says how it is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from litecache.kernels.metadata import AttentionMetadata, Geometry
from litecache.kernels.triton_common import pad_dim
from litecache.kernels.tuning import ChunkConfig, chunk_config

_FIXED_PIECE, _MOST_FIXED = 1024, 8
"""Tokens of a piece, and pieces of a chunk, where results must not depend on the batch."""

_ROUNDS = 4
"""So many times what runs at once is how many pieces there may be, for their sums to have room."""

# Globals that kernels read must be constexpr.
_MOST_PIECES = tl.constexpr(64)
_BEGIN_TILES = tl.constexpr(3)
"""Tiles of keys that a program could fold while it begins and ends."""
_MERGE_TILES = tl.constexpr(3)
"""Tiles that could be folded while the merge is launched ..."""
_PIECES_A_TILE = tl.constexpr(32)
"""... and for each so many pieces that are written and read again."""


@triton.jit(
    do_not_specialize=[
        "first_seq",
        "num_seqs",
        "most_queries",
        "num_chunks",
        "window",
        "slots",
        "places",
        "num_segments",
    ],
    do_not_specialize_on_alignment=["contexts_ptr", "starts_ptr"],
)
def _cut_kernel(
    contexts_ptr, starts_ptr, chunk_contexts_ptr, chunk_starts_ptr, chunk_seqs_ptr,
    ends_ptr, cuts_ptr, owner_ptr,
    first_seq, num_seqs, most_queries, num_chunks, window, slots, places, num_segments,
    QUERIES: tl.constexpr, TILE: tl.constexpr, CHUNKS_PAD: tl.constexpr, BLOCK_P: tl.constexpr,
    KV_HEADS: tl.constexpr, WINDOWED: tl.constexpr, FIXED: tl.constexpr, MOST: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Chunks of the sequences, pieces of each chunk, and the chunk of each piece."""
    chunk = tl.arange(0, CHUNKS_PAD)
    seq = chunk * 0
    queries = chunk * 0
    context = chunk * 0
    begin = chunk * 0 + tl.load(starts_ptr + num_seqs)
    at = first_seq * 0
    for each in range(first_seq, num_seqs):
        start = tl.load(starts_ptr + each)
        count = tl.load(starts_ptr + each + 1) - start
        known = tl.load(contexts_ptr + each)
        # A longer sequence is attended elsewhere; its one empty chunk keeps the starts in order.
        ours = count <= most_queries
        here = tl.where(ours, tl.cdiv(count, QUERIES), 1)
        inside = (chunk >= at) & (chunk < at + here)
        first = (chunk - at) * QUERIES
        last = tl.minimum(first + QUERIES, count)
        seq = tl.where(inside, each, seq)
        begin = tl.where(inside, start + first, begin)
        queries = tl.where(inside & ours, last - first, queries)
        context = tl.where(inside, tl.maximum(known - count + last, 0), context)
        at += here
    tiles = tl.cdiv(context, TILE)
    if WINDOWED:
        tiles -= tl.maximum(context - queries + 1 - window, 0) // TILE
    tiles = tl.where(queries > 0, tl.maximum(tiles, 1), 0)
    if FIXED > 0:
        pieces = tl.minimum(tl.cdiv(tiles, FIXED), MOST)
    else:
        longest = tl.maximum(tl.max(tiles, 0), 1)
        cheapest, lowest = 1, 1 << 30
        for base in range(0, _MOST_PIECES, AT_ONCE):
            cut = base + 1 + tl.arange(0, AT_ONCE)
            share = tl.cdiv(longest, cut)
            counts = tl.sum((tiles[None, :] + share[:, None] - 1) // share[:, None], 1) * KV_HEADS
            cost = tl.cdiv(counts, slots) * (share + _BEGIN_TILES)
            cost += tl.where(cut > 1, _MERGE_TILES + counts // _PIECES_A_TILE, 0)
            cost = tl.where((cut > 1) & (counts > places), 1 << 30, cost)
            low = tl.min(cost, 0)
            first_low = tl.min(tl.where(cost == low, cut, _MOST_PIECES), 0)
            cheapest = tl.where(low < lowest, first_low, cheapest)
            lowest = tl.minimum(low, lowest)
        pieces = tl.cdiv(tiles, tl.cdiv(longest, cheapest))
    ends = tl.cumsum(pieces, 0)
    total = tl.sum(pieces, 0) * KV_HEADS
    if tl.program_id(0) == 0:
        real = chunk < num_chunks
        tl.store(chunk_contexts_ptr + chunk, context, mask=real)
        tl.store(chunk_seqs_ptr + chunk, seq, mask=real)
        tl.store(chunk_starts_ptr + chunk, begin, mask=chunk <= num_chunks)
        tl.store(ends_ptr + 1 + chunk, ends, mask=real)
        tl.store(ends_ptr, 0)
        # As decode's cuts: shares of one piece each, and no tail.
        tl.store(cuts_ptr, 1)
        tl.store(cuts_ptr + 1, total)
        tl.store(cuts_ptr + 2, 1)
        tl.store(cuts_ptr + 3, 0)
    segment = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    before = (ends * KV_HEADS)[None, :] <= segment[:, None]
    owner = tl.where(segment < total, tl.sum(before.to(tl.int32), 1), -1)
    tl.store(owner_ptr + segment, owner, mask=segment < num_segments)


@dataclass
class ChunkPlan:
    """How a step's short chunks run in all layers of a geometry, and what they share.

    Attributes:
        config: tiles, warps and stages.
        tables: int32 `[seqs, max_blocks]`, of the step.
        tokens: of the chunks, at most.
        contexts: int32 `[chunks]`, tokens up to the last query of each chunk.
        starts: int32 `[chunks + 1]`, where each chunk's queries start in the packed batch.
        seqs: int32 `[chunks]`, the sequence of each.
        ends: int32 `[chunks + 1]`, pieces of one KV head up to each chunk.
        cuts: int32 `[4]`, see `triton_plan.load_cuts`.
        owner: int32 `[segments]`, the chunk of each piece; -1 where there are no more.
        partial: float32 `[places, block_m, v_pad]`, unnormalised sums of pieces.
        state: float32 `[places, block_m, 2]`, their peaks and sums of weights.
        fresh: no layer has run since the plan was launched.
    """

    config: ChunkConfig
    tables: torch.Tensor
    tokens: int
    contexts: torch.Tensor
    starts: torch.Tensor
    seqs: torch.Tensor
    ends: torch.Tensor
    cuts: torch.Tensor
    owner: torch.Tensor
    partial: torch.Tensor
    state: torch.Tensor
    fresh: bool = True


def most_queries(device: torch.device, geometry: Geometry) -> int:
    """Longest sequence that is cut: a longer one fills the GPU by its row tiles. 0 = none is."""
    config = chunk_config(device, max(geometry.k_dim, geometry.v_dim), geometry.dtype.itemsize)
    return config.block_m // geometry.group * (config.num_programs // geometry.kv_heads)


def plan_chunks(
    metadata: AttentionMetadata,
    geometry: Geometry,
    first_seq: int,
    config: ChunkConfig | None = None,
) -> ChunkPlan:
    """Launches the plan of the sequences from `first_seq` on, those that are not too long.

    Args:
        metadata: the step; the sequences before have a query each.
        geometry: of the layers.
        first_seq: the first sequence to attend.
        config: tiles, warps, stages and programs, None = from the table.
    """
    device, kv_heads = metadata.context_lens.device, geometry.kv_heads
    most = most_queries(device, geometry)
    if config is None:
        dim = max(geometry.k_dim, geometry.v_dim)
        config = chunk_config(device, dim, geometry.dtype.itemsize)
    queries = config.block_m // geometry.group
    tokens = metadata.slot_mapping.shape[0] - first_seq
    if metadata.context_lens_host is not None and metadata.query_lens is not None:
        lens = metadata.query_lens[first_seq:]
        num_chunks = sum(triton.cdiv(n, queries) if n <= most else 1 for n in lens)
    else:
        num_chunks = tokens // queries + metadata.num_seqs - first_seq
    pairs, fixed = num_chunks * kv_heads, 0
    if metadata.deterministic:
        fixed = max(1, _FIXED_PIECE // config.block_n)
        pieces = triton.cdiv(metadata.max_context_len, fixed * config.block_n)
        segments = places = pairs * max(1, min(_MOST_FIXED, pieces))
    else:
        segments = pairs + config.num_programs
        places = min(segments, _ROUNDS * config.num_programs)

    def ints(count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int32, device=device)

    rows = places * config.block_m
    plan = ChunkPlan(
        config=config,
        tables=metadata.block_tables,
        tokens=tokens,
        contexts=ints(num_chunks),
        starts=ints(num_chunks + 1),
        seqs=ints(num_chunks),
        ends=ints(num_chunks + 1),
        cuts=ints(4),
        owner=ints(segments),
        partial=torch.empty(rows * pad_dim(geometry.v_dim), dtype=torch.float32, device=device),
        state=torch.empty(rows * 2, dtype=torch.float32, device=device),
    )
    # Few sizes, so that the engine's graphs and first steps have compiled them all.
    chunks_pad = next(
        (size for size in (16, 128, 1024) if num_chunks < size),
        triton.next_power_of_2(num_chunks + 1),
    )
    block_p = max(1, min(64, 16384 // chunks_pad))
    _cut_kernel[(triton.cdiv(segments, block_p),)](
        metadata.context_lens, metadata.cu_seqlens_q, plan.contexts, plan.starts, plan.seqs,
        plan.ends, plan.cuts, plan.owner,
        first_seq, metadata.num_seqs, most, num_chunks, geometry.window or 0,
        config.num_programs, places, segments,
        QUERIES=queries, TILE=config.block_n, CHUNKS_PAD=chunks_pad, BLOCK_P=block_p,
        KV_HEADS=kv_heads, WINDOWED=geometry.window is not None, FIXED=fixed, MOST=_MOST_FIXED,
        AT_ONCE=max(1, min(64, 8192 // chunks_pad)),
    )  # fmt: skip
    return plan
