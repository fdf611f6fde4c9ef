"""Run by `test_triton_linear.py` in a process of its own, under TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from litecache.engine.kv_layout import KVLayout, KVPool, KVSpec
from litecache.engine.running.passes.triton_elementwise import rotate_and_store
from litecache.engine.running.passes.triton_linear import StreamConfig, stream_linear
from litecache.kernels import reference

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


@pytest.mark.parametrize(
    ("dtype", "rotary", "norm"),
    [("float32", 16, False), ("int8", 16, True), ("int8", 8, False)],
)
def test_rotated_keys_and_values_stand_in_the_pool_as_store_kv_writes_them(
    dtype: str, rotary: int, norm: bool
) -> None:
    heads, kv_heads, dim, tokens, size = 4, 2, 16, 5, 8
    spec = KVSpec(kv_heads, dim, dim, dtype)
    group = KVLayout.from_specs([spec] * 2, size).groups[0]
    pool, wanted = KVPool(group, 4, "cpu"), KVPool(group, 4, "cpu")
    generator = torch.Generator().manual_seed(rotary)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator)
    angle = torch.randn(tokens, rotary // 2, generator=generator).repeat(1, 2)
    weights = torch.rand(2, dim, generator=generator) + 0.5
    slots = torch.tensor([9, 31, 16, 8, 17])

    x = qkv.view(tokens, -1, dim)[:, : heads + kv_heads].clone()
    if norm:
        parts = zip((x[:, :heads], x[:, heads:]), weights, strict=True)
        x = torch.cat([functional.rms_norm(p, (dim,), w, 1e-6) for p, w in parts], 1)
    low, high = x[..., :rotary].chunk(2, -1)
    turned = x[..., :rotary] * angle.cos()[:, None]
    turned += torch.cat((-high, low), -1) * angle.sin()[:, None]
    x = torch.cat((turned, x[..., rotary:]), -1)
    value = qkv.view(tokens, -1, dim)[:, heads + kv_heads :].clone()
    reference.store_kv(x[:, heads:], value, *wanted.layer(1), slots, *wanted.scales(1))

    given = (*weights, 1e-6) if norm else None
    rotate_and_store(
        qkv, angle.cos(), angle.sin(), *pool.layer(1), slots, *pool.scales(1),
        num_heads=heads, norm=given,
    )  # fmt: skip
    for got, want in zip(
        (*pool.layer(1), *pool.scales(1)), (*wanted.layer(1), *wanted.scales(1)), strict=True
    ):
        if got is not None and want is not None:
            # a code may lie one step beside where the rotation rounds in another way
            step = 1 if got.dtype == torch.int8 else 1e-5
            assert (got.float() - want.float()).abs().max() <= step
            assert step < 1 or (got != want).float().mean() < 0.02
            assert want.float().abs().max() > 0
    assert not pool.layer(0)[0].float().any()
