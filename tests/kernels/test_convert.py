"""Blocks to eight bits and back on a CPU: close to what they were, in the layout of the pool."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from litecache.engine.kv_layout import KVLayout, KVSpec
from litecache.errors import KernelError
from litecache.kernels.quantise import BlockForm, convert_blocks

LAYERS, HEADS, SIZE, DIM = 3, 2, 8, 24


def form(dtype: str) -> tuple[BlockForm, int]:
    """The form of a block as `kv_layout` lays it out, and the block's bytes."""
    torch_dtype = getattr(torch, dtype)
    spec = KVSpec(HEADS, DIM, DIM, dtype)
    group = KVLayout.from_specs([spec] * LAYERS, SIZE).groups[0]
    first, second = group.extents[:2]
    return BlockForm(
        torch_dtype, LAYERS, HEADS * SIZE, DIM,
        layer_bytes=second.k_offset - first.k_offset,
        v_offset=first.v_offset,
        scale_offset=first.scale_offset if spec.scale_bytes else 0,
    ), group.block_bytes  # fmt: skip


@pytest.mark.parametrize(("dtype", "error"), [("int8", 0.012), ("float8_e4m3fn", 0.04)])
def test_blocks_come_back_nearly_as_they_were(dtype: str, error: float) -> None:
    wide, wide_bytes = form("bfloat16")
    narrow, narrow_bytes = form(dtype)
    pool = torch.full((5, wide_bytes), 0xFF, dtype=torch.uint8)
    wide.tokens(pool)[[1, 4]] = torch.randn(2, LAYERS, 2, HEADS * SIZE, DIM).bfloat16()
    original = wide.tokens(pool)[[1, 4]].double()
    tier = torch.full((3, narrow_bytes), 0xAA, dtype=torch.uint8)
    untouched = tier[1].clone()
    convert_blocks(pool, wide, tier, narrow, torch.tensor([1, 4]), torch.tensor([2, 0]))
    assert torch.equal(tier[1], untouched)
    back = torch.zeros(3, wide_bytes, dtype=torch.uint8)
    convert_blocks(tier, narrow, back, wide, torch.tensor([2, 0]), torch.tensor([0, 2]))
    restored = wide.tokens(back)[[0, 2]].double()
    assert (restored - original).norm() / original.norm() < error
    assert narrow_bytes < wide_bytes


def test_a_row_of_zeros_stays_zero() -> None:
    wide, wide_bytes = form("float32")
    narrow, narrow_bytes = form("int8")
    pool = torch.zeros(1, wide_bytes, dtype=torch.uint8)
    tier = torch.full((1, narrow_bytes), 0xFF, dtype=torch.uint8)
    one = torch.tensor([0])
    convert_blocks(pool, wide, tier, narrow, one, one)
    pool.fill_(0xFF)
    convert_blocks(tier, narrow, pool, wide, one, one)
    assert wide.tokens(pool).abs().max() == 0


def test_bad_arguments_are_named() -> None:
    wide, wide_bytes = form("bfloat16")
    narrow, narrow_bytes = form("int8")
    pool = torch.zeros(2, wide_bytes, dtype=torch.uint8)
    tier = torch.zeros(2, narrow_bytes, dtype=torch.uint8)
    one = torch.tensor([0])
    with pytest.raises(KernelError, match=r"^target\.shape"):
        convert_blocks(pool, wide, tier[:, :64].contiguous(), narrow, one, one)
    with pytest.raises(KernelError, match=r"^target_form\.dtype"):
        convert_blocks(pool, wide, pool, wide, one, one)
    with pytest.raises(KernelError, match=r"^target_form\.dim"):
        convert_blocks(pool, wide, tier, dataclasses.replace(narrow, dim=16), one, one)
    with pytest.raises(KernelError, match=r"^source"):
        convert_blocks(pool.float(), wide, tier, narrow, one, one)
    with pytest.raises(KernelError, match=r"^dst\.shape"):
        convert_blocks(pool, wide, tier, narrow, one, torch.tensor([0, 1]))
