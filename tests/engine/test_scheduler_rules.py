"""What the scheduler promises to those who wait: budget, order, fairness, prompt ends."""

from __future__ import annotations

import pytest
from scheduler_world import BLOCK_SIZE, World, expected_output

from litecache.engine.scheduling.orders import Schedule, StepPlan, TableUpdate
from litecache.storage.protocol import Retention
from litecache.token_ids import TokenIds
from litecache.types import FinishReason

PROMPT = (0, 1, 1, 0)


def endless(count: int, length: int) -> list[tuple[int, ...]]:
    """Prompts of 12 tokens whose output does not end by itself within `length` tokens."""
    candidates = (tuple(int(bit) for bit in f"{n:012b}") for n in range(4096))
    found = (p for p in candidates if len(expected_output(p, length)) == length)
    return [next(found) for _ in range(count)]


def next_plan(world: World) -> StepPlan | None:
    """Schedule and execute one step, and deliver its result."""
    out: Schedule = world.scheduler.schedule(world.now)
    world.take(out)
    if out.plan is not None:
        world.execute(out.plan)
        world.finish_step()
    return out.plan


def test_decodes_get_a_token_in_every_step_beside_the_chunks_of_a_long_prompt() -> None:
    world = World(num_blocks=60, lower_tiers=False, max_requests=4, max_batch_tokens=16)
    for prompt in endless(2, 30):
        world.submit(prompt, 30)
    while min(len(world.outputs[f"r{i}"]) for i in range(2)) < 2:
        next_plan(world)
    late = world.submit(PROMPT * 30, 2, cache_salt="own")
    chunks = []
    while not world.outputs[late]:
        before = [len(world.outputs[f"r{i}"]) for i in range(2)]
        plan = next_plan(world)
        assert plan is not None
        assert [len(world.outputs[f"r{i}"]) for i in range(2)] == [n + 1 for n in before]
        assert [row.num_tokens for row in plan.rows[:2]] == [1, 1]
        assert plan.num_tokens <= 16
        chunks.append(plan.rows[2].num_tokens)
    assert sum(chunks) == 120
    # The decodes' tokens count: what is left of the budget is filled to the last.
    assert set(chunks[:-1]) == {14}


def test_a_prompt_may_take_a_larger_step_while_nothing_decodes() -> None:
    world = World(num_blocks=80, lower_tiers=False, max_batch_tokens=16, max_prefill_tokens=64)
    first = world.submit(endless(1, 40)[0] * 7, 40)
    sizes = []
    while not world.outputs[first]:
        plan = next_plan(world)
        assert plan is not None
        sizes.append(plan.num_tokens)
    assert sizes == [64, 20]
    late = world.submit(PROMPT * 30, 1, cache_salt="own")
    while not world.outputs[late]:
        plan = next_plan(world)
        assert plan is not None
        assert plan.num_tokens <= 16


def test_beside_a_load_a_step_has_half_of_what_is_in_front_of_it_in_whole_chunks() -> None:
    world = World(num_blocks=90, max_batch_tokens=512, load_chunk_tokens=16)
    prompt = endless(1, 12)[0] * 21
    world.submit(prompt, 1)
    world.run_until_idle()
    world.scheduler.cache.evict_idle()
    world.costs.load_from = lambda first, end: 23
    late = world.submit(prompt, 1)
    world.answer_stage(0, lambda key: True)
    world.plans.clear()
    while next_plan(world):
        pass
    # 184 tokens are in front of the load, which has not landed; the last steps meet it
    assert [plan.num_tokens for plan in world.plans] == [80, 48, 16, 16, 16, 8]
    world.answer_load(0)
    # without a load a step has what its budget allows
    world.costs.load_from = lambda first, end: end
    other = world.submit(prompt, 1, cache_salt="own")
    world.run_until_idle()
    assert world.plans[-1].num_tokens == len(prompt)
    assert world.outputs[late] == world.outputs[other]
    world.check_outputs()


def test_what_clients_hear_of_a_step_does_not_wait_until_its_blocks_are_published() -> None:
    world = World(num_blocks=20)
    world.submit(PROMPT * 3, 1)
    world.submit(endless(1, 8)[0], 8, cache_salt="other")
    for _ in range(2):
        world.answer_stage(0, lambda key: False)
    index, told = world.scheduler.cache.indexes[0], []

    def tell(out: Schedule) -> None:
        told.append((len(out.deltas), len(index), len(out.saves)))
        world.take(out)

    assert world.step()
    out = world.scheduler.on_result(world.results.pop(0), world.now, tell)
    assert not out.deltas
    # the first request has ended and gave its blocks back: they are published before that
    assert told == [(2, 1, 1)]
    assert len(index) == 2
    world.take(out)
    assert len(world.saves) == 2
    world.run_until_idle()
    world.check_outputs()


def test_a_request_that_needs_most_of_the_pool_starts_under_a_stream_of_small_ones() -> None:
    world = World(num_blocks=20, lower_tiers=False, max_requests=3, max_batch_tokens=64)
    smalls = endless(60, 8)
    for small in smalls[:3]:
        world.submit(small, 8)
    next_plan(world)
    big = world.submit(PROMPT * 32, 4)
    steps = 0
    for small in smalls[3:]:
        world.now += 0.01
        world.submit(small, 8)
        next_plan(world)
        steps += 1
        if world.outputs[big]:
            break
    assert world.outputs[big], "small requests passed it over"
    assert steps < 20
    world.run_until_idle()
    world.check_outputs()


def test_the_one_preempted_is_the_latest_and_least_urgent() -> None:
    prompts = endless(3, 40)
    world = World(num_blocks=9, lower_tiers=False)
    first = world.submit(prompts[0], 40, priority=1)
    urgent = world.submit(prompts[1], 40)
    late = world.submit(prompts[2], 40, priority=1)
    world.now = 1.0
    while not world.scheduler.preemptions:
        assert next_plan(world) is not None
    waiting = [seq.id for seq in world.scheduler._queues.waiting]
    assert waiting == [late]
    while world.scheduler.preemptions < 2:
        assert next_plan(world) is not None
    assert [seq.id for seq in world.scheduler._queues.running] == [urgent]
    world.run_until_idle()
    assert next(iter(world.finished)) == urgent
    assert set(world.finished) == {first, urgent, late}
    world.check_outputs()


def test_a_preempted_request_resumes_by_loading_what_the_pool_lost() -> None:
    def computed(lower_tiers: bool) -> int:
        world = World(num_blocks=9, lower_tiers=lower_tiers)
        for prompt in endless(3, 40):
            world.submit(prompt, 40)
        while len(world.finished) < 3:
            moved = world.step() or bool(world.loads or world.reports)
            while world.results:
                world.finish_step()
            while world.saves:
                world.answer_save(0, True)
            if world.scheduler.num_waiting:
                # Others take the blocks of those that were preempted.
                world.scheduler.cache.evict_idle()
            while world.stages:
                world.answer_stage(0, lambda key: True)
            while world.loads:
                world.answer_load(0)
            while world.reports:
                world.report(0)
            assert moved or world.scheduler.num_waiting
        world.run_until_idle()
        assert world.scheduler.preemptions > 0
        world.check_outputs()
        return world.computed_tokens

    assert computed(True) < computed(False)


def test_an_aborted_request_is_in_no_later_plan_and_leaves_its_blocks_at_once() -> None:
    world = World(num_blocks=40, lower_tiers=False, max_batch_tokens=16)
    keeps, goes = (world.submit(prompt, 30) for prompt in endless(2, 30))
    while not world.outputs[goes]:
        next_plan(world)
    row = {seq.id: seq.row for seq in world.scheduler._queues.running}[goes]
    used = world.scheduler.cache.stats()
    # One step runs while the abort arrives.
    world.step()
    world.take(world.scheduler.abort([goes]))
    assert world.finished == {goes: FinishReason.ABORT}
    assert world.scheduler.cache.stats()["private"] < used["private"]
    told = len(world.outputs[goes])
    while world.results:
        world.finish_step()
    for _ in range(5):
        plan = next_plan(world)
        assert plan is not None
        assert row not in [step.row for step in plan.rows]
    assert len(world.outputs[goes]) == told
    world.run_until_idle()
    assert world.finished[keeps] in (FinishReason.STOP, FinishReason.LENGTH)


def test_a_deadline_ends_waiting_requests_too_and_none_of_them_twice() -> None:
    world = World(num_blocks=20, lower_tiers=False, max_requests=1)
    prompts = endless(2, 20)
    runs = world.submit(prompts[0], 20, max_time_s=9.0)
    waits = world.submit(prompts[1], 20, max_time_s=5.0)
    next_plan(world)
    assert world.scheduler.next_deadline() == 5.0
    world.now = 6.0
    next_plan(world)
    assert world.finished == {waits: FinishReason.LENGTH}
    assert world.outputs[waits] == []
    assert world.scheduler.next_deadline() == 9.0
    world.now = 10.0
    assert next_plan(world) is None
    assert world.finished[runs] is FinishReason.LENGTH
    assert world.scheduler.next_deadline() is None


@pytest.mark.parametrize(("length", "num_blocks"), [(12, 9), (20, 11), (28, 13), (40, 15)])
def test_a_row_that_is_given_back_and_taken_in_one_step_has_each_table_entry_written_once(
    length: int, num_blocks: int
) -> None:
    """The younger row trims its window, finds no block, and an urgent request takes its place."""
    prompts = endless(3, 60)
    world = World(num_blocks, windowed=True, window=16, lower_tiers=False, max_requests=2)
    for prompt in prompts[:2]:
        world.submit(prompt, 50)
    while len(world.outputs["r1"]) < 3:
        next_plan(world)
    world.submit((prompts[2] * 9)[:length], 3, priority=-1)
    world.run_until_idle()
    assert world.scheduler.preemptions > 0
    world.check_outputs()


def test_a_plan_that_writes_a_table_entry_twice_cannot_be_made() -> None:
    first, second = TableUpdate(0, 0, 3, (5, 6)), TableUpdate(0, 0, 4, (7,))
    with pytest.raises(AssertionError, match="writes entry 4 of row 0, group 0 twice"):
        StepPlan(1, table_updates=(second, first))
    StepPlan(1, table_updates=(second, TableUpdate(0, 1, 4, (7,)), TableUpdate(1, 0, 4, (7,))))


def published(world: World, salt: str) -> list[int]:
    """Per KV group, how many blocks of a salt the pool knows."""
    found = zip(world.scheduler.cache.indexes, world.roots(salt), strict=True)
    return [len(index.of_root(root)) for index, root in found]


@pytest.mark.parametrize("windowed", [False, True])
def test_a_request_whose_salt_is_deleted_ends_right_and_publishes_and_saves_no_more(
    windowed: bool,
) -> None:
    prompt, other = endless(2, 30)
    world = World(num_blocks=60, windowed=windowed, max_batch_tokens=64)
    kept = world.submit(other, 20, cache_salt="other")
    world.run_until_idle()
    ends = world.submit(prompt, 30, cache_salt="gone")
    while world.stages:
        world.answer_stage(0, lambda key: True)
    while len(world.outputs[ends]) < 10:
        next_plan(world)
    stored, others = set(world.stored), published(world, "other")
    assert world.scheduler.delete_salt("nobody's") == 0
    assert world.scheduler.delete_salt("gone") > 0
    assert world.scheduler.delete_salt("gone") == 0
    saves = [order.key for order in world.saves]
    again = world.submit(prompt, 1, cache_salt="gone")
    world.run_until_idle()
    assert set(world.finished) == {kept, ends, again}
    assert world.reused[again] == {}
    world.check_outputs()
    assert published(world, "gone") == [1] * len(world.groups), "of the later request alone"
    assert published(world, "other") == others
    fresh = set(world.stored) - stored - set(saves)
    assert not fresh, "what the later request saved had been saved before, and nothing else"


def test_a_prefix_is_saved_whatever_the_admission_and_again_when_it_was_evicted_below() -> None:
    (prompt,) = endless(1, 4)
    world = World(num_blocks=60, admission="none")
    world.submit(prompt, 1, cache_salt="s")
    world.run_until_idle()
    assert not world.stored
    for _ in range(2):
        world.take(world.scheduler.save_prefix(TokenIds(prompt), "s", everything=True))
        world.run_until_idle()
        assert len(world.stored) == len(world.groups)
        world.stored.clear()
    world.take(world.scheduler.save_prefix(TokenIds(prompt), "s", everything=False))
    world.take(world.scheduler.save_prefix(TokenIds(prompt), "another", everything=True))
    assert not world.saves


@pytest.mark.parametrize("windowed", [False, True])
def test_what_a_no_store_request_computes_is_found_by_nobody(windowed: bool) -> None:
    (prompt,) = endless(1, 30)
    world = World(num_blocks=60, windowed=windowed)
    for _ in range(2):
        name = world.submit(prompt, 30, cache_salt="s", cache="no-store")
        world.run_until_idle()
        assert world.found[name] == world.reused[name] == {}
        assert published(world, "s") == [0] * len(world.groups)
        assert not world.stored
    world.check_outputs()


@pytest.mark.parametrize("cache", ["no-store", "read-only"])
def test_a_preempted_request_leaves_no_more_than_one_that_ran_through(cache: str) -> None:
    world = World(num_blocks=8, max_requests=2)
    for prompt in endless(2, 30):
        world.submit(prompt, 30, cache_salt="s", cache=cache)
    world.run_until_idle()
    assert world.scheduler.preemptions > 0
    assert not world.stored
    assert bool(sum(published(world, "s"))) == (cache == "read-only")
    world.check_outputs()


@pytest.mark.parametrize("admission", ["all", "reused"])
def test_what_a_read_only_request_computes_is_saved_by_the_first_other_that_uses_it(
    admission: str,
) -> None:
    (prompt,) = endless(1, 30)
    prompt = (*prompt, *(0, 1) * 8)
    world = World(num_blocks=60, admission=admission)
    blocks = len(prompt) // 8
    for cache, reused in (("read-only", 0), ("read-only", blocks), ("no-store", blocks)):
        name = world.submit(prompt, 1, cache_salt="s", cache=cache)
        world.run_until_idle()
        assert sum(world.reused[name].values()) // 8 == reused
        assert published(world, "s") == [blocks]
        assert not world.stored, f"{cache} saves nothing, not on second sight either"
    world.submit(prompt, 1, cache_salt="s")
    world.run_until_idle()
    assert len(world.stored) == blocks
    world.check_outputs()


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("cache", ["no-store", "read-only"])
def test_blocks_of_the_lower_tiers_are_found_whatever_a_request_leaves(
    cache: str, windowed: bool
) -> None:
    (prompt,) = endless(1, 30)
    prompt = (*prompt, *(0, 1) * 8)
    world = World(num_blocks=60, windowed=windowed)
    world.submit(prompt, 1, cache_salt="s")
    world.run_until_idle()
    world.scheduler.cache.evict_idle()
    stored = set(world.stored)
    name = world.submit(prompt, 20, cache_salt="s", cache=cache)
    world.run_until_idle()
    assert world.reused[name] == {"ram": len(prompt) // 8 * 8}
    assert set(world.stored) == stored
    assert bool(sum(published(world, "s"))) == (cache == "read-only")
    world.check_outputs()


def test_what_is_saved_for_a_request_ends_and_is_kept_as_it_says() -> None:
    (prompt,) = endless(1, 30)
    world = World(num_blocks=60)
    world.submit(prompt, 30, cache_salt="s", expires_s=99, retention="low")
    while len(world.saves) < 3:
        next_plan(world)
        while world.stages:
            world.answer_stage(0, lambda key: True)
    kept = {(order.salt, order.expires_s, order.retention) for order in world.saves}
    assert kept == {("s", 99, Retention.LOW)}


def test_queued_tokens_are_those_of_prompts_that_the_pool_does_not_hold() -> None:
    world = World(num_blocks=60, lower_tiers=False, max_batch_tokens=16)
    prompt = PROMPT * 12
    world.submit(prompt, 8)
    counts = [world.scheduler.num_queued_tokens]
    for _ in range(4):
        next_plan(world)
        counts.append(world.scheduler.num_queued_tokens)
    assert counts == [48, 32, 16, 0, 0], "decoding is no queue"
    world.submit(prompt + (1,) * 10, 1)
    assert world.scheduler.num_queued_tokens == 10


def test_a_guided_request_that_was_preempted_starts_again_with_its_drivers_answer() -> None:
    (prompt,) = endless(1, 40)
    world = World(num_blocks=-(-(len(prompt) + 40) // BLOCK_SIZE), lower_tiers=False)
    older = world.submit(prompt, 40)
    guided = world.submit((1, 1, 0, 1), 20, mask=b"\3\0\0\0")
    world.run_steps()
    assert older in world.finished
    assert world.scheduler.preemptions == 1
    assert world.asking == [guided]
    assert not world.step(), "it steps though its driver has allowed nothing"
    assert (world.scheduler.num_running, world.scheduler.num_waiting) == (0, 1)
    world.run_until_idle()
    world.check_outputs()
    assert guided in world.finished
