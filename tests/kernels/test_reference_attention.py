"""The torch path against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Case, make_batch, worst_error
from kernel_grid import TINY, tolerance
from kernel_oracle import attend, attend_wide

from litecache.kernels import AttentionMetadata, paged_attention, plan_attention, store_kv

RAGGED = Case((1, 1, 1, 1, 1), (1, 7, 8, 9, 40))
MIXED = Case((1, 1, 5, 9, 3), (17, 3, 5, 30, 19))
GRID = [
    RAGGED,
    MIXED,
    Case((1,) * 6, (33, 33, 34, 35, 36, 33)),
    Case((1,) * 3, (32, 32, 32)),
    Case((12, 3), (12, 3), own_kv=True),
    Case((1, 12, 8), (5, 12, 20), own_kv=True),
    Case((1, 1, 12, 20), (1, 30, 12, 29), window=6, own_kv=True),
    Case((1, 1, 7), (9, 50, 41), window=16),
    Case((1, 1, 7), (9, 50, 41), window=1),
    Case((1, 4, 8), (9, 50, 8), softcap=2.0),
    Case((1, 4, 8), (9, 50, 8), sinks=True, own_kv=True),
    Case((1, 4, 8), (9, 50, 8), sinks=True, window=5),
    Case((1, 4, 8), (9, 50, 8), alibi=True),
    Case((1, 1, 6), (9, 20, 14), dims=(24, 8)),
    Case((1, 1, 6), (9, 20, 14), heads=(9, 3), dims=(64, 64), block_size=16),
    Case((1, 1, 6), (9, 20, 14), heads=(5, 5), dims=(20, 20), block_size=32),
    Case((1, 1, 6), (9, 20, 14), heads=(6, 1), block_size=256),
    Case((1, 1, 6), (9, 20, 14), dtype=torch.bfloat16),
    Case((1, 1, 6), (9, 20, 14), dtype=torch.float16, own_kv=True),
    Case((1, 1, 6), (9, 20, 14), pool_dtype=torch.int8, own_kv=True),
    Case((1, 1, 6), (9, 20, 14), pool_dtype=torch.float8_e4m3fn, window=7),
]


@pytest.mark.parametrize("case", GRID, ids=lambda case: case.name)
def test_agrees_with_the_oracle_and_writes_every_row(case: Case) -> None:
    batch = make_batch(case)
    poisoned = torch.full(
        (batch.query.shape[0], case.heads[0], case.dims[1]), torch.nan, dtype=case.dtype
    )
    out = batch.attend(out=poisoned)
    expected = attend(batch.query, batch.wide_k, batch.wide_v, batch.metadata, **batch.options)
    assert out is poisoned
    assert worst_error(out, expected) < tolerance(case)


def test_a_sequence_without_context_gives_zeros() -> None:
    case = Case((1, 1), (0, 5))
    batch = make_batch(case)
    out = batch.attend()
    assert out[0].abs().max() == 0
    assert out[1].abs().max() > 0


def test_layers_share_the_plan_of_a_step() -> None:
    batch = make_batch(MIXED)
    expected = attend(batch.query, batch.wide_k, batch.wide_v, batch.metadata, **batch.options)
    plan = plan_attention(batch.metadata, batch.layer())
    outs = [paged_attention(batch.layer(), plan) for _ in range(3)]
    assert all(worst_error(out, expected) < 1e-5 for out in outs)


def test_host_copies_may_be_missing() -> None:
    batch = make_batch(MIXED)
    expected = attend(batch.query, batch.wide_k, batch.wide_v, batch.metadata, **batch.options)
    batch.metadata.query_lens = batch.metadata.context_lens_host = None
    out = batch.attend()
    assert worst_error(out, expected) < 1e-5


def test_long_chunks_are_cut_so_that_masks_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litecache.kernels.reference._MASK_ELEMENTS", 100)
    for case in (Case((20,), (41,)), Case((20,), (41,), softcap=3.0)):
        batch = make_batch(case)
        out = batch.attend()
        expected = attend(batch.query, batch.wide_k, batch.wide_v, batch.metadata, **batch.options)
        assert worst_error(out, expected) < 1e-5


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_the_wide_oracle_of_the_gpu_tests_is_the_plain_one(case: Case) -> None:
    batch = make_batch(case)
    arguments = (batch.query, batch.wide_k, batch.wide_v, batch.metadata)
    plain, wide = (f(*arguments, **batch.options) for f in (attend, attend_wide))
    assert worst_error(wide, plain) < 1e-12


@pytest.mark.parametrize("queries", [(4, 3), (1, 20), (20, 12)])
def test_segments_of_one_sequence_see_what_the_others_wrote(queries: tuple[int, int]) -> None:
    batch = make_batch(Case((60,), (60,)))
    table = batch.metadata.block_tables[0].tolist()
    expected = attend(batch.query, batch.wide_k, batch.wide_v, batch.metadata, **batch.options)
    ends = (25, 58)
    rows = torch.cat([torch.arange(end - n, end) for n, end in zip(queries, ends, strict=True)])
    metadata = AttentionMetadata.build(queries, ends, [table, table], 8)
    slots = metadata.slot_mapping
    for cache in (batch.k_cache, batch.v_cache):
        cache[slots // 8, :, slots % 8] = torch.nan
    store_kv(batch.key[rows], batch.value[rows], batch.k_cache, batch.v_cache, slots)
    own = {name: getattr(batch, name)[rows] for name in ("query", "key", "value")}
    out = batch.attend(metadata, **own)
    assert worst_error(out, expected[rows]) < 1e-5
