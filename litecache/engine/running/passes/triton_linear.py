"""Linear layers for a handful of tokens: the weights stream through once, at memory bandwidth.

Libraries tune matrix products for many tokens; with one to sixty-four the time is that of reading
the weights. A program owns some rows of the weight matrix, or a part of them (then whoever finishes
last adds up the parts), and walks along them with several tiles in flight. One token is multiplied
and summed in registers; more tokens go through the tensor cores as the narrow side of the product.
Epilogues add a bias or the residual, or apply `silu(gate) * up`. The first weights are asked for
while the kernel before still runs (`litecache.kernels.triton_common`).

How a product is launched was measured by `scripts/sweep_linear.py` on an H100 with the products of
an 8B and a 0.6B model, each replayed in a CUDA graph over weights larger than the L2
(docs/engine.md). The rules between those shapes are interpolations.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from litecache.kernels.triton_common import await_previous, fetch_to_l2, use_pdl

_PARTIAL_ELEMENTS = 8 << 20
_COUNTERS = 1 << 14
MAX_TOKENS = 64
"""More go to the library's product."""

_FETCH_BYTES = 8192
"""Weights that a program asks for before its turn: enough to cover the memory's latency."""


class StreamConfig(NamedTuple):
    """How a product is launched.

    Attributes:
        block_n: weight rows a program.
        block_k: columns a tile.
        num_warps: warps a program.
        num_stages: tiles in flight.
        splits: parts a row is cut into, summed by whoever finishes last.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1

    def fetch_bytes(self, share: int) -> int:
        """Bytes of each row that are asked for early, in whole pieces of 16 bytes a thread.

        Args:
            share: elements of a row that every program has.
        """
        pieces = max(1, 32 * self.num_warps // self.block_n)
        row_bytes = min(_FETCH_BYTES // self.block_n, share * 2)
        return row_bytes // (16 * pieces) * (16 * pieces)


def stream_config(tokens: int, n: int, k: int, gated: bool) -> StreamConfig:
    """The launch for `n` result columns of `k` products each.

    Args:
        tokens: at most `MAX_TOKENS`.
        n: columns of the result; half the weight's rows when gated.
        k: columns of the weight.
        gated: the epilogue is `silu(gate) * up`.
    """
    if tokens == 1:
        return _one_token(n, k)
    if tokens <= 16:
        return _few_tokens(n, k, gated)
    if gated:
        return _gated(tokens, n)
    if n <= 1024:
        return StreamConfig(64, 128, 4, 6, splits=4)
    if n > 65_536:
        return StreamConfig(64, 128, 4, 4 if tokens <= 32 else 3)
    return StreamConfig(64, 128, 4, 6, splits=2 if k > 8192 else 1)


def _one_token(n: int, k: int) -> StreamConfig:
    if n <= 1024:
        return StreamConfig(2, 512, 2, 4)
    if k < 4096:
        return StreamConfig(4, 256, 2, 5)
    return StreamConfig(2 if n <= 4096 else 4, 1024, 4, 3)


def _few_tokens(n: int, k: int, gated: bool) -> StreamConfig:
    if gated:
        return StreamConfig(32, 128, 2, 5)
    if n <= 1024:
        return StreamConfig(16, 128, 2, 6, splits=4)
    if n > 65_536:
        return StreamConfig(32, 128, 2, 6)
    return StreamConfig(32, 256, 2, 6) if k > 8192 else StreamConfig(64, 128, 4, 6)


def _gated(tokens: int, n: int) -> StreamConfig:
    if n <= 8192:
        return StreamConfig(32, 64, 2, 6)
    return StreamConfig(64, 64, 4, 5) if tokens <= 32 else StreamConfig(128, 64, 4, 5)


@triton.jit
def _fetch_rows(w_ptr, row_base, N, K, first, BLOCK_N: tl.constexpr, FETCH: tl.constexpr,
                THREADS: tl.constexpr):  # fmt: skip
    """Asks for the first `FETCH` bytes of each of a program's rows, a piece a thread."""
    pieces: tl.constexpr = THREADS // BLOCK_N if THREADS > BLOCK_N else 1
    index = tl.arange(0, BLOCK_N * pieces)
    row = tl.minimum(row_base + index // pieces, N - 1)
    size: tl.constexpr = FETCH // pieces
    address = (w_ptr + row.to(tl.int64) * K + first).to(tl.int64) + (index % pieces) * size
    fetch_to_l2(address, size)


@triton.jit
def _load_weights(w_ptr, row, column, N, K, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    place = w_ptr + row.to(tl.int64)[:, None] * K + column[None, :]
    if EVEN_N and EVEN_K:
        return tl.load(place, eviction_policy="evict_first")
    else:
        mask = (row < N)[:, None] & (column < K)[None, :]
        return tl.load(place, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _row_sums(x_ptr, w_ptr, row, N, K, begin, end, UP, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
              GATED: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
              STAGES: tl.constexpr):  # fmt: skip
    """`w[row] @ x` for one token, float32 `[BLOCK_N]`; gated also for the rows `UP` further on."""
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up = acc
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_K)
        if EVEN_K:
            x = tl.load(x_ptr + column).to(tl.float32)
        else:
            x = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
        w = _load_weights(w_ptr, row, column, N, K, EVEN_N, EVEN_K)
        acc += w.to(tl.float32) * x[None, :]
        if GATED:
            w = _load_weights(w_ptr + UP.to(tl.int64) * K, row, column, N, K, EVEN_N, EVEN_K)
            up += w.to(tl.float32) * x[None, :]
    return tl.sum(acc, 1)[:, None], tl.sum(up, 1)[:, None]


@triton.jit
def _row_products(x_ptr, w_ptr, row, tokens, N, K, begin, end, UP, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GATED: tl.constexpr,
                  EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """`w[row] @ x.T` for several tokens, float32 `[BLOCK_N, BLOCK_M]`."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = acc
    # Columns beyond the last token are computed from its numbers and never stored.
    token = tl.minimum(tl.arange(0, BLOCK_M), tokens - 1)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_K)
        place = x_ptr + token[None, :] * K + column[:, None]
        x = tl.load(place) if EVEN_K else tl.load(place, mask=(column < K)[:, None], other=0.0)
        w = _load_weights(w_ptr, row, column, N, K, EVEN_N, EVEN_K)
        acc = tl.dot(w, x, acc, out_dtype=tl.float32)
        if GATED:
            w = _load_weights(w_ptr + UP.to(tl.int64) * K, row, column, N, K, EVEN_N, EVEN_K)
            up = tl.dot(w, x, up, out_dtype=tl.float32)
    return acc, up


@triton.jit(do_not_specialize=["tokens"])
def _stream_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, partial_ptr, counter_ptr, tokens, N, K, share,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, FETCH: tl.constexpr, THREADS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(0) * BLOCK_N
    row = base + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, K)
    if PDL and FETCH > 0:
        _fetch_rows(w_ptr, base, N, K, begin, BLOCK_N, FETCH, THREADS)
        if GATED:
            _fetch_rows(w_ptr, base + N, 2 * N, K, begin, BLOCK_N, FETCH, THREADS)
    await_previous(PDL)
    if BLOCK_M == 1:
        acc, up = _row_sums(
            x_ptr, w_ptr, row, N, K, begin, end, N, BLOCK_N, BLOCK_K, GATED, EVEN_N, EVEN_K, STAGES
        )
    else:
        acc, up = _row_products(
            x_ptr, w_ptr, row, tokens, N, K, begin, end, N, BLOCK_N, BLOCK_K, BLOCK_M, GATED,
            EVEN_N, EVEN_K, STAGES,
        )  # fmt: skip
    token = tl.arange(0, BLOCK_M)
    last = True
    if SPLITS > 1:
        sides: tl.constexpr = 2 if GATED else 1
        grid_rows = tl.num_programs(0) * BLOCK_N
        line = (row * BLOCK_M)[:, None] + token[None, :]
        mine = partial_ptr + tl.program_id(1) * (sides * grid_rows * BLOCK_M) + line
        tl.store(mine, acc)
        if GATED:
            tl.store(mine + grid_rows * BLOCK_M, up)
        # Every thread's part is written before the one that counts releases it.
        tl.debug_barrier()
        last = tl.atomic_add(counter_ptr + tl.program_id(0), 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(counter_ptr + tl.program_id(0), 0)
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            up = acc
            # In a fixed order, whoever comes last: the sum does not depend on the race.
            for part in tl.static_range(SPLITS):
                there = partial_ptr + part * (sides * grid_rows * BLOCK_M) + line
                acc += tl.load(there, cache_modifier=".cg")
                if GATED:
                    up += tl.load(there + grid_rows * BLOCK_M, cache_modifier=".cg")
    if last:
        there = row < N
        mask = there[:, None] & (token < tokens)[None, :]
        place = token[None, :] * N + row[:, None]
        if BIAS:
            acc += tl.load(bias_ptr + row, mask=there, other=0.0).to(tl.float32)[:, None]
        if GATED:
            if BIAS:
                up += tl.load(bias_ptr + N + row, mask=there, other=0.0).to(tl.float32)[:, None]
            acc = acc * tl.sigmoid(acc) * up
        if RESIDUAL:
            acc += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


@cache
def _workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of split products and the counters of who has arrived; 0 between launches."""
    return (
        torch.empty(_PARTIAL_ELEMENTS, dtype=torch.float32, device=device),
        torch.zeros(_COUNTERS, dtype=torch.int32, device=device),
    )


def prepare(device: torch.device) -> None:
    """Make what all launches on a device share, before any of them is captured in a graph."""
    _workspace(device)


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
    if tokens == 0:  # a chunk of a prompt that samples nothing
        return x.new_empty(0, weight.shape[0] // 2 if gated else weight.shape[0])
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    config = config or stream_config(tokens, n, k, gated)
    rows = 1 if tokens == 1 else max(16, triton.next_power_of_2(tokens))
    blocks = triton.cdiv(n, config.block_n)
    splits = config.splits
    if splits * (1 + gated) * blocks * config.block_n * rows > _PARTIAL_ELEMENTS:
        splits = 1
    share = triton.cdiv(triton.cdiv(k, splits), config.block_k) * config.block_k
    splits = triton.cdiv(k, share)
    partial, counter = _workspace(x.device) if splits > 1 else (None, None)
    # The last part of a row may be shorter; addresses must be multiples of 16 bytes.
    fetch = config.fetch_bytes(k - (splits - 1) * share) if k % 8 == 0 else 0
    pdl = use_pdl(x.device, tokens)
    out = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    _stream_kernel[(blocks, splits)](
        x, weight, bias, residual, out, partial, counter, tokens, n, k, share,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_M=rows, STAGES=config.num_stages,
        BIAS=bias is not None, RESIDUAL=residual is not None, GATED=gated, SPLITS=splits,
        EVEN_N=n % config.block_n == 0, EVEN_K=k % config.block_k == 0,
        FETCH=fetch, THREADS=32 * config.num_warps, PDL=pdl,
        num_warps=config.num_warps, launch_pdl=pdl,
    )  # fmt: skip
    return out
