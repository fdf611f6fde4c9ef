"""How streamed products are launched, by tokens and shape.

Measured by `scripts/sweep_linear.py` on an H100 with the products of an 8B and a 0.6B model, each
replayed in a CUDA graph over weights larger than the L2 (docs/engine.md). The rules between those
shapes are interpolations.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_TOKENS = 64
"""More go to the library's product."""

_FETCH_BYTES = 8192
"""Weights that a program asks for before its turn: enough to cover the memory's latency."""


@dataclass(frozen=True)
class StreamConfig:
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
