"""Padding a step to a graph's bucket changes nothing for its real tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plan_driver import random_prompt

from litecache.engine.kv_layout import KVLayout, KVSpec
from litecache.engine.running.batch import StepBuffers
from litecache.engine.running.cuda_graphs import GraphCache, GraphKey
from litecache.engine.running.row_tables import RowTables
from litecache.engine.scheduling.orders import NewRow, RowStep, StepPlan, TableUpdate
from litecache.types import SamplingParams

ROWS, LENGTH, BLOCK = 8, 256, 16
LAYOUT = KVLayout.from_specs(
    [KVSpec(2, 16, 16, "float32"), KVSpec(2, 16, 16, "float32", window=16)], BLOCK
)
GROUPS = len(LAYOUT.groups)


def make():
    device = torch.device("cpu")
    buffers = StepBuffers((1024, ROWS + 64, ROWS + 64, GROUPS, 1 << 14), ROWS, device)
    return buffers, RowTables(LAYOUT, buffers, ROWS, LENGTH, 512)


def plan_of(rows):
    """Rows of (known tokens, start, count, sample, temperature), rows of one token first."""
    new, updates, steps = [], [], []
    for index, (known, start, count, sample, temperature) in enumerate(rows):
        sampling = SamplingParams(9, temperature=temperature, seed=index)
        new.append(NewRow(index, tuple(random_prompt(known, index)), known, sampling))
        for group in range(GROUPS):
            blocks = tuple(range(1 + 40 * index + group, 17 + 40 * index + group))
            updates.append(TableUpdate(index, group, 0, blocks))
        steps.append(RowStep(index, start, count, sample))
    return StepPlan(1, tuple(new), tuple(updates), (), tuple(steps))


_ROW = st.tuples(
    st.integers(1, 200), st.integers(0, 40), st.integers(1, 60), st.booleans(),
    st.sampled_from([0.0, 0.7]),
)  # fmt: skip


@given(st.lists(_ROW, min_size=1, max_size=ROWS))
def test_padding_leaves_real_tokens_alone(rows):
    rows = sorted(
        ((known, min(start, known), count, sample, t) for known, start, count, sample, t in rows),
        key=lambda row: row[2] > 1,
    )
    plan = plan_of(rows)
    decodes = sum(row[2] == 1 for row in rows)
    tokens = plan.num_tokens - decodes
    key = GraphCache(ROWS, 512).key_for(decodes, tokens, len(rows) - decodes)
    assert key is not None
    seen = []
    for graph in (None, key):
        buffers, tables = make()
        batch = tables.build(plan, graph)
        fields = {name: field.clone() for name, field in batch.fields.items()}
        fields["input"] = buffers.words[fields["id_index"]]
        fields["last"] = fields["id_index"] < ROWS
        seen.append((batch, fields))
    (_, exact), (batch, padded) = seen
    gap = key.decodes - decodes
    # Decodes stay in front, longer sequences follow the padded decode slots.
    places = [*range(decodes), *range(key.decodes, key.decodes + tokens)]
    for name in ("input", "last", "positions"):
        assert torch.equal(padded[name][places], exact[name])
    slots = padded["slots"].view(GROUPS, -1)
    assert torch.equal(slots[:, places], exact["slots"].view(GROUPS, -1))
    others = sorted(set(range(len(batch.fields["positions"]))) - set(places))
    assert (slots[:, others] == 0).all()
    seqs = [*range(decodes), *range(key.decodes, key.decodes + len(rows) - decodes)]
    for name in ("rows", "context_lens"):
        assert torch.equal(padded[name][seqs], exact[name])
    starts, exact_starts = padded["cu_seqlens"].tolist(), exact["cu_seqlens"].tolist()
    for index, seq in enumerate(seqs):
        length = exact_starts[index + 1] - exact_starts[index]
        assert starts[seq + 1] - starts[seq] == length
    assert starts == sorted(starts)
    assert starts[-1] <= len(batch.fields["positions"])
    count = len(exact["sample_rows"])
    for name in ("sample_rows", "keys", "temperature"):
        assert torch.equal(padded[name][:count], exact[name])
    assert (padded["sample_rows"][count:] == ROWS).all()
    expected = [place + (gap if place >= decodes else 0) for place in exact["logit_index"].tolist()]
    assert padded["logit_index"][:count].tolist() == expected


@given(st.integers(1, 600), st.integers(0, 3000), st.integers(0, 700))
def test_a_bucket_holds_its_step_or_there_is_none(decodes, tokens, seqs):
    key = GraphCache(256, 2048).key_for(decodes, tokens, seqs)
    if key is None:
        assert decodes > 256 or tokens > 2048 or seqs > 32
        return
    assert key.decodes >= decodes
    if seqs:
        assert key.chunk_tokens >= tokens
        assert key.chunk_seqs >= seqs
    num_tokens, num_seqs, _ = key.sizes
    assert sum(key.query_lens) == num_tokens
    assert len(key.query_lens) == num_seqs
    assert num_tokens <= GraphCache(256, 2048).largest.sizes[0]


def test_an_empty_plan_fills_a_bucket_with_padding_alone():
    _, tables = make()
    batch = tables.build(StepPlan(0), GraphKey(4, 16, 4))
    fields = batch.fields
    assert fields["cu_seqlens"].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 4]
    assert (fields["slots"] == 0).all()
    assert (fields["rows"] == ROWS).all()
    assert batch.sampled_rows == ()


@pytest.mark.parametrize("known", [5, 8, 9])
def test_tokens_the_host_does_not_know_come_from_the_device(known):
    buffers, tables = make()
    buffers.last_tokens[0] = 777
    row = NewRow(0, tuple(random_prompt(known, 0)), known, SamplingParams(9))
    plan = StepPlan(1, (row,), (TableUpdate(0, 0, 0, (3,)),), (), (RowStep(0, 8, 1, True),))
    batch = tables.build(plan)
    token = int(buffers.words[batch.fields["id_index"]])
    assert token == (random_prompt(9, 0)[8] if known == 9 else 777)


def test_several_positions_of_a_row_draw_and_the_last_one_feeds_the_next_step():
    _, tables = make()
    new = tuple(NewRow(r, tuple(random_prompt(30, r)), 20, SamplingParams(9)) for r in (0, 1))
    steps = (RowStep(0, 5, 1, 1), RowStep(1, 20, 8, 3))
    batch = tables.build(StepPlan(1, new, (), (), steps))
    assert batch.sampled_rows == (0, 1, 1, 1)
    assert batch.fields["logit_index"].tolist() == [0, 6, 7, 8]
    assert batch.fields["sample_rows"].tolist() == [0, ROWS, ROWS, 1]
