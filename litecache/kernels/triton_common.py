"""What the Triton attention kernels share: the online softmax over tiles of paged keys.

Rows of a tile are the queries of a sequence times the query heads of one KV head (GQA packing):
row `r` is query `r // GROUP`, head `kv_head * GROUP + r % GROUP`. Scores are kept in units of
log2, so that `exp2` serves.

Programmatic dependent launch: a kernel begins while the one before it still runs.

On Hopper and later a launch may carry the attribute; the kernel's programs then move in as those of
the kernel before leave, and wait inside for its results. What hides behind the wait is the launch
itself and every read that does not depend on the kernel before. Three rules keep that right:

1. Before `await_previous` a kernel reads only what was written at least two kernels earlier
   (weights, block tables, plans, keys of earlier steps), and writes nothing.
2. Every program waits, and only then calls `let_next_begin`. So whoever runs before its own wait
   knows that all kernels but the last one are complete.
3. Kernels of other libraries are launched without the attribute: they wait for everything.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from litecache.kernels.metadata import Attention

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter, on the CPU."""

# Globals that kernels read must be constexpr.
_EXACT_DOT = tl.constexpr(INTERPRETED)
_NO_ASM = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)

MOST_TOKENS = 256
"""Launches for more tokens run so long that hiding their beginning gives nothing."""


@triton.jit
def dot(a, b):
    """`a @ b` in float32; the interpreter's bfloat16 product is wrong, so it gets float32."""
    if _EXACT_DOT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def dot_onto(a, b, acc):
    """`acc + a @ b` in float32."""
    if _EXACT_DOT:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def widen(codes):
    """int8 or fp8 codes as float16, exactly.

    Converting an int8 by the conversion unit is too slow to keep up with memory, so four codes at
    once are dropped into the mantissa of 1024.0 and the offset is subtracted.
    """
    if codes.dtype != tl.int8 or _NO_ASM:
        return codes.to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 u, lo, hi, magic;
            xor.b32 u, $2, 0x80808080;
            mov.b32 magic, 0x64646464;
            prmt.b32 lo, u, magic, 0x5140;
            prmt.b32 hi, u, magic, 0x5342;
            mov.b32 magic, 0x64806480;
            sub.f16x2 $0, lo, magic;
            sub.f16x2 $1, hi, magic;
            }
            """,
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )


@triton.jit
def load_pages(table_ptr, index):
    """Entries of a block table, as int64.

    Not `tl.load`: Triton's pipeliner would give the table a stage of its own ahead of the keys,
    which halves the key tiles in flight. The entries sit in L1 nearly always.
    """
    if _NO_ASM:
        return tl.load(table_ptr + index).to(tl.int64)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];",
            "=r,l",
            [(table_ptr + index).to(tl.int64)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        ).to(tl.int64)


@triton.jit
def load_rows(
    q_ptr, stride_token, stride_head, first_token, kv_head, first_row, num_rows,
    BLOCK_M: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    OFFSET: tl.constexpr = 0, STEP: tl.constexpr = 1,
):  # fmt: skip
    """Queries of a row tile, `[BLOCK_M, D_PAD / STEP]`: every `STEP`th dimension from `OFFSET`.

    Zeros where there is no row or dimension.
    """
    row = first_row + tl.arange(0, BLOCK_M)
    dim = OFFSET + tl.arange(0, D_PAD // STEP) * STEP
    token = (first_token + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    place = token[:, None] * stride_token + head[:, None] * stride_head + dim[None, :]
    return tl.load(q_ptr + place, mask=(row < num_rows)[:, None] & (dim < D)[None, :], other=0.0)


@triton.jit
def store_rows(
    out_ptr, stride_token, stride_head, rows, first_token, kv_head, first_row, num_rows,
    BLOCK_M: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_rows`."""
    row = first_row + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, DV_PAD)
    token = (first_token + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    place = token[:, None] * stride_token + head[:, None] * stride_head + dim[None, :]
    mask = (row < num_rows)[:, None] & (dim < DV)[None, :]
    tl.store(out_ptr + place, rows.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fold_tile(
    acc, peak, total, q, q_factor, q_position, slope,
    start, first_key, end_key, table_ptr,
    k_ptr, v_ptr, k_stride, v_stride, ks_ptr, vs_ptr, ks_stride, vs_stride,
    qk_scale, softcap, window,
    BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, ALIKE: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """Folds keys `start .. start + BLOCK_N` into a row tile's running softmax.

    `acc` is the unnormalised sum, `peak` the largest score in log2 units, `total` the sum of
    weights. `MASKED=False` promises that every row sees every key of the tile; `ALIKE` that keys
    and values have the same block stride and dimension.
    """
    column = start + tl.arange(0, BLOCK_N)
    k_dim = tl.arange(0, D_PAD)
    v_dim = tl.arange(0, DV_PAD)
    token = column
    if MASKED:
        # Slots beyond the context may hold NaN, and 0 * NaN would reach the sum. Reading the last
        # live key again instead costs less than a predicate on every load.
        token = tl.minimum(token, end_key - 1)
        if WINDOWED:
            token = tl.maximum(token, first_key)
    slot = token % PAGE
    page = load_pages(table_ptr, token // PAGE)
    k_place = (page * k_stride + slot * D)[:, None] + k_dim[None, :]
    v_place = k_place
    if not ALIKE:
        v_place = (page * v_stride + slot * DV)[:, None] + v_dim[None, :]
    if D == D_PAD:
        k = tl.load(k_ptr + k_place)
    else:
        k = tl.load(k_ptr + k_place, mask=(k_dim < D)[None, :], other=0.0)
    if DV == DV_PAD:
        v = tl.load(v_ptr + v_place)
    else:
        v = tl.load(v_ptr + v_place, mask=(v_dim < DV)[None, :], other=0.0)
    if QUANTISED:
        k_factor = tl.load(ks_ptr + page * ks_stride + slot)
        v_factor = tl.load(vs_ptr + page * vs_stride + slot)
        scores = dot(q, tl.trans(widen(k))) * q_factor[:, None] * (k_factor * qk_scale)[None, :]
    else:
        scores = dot(q, tl.trans(k.to(q.dtype)))
    # Where nothing else touches the scores their scale goes into the exponent's multiply-add.
    plain: tl.constexpr = not (QUANTISED or SOFTCAP or ALIBI)
    if (SOFTCAP or ALIBI) and not QUANTISED:
        scores *= qk_scale
    if SOFTCAP:
        # tanh by exp2, with an argument that cannot overflow; `qk_scale` is free of log2(e) here.
        decay = tl.exp2(tl.abs(scores) * (-2.0 * LOG2E / softcap))
        magnitude = (1.0 - decay) / (1.0 + decay)
        scores = tl.where(scores < 0, -magnitude, magnitude) * (softcap * LOG2E)
    if ALIBI:
        scores += slope[:, None] * (column[None, :] - q_position[:, None]).to(tl.float32)
    if MASKED:
        visible = (column < end_key)[None, :]
        if CAUSAL:
            visible = visible & (column[None, :] <= q_position[:, None])
        if WINDOWED:
            visible = visible & (column[None, :] > q_position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * (qk_scale if plain else 1.0))
    # A row that has seen nothing yet has peak -inf, and -inf - -inf is NaN.
    safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    if plain:
        weights = tl.exp2(scores * qk_scale - safe_peak[:, None])
    else:
        weights = tl.exp2(scores - safe_peak[:, None])
    decay_old = tl.exp2(peak - safe_peak)
    total = total * decay_old + tl.sum(weights, 1)
    acc = acc * decay_old[:, None]
    if QUANTISED:
        # Scales relative to the tile's largest keep the weights inside float16's range.
        largest = tl.max(v_factor, 0)
        relative = v_factor / tl.where(largest > 0, largest, 1.0)
        part = dot((weights * relative[None, :]).to(tl.float16), widen(v))
        acc += part * largest
    else:
        acc += dot(weights.to(q.dtype), v.to(q.dtype))
    return acc, new_peak, total


@triton.jit
def normalise_query(q, QUANTISED: tl.constexpr):
    """For quantised pools: rows as float16 of magnitude at most 1, and the factor taken out."""
    wide = q.to(tl.float32)
    factor = tl.max(tl.abs(wide), 1)
    if QUANTISED:
        factor = tl.where(factor > 0, factor, 1.0)
        return (wide / factor[:, None]).to(tl.float16), factor
    else:
        return q, factor


@triton.jit
def finish(acc, peak, total, sink, SINKS: tl.constexpr):
    """Normalises a row tile; rows that saw nothing become zeros."""
    if SINKS:
        top = tl.maximum(peak, sink)
        acc = acc * tl.exp2(peak - top)[:, None]
        total = total * tl.exp2(peak - top) + tl.exp2(sink - top)
    return acc / tl.where(total > 0, total, 1.0)[:, None]


def pad_dim(dim: int, quantised: bool = False) -> int:
    """A head's dimension as a tile has it."""
    # The matrix units want 16 along a product; a word of an eight-bit pool holds four codes.
    padded: int = triton.next_power_of_2(dim)
    return max(64 if quantised else 16, padded)


def cache_arguments(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[Any, ...]:
    """A layer's views of the pool as kernels take them: pointers, strides, scales and theirs."""
    return (
        k_cache, v_cache, k_cache.stride(0), k_cache.stride(1),
        v_cache.stride(0), v_cache.stride(1), k_scale, v_scale,
        k_scale.stride(0) if k_scale is not None else 0,
        v_scale.stride(0) if v_scale is not None else 0,
    )  # fmt: skip


def layer_constants(layer: Attention) -> dict[str, Any]:
    """What the attention kernels are specialised on in a layer, whoever of them attends it."""
    geometry, page = layer.geometry, layer.k_cache.shape[2]
    alike = layer.k_cache.stride(0) == layer.v_cache.stride(0) and geometry.k_dim == geometry.v_dim
    return {
        "GROUP": geometry.group, "PAGE": page, "D": geometry.k_dim, "DV": geometry.v_dim,
        "WINDOWED": layer.window is not None, "SOFTCAP": layer.softcap is not None,
        "SINKS": layer.sinks is not None, "ALIBI": layer.alibi_slopes is not None,
        "QUANTISED": layer.k_scale is not None, "ALIKE": alike,
    }  # fmt: skip


def use_pdl(device: torch.device, tokens: int) -> bool:
    """Whether a kernel for so many tokens is launched that way."""
    return tokens <= MOST_TOKENS and _supports_pdl(device)


@cache
def _supports_pdl(device: torch.device) -> bool:
    """`LITECACHE_PDL=0` turns it off."""
    if device.type != "cuda" or os.environ.get("LITECACHE_PDL", "1") == "0":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


_COMPILING_AHEAD = threading.Lock()


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Inside, this thread's launches of our kernels compile and do not run; outputs are undefined.

    What is not compiled yet is compiled by threads beside the caller, all of it by the end: Triton
    leaves Python's lock for most of the time. Other threads launch as ever.

    Raises:
        NotImplementedError: this Triton compiles where it launches.
    """
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None or INTERPRETED:
        raise NotImplementedError("this Triton compiles where it launches")
    caller = threading.get_ident()

    def compile_only(kernel: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        ours = threading.get_ident() == caller and kernel.module.startswith("litecache.")
        return run(kernel, *args, warmup=warmup or ours, **options)

    with _COMPILING_AHEAD, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, mode(pool):
        run = triton.JITFunction.run
        triton.JITFunction.run = compile_only
        try:
            yield
        finally:
            triton.JITFunction.run = run


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Returns when the kernel before this one has ended and its writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch_to_l2(addresses, num_bytes):
    """Asks for `num_bytes` (a multiple of 16) at each address; nobody waits for them.

    Args:
        addresses: int64 tensor of 16-byte aligned global addresses, best one a thread.
        num_bytes: int32.
    """
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // $0",
        "=r,l,r",
        [addresses, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
