"""Decode attention over eight-bit pools: codes are widened on their way into the matrix units.

An eight-bit tile is read as 32-bit words of four codes. Word `i` holds dimensions `4i .. 4i + 3`,
so four products over every fourth dimension, with the queries cut the same way, make one; each
thread widens whole registers with byte permutes, and no byte is ever addressed on its own. int8
codes are dropped into the mantissa of 1024.0, which leaves `code + 1152`; the constant is taken
out of the products. The conversion unit would be too slow to keep up with memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from litecache.kernels.triton_common import INTERPRETED, LOG2E, dot, dot_onto, load_pages, load_rows

_NO_ASM = tl.constexpr(INTERPRETED)
_OFFSET = tl.constexpr(1152.0)


@triton.jit
def _widen_byte(words, BYTE: tl.constexpr, FLOAT: tl.constexpr):
    """What `unpack` does, for the interpreter."""
    if FLOAT:
        return ((words >> (8 * BYTE)) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return (((words << (24 - 8 * BYTE)) >> 24).to(tl.float32) + _OFFSET).to(tl.float16)


@triton.jit
def unpack(words, FLOAT: tl.constexpr):
    """The four codes of each word as float16: e4m3 exactly, int8 plus 1152."""
    if _NO_ASM:
        a = _widen_byte(words, 0, FLOAT).to(tl.float16)
        b = _widen_byte(words, 1, FLOAT).to(tl.float16)
        c = _widen_byte(words, 2, FLOAT).to(tl.float16)
        d = _widen_byte(words, 3, FLOAT).to(tl.float16)
        return a, b, c, d
    elif FLOAT:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            .reg .b16 lo, hi;
            prmt.b32 t, $4, $5, 0x5140;
            mov.b32 {lo, hi}, t;
            cvt.rn.f16x2.e4m3x2 $0, lo;
            cvt.rn.f16x2.e4m3x2 $1, hi;
            prmt.b32 t, $4, $5, 0x7362;
            mov.b32 {lo, hi}, t;
            cvt.rn.f16x2.e4m3x2 $2, lo;
            cvt.rn.f16x2.e4m3x2 $3, hi;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            prmt.b32 t, $4, $5, 0x0400;
            lop3.b32 $0, t, 0x00ff00ff, 0x64806480, 0x6a;
            prmt.b32 t, $4, $5, 0x0501;
            lop3.b32 $1, t, 0x00ff00ff, 0x64806480, 0x6a;
            prmt.b32 t, $4, $5, 0x0602;
            lop3.b32 $2, t, 0x00ff00ff, 0x64806480, 0x6a;
            prmt.b32 t, $4, $5, 0x0703;
            lop3.b32 $3, t, 0x00ff00ff, 0x64806480, 0x6a;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def _load_quarter(
    q_ptr, stride_token, stride_head, first_token, kv_head, num_rows,
    BLOCK_M: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    rows = load_rows(
        q_ptr, stride_token, stride_head, first_token, kv_head, 0, num_rows,
        BLOCK_M, GROUP, D, D_PAD, OFFSET, 4,
    )  # fmt: skip
    return rows.to(tl.float32)


@triton.jit
def attend_codes(
    q_ptr, q_token, q_head, first_token, kv_head, num_rows, q_position, slope,
    low, high, first_key, end_key, table_ptr,
    k_ptr, v_ptr, k_stride, v_stride, ks_ptr, vs_ptr, ks_stride, vs_stride,
    qk_scale, softcap, window,
    BLOCK_M: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    FLOAT: tl.constexpr, ALIKE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attends keys `low .. high` of one (sequence, KV head); pointers are to 32-bit words.

    Returns:
        The unnormalised sum `[BLOCK_M, DV_PAD]`, the peak in log2 units and the sum of weights.
    """
    q0 = _load_quarter(
        q_ptr, q_token, q_head, first_token, kv_head, num_rows, BLOCK_M, GROUP, D, D_PAD, 0
    )
    q1 = _load_quarter(
        q_ptr, q_token, q_head, first_token, kv_head, num_rows, BLOCK_M, GROUP, D, D_PAD, 1
    )
    q2 = _load_quarter(
        q_ptr, q_token, q_head, first_token, kv_head, num_rows, BLOCK_M, GROUP, D, D_PAD, 2
    )
    q3 = _load_quarter(
        q_ptr, q_token, q_head, first_token, kv_head, num_rows, BLOCK_M, GROUP, D, D_PAD, 3
    )
    # Rows of magnitude at most 1 fit float16 whatever the model's range.
    largest_q = tl.maximum(
        tl.maximum(tl.max(tl.abs(q0), 1), tl.max(tl.abs(q1), 1)),
        tl.maximum(tl.max(tl.abs(q2), 1), tl.max(tl.abs(q3), 1)),
    )
    q_factor = tl.where(largest_q > 0, largest_q, 1.0)
    q0 = (q0 / q_factor[:, None]).to(tl.float16)
    q1 = (q1 / q_factor[:, None]).to(tl.float16)
    q2 = (q2 / q_factor[:, None]).to(tl.float16)
    q3 = (q3 / q_factor[:, None]).to(tl.float16)
    bias = tl.zeros((BLOCK_M,), tl.float32)
    if not FLOAT:
        bias = tl.sum(q0.to(tl.float32) + q1.to(tl.float32), 1)
        bias = (bias + tl.sum(q2.to(tl.float32) + q3.to(tl.float32), 1)) * _OFFSET

    acc0 = tl.zeros((BLOCK_M, DV_PAD // 4), tl.float32)
    acc1 = tl.zeros((BLOCK_M, DV_PAD // 4), tl.float32)
    acc2 = tl.zeros((BLOCK_M, DV_PAD // 4), tl.float32)
    acc3 = tl.zeros((BLOCK_M, DV_PAD // 4), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    k_dim = tl.arange(0, D_PAD // 4)
    v_dim = tl.arange(0, DV_PAD // 4)
    for start in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_N)
        token = tl.minimum(column, end_key - 1)
        if WINDOWED:
            token = tl.maximum(token, first_key)
        slot = token % PAGE
        page = load_pages(table_ptr, token // PAGE)
        k_place = (page * k_stride + slot * (D // 4))[:, None] + k_dim[None, :]
        v_place = k_place
        if not ALIKE:
            v_place = (page * v_stride + slot * (DV // 4))[:, None] + v_dim[None, :]
        if D == D_PAD:
            k = tl.load(k_ptr + k_place)
        else:
            k = tl.load(k_ptr + k_place, mask=(k_dim < D // 4)[None, :], other=0)
        if DV == DV_PAD:
            v = tl.load(v_ptr + v_place)
        else:
            v = tl.load(v_ptr + v_place, mask=(v_dim < DV // 4)[None, :], other=0)
        k_factor = tl.load(ks_ptr + page * ks_stride + slot)
        v_factor = tl.load(vs_ptr + page * vs_stride + slot)
        k0, k1, k2, k3 = unpack(k, FLOAT)
        # Starting from minus the constant part leaves the products of the codes themselves.
        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) - bias[:, None]
        scores = dot_onto(q0, tl.trans(k0), scores)
        scores = dot_onto(q1, tl.trans(k1), scores)
        scores = dot_onto(q2, tl.trans(k2), scores)
        scores = dot_onto(q3, tl.trans(k3), scores)
        scores *= q_factor[:, None] * (k_factor * qk_scale)[None, :]
        if SOFTCAP:
            decay = tl.exp2(tl.abs(scores) * (-2.0 * LOG2E / softcap))
            magnitude = (1.0 - decay) / (1.0 + decay)
            scores = tl.where(scores < 0, -magnitude, magnitude) * (softcap * LOG2E)
        if ALIBI:
            scores += slope[:, None] * (column[None, :] - q_position[:, None]).to(tl.float32)
        visible = (column < end_key)[None, :]
        if CAUSAL:
            visible = visible & (column[None, :] <= q_position[:, None])
        if WINDOWED:
            visible = visible & (column[None, :] > q_position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - safe_peak[:, None])
        decay_old = tl.exp2(peak - safe_peak)
        total = total * decay_old + tl.sum(weights, 1)
        peak = new_peak
        # Scales relative to the tile's largest keep the weights inside float16's range.
        largest = tl.max(v_factor, 0)
        relative = v_factor / tl.where(largest > 0, largest, 1.0)
        narrow = (weights * relative[None, :]).to(tl.float16)
        v0, v1, v2, v3 = unpack(v, FLOAT)
        shift = tl.zeros((BLOCK_M,), tl.float32)
        if not FLOAT:
            shift = tl.sum(narrow.to(tl.float32), 1) * (_OFFSET * largest)
        acc0 = acc0 * decay_old[:, None] + (dot(narrow, v0) * largest - shift[:, None])
        acc1 = acc1 * decay_old[:, None] + (dot(narrow, v1) * largest - shift[:, None])
        acc2 = acc2 * decay_old[:, None] + (dot(narrow, v2) * largest - shift[:, None])
        acc3 = acc3 * decay_old[:, None] + (dot(narrow, v3) * largest - shift[:, None])
    interleaved = tl.join(tl.join(acc0, acc2), tl.join(acc1, acc3))
    return tl.reshape(interleaved, (BLOCK_M, DV_PAD)), peak, total
