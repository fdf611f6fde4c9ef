"""Merges the pieces that decode attention leaves where a pair was cut: flash-decoding's last step.

A piece is a sum over some keys, not normalised, with its largest score and its sum of weights (see
`triton_plan.DecodePlan`). Whoever finishes a pair last merges it inside the decode kernel; where
pairs of many rows have many pieces, many programs do it in a launch of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from litecache.kernels.triton_common import LOG2E, finish, store_rows
from litecache.kernels.triton_pdl import await_previous
from litecache.kernels.triton_plan import load_cuts, segment_at, segment_begin
from litecache.kernels.tuning import DecodeConfig


@triton.jit
def merge_pieces(
    partial_ptr, state_ptr, out_ptr, o_token, o_head, sinks_ptr,
    pair_begin, pair_end, share, tail_begin, tail_share, num_programs,
    first_token, queries, kv_head, first_row,
    GROUP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, DV: tl.constexpr,
    DV_PAD: tl.constexpr, SINKS: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Merges the pieces of one pair for `TILE` of its rows, `MERGE` pieces at a time."""
    first = segment_at(pair_begin, share, tail_begin, tail_share, num_programs)
    pieces = segment_at(pair_end - 1, share, tail_begin, tail_share, num_programs) - first + 1
    first_begin = segment_begin(first, share, tail_begin, tail_share, num_programs)
    first_is_later = (pair_begin != first_begin).to(tl.int32)
    row = first_row + tl.arange(0, TILE)
    dim = tl.arange(0, DV_PAD)
    head = kv_head * GROUP + row % GROUP
    acc = tl.zeros((TILE, DV_PAD), tl.float32)
    peak = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for begin in range(0, pieces, MERGE):
        piece = begin + tl.arange(0, MERGE)
        place = (first + piece) * 2 + tl.where(piece == 0, first_is_later, 0)
        line = place[:, None] * ROWS + row[None, :]
        there = (piece < pieces)[:, None] & (row >= 0)[None, :]
        # The pieces come from other multiprocessors: read them past this one's L1.
        peaks = tl.load(state_ptr + line * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(state_ptr + line * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        parts = tl.load(
            partial_ptr + line[:, :, None] * DV_PAD + dim[None, None, :],
            mask=there[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(peaks - safe_peak[None, :])
        decay = tl.exp2(peak - safe_peak)
        total = total * decay + tl.sum(weights * totals, 0)
        acc = acc * decay[:, None] + tl.sum(parts * weights[:, :, None], 0)
        peak = new_peak
    sink = peak
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
    result = finish(acc, peak, total, sink, SINKS)
    store_rows(
        out_ptr, o_token, o_head, result, first_token, kv_head, first_row, queries * GROUP,
        TILE, GROUP, DV, DV_PAD,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_programs"], do_not_specialize_on_alignment=["starts_ptr"])
def merge_kernel(
    partial_ptr, state_ptr, out_ptr, o_token, o_head, sinks_ptr, starts_ptr, ends_ptr,
    cuts_ptr, num_programs,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    DV: tl.constexpr, DV_PAD: tl.constexpr, SINKS: tl.constexpr, MERGE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Merges `TILE` rows of every pair that was cut: a program for each pair and row tile."""
    seq = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    share, tail_begin, tail_share, _ = load_cuts(cuts_ptr)
    seq_begin = tl.load(ends_ptr + seq)
    seq_tiles = tl.load(ends_ptr + seq + 1) - seq_begin
    pair_begin = seq_begin * KV_HEADS + kv_head * seq_tiles
    pair_end = pair_begin + seq_tiles
    await_previous(PDL)
    begins_in = segment_at(pair_begin, share, tail_begin, tail_share, num_programs)
    ends_in = segment_at(pair_end - 1, share, tail_begin, tail_share, num_programs)
    if begins_in != ends_in:
        first_token = tl.load(starts_ptr + seq)
        queries = tl.load(starts_ptr + seq + 1) - first_token
        merge_pieces(
            partial_ptr, state_ptr, out_ptr, o_token, o_head, sinks_ptr,
            pair_begin, pair_end, share, tail_begin, tail_share, num_programs,
            first_token, queries, kv_head, tl.program_id(1) * TILE,
            GROUP, ROWS, TILE, DV, DV_PAD, SINKS, MERGE,
        )  # fmt: skip


def merge_width(config: DecodeConfig, rows: int, v_pad: int, quantised: bool) -> int:
    """Pieces merged at once: many hide latency, but their registers burden the whole kernel.

    Measured on an H200: wide merges win 6 % at 8 sequences of 8,192 tokens; over fp8 pools, and
    for 8 queries a sequence, they cost 11 % and 7 %, because those kernels have none to spare.
    """
    burdened = quantised or rows > 16
    elements = (512 if burdened else 4096) * config.num_warps
    return max(1, min(16, elements // (rows * v_pad)))
