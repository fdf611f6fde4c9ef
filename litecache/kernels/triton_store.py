"""Cache writes and block copies for Triton: pure data movement, quantising on the way if asked."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from litecache.kernels.quantise import LARGEST_CODE
from litecache.kernels.triton_common import cache_arguments

_ROWS = 16
"""Heads of tokens a program moves."""
_COPY_ELEMENTS = 2048
"""Eight-byte words a program of `copy_blocks` moves."""


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
        scale = tl.div_rn(tl.max(tl.abs(wide), 1), LARGEST)
        codes = tl.div_rn(wide, tl.where(scale > 0, scale, 1.0)[:, None])
        if cache_ptr.dtype.element_ty == tl.int8:
            codes = tl.minimum(tl.maximum(tl.floor(codes + 0.5), -127.0), 127.0)
        tl.store(place, codes.to(cache_ptr.dtype.element_ty), mask=mask)
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


@triton.jit
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
