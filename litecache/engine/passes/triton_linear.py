"""Linear layers for a handful of tokens: the weights stream through once, at memory bandwidth.

Libraries tune matrix products for many tokens; with one to sixteen the time is that of reading the
weights. A program owns a few rows of the weight matrix and walks along them with several tiles in
flight. One token is multiplied and summed in registers; more tokens go through the tensor cores as
the narrow side of the product. Epilogues add a bias or the residual, or apply `silu(gate) * up`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MAX_TOKENS = 16


@dataclass(frozen=True)
class StreamConfig:
    """How a product is launched.

    Attributes:
        block_n: weight rows a program.
        block_k: columns a tile.
        num_warps: warps a program.
        num_stages: tiles in flight.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@triton.jit
def _row_sums(x_ptr, w_ptr, row, there, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
              STAGES: tl.constexpr):  # fmt: skip
    """`w[row] @ x` for one token, float32 `[BLOCK_N]`."""
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    base = w_ptr + row.to(tl.int64)[:, None] * K
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < K
        x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(
            base + column[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        acc += w.to(tl.float32) * x[None, :]
    return tl.sum(acc, 1)


@triton.jit
def _row_products(x_ptr, w_ptr, row, there, tokens, K, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """`w[row] @ x.T` for several tokens, float32 `[BLOCK_N, BLOCK_M]`."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    token = tl.arange(0, BLOCK_M)
    base = w_ptr + row.to(tl.int64)[:, None] * K
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < K
        x = tl.load(
            x_ptr + token[None, :] * K + column[:, None],
            mask=(token < tokens)[None, :] & inside[:, None],
            other=0.0,
        )
        w = tl.load(
            base + column[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        acc = tl.dot(w, x, acc, out_dtype=tl.float32)
    return acc


@triton.jit
def _stream_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, tokens, N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = row < N
    if BLOCK_M == 1:
        acc = _row_sums(x_ptr, w_ptr, row, there, K, BLOCK_N, BLOCK_K, STAGES)
        if BIAS:
            acc += tl.load(bias_ptr + row, mask=there, other=0.0).to(tl.float32)
        if GATED:
            up = _row_sums(x_ptr, w_ptr, row + N, there, K, BLOCK_N, BLOCK_K, STAGES)
            if BIAS:
                up += tl.load(bias_ptr + N + row, mask=there, other=0.0).to(tl.float32)
            acc = acc * tl.sigmoid(acc) * up
        if RESIDUAL:
            acc += tl.load(residual_ptr + row, mask=there, other=0.0).to(tl.float32)
        tl.store(out_ptr + row, acc.to(out_ptr.dtype.element_ty), mask=there)
    else:
        token = tl.arange(0, BLOCK_M)
        place = token[None, :] * N + row[:, None]
        mask = there[:, None] & (token < tokens)[None, :]
        acc = _row_products(x_ptr, w_ptr, row, there, tokens, K, BLOCK_N, BLOCK_K, BLOCK_M, STAGES)
        if BIAS:
            acc += tl.load(bias_ptr + row, mask=there, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up = _row_products(
                x_ptr, w_ptr, row + N, there, tokens, K, BLOCK_N, BLOCK_K, BLOCK_M, STAGES
            )
            if BIAS:
                up += tl.load(bias_ptr + N + row, mask=there, other=0.0).to(tl.float32)[:, None]
            acc = acc * tl.sigmoid(acc) * up
        if RESIDUAL:
            acc += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


def stream_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    config: StreamConfig | None = None,
) -> torch.Tensor:
    """`x @ weight.T`, with its epilogue, for at most `MAX_TOKENS` tokens.

    Args:
        x: `[T, K]`, contiguous.
        weight: `[N, K]`, contiguous; with `gated` `[2N, K]`, the gate's rows first.
        bias: `[N]`, with `gated` `[2N]`.
        residual: `[T, N]`, added to the result.
        gated: return `silu(gate) * up`.
        config: launch, None = from the table.

    Returns:
        `[T, N]` in x's dtype.
    """
    tokens, k = x.shape
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    config = config or stream_config(tokens, n, gated)
    out = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    _stream_kernel[(triton.cdiv(n, config.block_n),)](
        x, weight, bias, residual, out, tokens, n, k,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_M=1 if tokens == 1 else 16,
        STAGES=config.num_stages, BIAS=bias is not None, RESIDUAL=residual is not None,
        GATED=gated, num_warps=config.num_warps,
    )  # fmt: skip
    return out


def stream_config(tokens: int, n: int, gated: bool) -> StreamConfig:
    """The launch for `n` result columns, from measurements on an H200 (docs/engine.md)."""
    if tokens == 1:
        if n <= 1024:
            return StreamConfig(2, 1024, 4, 3)
        if gated and n >= 8192:
            return StreamConfig(4, 512, 4, 4)
        return StreamConfig(4, 256, 2, 5)
    if n >= 8192:
        return StreamConfig(64, 128, 4, 4)
    return StreamConfig(16, 256, 2, 4)
