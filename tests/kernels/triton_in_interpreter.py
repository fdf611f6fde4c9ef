"""Run by `test_triton_interpreter.py` in a process of its own, under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Case, make_batch, worst_error
from kernel_grid import TINY, tolerance
from kernel_oracle import attend

from litecache.kernels import copy_blocks, paged_attention, store_kv
from litecache.kernels.quantise import dequantise, quantise

torch.set_num_threads(1)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_attention_agrees_with_the_oracle(case: Case) -> None:
    batch = make_batch(case)
    out = torch.full((batch.query.shape[0], case.heads[0], case.dims[1]), torch.nan).to(case.dtype)
    paged_attention(
        batch.query, batch.k_cache, batch.v_cache, batch.metadata, **batch.arguments(), out=out
    )
    expected = attend(batch.query, batch.wide_k, batch.wide_v, batch.metadata, **batch.options)
    assert worst_error(out, expected) < tolerance(case)


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_store_writes_each_token_to_its_slot_and_nothing_else(pool_dtype: torch.dtype) -> None:
    quantised = pool_dtype == torch.int8
    case = Case((5, 3), (13, 3), dims=(24, 8), pool_dtype=pool_dtype if quantised else None,
                dtype=torch.float32 if quantised else pool_dtype)  # fmt: skip
    batch = make_batch(case)
    key = torch.randn(8, 2, 2, 24)[:, :, 0].to(case.dtype)
    value = torch.randn(8, 2, 8).to(case.dtype)
    before = batch.k_cache.clone()
    slots = batch.metadata.slot_mapping
    store_kv(key, value, batch.k_cache, batch.v_cache, slots, batch.k_scale, batch.v_scale)
    blocks, offsets = slots // 8, slots % 8
    written = torch.zeros(before.shape[:3], dtype=torch.bool)
    written[blocks, :, offsets] = True
    sides = ((key, batch.k_cache, batch.k_scale), (value, batch.v_cache, batch.v_scale))
    for tokens, cache, scale in sides:
        stored = cache[blocks, :, offsets]
        if scale is None:
            assert torch.equal(stored, tokens)
        else:
            codes, factors = quantise(tokens, pool_dtype)
            assert (stored.int() - codes.int()).abs().max() <= 1
            back = dequantise(stored, scale[blocks, :, offsets])
            assert (back - tokens).abs().max() <= factors.max() * 0.51
    untouched = batch.k_cache[~written].nan_to_num(7.0) == before[~written].nan_to_num(7.0)
    assert bool(untouched.all())


@pytest.mark.parametrize("block_bytes", [4096, 4099])
def test_copy_moves_whole_blocks(block_bytes: int) -> None:
    pool = torch.randint(0, 256, (6, block_bytes), dtype=torch.uint8)
    expected = pool.clone()
    expected[[4, 1]] = pool[[2, 5]]
    copy_blocks(pool, torch.tensor([2, 5]), torch.tensor([4, 1]))
    assert torch.equal(pool, expected)
