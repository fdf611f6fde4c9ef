"""Run by `test_triton_linear.py` in a process of its own, under TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from litecache.engine.running.passes.triton_linear import StreamConfig, stream_linear

torch.set_num_threads(1)

# Rows and columns that fill their tiles and that do not; rows in one part and in several.
SHAPES = ((32, 128, 1), (24, 100, 1), (16, 256, 2), (24, 200, 3), (16, 200, 4))


@pytest.mark.parametrize(
    ("tokens", "shape", "gated"), list(itertools.product((1, 5, 17), SHAPES, (False, True)))
)
def test_a_product_and_its_epilogue_equal_torchs(
    tokens: int, shape: tuple[int, int, int], gated: bool
) -> None:
    n, k, splits = shape
    generator = torch.Generator().manual_seed(n + k + tokens)
    rows = 2 * n if gated else n
    x, weight, bias, residual = (
        torch.randn(*size, generator=generator)
        for size in ((tokens, k), (rows, k), (rows,), (tokens, n))
    )
    config = StreamConfig(16, 64, 2, 2, splits)
    for with_bias, with_residual in itertools.product((False, True), repeat=2):
        expected = functional.linear(x, weight, bias if with_bias else None)
        if gated:
            gate, up = expected.chunk(2, dim=1)
            expected = functional.silu(gate) * up
        if with_residual:
            expected = expected + residual
        got = stream_linear(
            x, weight, bias if with_bias else None,
            residual=residual if with_residual else None, gated=gated, config=config,
        )  # fmt: skip
        assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_no_tokens_give_no_rows() -> None:
    out = stream_linear(torch.zeros(0, 64), torch.zeros(32, 64))
    assert out.shape == (0, 32)
