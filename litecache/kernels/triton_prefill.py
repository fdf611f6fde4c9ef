"""Prefill attention for Triton: many queries a sequence, over a paged prefix, variable lengths.

FlashAttention-2's loop (Dao, 2023) over tiles of paged keys. A program takes a tile of rows
(queries times the heads of one KV head), the last queries first, since they have most to do.
Tiles that every row sees entirely are folded without a mask.

Where row tiles are few and prefixes long, a program takes a piece of a row tile's keys instead, as
`triton_chunks` plans it, and the merge launch of decode puts the pieces together.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from litecache.kernels.metadata import Attention, AttentionMetadata
from litecache.kernels.triton_chunks import ChunkPlan
from litecache.kernels.triton_common import (
    LOG2E,
    await_previous,
    cache_arguments,
    finish,
    fold_tile,
    layer_constants,
    load_rows,
    normalise_query,
    pad_dim,
    store_rows,
    use_pdl,
)
from litecache.kernels.triton_decode import merge_kernel
from litecache.kernels.tuning import ChunkConfig, PrefillConfig, prefill_config

_MANY_PAIRS = 256
"""Pairs of chunk and KV head from which a program merges more rows."""


@triton.jit(
    do_not_specialize=["lse_head", "table_stride", "window", "first_seq", "least", "floor"],
    do_not_specialize_on_alignment=["tables_ptr", "contexts_ptr", "starts_ptr"],
)
def _prefill_kernel(
    q_ptr, out_ptr, lse_ptr, q_token, q_head, o_token, o_head, lse_head,
    k_ptr, v_ptr, k_block, k_head, v_block, v_head,
    ks_ptr, vs_ptr, ks_block, vs_block,
    tables_ptr, table_stride, contexts_ptr, starts_ptr, sinks_ptr, slopes_ptr,
    scale, softcap, window, first_seq, least, floor,
    seqs_ptr, ends_ptr, owner_ptr, partial_ptr, state_ptr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr,
    QUANTISED: tl.constexpr, ALIKE: tl.constexpr, LSE: tl.constexpr,
    STAGES: tl.constexpr, KV_HEADS: tl.constexpr, CUT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if not CUT:
        pieces: tl.constexpr = 1
        kv_head = tl.program_id(0)
        seq = first_seq + tl.program_id(2)
        first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    else:
        owner = tl.load(owner_ptr + tl.program_id(0))
        seq = tl.maximum(owner, 0)
        pieces_before = tl.load(ends_ptr + seq)
        pieces = tl.load(ends_ptr + seq + 1) - pieces_before
        piece = tl.program_id(0) - pieces_before * KV_HEADS
        kv_head = piece // tl.maximum(pieces, 1)
        piece -= kv_head * pieces
        first_row = 0
    first_token = tl.load(starts_ptr + seq)
    queries = tl.load(starts_ptr + seq + 1) - first_token
    context = tl.load(contexts_ptr + seq)
    if CUT:
        seq = tl.load(seqs_ptr + seq)
        queries = tl.where(owner < 0, 0, queries)
    else:
        queries = tl.where(queries < least, 0, queries)
    await_previous(PDL)
    num_rows = queries * GROUP
    if first_row < num_rows:
        row = first_row + tl.arange(0, BLOCK_M)
        q = load_rows(
            q_ptr, q_token, q_head, first_token, kv_head, first_row, num_rows,
            BLOCK_M, GROUP, D, D_PAD,
        )  # fmt: skip
        q, q_factor = normalise_query(q, QUANTISED)
        q_position = context - queries + row // GROUP
        head = kv_head * GROUP + row % GROUP
        slope = q_factor
        if ALIBI:
            slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
        qk_scale = scale if SOFTCAP else scale * LOG2E

        low_position = context - queries + first_row // GROUP
        last_row = tl.minimum(first_row + BLOCK_M, num_rows) - 1
        end_key = tl.minimum(context - queries + last_row // GROUP + 1, context)
        first_key = floor
        if WINDOWED:
            first_key = tl.maximum(first_key, low_position - window + 1)
        low = first_key // BLOCK_N * BLOCK_N
        stop_key = end_key
        # Keys before this are seen by all rows; `floor` is a multiple of the tile.
        full_end = (low_position + 1) // BLOCK_N * BLOCK_N
        if CUT:
            share = tl.cdiv(tl.cdiv(end_key, BLOCK_N) - low // BLOCK_N, pieces) * BLOCK_N
            low += piece * share
            stop_key = tl.minimum(low + share, end_key)
            full_end = tl.minimum(full_end, stop_key)
        full_end = tl.maximum(full_end, low)
        if WINDOWED:
            full_end = low

        acc = tl.zeros((BLOCK_M, DV_PAD), tl.float32)
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
        k_base = k_ptr + kv_head.to(tl.int64) * k_head
        v_base = v_ptr + kv_head.to(tl.int64) * v_head
        ks_base, vs_base = ks_ptr, vs_ptr
        if QUANTISED:
            ks_base += kv_head * PAGE
            vs_base += kv_head * PAGE
        for start in tl.range(low, full_end, BLOCK_N, num_stages=STAGES):
            acc, peak, total = fold_tile(
                acc, peak, total, q, q_factor, q_position, slope,
                start, first_key, end_key, table_ptr,
                k_base, v_base, k_block, v_block, ks_base, vs_base, ks_block, vs_block,
                qk_scale, softcap, window,
                BLOCK_N, PAGE, D, D_PAD, DV, DV_PAD,
                False, True, WINDOWED, ALIKE, SOFTCAP, ALIBI, QUANTISED,
            )  # fmt: skip
        for start in tl.range(full_end, stop_key, BLOCK_N, num_stages=STAGES):
            acc, peak, total = fold_tile(
                acc, peak, total, q, q_factor, q_position, slope,
                start, first_key, end_key, table_ptr,
                k_base, v_base, k_block, v_block, ks_base, vs_base, ks_block, vs_block,
                qk_scale, softcap, window,
                BLOCK_N, PAGE, D, D_PAD, DV, DV_PAD,
                True, True, WINDOWED, ALIKE, SOFTCAP, ALIBI, QUANTISED,
            )  # fmt: skip

        if pieces > 1:
            line = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
            dim = tl.arange(0, DV_PAD)
            tl.store(partial_ptr + (line * DV_PAD)[:, None] + dim[None, :], acc)
            tl.store(state_ptr + line * 2, peak)
            tl.store(state_ptr + line * 2 + 1, total)
        else:
            sink = peak
            if SINKS:
                sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
            result = finish(acc, peak, total, sink, SINKS)
            store_rows(
                out_ptr, o_token, o_head, result, first_token, kv_head, first_row, num_rows,
                BLOCK_M, GROUP, DV, DV_PAD,
            )  # fmt: skip
        if LSE:
            tl.store(
                lse_ptr + head * lse_head + first_token + row // GROUP,
                (peak + tl.log2(total)) / LOG2E,
                mask=row < num_rows,
            )


def prefill(
    layer: Attention,
    metadata: AttentionMetadata,
    first_seq: int,
    out: torch.Tensor,
    config: PrefillConfig | None = None,
    *,
    least: int = 1,
    floor: int = 0,
    lse: torch.Tensor | None = None,
) -> None:
    """Attends the sequences from `first_seq` on.

    Args:
        layer: see `litecache.kernels.paged_attention`.
        metadata: the step.
        first_seq: the first sequence to attend.
        out: `[T, num_heads, v_dim]`; rows of those sequences are written, all of them.
        config: row tile, key tile, warps and stages, None = from the table.
        least: sequences of fewer queries are left out: `attend_chunks` attends them.
        floor: keys before this position are left out: someone else attends them. A multiple of 256.
        lse: float32 `[num_heads, T]`, receives the log of the sum of exponentials.
    """
    geometry = layer.geometry
    if config is None:
        dim = max(geometry.k_dim, geometry.v_dim)
        config = prefill_config(layer.query.device, dim, geometry.dtype.itemsize)
    tiles = triton.cdiv(metadata.max_query_len * geometry.group, config.block_m)
    _prefill_kernel[(geometry.kv_heads, tiles, metadata.num_seqs - first_seq)](
        *_tensors(layer, out, lse), metadata.block_tables, metadata.block_tables.stride(0),
        metadata.context_lens, metadata.cu_seqlens_q, *_scores(layer), first_seq, least, floor,
        None, None, None, None, None, **_constants(layer, config),
        LSE=lse is not None, CUT=False, PDL=False,
    )  # fmt: skip


def attend_chunks(layer: Attention, plan: ChunkPlan, out: torch.Tensor) -> None:
    """Attends the sequences whose keys a plan cuts into pieces.

    Args:
        layer: see `litecache.kernels.paged_attention`.
        plan: from `plan_chunks`.
        out: `[T, num_heads, v_dim]`; rows of those sequences are written, all of them.
    """
    geometry, config = layer.geometry, plan.config
    pdl = use_pdl(layer.query.device, plan.tokens)
    constants = _constants(layer, config)
    _prefill_kernel[(plan.owner.shape[0],)](
        *_tensors(layer, out, None), plan.tables, plan.tables.stride(0), plan.contexts,
        plan.starts, *_scores(layer), 0, 0, 0,
        plan.seqs, plan.ends, plan.owner, plan.partial, plan.state, **constants,
        LSE=False, CUT=True, PDL=pdl, maxnreg=config.registers,
        # The plan is read before the wait, so the kernel right behind the plan starts after it.
        launch_pdl=pdl and not plan.fresh,
    )  # fmt: skip
    plan.fresh = False
    v_pad, pairs = constants["DV_PAD"], plan.contexts.shape[0] * geometry.kv_heads
    # Few pairs have many pieces; of many most are not cut, and their programs only come and go.
    tile = min(8 if pairs <= _MANY_PAIRS else 32, config.block_m)
    merge_kernel[(pairs, config.block_m // tile)](
        plan.partial, plan.state, out, out.stride(0), out.stride(1), layer.sinks, plan.starts,
        plan.ends, plan.cuts, plan.owner.shape[0],
        # Half the rows: a segment has one piece here, and two where decode cuts.
        KV_HEADS=geometry.kv_heads, GROUP=geometry.group, ROWS=config.block_m // 2, TILE=tile,
        DV=geometry.v_dim, DV_PAD=v_pad, SINKS=layer.sinks is not None,
        MERGE=max(1, min(16, 8192 // (tile * v_pad))), PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip


def _tensors(layer: Attention, out: torch.Tensor, lse: torch.Tensor | None) -> tuple[Any, ...]:
    query = layer.query
    return (
        query, out, lse, query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        lse.stride(0) if lse is not None else 0,
        *cache_arguments(layer.k_cache, layer.v_cache, layer.k_scale, layer.v_scale),
    )  # fmt: skip


def _scores(layer: Attention) -> tuple[Any, ...]:
    return (
        layer.sinks, layer.alibi_slopes, layer.scale, layer.softcap or 1.0, layer.window or 0
    )  # fmt: skip


def _constants(layer: Attention, config: PrefillConfig | ChunkConfig) -> dict[str, Any]:
    geometry = layer.geometry
    return {
        **layer_constants(layer), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "D_PAD": pad_dim(geometry.k_dim), "DV_PAD": pad_dim(geometry.v_dim),
        "KV_HEADS": geometry.kv_heads, "STAGES": config.num_stages, "num_warps": config.num_warps,
    }  # fmt: skip


@triton.jit(do_not_specialize=["a_lse_head", "b_lse_head"])
def _merge_two_kernel(
    a_ptr, a_token, a_head, a_lse_ptr, a_lse_head,
    b_ptr, b_token, b_head, b_lse_ptr, b_lse_head,
    out_ptr, out_token, out_head,
    HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HEADS_PAD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_PAD)
    dim = tl.arange(0, D_PAD)
    there = head < HEADS
    mask = there[:, None] & (dim < D)[None, :]
    a_lse = tl.load(a_lse_ptr + head * a_lse_head + token, mask=there, other=0.0)
    b_lse = tl.load(b_lse_ptr + head * b_lse_head + token, mask=there, other=0.0)
    a_share = 1.0 / (1.0 + tl.exp(b_lse - a_lse))
    a = tl.load(a_ptr + token * a_token + head[:, None] * a_head + dim[None, :], mask=mask)
    b = tl.load(b_ptr + token * b_token + head[:, None] * b_head + dim[None, :], mask=mask)
    merged = a.to(tl.float32) * a_share[:, None] + b.to(tl.float32) * (1.0 - a_share)[:, None]
    target = out_ptr + token * out_token + head[:, None] * out_head + dim[None, :]
    tl.store(target, merged.to(out_ptr.dtype.element_ty), mask=mask)


def merge_two(
    a: torch.Tensor, a_lse: torch.Tensor, b: torch.Tensor, b_lse: torch.Tensor, out: torch.Tensor
) -> None:
    """Attention over two sets of keys from the attention over each.

    Args:
        a: `[T, heads, dim]`, over the first set.
        a_lse: float32 `[heads, T]`, its log of the sum of exponentials.
        b: `[T, heads, dim]`, over the second set.
        b_lse: float32 `[heads, T]`.
        out: `[T, heads, dim]`, written.
    """
    tokens, heads, dim = a.shape
    _merge_two_kernel[(tokens,)](
        a, a.stride(0), a.stride(1), a_lse, a_lse.stride(0),
        b, b.stride(0), b.stride(1), b_lse, b_lse.stride(0),
        out, out.stride(0), out.stride(1),
        HEADS=heads, D=dim, D_PAD=triton.next_power_of_2(dim),
        HEADS_PAD=triton.next_power_of_2(heads), num_warps=4,
    )  # fmt: skip
