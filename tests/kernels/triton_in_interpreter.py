"""Run by `test_triton_interpreter.py` in a process of its own, under TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from kernel_cases import Case, make_batch, worst_error
from kernel_grid import PIECES, TINY, tolerance
from kernel_oracle import attend
from test_reference_attention import (
    test_segments_of_one_sequence_see_what_the_others_wrote,  # noqa: F401 - runs here, too
)

from litecache.engine.kv_layout import KVLayout, KVPool, KVSpec
from litecache.engine.transfer.block_copier import BlockCopier, PinnedArenas
from litecache.engine.transfer.codec import EightBits
from litecache.kernels import (
    AttentionMetadata,
    Geometry,
    copy_blocks,
    library_prefill,
    paged_attention,
    plan_attention,
    store_kv,
    triton_backend,
    triton_chunks,
    triton_decode,
    triton_plan,
    triton_prefill,
    triton_store,
)
from litecache.kernels import quantise as quantise_module
from litecache.kernels.quantise import BlockForm, convert_reference, dequantise, quantise
from litecache.kernels.triton_backend import TritonPlan
from litecache.kernels.triton_chunks import plan_chunks
from litecache.kernels.triton_plan import (
    _MOST_PIECES,
    _TAIL_SEGMENTS,
    plan_decode,
)
from litecache.kernels.triton_prefill import merge_two
from litecache.kernels.triton_store import gather
from litecache.kernels.tuning import ChunkConfig, DecodeConfig

torch.set_num_threads(1)
GEOMETRY = Geometry(4, 2, 16, 16, torch.float32)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_attention_agrees_with_the_oracle(case: Case) -> None:
    batch = make_batch(case)
    out = torch.full((batch.query.shape[0], case.heads[0], case.dims[1]), torch.nan).to(case.dtype)
    batch.attend(out=out)
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


@pytest.mark.parametrize("pool_dtype", [None, torch.int8])
def test_gather_returns_the_tokens_in_order(pool_dtype: torch.dtype | None) -> None:
    case = Case((3,), (37,), dims=(24, 8), pool_dtype=pool_dtype)
    batch = make_batch(case)
    got = gather(batch.k_cache, batch.k_scale, batch.metadata.block_tables[0], 5, 30, torch.float32)
    positions = torch.arange(5, 35)
    blocks = batch.metadata.block_tables[0, positions // 8].long()
    assert torch.equal(got.transpose(0, 1).double(), batch.wide_k[blocks, :, positions % 8])


def test_two_attentions_merge_into_one() -> None:
    scores, values = torch.randn(3, 5, 40), torch.randn(3, 40, 8)
    whole = (torch.softmax(scores, -1) @ values).transpose(0, 1)
    halves = []
    for part in (slice(0, 10), slice(10, 40)):
        out = torch.softmax(scores[..., part], -1) @ values[:, part]
        halves += [out.transpose(0, 1), torch.logsumexp(scores[..., part], -1)]
    merged = torch.empty(5, 3, 8)
    merge_two(*halves, merged)
    torch.testing.assert_close(merged, whole)


def _torch_attention(
    query: torch.Tensor,
    keys_and_values: tuple[torch.Tensor, ...],
    scale: float,
    *,
    causal: bool,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What cuDNN computes: the causal mask aligned at the top left."""
    group = query.shape[1] // keys_and_values[0].shape[1]
    key, value = (x[0].repeat_interleave(group, 0) for x in keys_and_values)
    scores = query.transpose(0, 1) @ key.transpose(1, 2) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    out = (torch.softmax(scores, -1) @ value).transpose(0, 1)
    return out, torch.logsumexp(scores, -1) if lse else torch.empty(0)


@pytest.mark.parametrize("own_kv", [True, False])
@pytest.mark.parametrize(
    ("queries", "contexts"),
    [
        ((8,), (8,)),  # no prefix
        ((8,), (40,)),  # a piece of each size
        ((8,), (88,)),  # two large pieces and a small one
        ((8,), (30,)),  # a small piece and a rest for Triton
        ((8,), (15,)),  # only a rest
        ((1, 8, 8), (5, 24, 8)),  # after a decode
    ],
)
def test_the_library_path_covers_every_key_once(
    monkeypatch: pytest.MonkeyPatch,
    queries: tuple[int, ...],
    contexts: tuple[int, ...],
    own_kv: bool,
) -> None:
    monkeypatch.setattr(library_prefill, "PIECES", (32, 16))
    monkeypatch.setattr(library_prefill, "_cudnn", _torch_attention)
    batch = make_batch(Case(queries, contexts))
    first = sum(1 for count in queries if count == 1)
    out = torch.full((sum(queries), 4, 16), torch.nan) if first else None
    own = {"key": batch.key, "value": batch.value} if own_kv else {}
    got = library_prefill.attend(batch.layer(**own), batch.metadata, first, out)
    expected = attend(batch.query, batch.wide_k, batch.wide_v, batch.metadata, **batch.options)
    rows = slice(first, None)
    assert worst_error(got[rows], expected[rows]) < 1e-5


def test_convert_writes_what_the_reference_writes() -> None:
    wide = BlockForm(torch.float32, 2, 40, 24, layer_bytes=8192, v_offset=4096)
    narrow = BlockForm(torch.int8, 2, 40, 24, 2560, 1024, scale_offset=2048)
    pool = torch.zeros(3, 16384, dtype=torch.uint8)
    wide.tokens(pool).normal_()
    ours, theirs = (torch.zeros(2, 5120, dtype=torch.uint8) for _ in range(2))
    src, dst = torch.tensor([2, 0]), torch.tensor([0, 1])
    triton_store.convert(pool, wide, ours, narrow, src, dst)
    convert_reference(pool, wide, theirs, narrow, src, dst)
    assert torch.equal(narrow.scales(ours), narrow.scales(theirs))
    assert (narrow.tokens(ours).int() - narrow.tokens(theirs).int()).abs().max() <= 1
    back, expected = torch.zeros_like(pool), torch.zeros_like(pool)
    triton_store.convert(theirs, narrow, back, wide, dst, src)
    convert_reference(theirs, narrow, expected, wide, dst, src)
    assert torch.equal(back, expected)


def test_blocks_of_a_pool_go_to_eight_bit_tiers_and_back_by_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (group,) = KVLayout.from_specs([KVSpec(2, 24, 24, "float32")] * 3, 8, "int8").groups
    copier = BlockCopier(torch.device("cpu"), lambda step: None, PinnedArenas())
    results = []
    for convert in (convert_reference, triton_store.convert):
        monkeypatch.setattr(quantise_module, "convert_reference", convert)
        pool = KVPool(group, 6, "cpu")
        for layer in range(3):
            for side in pool.layer(layer):
                side.copy_(torch.randn(side.shape, generator=torch.Generator().manual_seed(layer)))
        eight = EightBits(copier)
        slots = [[torch.zeros(group.tier_bytes, dtype=torch.uint8)] for _ in range(3)]
        eight.save(pool, np.array([4, 1, 5]), slots)
        eight.load(pool, np.array([2, 3, 0]), slots)
        results.append([pool.layer(layer) for layer in range(3)])
    for theirs, ours in zip(*results, strict=True):
        for expected, got in zip(theirs, ours, strict=True):
            # a code may lie one step beside where division rounds in another way
            assert (expected - got).abs().max() <= 0.05
            assert (expected[[2, 3, 0]] - got[[4, 1, 5]]).abs().max() <= 0.05


def test_rows_of_one_token_do_not_fall_to_one_program() -> None:
    # one long row and the rows that pad a step: what a program gets of them is bounded
    contexts = [4096] + [1] * 15
    metadata = AttentionMetadata.build([1] * 16, contexts, [[0] * 512] * 16, 8)
    config = DecodeConfig(block_n=64, num_warps=4, num_stages=2, num_programs=16)
    plan = plan_decode(metadata, GEOMETRY, slice(0, 16), 1, config)
    tiles = plan.ends.diff().tolist()
    assert tiles == [64] + [2] * 15
    share = -(-sum(tiles) * 2 // config.num_programs)
    assert share // tiles[1] <= 6


@pytest.mark.parametrize(
    "extras",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"window": 300},
        pytest.param({"pool_dtype": torch.int8}, marks=pytest.mark.slow),
    ],
)
def test_the_end_of_a_long_line_is_handed_out(extras: dict[str, Any]) -> None:
    case = Case((1, 1, 1, 1), (17, 700, 1, 560), heads=(4, 2), **extras)
    batch = make_batch(case)
    out = torch.full((4, 4, 16), torch.nan)
    step = plan_attention(batch.metadata, batch.layer())
    for _ in range(2):  # the tickets begin anew
        paged_attention(batch.layer(out=out), step)
        expected = attend(batch.query, batch.wide_k, batch.wide_v, batch.metadata, **batch.options)
        assert worst_error(out, expected) < tolerance(case)
        out.fill_(torch.nan)
    assert isinstance(step, TritonPlan)
    (plan,) = step.decodes
    share, tail_begin, tail_share, tail_segments = plan.cuts.tolist()
    work = plan.ends[-1].item() * 2
    programs = len(plan.owner) // (2 + _TAIL_SEGMENTS)
    assert tail_begin == programs * share < work
    assert programs < tail_segments <= programs * (1 + _TAIL_SEGMENTS)
    assert 0 <= tail_begin + tail_segments * tail_share - work < tail_share
    assert not plan.counter.any()


@pytest.mark.parametrize("programs", [3, 17, 132])
@pytest.mark.parametrize(
    "tiles", [[70], [48] * 3, [24] * 16, [1, 500, 3, 2000], [40] * 300, [4096]]
)
def test_segments_cover_the_line_and_fit_their_room(programs: int, tiles: list[int]) -> None:
    contexts = [count * 16 for count in tiles]
    width = max(tiles) * 2
    metadata = AttentionMetadata.build([1] * len(tiles), contexts, [[0] * width] * len(tiles), 8)
    config = DecodeConfig(block_n=16, num_warps=4, num_stages=2, num_programs=programs, tail=8)
    plan = plan_decode(metadata, GEOMETRY, slice(0, len(tiles)), 1, config)
    share, tail_begin, tail_share, tail_segments = plan.cuts.tolist()
    work = plan.ends[-1].item() * 2
    begins = [p * share for p in range(programs) if p * share < tail_begin]
    if tail_segments:
        assert len(begins) == programs
        begins += [tail_begin + s * tail_share for s in range(tail_segments)]
        assert max(tiles) // tail_share <= _MOST_PIECES
    assert begins[-1] < work <= begins[-1] + (tail_share if tail_segments else share)
    assert len(begins) <= len(plan.owner)
    ends = (plan.ends[1:] * 2).tolist()
    assert plan.owner[: len(begins)].tolist() == [
        sum(end <= begin for end in ends) for begin in begins
    ]


@pytest.mark.slow
def test_deterministic_results_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litecache.kernels.triton_plan._FIXED_CHUNK", 32)
    case = Case((1, 1, 1), (9, 70, 130), heads=(4, 2))
    batch = make_batch(case)
    metadata = dataclasses.replace(batch.metadata, deterministic=True)
    together = batch.attend(metadata)
    expected = attend(batch.query, batch.wide_k, batch.wide_v, batch.metadata, **batch.options)
    assert worst_error(together, expected) < 1e-5
    for row in range(3):
        table = batch.metadata.block_tables[row].tolist()
        alone = AttentionMetadata.build([1], [case.context_lens[row]], [table], 8)
        alone.deterministic = True
        out = batch.attend(alone, query=batch.query[row : row + 1])
        assert torch.equal(out[0], together[row])


def cut_for(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 for a chip that runs so many programs at once; to begin and merge is free."""
    for name in ("_BEGIN_TILES", "_MERGE_TILES"):
        monkeypatch.setattr(triton_chunks, name, tl.constexpr(0))
    monkeypatch.setattr(
        triton_chunks, "chunk_config", lambda *_: ChunkConfig(16, 16, 4, 1, programs)
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", PIECES, ids=lambda case: case.name)
def test_pieces_of_keys_make_the_whole(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_for(50, monkeypatch)
    monkeypatch.setattr(triton_backend, "most_queries", lambda *_: 20)
    monkeypatch.setattr(triton_chunks, "most_queries", lambda *_: 20)
    batch = make_batch(case)
    out = torch.full((batch.query.shape[0], case.heads[0], case.dims[1]), torch.nan).to(case.dtype)
    plan = plan_attention(batch.metadata, batch.layer())
    assert isinstance(plan, TritonPlan)
    assert plan.chunks is not None
    assert plan.longer == (max(case.query_lens) > 20)
    paged_attention(batch.layer(out=out), plan)
    expected = attend(batch.query, batch.wide_k, batch.wide_v, batch.metadata, **batch.options)
    assert worst_error(out, expected) < tolerance(case)
    assert plan.chunks.ends.diff().max() > 1


@pytest.mark.slow
def test_a_graph_cuts_by_the_lengths_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    # captured for a bucket of 32 tokens in 4 sequences beside 2 decodes, run with other lengths
    cut_for(16, monkeypatch)
    case = Case((1, 1, 20, 5, 0, 0), (9, 1, 60, 45, 0, 0), heads=(2, 1))
    batch = make_batch(case)
    static = dataclasses.replace(
        batch.metadata,
        slot_mapping=torch.zeros(34, dtype=torch.int64),
        max_query_len=32,
        max_context_len=1000,
        query_lens=(1, 1, 32, 0, 0, 0),
        context_lens_host=None,
    )
    query = torch.randn(34, 2, 16)
    plan = plan_attention(static, batch.layer(query=query))
    for lengths in ((20, 60, 5, 45), (3, 60, 20, 20)):
        first, first_context, second, second_context = lengths
        starts = [0, 1, 2, 2 + first, 2 + first + second]
        static.cu_seqlens_q.copy_(torch.tensor(starts + starts[-1:] * 2))
        static.context_lens.copy_(torch.tensor([9, 1, first_context, second_context, 0, 0]))
        plan = plan_attention(static, batch.layer(query=query))
        out = paged_attention(batch.layer(query=query), plan)[: starts[-1]]
        expected = attend(query, batch.wide_k, batch.wide_v, static, **batch.options)
        assert worst_error(out, expected[: starts[-1]]) < 1e-5
        assert isinstance(plan, TritonPlan)
        assert plan.chunks is not None
        assert plan.chunks.ends.diff().max() > 1


QUESTION = Geometry(32, 8, 128, 128, torch.bfloat16)


@pytest.mark.parametrize(
    ("queries", "contexts", "least"),
    [
        ([64], [32768], 0.95),
        ([64], [8192], 0.9),
        ([256], [32768], 0.95),
        ([64] * 8, [8192] * 8, 0.95),
        ([17, 64, 300], [3000, 32768, 9000], 0.7),
        # nothing is gained by cutting
        pytest.param([512] * 8, [512] * 8, 0.0, marks=pytest.mark.slow),
    ],
)
def test_pieces_keep_the_whole_chip_busy(
    queries: list[int], contexts: list[int], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ChunkConfig(128, 32, 8, 4, 264)
    monkeypatch.setattr(triton_chunks, "chunk_config", lambda *_: config)
    tables = [[0] * (context // 16 + 1) for context in contexts]
    metadata = AttentionMetadata.build(queries, contexts, tables, 16)
    plan = plan_chunks(metadata, QUESTION, 0, config)
    pieces = plan.ends.diff()
    total = int(pieces.sum()) * 8
    assert (int(pieces.max()) > 1) == (least > 0)
    assert total <= len(plan.owner)
    assert pieces.max() == 1 or total * 128 * 128 <= len(plan.partial)
    owners = plan.owner[:total]
    assert torch.equal(owners, torch.arange(len(pieces)).repeat_interleave(pieces * 8).int())
    assert plan.owner[total:].eq(-1).all()
    tiles = -(-plan.contexts // 32)
    longest = int((-(-tiles // pieces)).max())
    waves = -(-total // config.num_programs)
    assert int(tiles.sum()) * 8 / (waves * longest * config.num_programs) >= least


@pytest.mark.slow
def test_deterministic_chunks_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_chunks, "_FIXED_PIECE", 32)
    case = Case((1, 5, 20, 50), (9, 70, 90, 50), heads=(2, 1))
    batch = make_batch(case)
    metadata = dataclasses.replace(batch.metadata, deterministic=True)
    together = batch.attend(metadata)
    expected = attend(batch.query, batch.wide_k, batch.wide_v, batch.metadata, **batch.options)
    assert worst_error(together, expected) < 1e-5
    start = 0
    for row, count in enumerate(case.query_lens):
        rows = slice(start, start + count)
        start += count
        table = batch.metadata.block_tables[row].tolist()
        alone = AttentionMetadata.build([count], [case.context_lens[row]], [table], 8)
        alone.deterministic = True
        out = batch.attend(alone, query=batch.query[rows])
        assert torch.equal(out, together[rows])


@pytest.mark.parametrize("many", [1, 100])
@pytest.mark.parametrize("extras", [{}, {"sinks": True}, {"pool_dtype": torch.int8}])
def test_many_rows_of_few_pairs_merge_in_either_launch(
    monkeypatch: pytest.MonkeyPatch, many: int, extras: dict[str, Any]
) -> None:
    monkeypatch.setattr("litecache.kernels.triton_plan._MANY_PIECES", many)
    launches = counted_launches(monkeypatch, triton_decode, "merge_kernel")
    case = Case((8,), (90,), heads=(4, 1), **extras)
    batch = make_batch(case)
    out = torch.full((8, 4, 16), torch.nan)
    batch.attend(out=out)
    expected = attend(batch.query, batch.wide_k, batch.wide_v, batch.metadata, **batch.options)
    assert worst_error(out, expected) < tolerance(case)
    assert launches == ([("merge_kernel", (1, 4))] if many == 1 else [])


def test_a_step_is_planned_once_and_its_layers_launch_attention_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches = counted_launches(monkeypatch, triton_plan, "_plan_kernel")
    counted_launches(monkeypatch, triton_chunks, "_cut_kernel", launches)
    counted_launches(monkeypatch, triton_decode, "_decode_kernel", launches)
    counted_launches(monkeypatch, triton_prefill, "_prefill_kernel", launches)
    counted_launches(monkeypatch, triton_prefill, "merge_kernel", launches)
    plan, cut, pieces = ["_plan_kernel"], ["_cut_kernel"], ["_prefill_kernel", "merge_kernel"]
    for queries, planned, each in (
        ((1, 1), plan, ["_decode_kernel"]),
        ((1, 3), plan * 2, ["_decode_kernel"] * 2),
        ((1, 20), plan + cut, ["_decode_kernel", *pieces]),
        ((20, 20), cut, pieces),
        ((5, 49), cut, [*pieces, "_prefill_kernel"]),
        ((49, 49), [], ["_prefill_kernel"]),
    ):
        batch = make_batch(Case(queries, (50, 50), heads=(2, 1)))
        launches.clear()
        step = plan_attention(batch.metadata, batch.layer())
        for _ in range(2):
            paged_attention(batch.layer(), step)
        assert [name for name, _ in launches] == planned + 2 * each


def counted_launches(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, launches: list[Any] | None = None
) -> list[Any]:
    """The launches of a kernel from now on: its name and grid."""
    launches = [] if launches is None else launches
    kernel = getattr(module, name)

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append((name, grid))
            return kernel[grid]

    monkeypatch.setattr(module, name, Counted())
    return launches
