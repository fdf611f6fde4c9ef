"""The plan of a decode step: how its tiles are shared out, made on the device once for all layers.

Read `triton_decode` first: this is the line that its programs walk along. The line is cut into
segments: one of equal length for each program, and behind them, where there is work enough, small
ones that programs take as they finish ("tail"). A cut inside a pair makes pieces that are merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from litecache.kernels.metadata import AttentionMetadata, Geometry
from litecache.kernels.quantise import LARGEST_CODE
from litecache.kernels.triton_common import pad_dim
from litecache.kernels.tuning import DecodeConfig, Shape, decode_config

_LEAST_TILES = 2
"""What a pair counts for at least, because to begin one takes longer than a tile of a long one.

A step padded to its graph's bucket ends in rows of one token. Counted as one tile each, a hundred
of their pairs fell to one program, and every layer waited for it: 2.4 ms a step of 242 rows.
"""


_LEAST_SHARE = 12
"""Tiles a program below which there is no tail: its pieces would cost more than they even out."""

_TAIL_SEGMENTS = 2
"""Segments of a whole tail a program; what is left over by rounding makes at most one more."""

_MOST_PIECES = 48
"""A pair is cut into about so many segments of the tail at most: one program merges them.

Where that makes one longer than three quarters of a program's part of the tail, there is no tail:
16 sequences of 8,192 tokens lost 1 % to it.
"""

_MOST_ROWS = 16
"""Rows of a pair up to which there is a tail."""

_MANY_PIECES = 4
"""Mean pieces of a pair from which many rows are merged by a launch of their own."""

_FIXED_CHUNK = 1024
"""Tokens of a piece where results must not depend on the batch."""

# Globals that kernels read must be constexpr.
_SHARE_FLOOR = tl.constexpr(_LEAST_SHARE)
_TAIL_CUTS = tl.constexpr(_TAIL_SEGMENTS)
_PIECES_CEILING = tl.constexpr(_MOST_PIECES)


@triton.jit
def load_cuts(cuts_ptr):
    """Length of a share, where the tail begins, length of its segments, and how many there are."""
    share = tl.load(cuts_ptr)
    tail_begin = tl.load(cuts_ptr + 1)
    tail_share = tl.load(cuts_ptr + 2)
    tail_segments = tl.load(cuts_ptr + 3)
    return share, tail_begin, tail_share, tail_segments


@triton.jit
def segment_at(tile, share, tail_begin, tail_share, num_programs):
    """The segment that a tile of the line lies in."""
    return tl.where(
        tile < tail_begin, tile // share, num_programs + (tile - tail_begin) // tail_share
    )


@triton.jit
def segment_begin(segment, share, tail_begin, tail_share, num_programs):
    """The first tile of a segment."""
    return tl.where(
        segment < num_programs, segment * share, tail_begin + (segment - num_programs) * tail_share
    )


@triton.jit(
    do_not_specialize=["num_seqs", "window", "num_programs", "num_segments"],
    do_not_specialize_on_alignment=["contexts_ptr", "starts_ptr"],
)
def _plan_kernel(
    contexts_ptr, starts_ptr, ends_ptr, cuts_ptr, owner_ptr,
    num_seqs, window, num_programs, num_segments,
    TILE: tl.constexpr, SEQS_PAD: tl.constexpr, BLOCK_P: tl.constexpr, KV_HEADS: tl.constexpr,
    WINDOWED: tl.constexpr, CHUNK: tl.constexpr, LEAST: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Cumulative tiles per sequence, the cuts, and the sequence in which each segment begins."""
    seq = tl.arange(0, SEQS_PAD)
    real = seq < num_seqs
    context = tl.load(contexts_ptr + seq, mask=real, other=0)
    tiles = tl.cdiv(context, TILE)
    if WINDOWED:
        begin = tl.load(starts_ptr + seq, mask=real, other=0)
        end = tl.load(starts_ptr + seq + 1, mask=real, other=0)
        tiles -= tl.maximum(context - (end - begin) + 1 - window, 0) // TILE
    # An empty sequence has a place on the line, too, whose owner writes its zeros.
    tiles = tl.maximum(tiles, LEAST)
    if CHUNK > 0:
        tiles = tl.cdiv(tiles, CHUNK) * CHUNK
    tiles = tl.where(real, tiles, 0)
    ends = tl.cumsum(tiles, 0)
    work = tl.sum(tiles, 0) * KV_HEADS
    share = CHUNK
    if CHUNK == 0:
        share = tl.cdiv(work, num_programs)
    tail_begin, tail_share, tail_segments = work, 1, 0
    if TAIL > 0:
        even = work // num_programs
        least = tl.cdiv(tl.max(tiles, 0), _PIECES_CEILING)
        length = tl.maximum(tl.cdiv(even, _TAIL_CUTS * TAIL), least)
        if (even >= _SHARE_FLOOR) & (length * TAIL * 4 <= even * 3):
            share = even - even // TAIL
            tail_begin = share * num_programs
            tail_share = length
            tail_segments = tl.cdiv(work - tail_begin, length)
    if tl.program_id(0) == 0:
        tl.store(ends_ptr + 1 + seq, ends, mask=real)
        tl.store(ends_ptr, 0)
        tl.store(cuts_ptr, share)
        tl.store(cuts_ptr + 1, tail_begin)
        tl.store(cuts_ptr + 2, tail_share)
        tl.store(cuts_ptr + 3, tail_segments)
    segment = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    begin = segment_begin(segment, share, tail_begin, tail_share, num_programs)
    before = (ends * KV_HEADS)[None, :] <= begin[:, None]
    owner = tl.sum((before & real[None, :]).to(tl.int32), 1)
    tl.store(owner_ptr + segment, owner, mask=segment < num_segments)


@dataclass
class DecodePlan:
    """How a step's decodes run in all layers of a geometry, and what they share on the device.

    Attributes:
        geometry: of the layers.
        config: tile, warps, stages and programs.
        tables: int32 `[seqs, max_blocks]`.
        contexts: int32 `[seqs]`.
        starts: int32 `[seqs + 1]`, where each sequence's queries start in the packed batch.
        max_queries: largest number of queries of a sequence.
        rows: queries times heads of a group, padded to a power of two.
        v_pad: V's dimension, padded likewise.
        inline: whoever finishes last merges a pair's pieces; else a launch of its own does.
        has_tail: there may be segments behind the programs' own.
        ends: int32 `[seqs + 1]`, tiles of one KV head up to each sequence.
        cuts: int32 `[4]`, see `load_cuts`.
        owner: int32 `[segments]`, the sequence in which each segment begins.
        partial: float32 `[2 * segments, rows, v_pad]`, unnormalised sums of pieces.
        state: float32 `[2 * segments, rows, 2]`, their peaks and sums of weights.
        counter: int32 `[seqs * kv_heads + 1]`, pieces of each pair that are done, and segments of
            the tail that are taken; 0 between layers.
        fresh: no layer has run since the plan was launched.
    """

    geometry: Geometry
    config: DecodeConfig
    tables: torch.Tensor
    contexts: torch.Tensor
    starts: torch.Tensor
    max_queries: int
    rows: int
    v_pad: int
    inline: bool
    has_tail: bool
    ends: torch.Tensor
    cuts: torch.Tensor
    owner: torch.Tensor
    partial: torch.Tensor
    state: torch.Tensor
    counter: torch.Tensor
    fresh: bool = True


def plan_decode(
    metadata: AttentionMetadata,
    geometry: Geometry,
    seqs: slice,
    max_queries: int,
    config: DecodeConfig | None = None,
) -> DecodePlan:
    """Launches the plan of some sequences.

    Args:
        metadata: the step.
        geometry: of the layers.
        seqs: which of its sequences, `slice(first, end)`.
        max_queries: largest number of queries among them.
        config: tile, warps, stages and programs, None = from the table.
    """
    device = metadata.context_lens.device
    num_seqs, kv_heads = seqs.stop - seqs.start, geometry.kv_heads
    quantised = geometry.dtype in LARGEST_CODE
    rows = triton.next_power_of_2(max_queries * geometry.group)
    v_pad = pad_dim(geometry.v_dim, quantised)
    if config is None:
        dim = triton.next_power_of_2(max(geometry.k_dim, geometry.v_dim))
        fp8 = geometry.dtype == torch.float8_e4m3fn
        shape = Shape(geometry.dtype.itemsize, dim, geometry.group > 1, max(16, rows), fp8)
        config = decode_config(device, shape)
    chunk = 0
    if metadata.deterministic:
        chunk = max(1, _FIXED_CHUNK // config.block_n)
        chunks = triton.cdiv(metadata.max_context_len, chunk * config.block_n)
        config = config._replace(num_programs=num_seqs * kv_heads * max(1, chunks))
    programs = config.num_programs
    # Where pairs of many rows are cut into many pieces, many programs merge them, in a launch of
    # its own; beyond 32 rows the merge would also spill the kernel's registers.
    few_pieces = num_seqs * kv_heads * _MANY_PIECES > programs
    # The scratch of many rows is large as it is.
    tail = config.tail if chunk == 0 and rows <= _MOST_ROWS else 0
    segments = programs * (2 + _TAIL_SEGMENTS if tail else 1)

    def ints(count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int32, device=device)

    plan = DecodePlan(
        geometry=geometry,
        config=config,
        tables=metadata.block_tables[seqs],
        contexts=metadata.context_lens[seqs],
        starts=metadata.cu_seqlens_q[seqs.start : seqs.stop + 1],
        max_queries=max_queries,
        rows=rows,
        v_pad=v_pad,
        inline=rows <= 16 or (rows <= 32 and chunk == 0 and few_pieces),
        has_tail=tail > 0,
        ends=ints(num_seqs + 1),
        cuts=ints(4),
        owner=ints(segments),
        partial=torch.empty(2 * segments * rows * v_pad, dtype=torch.float32, device=device),
        state=torch.empty(2 * segments * rows * 2, dtype=torch.float32, device=device),
        counter=torch.zeros(num_seqs * kv_heads + 1, dtype=torch.int32, device=device),
    )
    seqs_pad = max(16, triton.next_power_of_2(num_seqs))
    block_p = max(1, min(64, 16384 // seqs_pad))
    window = geometry.window
    _plan_kernel[(triton.cdiv(segments, block_p),)](
        plan.contexts, plan.starts, plan.ends, plan.cuts, plan.owner,
        num_seqs, window or 0, programs, segments,
        TILE=config.block_n, SEQS_PAD=seqs_pad, BLOCK_P=block_p, KV_HEADS=kv_heads,
        WINDOWED=window is not None, CHUNK=chunk, LEAST=1 if chunk else _LEAST_TILES, TAIL=tail,
    )  # fmt: skip
    return plan
