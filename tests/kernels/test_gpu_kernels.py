"""The Triton kernels on a GPU: the grid of heads, dims, block sizes, lengths and extras."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import Case, make_batch, worst_error
from kernel_grid import LARGE, TINY, tolerance
from kernel_oracle import attend_wide

from litecache.kernels import (
    Attention,
    AttentionMetadata,
    copy_blocks,
    library_prefill,
    paged_attention,
    plan_attention,
    reference,
    store_kv,
)
from litecache.kernels.quantise import dequantise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("case", TINY + LARGE, ids=lambda case: case.name)
def test_attention_agrees_with_the_oracle(case: Case) -> None:
    batch = make_batch(case, "cuda")
    out = torch.full((batch.query.shape[0], case.heads[0], case.dims[1]), torch.nan)
    out = out.to("cuda", case.dtype)
    batch.attend(out=out)
    expected = attend_wide(batch.query, batch.wide_k, batch.wide_v, batch.metadata, **batch.options)
    assert worst_error(out, expected) < tolerance(case)


@pytest.mark.parametrize(
    ("queries", "contexts", "pool_dtype", "own_kv"),
    [
        ((2048,), (2048,), None, True),
        ((2048,), (2048,), None, False),
        ((3072,), (3072 + 2048,), None, True),
        ((2048,), (2048 + 100,), None, True),
        ((2048,), (2048 + 8192 + 2048 + 17,), None, True),
        ((1, 1, 2048, 3072), (50, 3, 4096, 3072), None, True),
        ((1, 2048, 3072), (50, 2500, 3072), torch.int8, True),
    ],
)
def test_the_library_path_agrees_with_the_oracle(
    queries: tuple[int, ...],
    contexts: tuple[int, ...],
    pool_dtype: torch.dtype | None,
    own_kv: bool,
) -> None:
    case = Case(queries, contexts, heads=(8, 2), dims=(128, 128), block_size=16,
                dtype=torch.bfloat16, pool_dtype=pool_dtype, own_kv=own_kv)  # fmt: skip
    batch = make_batch(case, "cuda")
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library_prefill, "attend", _counted(library_prefill.attend, calls))
        out = batch.attend()
    expected = attend_wide(batch.query, batch.wide_k, batch.wide_v, batch.metadata, **batch.options)
    assert worst_error(out, expected) < 1e-2
    assert len(calls) == 1


def _counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return function(*arguments, **named)

    return counted


def test_repeated_runs_give_the_same_bits() -> None:
    case = Case((1,) * 7, (1, 15, 16, 17, 129, 9000, 40000), heads=(32, 8), dims=(128, 128),
                block_size=16, dtype=torch.bfloat16)  # fmt: skip
    batch = make_batch(case, "cuda")
    outs = [batch.attend() for _ in range(20)]
    assert all(torch.equal(outs[0], out) for out in outs[1:])


def test_deterministic_results_do_not_depend_on_the_batch() -> None:
    case = Case((1,) * 5, (1, 17, 3000, 9000, 40000), heads=(32, 8), dims=(128, 128),
                block_size=16, dtype=torch.bfloat16)  # fmt: skip
    batch = make_batch(case, "cuda")
    metadata = dataclasses.replace(batch.metadata, deterministic=True)
    together = batch.attend(metadata)
    expected = attend_wide(batch.query, batch.wide_k, batch.wide_v, metadata, **batch.options)
    assert worst_error(together, expected) < 1e-2
    for row in range(5):
        table = metadata.block_tables[row].tolist()
        alone = AttentionMetadata.build([1], [case.context_lens[row]], [table], 16, "cuda")
        alone.deterministic = True
        out = batch.attend(alone, query=batch.query[row : row + 1])
        assert torch.equal(out[0], together[row])


def _replayed(case: Case, other_lengths: list[tuple[int, ...]]) -> list[list[int]]:
    """One graph, captured at length 1, must be right at every length its tables have room for.

    Returns the cuts of the plan at each of the lengths.
    """
    batch = make_batch(case, "cuda")
    count = len(case.context_lens)
    static = AttentionMetadata(
        slot_mapping=batch.metadata.slot_mapping.clone(),
        block_tables=torch.zeros(count, 512, dtype=torch.int32, device="cuda"),
        context_lens=torch.ones(count, dtype=torch.int32, device="cuda"),
        cu_seqlens_q=batch.metadata.cu_seqlens_q.clone(),
        block_size=16,
        max_query_len=1,
        max_context_len=8192,
    )

    plans = []

    def step() -> torch.Tensor:
        plans.append(plan_attention(static, batch.layer()))
        for _ in range(2):  # layers that share a plan
            out = paged_attention(batch.layer(), plans[-1])
        return out

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    (plan,) = plans[-1].decodes
    tables = batch.metadata.block_tables
    static.block_tables[:, : tables.shape[1]] = tables
    cuts = []
    for lens in other_lengths:
        static.context_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        graph.replay()
        expected = attend_wide(batch.query, batch.wide_k, batch.wide_v, static, **batch.options)
        assert worst_error(out, expected) < tolerance(case)
        cuts.append(plan.cuts.tolist())
        assert not plan.counter.any()
    return cuts


def test_a_captured_graph_replays_at_other_lengths() -> None:
    lengths = (3000, 700, 17, 5000)
    case = Case((1,) * 4, lengths, heads=(8, 2), dims=(64, 64), block_size=16, dtype=torch.float32)
    _replayed(case, [lengths, (1, 1, 1, 4999), (0, 16, 5, 1)])


def test_a_graph_replays_whether_the_end_of_its_line_is_handed_out_or_not() -> None:
    lengths = tuple(1900 + 10 * i for i in range(64))
    case = Case((1,) * 64, lengths, heads=(32, 8), dims=(128, 128), block_size=16,
                dtype=torch.bfloat16)  # fmt: skip
    short = tuple(1 + i for i in range(64))
    ragged = tuple(length if i % 3 else i for i, length in enumerate(lengths))
    cuts = _replayed(case, [lengths, short, lengths, ragged, lengths])
    handed_out = [tail_segments > 0 for *_, tail_segments in cuts]
    assert handed_out[::2] == [True] * 3
    assert not handed_out[1]


def test_a_graph_of_chunks_replays_at_other_lengths() -> None:
    case = Case((1, 1, 64, 30, 0, 0), (900, 1, 9000, 700, 0, 0), heads=(32, 8), dims=(128, 128),
                block_size=16, dtype=torch.bfloat16)  # fmt: skip
    batch = make_batch(case, "cuda")
    query = torch.randn(130, 32, 128, device="cuda", dtype=torch.bfloat16)
    static = dataclasses.replace(
        batch.metadata,
        slot_mapping=torch.zeros(130, dtype=torch.int64, device="cuda"),
        max_query_len=128,
        max_context_len=16384,
        query_lens=(1, 1, 128, 0, 0, 0),
        context_lens_host=None,
    )

    def step() -> torch.Tensor:
        plan = plan_attention(static, batch.layer(query=query))
        for _ in range(2):  # layers that share a plan
            out = paged_attention(batch.layer(query=query), plan)
        return out

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for first, first_context, second, second_context in (
        (64, 9000, 30, 700), (3, 17, 90, 90), (128, 8000, 0, 0), (100, 300, 28, 699),
    ):  # fmt: skip
        starts = [0, 1, 2, 2 + first, 2 + first + second]
        static.cu_seqlens_q.copy_(torch.tensor(starts + starts[-1:] * 2))
        static.context_lens.copy_(torch.tensor([900, 1, first_context, second_context, 0, 0]))
        out.fill_(torch.nan)
        graph.replay()
        rows = slice(0, starts[-1])
        expected = attend_wide(query, batch.wide_k, batch.wide_v, static, **batch.options)
        assert worst_error(out[rows], expected[rows]) < tolerance(case)


def test_deterministic_chunks_do_not_depend_on_the_batch() -> None:
    case = Case((1, 5, 64, 300, 1200), (9, 3000, 20000, 900, 5000), heads=(32, 8), dims=(128, 128),
                block_size=16, dtype=torch.bfloat16)  # fmt: skip
    batch = make_batch(case, "cuda")
    metadata = dataclasses.replace(batch.metadata, deterministic=True)
    together = batch.attend(metadata)
    expected = attend_wide(batch.query, batch.wide_k, batch.wide_v, metadata, **batch.options)
    assert worst_error(together, expected) < 1e-2
    start = 0
    for row, count in enumerate(case.query_lens):
        rows = slice(start, start + count)
        start += count
        table = metadata.block_tables[row].tolist()
        alone = AttentionMetadata.build([count], [case.context_lens[row]], [table], 16, "cuda")
        alone.deterministic = True
        assert torch.equal(batch.attend(alone, query=batch.query[rows]), together[rows])


def test_offsets_survive_a_pool_of_more_than_two_to_the_31_elements() -> None:
    block_bytes, num_blocks = 1 << 20, 4200
    buffer = torch.empty(num_blocks * block_bytes, dtype=torch.uint8, device="cuda")
    shape = (num_blocks, 2, 16, 64)
    k_cache, v_cache = (
        buffer.view(torch.bfloat16).as_strided(shape, (block_bytes // 2, 1024, 64, 1), offset)
        for offset in (block_bytes // 2 - 4096, block_bytes // 2 - 2048)
    )
    blocks = list(range(num_blocks - 5, num_blocks))
    metadata = AttentionMetadata.build([70], [70], [blocks], 16, "cuda")
    key, value = (torch.randn(70, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(70, 8, 64, device="cuda", dtype=torch.bfloat16)
    store_kv(key, value, k_cache, v_cache, metadata.slot_mapping)
    layer = Attention(query, k_cache, v_cache, 0.125)
    out = paged_attention(layer, plan_attention(metadata, layer))
    q, k, v = (x.transpose(0, 1).double() for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.125, enable_gqa=True
    ).transpose(0, 1)
    assert worst_error(out, expected.cpu()) < 1e-2
    last = AttentionMetadata.build([1], [70], [blocks], 16, "cuda")
    plan = plan_attention(last, layer._replace(query=query[-1:]))
    row = paged_attention(layer._replace(query=query[-1:]), plan)
    assert worst_error(row, expected[-1:].cpu()) < 1e-2


@pytest.mark.parametrize(
    "pool_dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
)
def test_store_agrees_with_the_reference(pool_dtype: torch.dtype) -> None:
    quantised = pool_dtype.itemsize == 1
    dtype = torch.bfloat16 if quantised else pool_dtype
    case = Case((500, 77), (800, 77), heads=(9, 3), dims=(80, 64), block_size=16, dtype=dtype,
                pool_dtype=pool_dtype if quantised else None)  # fmt: skip
    ours, theirs = make_batch(case, "cuda"), make_batch(case, "cpu")
    key, value = (torch.randn(577, 3, dim).to(dtype) for dim in (80, 64))
    slots = ours.metadata.slot_mapping
    store_kv(key.cuda(), value.cuda(), ours.k_cache, ours.v_cache, slots,
             ours.k_scale, ours.v_scale)  # fmt: skip
    reference.store_kv(key, value, theirs.k_cache, theirs.v_cache, slots.cpu(),
                       theirs.k_scale, theirs.v_scale)  # fmt: skip
    blocks, offsets = slots.cpu() // 16, slots.cpu() % 16
    for mine, its, my_scale, its_scale in (
        (ours.k_cache, theirs.k_cache, ours.k_scale, theirs.k_scale),
        (ours.v_cache, theirs.v_cache, ours.v_scale, theirs.v_scale),
    ):
        a, b = mine.cpu()[blocks, :, offsets], its[blocks, :, offsets]
        if my_scale is None or its_scale is None:
            assert torch.equal(a, b)
            continue
        wide_a = dequantise(a, my_scale.cpu()[blocks, :, offsets])
        wide_b = dequantise(b, its_scale[blocks, :, offsets])
        # A tie may round the other way by one code.
        assert (wide_a - wide_b).norm() <= 2e-3 * wide_b.norm()


def test_copy_moves_whole_blocks() -> None:
    pool = torch.randint(0, 256, (64, 368640), dtype=torch.uint8, device="cuda")
    src, dst = (torch.tensor(x, device="cuda") for x in ([3, 9, 60], [4, 0, 63]))
    expected = pool.clone()
    expected[dst] = pool[src]
    copy_blocks(pool, src, dst)
    assert torch.equal(pool, expected)
