"""Gathers a sequence's paged keys and values into contiguous tensors, and merges two attentions.

What the library path of prefill needs around torch's own attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TOKENS = 32


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
    _gather_kernel[(triton.cdiv(count, _TOKENS), kv_heads)](
        cache, cache.stride(0), cache.stride(1), scale,
        scale.stride(0) if scale is not None else 0, table, out, out.stride(0), first, count,
        PAGE=page, D=dim, D_PAD=triton.next_power_of_2(dim), TOKENS=_TOKENS,
        QUANTISED=scale is not None, num_warps=4,
    )  # fmt: skip
    return out


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
