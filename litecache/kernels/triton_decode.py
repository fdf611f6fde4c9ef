"""Decode attention for Triton: few queries a sequence (1 to 16), memory-bound.

The keys of all (sequence, KV head) pairs are cut into tiles and laid end to end; a fixed grid of
programs takes equal shares of that line (the stream-K idea of Osama et al., 2023, applied to
flash-decoding). So ragged batches balance by themselves, there is no split count to tune and no
cliff between batch sizes. A share that covers a pair completely writes its output; pieces of a
pair go to a workspace and whoever finishes last merges them: one launch. Shares are computed on
the device once a step from the context lengths, so a CUDA graph replays at any length. Where a
step asks for determinism, shares are fixed chunks of each pair instead.

A piece is a sum over some keys, not normalised, with its largest score and its sum of weights (see
`triton_plan.DecodePlan`). Where pairs of many rows have many pieces, many programs merge them in a
launch of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from litecache.kernels.metadata import Attention
from litecache.kernels.triton_codes import attend_codes
from litecache.kernels.triton_common import (
    LOG2E,
    await_previous,
    cache_arguments,
    fetch_to_l2,
    finish,
    fold_tile,
    layer_constants,
    load_rows,
    pad_dim,
    store_rows,
    use_pdl,
)
from litecache.kernels.triton_plan import DecodePlan, load_cuts, segment_at, segment_begin
from litecache.kernels.tuning import DecodeConfig

MAX_QUERIES = 16
"""Sequences with more queries than this are left to the prefill kernel."""

_FETCH_TOKENS = 64
"""Tokens whose keys and values a program asks for before its turn."""


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
    if (begins_in != ends_in) & (seq_tiles > 0):
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


@triton.jit(
    do_not_specialize=["table_stride", "window", "num_seqs", "num_programs"],
    # Slices of a step start anywhere; a second variant would be compiled while requests wait.
    do_not_specialize_on_alignment=["tables_ptr", "contexts_ptr", "starts_ptr"],
)
def _decode_kernel(
    q_ptr, out_ptr, q_token, q_head, o_token, o_head,
    k_ptr, v_ptr, k_block, k_head, v_block, v_head,
    ks_ptr, vs_ptr, ks_block, vs_block,
    tables_ptr, table_stride, contexts_ptr, starts_ptr, ends_ptr, cuts_ptr, owner_ptr,
    partial_ptr, state_ptr, counter_ptr, sinks_ptr, slopes_ptr,
    scale, softcap, window, num_seqs, num_programs,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SEVERAL: tl.constexpr, BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr,
    QUANTISED: tl.constexpr, FLOAT: tl.constexpr, ALIKE: tl.constexpr, STAGES: tl.constexpr,
    MERGE: tl.constexpr, INLINE_MERGE: tl.constexpr, TAIL: tl.constexpr, PDL: tl.constexpr,
    FETCH_PAGES: tl.constexpr, FETCH_PIECES: tl.constexpr, FETCH_K: tl.constexpr,
    FETCH_V: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    share, tail_begin, tail_share, tail_segments = load_cuts(cuts_ptr)
    segment = program
    begin = program * share
    end = tl.minimum(begin + share, tail_begin)
    if begin < end:
        seq = tl.load(owner_ptr + program)
        at = begin
        while at < end:
            seq_begin = tl.load(ends_ptr + seq)
            seq_tiles = tl.load(ends_ptr + seq + 1) - seq_begin
            kv_head = (at - seq_begin * KV_HEADS) // seq_tiles
            pair_begin = seq_begin * KV_HEADS + kv_head * seq_tiles
            pair_end = pair_begin + seq_tiles
            stop = tl.minimum(pair_end, end)

            context = tl.load(contexts_ptr + seq)
            first_token = tl.load(starts_ptr + seq)
            queries = tl.load(starts_ptr + seq + 1) - first_token
            first_key = 0
            if WINDOWED:
                first_key = tl.maximum(context - queries + 1 - window, 0)
            row = tl.arange(0, BLOCK_M)
            q_position = context - queries + row // GROUP
            head = kv_head * GROUP + row % GROUP
            slope = row.to(tl.float32)
            if ALIBI:
                slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
            qk_scale = scale if SOFTCAP else scale * LOG2E

            table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
            k_base = k_ptr + kv_head.to(tl.int64) * k_head
            v_base = v_ptr + kv_head.to(tl.int64) * v_head
            ks_base, vs_base = ks_ptr, vs_ptr
            if QUANTISED:
                ks_base += kv_head * PAGE
                vs_base += kv_head * PAGE
            base = first_key // BLOCK_N * BLOCK_N
            low = base + (at - pair_begin) * BLOCK_N
            high = tl.minimum(base + (stop - pair_begin) * BLOCK_N, context)
            if PDL:  # noqa: SIM102 - constants are folded one `if` at a time
                # Keys of earlier steps are there already: ask for the first ones meanwhile.
                if at == program * share:
                    _fetch_pages(
                        k_base, k_block, table_ptr, low, high,
                        PAGE, FETCH_PAGES, FETCH_PIECES, FETCH_K,
                    )  # fmt: skip
                    _fetch_pages(
                        v_base, v_block, table_ptr, low, high,
                        PAGE, FETCH_PAGES, FETCH_PIECES, FETCH_V,
                    )  # fmt: skip
            await_previous(PDL)
            if QUANTISED:
                acc, peak, total = attend_codes(
                    q_ptr, q_token, q_head, first_token, kv_head, queries * GROUP,
                    q_position, slope, low, high, first_key, context, table_ptr,
                    k_base, v_base, k_block, v_block, ks_base, vs_base, ks_block, vs_block,
                    qk_scale, softcap, window,
                    BLOCK_M, GROUP, BLOCK_N, PAGE, D, D_PAD, DV, DV_PAD,
                    SEVERAL, WINDOWED, SOFTCAP, ALIBI, FLOAT, ALIKE, STAGES,
                )  # fmt: skip
            else:
                q = load_rows(
                    q_ptr, q_token, q_head, first_token, kv_head, 0, queries * GROUP,
                    BLOCK_M, GROUP, D, D_PAD,
                )  # fmt: skip
                acc = tl.zeros((BLOCK_M, DV_PAD), tl.float32)
                peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
                total = tl.zeros((BLOCK_M,), tl.float32)
                for start in tl.range(low, high, BLOCK_N, num_stages=STAGES):
                    acc, peak, total = fold_tile(
                        acc, peak, total, q, slope, q_position, slope,
                        start, first_key, context, table_ptr,
                        k_base, v_base, k_block, v_block, ks_base, vs_base, ks_block, vs_block,
                        qk_scale, softcap, window,
                        BLOCK_N, PAGE, D, D_PAD, DV, DV_PAD,
                        True, SEVERAL, WINDOWED, ALIKE, SOFTCAP, ALIBI, False,
                    )  # fmt: skip

            if stop - at == seq_tiles:
                sink = peak
                if SINKS:
                    sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
                result = finish(acc, peak, total, sink, SINKS)
                store_rows(
                    out_ptr, o_token, o_head, result, first_token, kv_head, 0, queries * GROUP,
                    BLOCK_M, GROUP, DV, DV_PAD,
                )  # fmt: skip
            else:
                # A segment has at most two pieces: the one that it begins with, and a later one.
                place = segment * 2 + (at != begin).to(tl.int32)
                dim = tl.arange(0, DV_PAD)
                mine = row < ROWS
                tl.store(
                    partial_ptr + ((place * ROWS + row) * DV_PAD)[:, None] + dim[None, :],
                    acc,
                    mask=mine[:, None],
                )
                tl.store(state_ptr + (place * ROWS + row) * 2, peak, mask=mine)
                tl.store(state_ptr + (place * ROWS + row) * 2 + 1, total, mask=mine)
                if INLINE_MERGE:
                    pair = seq * KV_HEADS + kv_head
                    first = segment_at(pair_begin, share, tail_begin, tail_share, num_programs)
                    last = segment_at(pair_end - 1, share, tail_begin, tail_share, num_programs)
                    # Every thread's piece is written before the one that counts releases it.
                    tl.debug_barrier()
                    arrived = tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel")
                    if arrived == last - first:
                        merge_pieces(
                            partial_ptr, state_ptr, out_ptr, o_token, o_head, sinks_ptr,
                            pair_begin, pair_end, share, tail_begin, tail_share, num_programs,
                            first_token, queries, kv_head, 0,
                            GROUP, ROWS, ROWS, DV, DV_PAD, SINKS, MERGE,
                        )  # fmt: skip
                        tl.store(counter_ptr + pair, 0)
            at = stop
            if (stop == pair_end) & (kv_head == KV_HEADS - 1):
                seq += 1
            if TAIL:  # noqa: SIM102 - constants are folded one `if` at a time
                if (at == end) & (tail_segments > 0):
                    ticket_ptr = counter_ptr + num_seqs * KV_HEADS
                    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
                    if ticket < tail_segments:
                        segment = num_programs + ticket
                        begin = tail_begin + ticket * tail_share
                        at = begin
                        end = tl.minimum(
                            begin + tail_share, tl.load(ends_ptr + num_seqs) * KV_HEADS
                        )
                        seq = tl.load(owner_ptr + segment)
                    elif ticket == tail_segments + num_programs - 1:
                        tl.store(ticket_ptr, 0)  # every program has drawn its last


@triton.jit
def _fetch_pages(
    base_ptr, block_stride, table_ptr, low, high,
    PAGE: tl.constexpr, PAGES: tl.constexpr, PIECES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Asks for the pages from token `low` on, in pieces of `SIZE` bytes, one a thread."""
    if SIZE > 0:
        index = tl.arange(0, PAGES * PIECES)
        token = tl.minimum(low // PAGE * PAGE + index // PIECES * PAGE, tl.maximum(high - 1, 0))
        page = tl.load(table_ptr + token // PAGE).to(tl.int64)
        address = (base_ptr + page * block_stride).to(tl.int64) + (index % PIECES) * SIZE
        fetch_to_l2(address, SIZE)


def decode(layer: Attention, plan: DecodePlan, out: torch.Tensor) -> None:
    """Attends the sequences of a plan in one layer of its geometry.

    Args:
        layer: see `litecache.kernels.paged_attention`.
        plan: from `plan_decode`.
        out: `[T, num_heads, v_dim]`; rows of those sequences are written, all of them.
    """
    query, sinks, config = layer.query, layer.sinks, plan.config
    geometry, rows, v_pad = plan.geometry, plan.rows, plan.v_pad
    quantised, num_seqs = layer.k_scale is not None, plan.contexts.shape[0]
    dims = (geometry.k_dim, geometry.v_dim)
    page, itemsize = layer.k_cache.shape[2], geometry.dtype.itemsize
    fetch = _fetch_plan(page, dims, itemsize, 32 * config.num_warps)
    caches = (layer.k_cache, layer.v_cache)
    if quantised:
        caches = (caches[0].view(torch.int32), caches[1].view(torch.int32))
    pdl = use_pdl(query.device, num_seqs)
    _decode_kernel[(config.num_programs,)](
        query, out, query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        *cache_arguments(*caches, layer.k_scale, layer.v_scale),
        plan.tables, plan.tables.stride(0), plan.contexts, plan.starts, plan.ends, plan.cuts,
        plan.owner, plan.partial, plan.state, plan.counter, sinks, layer.alibi_slopes,
        layer.scale, layer.softcap or 1.0, layer.window or 0, num_seqs, config.num_programs,
        **layer_constants(layer),
        KV_HEADS=geometry.kv_heads, SEVERAL=plan.max_queries > 1, BLOCK_M=max(16, rows),
        ROWS=rows, BLOCK_N=config.block_n, D_PAD=pad_dim(dims[0], quantised), DV_PAD=v_pad,
        FLOAT=geometry.dtype == torch.float8_e4m3fn, STAGES=config.num_stages,
        MERGE=merge_width(config, rows, v_pad, quantised), INLINE_MERGE=plan.inline,
        TAIL=plan.has_tail, PDL=pdl,
        FETCH_PAGES=fetch[0], FETCH_PIECES=fetch[1], FETCH_K=fetch[2], FETCH_V=fetch[3],
        # The plan is read before the wait, so the kernel right behind the plan starts after it.
        num_warps=config.num_warps, launch_pdl=pdl and not plan.fresh,
    )  # fmt: skip
    plan.fresh = False
    if not plan.inline:
        tile = min(8, rows)
        merge_kernel[(num_seqs * geometry.kv_heads, rows // tile)](
            plan.partial, plan.state, out, out.stride(0), out.stride(1), sinks, plan.starts,
            plan.ends, plan.cuts, config.num_programs,
            KV_HEADS=geometry.kv_heads, GROUP=geometry.group, ROWS=rows, TILE=tile,
            DV=geometry.v_dim, DV_PAD=v_pad, SINKS=sinks is not None,
            MERGE=max(1, min(16, 8192 // (tile * v_pad))), PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip


def _fetch_plan(
    page: int, dims: tuple[int, int], itemsize: int, threads: int
) -> tuple[int, int, int, int]:
    """Pages to ask for early, the pieces of each, and a piece's bytes of keys and of values."""
    pages = max(1, _FETCH_TOKENS // page)
    pieces = max(1, threads // pages)
    sizes = [page * dim * itemsize // pieces for dim in dims]
    # The instruction takes multiples of 16 bytes; odd shapes do without.
    k_size, v_size = (size if size * pieces % 16 == 0 and size % 16 == 0 else 0 for size in sizes)
    return pages, pieces, k_size, v_size
