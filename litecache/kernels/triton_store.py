"""Data movement for Triton: cache writes, block copies, blocks rewritten in
another form, and a sequence's tokens gathered in order.

Keys and values are quantised on the way where the target is an eight-bit pool.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from litecache.kernels.quantise import LARGEST_CODE, BlockForm
from litecache.kernels.triton_common import cache_arguments

_ROWS = 16
"""Heads of tokens a program moves."""
_CONVERTED_ROWS = 32
"""Heads of tokens that a program of `convert` rewrites."""
_GATHERED_TOKENS = 32
"""Tokens that a program of `gather` copies."""
_COPY_ELEMENTS = 2048
"""Eight-byte words a program of `copy_blocks` moves."""


@triton.jit
def to_codes(wide, scale, DTYPE: tl.constexpr):
    """Codes of float32 rows with a scale each."""
    codes = tl.div_rn(wide, tl.where(scale > 0, scale, 1.0)[:, None])
    if tl.int8 == DTYPE:
        codes = tl.minimum(tl.maximum(tl.floor(codes + 0.5), -127.0), 127.0)
    return codes.to(DTYPE)


@triton.jit
def _quantise(wide, LARGEST: tl.constexpr, DTYPE: tl.constexpr):
    """Codes and scales of float32 rows; `LARGEST` is the largest code."""
    scale = tl.div_rn(tl.max(tl.abs(wide), 1), LARGEST)
    return to_codes(wide, scale, DTYPE), scale


@triton.jit
def _store_side(
    src_ptr, src_token, src_head, cache_ptr, cache_block, cache_head, scale_ptr, scale_block,
    token, head, page, slot, there,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Moves rows of keys or of values; `LARGEST` is the largest code of a quantised pool, or 0."""
    dim = tl.arange(0, D_PAD)
    mask = there[:, None] & (dim < D)[None, :]
    rows = tl.load(
        src_ptr + (token * src_token + head * src_head)[:, None] + dim[None, :], mask=mask
    )
    place = cache_ptr + (page * cache_block + head * cache_head + slot * D)[:, None] + dim[None, :]
    if LARGEST > 0:
        wide = tl.where(mask, rows.to(tl.float32), 0.0)
        codes, scale = _quantise(wide, LARGEST, cache_ptr.dtype.element_ty)
        tl.store(place, codes, mask=mask)
        tl.store(scale_ptr + page * scale_block + head * PAGE + slot, scale, mask=there)
    else:
        tl.store(place, rows.to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slots_ptr"])
def _store_kernel(
    key_ptr, value_ptr, key_token, key_head, value_token, value_head,
    k_ptr, v_ptr, k_block, k_head, v_block, v_head, ks_ptr, vs_ptr, ks_block, vs_block,
    slots_ptr, num_rows,
    KV_HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    DV: tl.constexpr, DV_PAD: tl.constexpr, LARGEST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    token = (row // KV_HEADS).to(tl.int64)
    head = row % KV_HEADS
    where = tl.load(slots_ptr + token, mask=there, other=0)
    page = where // PAGE
    slot = where % PAGE
    _store_side(
        key_ptr, key_token, key_head, k_ptr, k_block, k_head, ks_ptr, ks_block,
        token, head, page, slot, there, D, D_PAD, PAGE, LARGEST,
    )  # fmt: skip
    _store_side(
        value_ptr, value_token, value_head, v_ptr, v_block, v_head, vs_ptr, vs_block,
        token, head, page, slot, there, DV, DV_PAD, PAGE, LARGEST,
    )  # fmt: skip


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
    num_tokens, kv_heads, k_dim = key.shape
    v_dim = value.shape[2]
    num_rows = num_tokens * kv_heads
    _store_kernel[(triton.cdiv(num_rows, _ROWS),)](
        key, value, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        *cache_arguments(k_cache, v_cache, k_scale, v_scale),
        slot_mapping, num_rows,
        KV_HEADS=kv_heads, PAGE=k_cache.shape[2],
        D=k_dim, D_PAD=triton.next_power_of_2(k_dim),
        DV=v_dim, DV_PAD=triton.next_power_of_2(v_dim),
        LARGEST=LARGEST_CODE.get(k_cache.dtype, 0.0), ROWS=_ROWS, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["src_ptr", "dst_ptr"])
def _copy_kernel(from_ptr, to_ptr, src_ptr, dst_ptr, words, BLOCK: tl.constexpr):
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    src = tl.load(src_ptr + tl.program_id(0)) * words
    dst = tl.load(dst_ptr + tl.program_id(0)) * words
    there = word < words
    tl.store(to_ptr + dst + word, tl.load(from_ptr + src + word, mask=there), mask=there)


def copy_rows(
    source: torch.Tensor, target: torch.Tensor, src: torch.Tensor, dst: torch.Tensor
) -> None:
    """Copies whole rows by a kernel; either side may be pinned host memory.

    Args:
        source: uint8 `[n, row_bytes]`, contiguous.
        target: uint8 `[m, row_bytes]`, contiguous.
        src: int64 `[k]` on the device, rows to read.
        dst: int64 `[k]` on the device, distinct rows to write; none of them is read.
    """
    if source.shape[1] % 8 == 0:
        source, target = source.view(torch.int64), target.view(torch.int64)
    words = source.shape[1]
    _copy_kernel[(src.shape[0], triton.cdiv(words, _COPY_ELEMENTS))](
        source, target, src, dst, words, BLOCK=_COPY_ELEMENTS, num_warps=4
    )


def copy_blocks(pool: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copies whole blocks; no block is both source and destination."""
    copy_rows(pool, pool, src, dst)


# parts of a list of blocks begin anywhere, and no request must wait for a compiler
@triton.jit(do_not_specialize_on_alignment=["wide_blocks_ptr", "code_blocks_ptr"])
def _convert_kernel(
    wide_ptr, codes_ptr, scale_ptr, wide_blocks_ptr, code_blocks_ptr,
    wide_block, wide_layer, wide_side, code_block, code_layer, code_side,
    scale_block, scale_layer,
    TOKENS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
    LARGEST: tl.constexpr, QUANTISE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    layer = tl.program_id(1) // 2
    side = tl.program_id(1) % 2
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, D_PAD)
    there = row < TOKENS
    mask = there[:, None] & (dim < D)[None, :]
    place = row[:, None] * D + dim[None, :]
    wide = tl.load(wide_blocks_ptr + index) * wide_block + layer * wide_layer + side * wide_side
    code = tl.load(code_blocks_ptr + index)
    scale_at = scale_ptr + code * scale_block + layer * scale_layer + side * TOKENS + row
    code = code * code_block + layer * code_layer + side * code_side
    if QUANTISE:
        values = tl.load(wide_ptr + wide + place, mask=mask, other=0.0).to(tl.float32)
        codes, scale = _quantise(values, LARGEST, codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + code + place, codes, mask=mask)
        tl.store(scale_at, scale, mask=there)
    else:
        scale = tl.load(scale_at, mask=there, other=0.0)
        codes = tl.load(codes_ptr + code + place, mask=mask).to(tl.float32)
        values = codes * scale[:, None]
        tl.store(wide_ptr + wide + place, values.to(wide_ptr.dtype.element_ty), mask=mask)


def convert(
    source: torch.Tensor,
    source_form: BlockForm,
    target: torch.Tensor,
    target_form: BlockForm,
    src: torch.Tensor,
    dst: torch.Tensor,
) -> None:
    """Rewrites blocks; see `litecache.kernels.quantise.convert_blocks`."""
    quantise = target_form.quantised
    sides = ((source, source_form, src), (target, target_form, dst))
    (wide, wide_form, wide_blocks), (codes, code_form, code_blocks) = (
        sides if quantise else sides[::-1]
    )
    wide_tokens, code_tokens = wide_form.tokens(wide), code_form.tokens(codes)
    scales = code_form.scales(codes)
    grid = (src.shape[0], 2 * wide_form.num_layers, triton.cdiv(wide_form.rows, _CONVERTED_ROWS))
    _convert_kernel[grid](
        wide_tokens, code_tokens, scales, wide_blocks, code_blocks,
        wide_tokens.stride(0), wide_tokens.stride(1), wide_tokens.stride(2),
        code_tokens.stride(0), code_tokens.stride(1), code_tokens.stride(2),
        scales.stride(0), scales.stride(1),
        TOKENS=wide_form.rows, D=wide_form.dim, D_PAD=triton.next_power_of_2(wide_form.dim),
        ROWS=_CONVERTED_ROWS, LARGEST=LARGEST_CODE[code_form.dtype], QUANTISE=quantise, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "count"], do_not_specialize_on_alignment=["table_ptr"])
def _gather_kernel(
    cache_ptr, cache_block, cache_head, scale_ptr, scale_block, table_ptr, out_ptr, out_head,
    first, count,
    PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TOKENS: tl.constexpr,
    QUANTISED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    index = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = index < count
    token = first + tl.minimum(index, count - 1)
    page = tl.load(table_ptr + token // PAGE).to(tl.int64)
    slot = token % PAGE
    dim = tl.arange(0, D_PAD)
    mask = there[:, None] & (dim < D)[None, :]
    place = (page * cache_block + head * cache_head + slot * D)[:, None] + dim[None, :]
    rows = tl.load(cache_ptr + place, mask=mask)
    if QUANTISED:
        scale = tl.load(scale_ptr + page * scale_block + head * PAGE + slot)
        rows = rows.to(tl.float32) * scale[:, None]
    target = head.to(tl.int64) * out_head + index[:, None] * D + dim[None, :]
    tl.store(out_ptr + target, rows.to(out_ptr.dtype.element_ty), mask=mask)


def gather(
    cache: torch.Tensor,
    scale: torch.Tensor | None,
    table: torch.Tensor,
    first: int,
    count: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Tokens `first .. first + count` of one sequence.

    Args:
        cache: `[num_blocks, kv_heads, block_size, dim]`, a layer's view of the pool.
        scale: float32 `[num_blocks, kv_heads, block_size]` of a quantised pool.
        table: int32 `[max_blocks]`, the sequence's block table.
        first: first token.
        count: how many, at least 1.
        dtype: of the result.

    Returns:
        `[kv_heads, count, dim]`, contiguous.
    """
    kv_heads, page, dim = cache.shape[1:]
    out = torch.empty(kv_heads, count, dim, dtype=dtype, device=cache.device)
    _gather_kernel[(triton.cdiv(count, _GATHERED_TOKENS), kv_heads)](
        cache, cache.stride(0), cache.stride(1), scale,
        scale.stride(0) if scale is not None else 0, table, out, out.stride(0), first, count,
        PAGE=page, D=dim, D_PAD=triton.next_power_of_2(dim), TOKENS=_GATHERED_TOKENS,
        QUANTISED=scale is not None, num_warps=4,
    )  # fmt: skip
    return out
