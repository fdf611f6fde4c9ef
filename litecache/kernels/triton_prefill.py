"""Prefill attention for Triton: many queries a sequence, over a paged prefix, variable lengths.

FlashAttention-2's loop (Dao, 2023) over tiles of paged keys. A program takes a tile of rows
(queries times the heads of one KV head), the last queries first, since they have most to do.
Tiles that every row sees entirely are folded without a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from litecache.kernels.metadata import Attention, AttentionMetadata
from litecache.kernels.triton_common import (
    LOG2E,
    cache_arguments,
    finish,
    fold_tile,
    layer_constants,
    load_rows,
    normalise_query,
    pad_dim,
    store_rows,
)
from litecache.kernels.tuning import PrefillConfig, prefill_config


@triton.jit(
    do_not_specialize=["table_stride", "window", "first_seq", "floor"],
    do_not_specialize_on_alignment=["tables_ptr", "contexts_ptr", "starts_ptr"],
)
def _prefill_kernel(
    q_ptr, out_ptr, lse_ptr, q_token, q_head, o_token, o_head, lse_head,
    k_ptr, v_ptr, k_block, k_head, v_block, v_head,
    ks_ptr, vs_ptr, ks_block, vs_block,
    tables_ptr, table_stride, contexts_ptr, starts_ptr, sinks_ptr, slopes_ptr,
    scale, softcap, window, first_seq, floor,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr,
    QUANTISED: tl.constexpr, ALIKE: tl.constexpr, LSE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq = first_seq + tl.program_id(2)
    first_token = tl.load(starts_ptr + seq)
    queries = tl.load(starts_ptr + seq + 1) - first_token
    context = tl.load(contexts_ptr + seq)
    first_row = tile * BLOCK_M
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
        # Keys before this are seen by all rows; `floor` is a multiple of the tile.
        full_end = tl.maximum((low_position + 1) // BLOCK_N * BLOCK_N, low)
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
        for start in tl.range(full_end, end_key, BLOCK_N, num_stages=STAGES):
            acc, peak, total = fold_tile(
                acc, peak, total, q, q_factor, q_position, slope,
                start, first_key, end_key, table_ptr,
                k_base, v_base, k_block, v_block, ks_base, vs_base, ks_block, vs_block,
                qk_scale, softcap, window,
                BLOCK_N, PAGE, D, D_PAD, DV, DV_PAD,
                True, True, WINDOWED, ALIKE, SOFTCAP, ALIBI, QUANTISED,
            )  # fmt: skip

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
        floor: keys before this position are left out: someone else attends them. A multiple of 256.
        lse: float32 `[num_heads, T]`, receives the log of the sum of exponentials.
    """
    query, geometry = layer.query, layer.geometry
    dims = (geometry.k_dim, geometry.v_dim)
    if config is None:
        config = prefill_config(query.device, max(dims), geometry.dtype.itemsize)
    tiles = triton.cdiv(metadata.max_query_len * geometry.group, config.block_m)
    _prefill_kernel[(geometry.kv_heads, tiles, metadata.num_seqs - first_seq)](
        query, out, lse, query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        lse.stride(0) if lse is not None else 0,
        *cache_arguments(layer.k_cache, layer.v_cache, layer.k_scale, layer.v_scale),
        metadata.block_tables, metadata.block_tables.stride(0), metadata.context_lens,
        metadata.cu_seqlens_q, layer.sinks, layer.alibi_slopes,
        layer.scale, layer.softcap or 1.0, layer.window or 0, first_seq, floor,
        **layer_constants(layer),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, D_PAD=pad_dim(dims[0]),
        DV_PAD=pad_dim(dims[1]), LSE=lse is not None, STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip


@triton.jit
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
