"""The small kernels between matrix products: norm, rotary with cache write, gated activation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from litecache.kernels.quantise import LARGEST_CODE
from litecache.kernels.triton_common import await_previous, cache_arguments, use_pdl
from litecache.kernels.triton_store import to_codes


@triton.jit
def _norm_kernel(x_ptr, weight_ptr, out_ptr, width, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    await_previous(PDL)
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    # Rounded before the weight as the model rounds it.
    normal = (x * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, weight * normal, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension of a contiguous `x` `[..., width]`."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    pdl = use_pdl(x.device, x.numel() // width)
    _norm_kernel[(x.numel() // width,)](
        x, weight, out, width, eps, BLOCK=block, PDL=pdl,
        num_warps=max(1, min(16, block // 512)), launch_pdl=pdl,
    )  # fmt: skip
    return out


@triton.jit
def _gate_kernel(x_ptr, out_ptr, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    await_previous(PDL)
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0)
    # Rounded after silu as the model rounds it.
    active = (gate * tl.sigmoid(gate)).to(up.dtype)
    tl.store(out_ptr + row * width + column, active * up, mask=inside)


def silu_and_multiply(x: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` for contiguous `x` `[T, 2 * width]`, the gate first."""
    width = x.shape[1] // 2
    out = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
    pdl = use_pdl(x.device, x.shape[0])
    _gate_kernel[(x.shape[0], triton.cdiv(width, 1024))](
        x, out, width, BLOCK=1024, PDL=pdl, num_warps=4, launch_pdl=pdl
    )
    return out


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _rotary_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, eps,
    k_ptr, v_ptr, k_block, k_head, v_block, v_head, ks_ptr, vs_ptr, ks_block, vs_block, slots_ptr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROT: tl.constexpr,
    HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, PAGE: tl.constexpr, NORM: tl.constexpr,
    LARGEST: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    await_previous(PDL)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total: tl.constexpr = HEADS + 2 * KV_HEADS
    there = head < total
    rotated = head < HEADS + KV_HEADS
    half: tl.constexpr = ROT // 2
    low = tl.arange(0, HALF_PAD)
    inside = there[:, None] & (low < half)[None, :]
    line = qkv_ptr + (token * total + head)[:, None] * DIM
    first = tl.load(line + low[None, :], mask=inside, other=0.0)
    second = tl.load(line + half + low[None, :], mask=inside, other=0.0)
    dtype = first.dtype
    a, b = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DIM + eps)[:, None]
        is_query = (head < HEADS)[:, None]
        fits = (low < half)[None, :]
        wq1 = tl.load(q_weight_ptr + low[None, :], mask=fits, other=0.0)
        wq2 = tl.load(q_weight_ptr + half + low[None, :], mask=fits, other=0.0)
        wk1 = tl.load(k_weight_ptr + low[None, :], mask=fits, other=0.0)
        wk2 = tl.load(k_weight_ptr + half + low[None, :], mask=fits, other=0.0)
        a = ((a * scale).to(dtype) * tl.where(is_query, wq1, wk1)).to(tl.float32)
        b = ((b * scale).to(dtype) * tl.where(is_query, wq2, wk2)).to(tl.float32)
    cos_line = cos_ptr + token * ROT + low
    sin_line = sin_ptr + token * ROT + low
    cos1 = tl.load(cos_line, mask=low < half, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_line + half, mask=low < half, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_line, mask=low < half, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_line + half, mask=low < half, other=0.0).to(tl.float32)[None, :]
    out1 = (a * cos1 - b * sin1).to(dtype)
    out2 = (b * cos2 + a * sin2).to(dtype)
    turn = inside & rotated[:, None]
    tl.store(line + low[None, :], out1, mask=turn)
    tl.store(line + half + low[None, :], out2, mask=turn)

    slot = tl.load(slots_ptr + token)
    page, offset = slot // PAGE, slot % PAGE
    kv_head = head - HEADS
    is_key = (kv_head >= 0) & rotated
    is_value = there & (kv_head >= KV_HEADS)
    if DIM > ROT:
        # The part of a head that no rotation touches, copied as it is.
        rest = tl.arange(0, REST_PAD)
        past = there[:, None] & (rest < DIM - ROT)[None, :]
        tail = tl.load(line + ROT + rest[None, :], mask=past, other=0.0)
    k_type = k_ptr.dtype.element_ty
    if LARGEST > 0:
        out1 = tl.where(is_key[:, None], out1, first).to(tl.float32)
        out2 = tl.where(is_key[:, None], out2, second).to(tl.float32)
        peak = tl.maximum(tl.max(tl.abs(out1), 1), tl.max(tl.abs(out2), 1))
        if DIM > ROT:
            tail = tail.to(tl.float32)
            peak = tl.maximum(peak, tl.max(tl.abs(tail), 1))
        scale = tl.div_rn(peak, LARGEST)
        k_place = page * ks_block + kv_head * PAGE + offset
        tl.store(ks_ptr + k_place, scale, mask=is_key)
        v_place = page * vs_block + (kv_head - KV_HEADS) * PAGE + offset
        tl.store(vs_ptr + v_place, scale, mask=is_value)
        out1 = to_codes(out1, scale, k_type)
        out2 = to_codes(out2, scale, k_type)
        first, second = out1, out2
        if DIM > ROT:
            tail = to_codes(tail, scale, k_type)
    k_line = k_ptr + page * k_block + (kv_head.to(tl.int64) * k_head + offset * DIM)[:, None]
    key_mask = inside & is_key[:, None]
    tl.store(k_line + low[None, :], out1.to(k_type), mask=key_mask)
    tl.store(k_line + half + low[None, :], out2.to(k_type), mask=key_mask)
    v_line = v_ptr + page * v_block + (
        (kv_head - KV_HEADS).to(tl.int64) * v_head + offset * DIM
    )[:, None]  # fmt: skip
    value_mask = inside & is_value[:, None]
    tl.store(v_line + low[None, :], first.to(k_type), mask=value_mask)
    tl.store(v_line + half + low[None, :], second.to(k_type), mask=value_mask)
    if DIM > ROT:
        tail = tail.to(k_type)
        tl.store(k_line + ROT + rest[None, :], tail, mask=past & is_key[:, None])
        tl.store(v_line + ROT + rest[None, :], tail, mask=past & is_value[:, None])


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    *,
    num_heads: int,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> None:
    """Norm and rotate queries and keys in place, and write keys and values to their slots.

    Args:
        qkv: `[T, (num_heads + 2 * kv_heads) * dim]`, contiguous; overwritten.
        cos: `[T, rotary_dim]`, contiguous; heads rotate their first `rotary_dim` elements.
        sin: likewise.
        k_cache: `[num_blocks, kv_heads, block_size, dim]`, a layer's view; eight-bit ones are
            quantised on the way, as `store_kv` does it.
        v_cache: likewise, of the same dim.
        slots: int64 `[T]`.
        k_scale: float32 `[num_blocks, kv_heads, block_size]` of an eight-bit pool, else None.
        v_scale: likewise.
        num_heads: of the queries.
        norm: weights of the query and key norms over `dim` and their epsilon; only with a
            rotation over the whole head.
    """
    kv_heads, page, dim = k_cache.shape[1:]
    rotary = cos.shape[-1]
    q_weight, k_weight, eps = norm if norm is not None else (None, None, 0.0)
    rows = 8 if qkv.shape[0] > 64 else 2
    pdl = use_pdl(qkv.device, qkv.shape[0])
    _rotary_kernel[(qkv.shape[0], triton.cdiv(num_heads + 2 * kv_heads, rows))](
        qkv, cos, sin, q_weight, k_weight, eps,
        *cache_arguments(k_cache, v_cache, k_scale, v_scale), slots,
        HEADS=num_heads, KV_HEADS=kv_heads, DIM=dim, ROT=rotary,
        HALF_PAD=triton.next_power_of_2(rotary // 2),
        REST_PAD=triton.next_power_of_2(max(1, dim - rotary)),
        PAGE=page, NORM=norm is not None, LARGEST=LARGEST_CODE.get(k_cache.dtype, 0.0),
        ROWS=rows, PDL=pdl,
        num_warps=1 if rows == 2 else 4, launch_pdl=pdl,
    )  # fmt: skip
