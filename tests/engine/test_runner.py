"""The runner gives the tokens of stock transformers, however a sequence is cut into steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from plan_driver import (
    FAMILIES,
    GREEDY,
    PlanDriver,
    random_prompt,
    stock_generate,
    stock_model,
    tiny_model,
)

from litecache.engine.running.cuda_graphs import GraphCache
from litecache.engine.scheduling.orders import RowStep, StepPlan
from litecache.errors import ConfigError
from litecache.kernels import dispatch
from litecache.types import SamplingParams


@pytest.fixture(
    scope="module",
    params=[*sorted(FAMILIES), "llama+passes", "qwen3+passes", "mistral+passes", "phi+passes"],
)
def loaded(request):
    family, _, passes = request.param.partition("+")
    return tiny_model(family, passes="fused,merged,small" if passes else "none")


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def test_chunked_prefill_mixed_steps_and_decode_equal_stock(loaded):
    prompts = [random_prompt(length, seed) for seed, length in enumerate((1, 37, 64, 21))]
    expected = [stock_generate(loaded, prompt, 12) for prompt in prompts]
    driver = PlanDriver(loaded)
    for row, prompt in enumerate(prompts):
        driver.add(row, prompt)
    got = [[], [], [], []]

    def step(counts):
        plan = driver.plan(counts)
        tokens = driver.runner.execute(plan).result().tokens
        for row, token in zip((s.row for s in plan.rows if s.sample), tokens, strict=True):
            got[row].append(token)

    step({0: 1, 1: 19, 2: 7})
    step({0: 1, 1: 18, 2: 33})  # a decode beside two chunks, one of which ends its prompt
    step({0: 1, 1: 1, 2: 24, 3: 21})
    while min(map(len, got)) < 12:
        step({row: 1 for row in range(4) if len(got[row]) < 12})
    assert got == expected


def test_chunks_that_sample_nothing_leave_their_keys_in_every_layer(loaded):
    prompt = random_prompt(61, 6)
    driver = PlanDriver(loaded)
    driver.add(0, prompt)
    for count in (20, 20):
        assert driver.step({0: count}).result().tokens == ()
    # The last chunk wants the logits of one position of many: the last layer skips the rest.
    first = driver.step({0: 21}).result().tokens[0]
    assert [first, *driver.decode(0, 9)] == stock_generate(loaded, prompt, 10)


def test_next_step_starts_before_the_result_of_the_last_is_read(loaded):
    prompt = random_prompt(23, 5)
    driver = PlanDriver(loaded)
    driver.add(0, prompt)
    first = driver.step({0: 23})
    second = driver.step({0: 1})
    tokens = [first.result().tokens[0], second.result().tokens[0]]
    assert [*tokens, *driver.decode(0, 8)] == stock_generate(loaded, prompt, 10)


def test_shared_blocks_and_a_copied_tail_give_the_same_tokens(loaded):
    first = random_prompt(45, 7)
    second = first[:41] + random_prompt(9, 8)
    driver = PlanDriver(loaded)
    driver.add(0, first)
    driver.step({0: 45})
    driver.add(1, second, prefix_of=0, num_shared=41)
    assert driver.rows[1].blocks[0][:2] == driver.rows[0].blocks[0][:2]
    assert driver.rows[1].blocks[0][2] != driver.rows[0].blocks[0][2]
    token = driver.step({1: 9}).result().tokens[0]
    assert [token, *driver.decode(1, 7)] == stock_generate(loaded, second, 8)
    # The copy left the first row's own tail alone.
    assert driver.decode(0, 4) == stock_generate(loaded, first, 5)[1:]


def test_a_full_hit_reads_the_cached_token_and_changes_no_block(loaded):
    prompt = random_prompt(48, 9)
    driver = PlanDriver(loaded)
    driver.add(0, prompt)
    driver.step({0: 48})
    before = [pool.buffer[1:].clone() for pool in driver.pools]
    driver.add(1, prompt, prefix_of=0, num_shared=48)
    driver.rows[1].computed = 47
    token = driver.step({1: 1}, cached=(1,)).result().tokens[0]
    for pool, bytes_before in zip(driver.pools, before, strict=True):
        assert torch.equal(pool.buffer[1:], bytes_before)
    assert [token, *driver.decode(1, 5)] == stock_generate(loaded, prompt, 6)


def test_a_row_is_reused_and_a_preempted_request_resumes(llama):
    prompt = random_prompt(30, 1)
    expected = stock_generate(llama, prompt, 10)
    driver = PlanDriver(llama)
    driver.add(0, random_prompt(60, 2))
    driver.step({0: 60})
    driver.decode(0, 3)
    driver.add(0, prompt + expected[:4], num_prompt_tokens=30)
    token = driver.step({0: 34}).result().tokens[0]
    assert [token, *driver.decode(0, 5)] == expected[4:]


def test_draws_do_not_depend_on_the_neighbours_or_the_chunks(llama):
    drawing = SamplingParams(
        max_new_tokens=8, temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, seed=1234
    )
    prompt = random_prompt(33, 4)
    alone = PlanDriver(llama)
    alone.add(0, prompt, drawing)
    expected = [alone.step({0: 33}).result().tokens[0], *alone.decode(0, 7)]
    driver = PlanDriver(llama)
    driver.add(3, random_prompt(5, 6), replace(drawing, seed=99))
    driver.add(1, random_prompt(40, 7), GREEDY)
    driver.add(2, prompt, drawing)
    driver.step({3: 5, 1: 40, 2: 20})
    got = [driver.step({3: 1, 1: 1, 2: 13}).result().tokens[2]]
    got += [driver.step({1: 1, 2: 1}).result().tokens[1] for _ in range(7)]
    assert got == expected


def test_a_resumed_request_draws_the_same_numbers(llama):
    drawing = SamplingParams(max_new_tokens=12, temperature=1.0, seed=5)
    prompt = random_prompt(20, 4)
    driver = PlanDriver(llama)
    driver.add(0, prompt, drawing)
    tokens = [driver.step({0: 20}).result().tokens[0], *driver.decode(0, 9)]
    driver.add(1, prompt + tokens[:4], drawing, num_prompt_tokens=20)
    assert [driver.step({1: 24}).result().tokens[0], *driver.decode(1, 5)] == tokens[4:]


def test_no_end_of_sequence_before_min_new_tokens(llama):
    prompt = random_prompt(20, 4)
    eos = stock_generate(llama, prompt, 3)[2]
    sampling = SamplingParams(max_new_tokens=9, min_new_tokens=4, eos_token_ids=(eos,))
    driver = PlanDriver(llama)
    driver.add(0, prompt, sampling)
    tokens = [driver.step({0: 20}).result().tokens[0], *driver.decode(0, 8)]
    assert eos not in tokens[:4]
    assert tokens[:2] == stock_generate(llama, prompt, 2)


def test_non_finite_logits_are_reported_for_their_row_alone():
    loaded = tiny_model("llama")
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight[7] = float("nan")
    driver = PlanDriver(loaded)
    driver.add(0, [1, 2, 3])
    driver.add(1, [4, 7, 5])
    result = driver.step({0: 3, 1: 3}).result()
    assert result.invalid_rows == (1,)
    assert result.tokens[0] == stock_generate(loaded, [1, 2, 3], 1)[0]


def test_a_model_that_gives_all_logits_draws_the_same(llama):
    prompt = random_prompt(20, 1)
    driver = PlanDriver(llama)
    driver.runner._keeps_logits = False
    driver.add(0, random_prompt(31, 2))
    driver.add(1, prompt)
    assert driver.step({0: 30, 1: 20}).result().tokens[0] == stock_generate(llama, prompt, 1)[0]


def test_a_step_that_draws_nothing_gives_no_tokens(llama):
    driver = PlanDriver(llama)
    driver.add(0, random_prompt(40, 1))
    handle = driver.step({0: 30})
    assert handle.result().tokens == ()
    assert handle.ready()


def test_a_plan_of_deltas_alone_takes_effect(llama):
    prompt = random_prompt(20, 1)
    driver = PlanDriver(llama)
    driver.add(0, prompt)
    whole = driver.plan({0: 20})
    driver.runner.execute(replace(whole, rows=()))
    handle = driver.runner.execute(StepPlan(2, rows=whole.rows))
    assert handle.result().tokens[0] == stock_generate(llama, prompt, 1)[0]


def test_a_step_over_the_token_budget_is_refused(llama):
    driver = PlanDriver(llama)
    driver.add(0, random_prompt(200, 1))
    driver.add(1, random_prompt(200, 2))
    with pytest.raises(ConfigError, match=r"num_tokens=400.*256"):
        driver.step({0: 200, 1: 200})


class _Refusing(GraphCache):
    def capture(self, key, step):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_model_that_cannot_be_captured_starts_and_runs_without_graphs(llama, caplog):
    driver = PlanDriver(llama)
    driver.runner._graphs = _Refusing(8, 16)
    told = []
    driver.runner.warm_up(lambda done, total: told.append((done, total)))
    assert all(done <= total for done, total in told)
    assert "cannot be captured" in caplog.text
    prompt = random_prompt(20, 1)
    driver.add(0, prompt)
    first = driver.step({0: 20}).result().tokens[0]
    assert [first, *driver.decode(0, 5)] == stock_generate(llama, prompt, 6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_segments_of_a_row_in_one_step_give_what_the_whole_gives(family):
    loaded, prompt = tiny_model(family), random_prompt(70, 5)
    whole = PlanDriver(loaded)
    whole.add(0, prompt)
    expected = whole.step({0: 70}).result().tokens
    parts = PlanDriver(loaded)
    parts.add(0, prompt)
    plan = parts.plan({0: 70})
    rows = (RowStep(0, 0, 33, 0), RowStep(0, 33, 20, 0), RowStep(0, 53, 17, 1))
    assert parts.runner.execute(replace(plan, rows=rows)).result().tokens == expected
    assert parts.decode(0, 8) == whole.decode(0, 8)


@pytest.mark.parametrize("family", ["llama", "llama+passes", "gemma2", "gpt2"])
def test_a_gap_and_the_tokens_behind_what_was_loaded_run_in_one_step(family):
    family, _, passes = family.partition("+")
    loaded = tiny_model(family, passes="fused,merged,small" if passes else "none")
    prompt = random_prompt(90, 5)
    whole = PlanDriver(loaded)
    whole.add(0, prompt)
    expected = whole.step({0: 90}).result().tokens
    driver = PlanDriver(loaded, max_requests=1)
    driver.add(0, prompt)
    plan = driver.plan({0: 90})
    driver.runner.execute(replace(plan, rows=(RowStep(0, 0, 20, 0),)))
    # Blocks 3 and 4 come from a lower tier; those before and behind are computed here.
    sources = zip(
        driver.pools, whole.pools, driver.rows[0].blocks, whole.rows[0].blocks, strict=True
    )
    for mine, theirs, to, source in sources:
        mine.buffer[to[3:5]] = theirs.buffer[source[3:5]]
    rows = (RowStep(0, 20, 28, 0), RowStep(0, 80, 10, 1))
    got = driver.runner.execute(StepPlan(2, rows=rows)).result().tokens
    assert got == expected == tuple(stock_generate(loaded, prompt, 1))
    assert driver.decode(0, 8) == whole.decode(0, 8)


@pytest.mark.parametrize("last", [1, 5])
def test_segments_may_be_more_than_rows_and_fill_the_step(llama, last):
    prompt = random_prompt(256 - 8, 5)
    driver = PlanDriver(llama, max_requests=1)
    driver.add(0, prompt)
    plan = driver.plan({0: len(prompt)})
    ends = [0, *range(len(prompt) - last, 0, -9)][::-1]
    rows = [RowStep(0, a, b - a, 0) for a, b in pairwise(sorted(ends))]
    rows.append(RowStep(0, len(prompt) - last, last, 1))
    rows.sort(key=lambda row: row.num_tokens > 1)  # a plan begins with those of one token
    got = driver.runner.execute(replace(plan, rows=tuple(rows))).result().tokens
    assert [*got, *driver.decode(0, 4)] == stock_generate(llama, prompt, 5)


def test_each_sampled_position_of_a_chunk_draws_as_if_it_were_the_last():
    loaded, prompt = tiny_model("llama"), random_prompt(70, 5)
    expected = []
    for length in (68, 69, 70):
        driver = PlanDriver(loaded)
        driver.add(0, prompt[:length])
        expected += driver.step({0: length}).result().tokens
    several = PlanDriver(loaded)
    several.add(0, prompt)
    plan = several.plan({0: 70})
    result = several.runner.execute(replace(plan, rows=(RowStep(0, 0, 70, 3),))).result()
    assert list(result.tokens) == expected
    assert several.decode(0, 4) == driver.decode(0, 4)


@pytest.mark.parametrize("keeps_logits", [True, False])
def test_logits_of_all_positions_of_a_chunk_are_handed_out(llama, keeps_logits):
    prompts = [random_prompt(20, 1), random_prompt(33, 2), random_prompt(9, 3)]
    driver = PlanDriver(llama)
    driver.runner._keeps_logits = keeps_logits
    for row, prompt in enumerate(prompts):
        driver.add(row, prompt)
    driver.step({1: 13})
    plan = driver.plan({0: 20, 1: 20, 2: 9})
    rows = tuple(step._replace(logits=step.num_tokens * (step.row != 0)) for step in plan.rows)
    result = driver.runner.execute(replace(plan, rows=rows)).result()
    assert list(result.tokens) == [stock_generate(llama, p, 1)[0] for p in prompts]
    stock = stock_model("llama", 0, llama.device.type)
    assert sorted(result.logits) == [1, 2]
    for place, told in result.logits.items():
        logits = torch.frombuffer(bytearray(told), dtype=llama.dtype)
        logits = logits.view(-1, llama.vocab_size).to(llama.device)
        prompt = torch.tensor([prompts[rows[place].row]], device=llama.device)
        expected = stock(prompt, use_cache=False).logits[0, rows[place].start :]
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "groups"), [("llama", 1), ("gemma2", 2)])
def test_a_step_is_planned_once_for_each_group(family, groups, monkeypatch):
    loaded = tiny_model(family)
    driver = PlanDriver(loaded)
    driver.add(0, random_prompt(20, 1))
    driver.step({0: 20})
    module, planned = dispatch.backend(loaded.device), []
    plan = module.plan_attention
    monkeypatch.setattr(module, "plan_attention", lambda *step: planned.append(step) or plan(*step))
    assert len(driver.layout.groups) == groups
    for count in (1, 2):
        driver.step({0: 1})
        if driver.runner._graphs is None:
            assert len(planned) == count * groups
