"""The scheduler against a plain model: right tokens, right KV, nothing lost, nobody starved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from scheduler_world import BLOCK_SIZE, WINDOW, World, expected_output, guide

from litecache.engine.kv_layout import KVLayout, KVSpec
from litecache.engine.scheduling.below import NO_REFS, Refs
from litecache.engine.scheduling.block_pool import BlockPool
from litecache.engine.scheduling.loads import MAX_STAGING, Loads
from litecache.engine.scheduling.orders import LoadReport, RowGuide, Schedule
from litecache.engine.scheduling.plan_builder import PlanBuilder
from litecache.engine.scheduling.prefix_cache import PrefixCache
from litecache.engine.scheduling.prefix_index import (
    MISSING,
    PENDING,
    TOKEN_BYTES,
    PartialMatch,
    PrefixIndex,
    sortable,
)
from litecache.engine.scheduling.saves import Saves
from litecache.engine.scheduling.scheduler import Scheduler
from litecache.engine.scheduling.sequence import KeyChain, Sequence
from litecache.types import FinishReason, Guidance

PROMPTS = st.builds(
    lambda shared, own: (0, 1, 1, 0) * (shared // 4) + tuple(own),
    st.sampled_from([0, 16, 24, 40, 40]),
    st.lists(st.integers(0, 1), min_size=0, max_size=20),
).filter(bool)

SALTS = ["", "b", "c", "d"]
ALL = b"\7\0\0\0"
"""Of the world's three tokens."""


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, events and failures in random order, up to two steps in flight."""

    @initialize(
        num_blocks=st.integers(11, 24),
        windowed=st.booleans(),
        # of whole blocks: a row trims its window in the very step in which it needs a block
        window=st.sampled_from([16, WINDOW]),
        lower_tiers=st.booleans(),
        admission=st.sampled_from(["all", "frequent", "reused", "none"]),
        deterministic=st.booleans(),
        warm=st.sampled_from([True, True, True, False]),
    )
    def start(self, warm: bool, **settings: object) -> None:
        if warm:
            settings |= {"lower_tiers": True, "admission": "all"}
        self.world = World(**settings)  # type: ignore[arg-type]
        if warm:
            # What an earlier life left in the lower tier.
            for salt in SALTS:
                self.world.submit((0, 1, 1, 0) * 10, 1, cache_salt=salt)
                self.world.run_until_idle()
                self.world.scheduler.cache.evict_idle()
        self.world.costs.load_from = lambda first, end: first + self.split * (end - first) // 4
        self.split = 0

    @rule(prompt=PROMPTS, new=st.integers(1, 20), salt=st.sampled_from(["", *SALTS]))
    def submit(self, prompt: tuple[int, ...], new: int, salt: str) -> None:
        if len(self.world.requests) < 16:
            self.world.submit(prompt, new, cache_salt=salt)

    @rule(prompt=PROMPTS, new=st.integers(1, 28), salt=st.sampled_from(["", *SALTS]))
    def submit_guided(self, prompt: tuple[int, ...], new: int, salt: str) -> None:
        if len(self.world.requests) < 16:
            self.world.submit(prompt, new, cache_salt=salt, mask=guide(prompt, 0)[1] or ALL)

    @rule(pick=st.integers(0, 9), times=st.integers(1, 2))
    def driver_answers(self, pick: int, times: int) -> None:
        if self.world.asking:
            self.world.answer_driver(pick % len(self.world.asking), times)

    @rule(prompt=PROMPTS, last=st.integers(1, 20), salt=st.sampled_from(["", *SALTS]))
    def forward(self, prompt: tuple[int, ...], last: int, salt: str) -> None:
        """Logits are asked for, of a prompt and then of one that goes on from it."""
        for tokens in (prompt, (*prompt, 1, 1)):
            if len(self.world.requests) < 16:
                wanted = min(last, len(tokens))
                self.world.submit(tokens, 0, cache_salt=salt, logits=wanted)

    @rule(pick=st.integers(0, 15), more=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def go_on(self, pick: int, more: list[int]) -> None:
        """The next turn of a chat: what a request asked and was told, and more."""
        if self.world.finished and len(self.world.requests) < 16:
            name = list(self.world.finished)[pick % len(self.world.finished)]
            request = self.world.requests[name]
            tokens = (*request.prompt, *self.world.outputs[name], *more)
            self.submit(tokens[:60], 4, request.cache_salt)

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            if len(self.world.results) == 2:
                self.world.finish_step()
            self.world.step()

    @rule()
    def finish_step(self) -> None:
        if self.world.results:
            self.world.finish_step()

    @rule(pick=st.integers(0, 9), have=st.booleans())
    def staged(self, pick: int, have: bool) -> None:
        if self.world.stages:
            self.world.answer_stage(pick % len(self.world.stages), lambda key: have or key[0] % 4)

    @rule(split=st.integers(0, 4), patient=st.booleans())
    def costs(self, split: int, patient: bool) -> None:
        """From where to load, and whether to wait at the meeting."""
        self.split, self.world.costs.patient = split, patient

    @rule(pick=st.integers(0, 9), fail=st.integers(1, 7))
    def loaded(self, pick: int, fail: int) -> None:
        if self.world.loads:
            self.world.answer_load(pick % len(self.world.loads), lambda number: number != fail)

    @rule(pick=st.integers(0, 9), count=st.integers(1, 3), fail=st.integers(1, 12))
    def lands(self, pick: int, count: int, fail: int) -> None:
        if self.world.loads:
            position = pick % len(self.world.loads)
            self.world.land(position, count, lambda number: number != fail)

    @rule(pick=st.integers(0, 9), count=st.integers(1, 3))
    def copies_begin(self, pick: int, count: int) -> None:
        if self.world.loads:
            self.world.begin_copies(pick % len(self.world.loads), count)

    @rule(pick=st.integers(0, 9))
    def cancelled(self, pick: int) -> None:
        if self.world.reports:
            self.world.report(pick % len(self.world.reports))

    @rule(seconds=st.sampled_from([0.01, 0.2]))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(fail=st.integers(1, 7), part=st.integers(0, 3), split=st.integers(0, 4))
    def stage_and_load(self, fail: int, part: int, split: int) -> None:
        """The usual order of things, which random rules hit rarely."""
        self.split = split
        while self.world.stages:
            self.world.answer_stage(0, lambda key: True)
        self.step(1)
        if self.world.loads and part:
            self.world.land(0, part)
            self.step(1)
        while self.world.loads:
            self.world.answer_load(0, lambda number: number != fail)
        self.step(1)

    @rule(split=st.integers(1, 4), part=st.integers(0, 3), salt=st.sampled_from(SALTS))
    def meet(self, split: int, part: int, salt: str) -> None:
        """A load is late: what is computed in front of it takes over."""
        self.split, self.world.costs.patient = split, False
        self.evict()
        self.submit((0, 1, 1, 0) * 10 + (1,) * part, 3, salt)
        while self.world.stages:
            self.world.answer_stage(0, lambda key: True)
        self.step(1)
        if self.world.loads and part:
            self.world.begin_copies(len(self.world.loads) - 1, part)
        self.step(2)

    @rule(pick=st.integers(0, 9), works=st.booleans())
    def saved(self, pick: int, works: bool) -> None:
        if self.world.saves:
            self.world.answer_save(pick % len(self.world.saves), works)

    @rule(salt=st.sampled_from(["", *SALTS]))
    def salt_is_deleted(self, salt: str) -> None:
        self.world.scheduler.delete_salt(salt)
        indexes = self.world.scheduler.cache.indexes
        for index, root in zip(indexes, self.world.roots(salt), strict=True):
            assert not index.of_root(root)

    @rule(pick=st.integers(0, 15))
    def abort(self, pick: int) -> None:
        if f"r{pick}" in self.world.requests:
            self.world.take(self.world.scheduler.abort([f"r{pick}"]))

    @rule(pick=st.integers(0, 15), paused=st.booleans())
    def pause(self, pick: int, paused: bool) -> None:
        self.world.scheduler.set_paused([f"r{pick}"], paused)

    @rule(out_of_memory=st.booleans())
    def step_raises(self, out_of_memory: bool) -> None:
        """The newest launched step never happened."""
        world = self.world
        if len(world.results) < 2 and world.step():
            world.fail_last_step(out_of_memory)

    @rule()
    def evict(self) -> None:
        self.world.scheduler.cache.evict_idle()

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.scheduler.set_paused(list(world.requests), False)
        world.costs.patient = True
        world.run_until_idle()
        assert set(world.finished) == set(world.requests), "a request starved"
        world.check_outputs()
        assert not world.leases, "a lease was never given back"
        blocks = world.scheduler.cache.stats()
        used = {state: n for state, n in blocks.items() if n and state not in ("free", "idle")}
        assert not used, f"blocks leaked: {used}"


TestScheduler = pytest.mark.no_cover(SchedulerMachine.TestCase)


def _fail_to_pin_shared_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hit takes no reference when the block is in use already."""

    def acquire(self: BlockPool, blocks: list[int]) -> None:
        for block in blocks:
            if self._refs[block] == 0:
                del self._idle_like(block)[block]
                self._refs[block] += 1

    monkeypatch.setattr(BlockPool, "acquire", acquire)


def _match_one_token_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PrefixIndex.match_partial

    def match_partial(self: PrefixIndex, parent: bytes, tokens: object) -> PartialMatch | None:
        best = original(self, parent, tokens)  # type: ignore[arg-type]
        if best is None or best.num_tokens == len(tokens):  # type: ignore[arg-type]
            return best
        return best._replace(num_tokens=best.num_tokens + 1)

    monkeypatch.setattr(PrefixIndex, "match_partial", match_partial)


def _publish_before_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Saves._publish

    def publish(self: Saves, seq: Sequence, start: int, end: int, out: Schedule) -> None:
        original(self, seq, start, end + BLOCK_SIZE, out)

    monkeypatch.setattr(Saves, "_publish", publish)


def _skip_copy_on_write(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PlanBuilder._enter

    def enter(self: PlanBuilder, seq: Sequence) -> None:
        original(self, seq)
        self._copies.clear()

    monkeypatch.setattr(PlanBuilder, "_enter", enter)


def _trust_failed_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Loads.on_loaded

    def on_loaded(self: Loads, report: LoadReport) -> Schedule:
        everything = np.concatenate((report.landed, report.lost))
        return original(self, report._replace(landed=everything, lost=NO_REFS))

    monkeypatch.setattr(Loads, "on_loaded", on_loaded)


def _compute_into_what_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_writable(self: BlockPool, block: int) -> bool:
        return bool(block) and self._keys[block] is None

    monkeypatch.setattr(BlockPool, "is_writable", is_writable)


def _let_copies_overtake_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    original = BlockPool.release
    monkeypatch.setattr(BlockPool, "release", lambda self, blocks, step=0: original(self, blocks))


def _free_blocks_under_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled block counts as free, though its copy has begun."""
    original = Loads.cancel

    def cancel(self: Loads, seq: Sequence, refs: Refs, out: Schedule) -> None:
        for group, index in refs:
            self._cache.pools[group]._loading.discard(seq.tables[group][index])
        original(self, seq, refs, out)

    monkeypatch.setattr(Loads, "cancel", cancel)
    monkeypatch.setattr(
        BlockPool, "end_copies", lambda self, blocks: self._loading.difference_update(blocks)
    )


def _jump_over_a_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PrefixCache.ahead_end

    def ahead_end(self: PrefixCache, seq: Sequence, first: int) -> int:
        end = original(self, seq, first)
        return min(end + (end > first), len(seq.chain.keys[0]))

    monkeypatch.setattr(PrefixCache, "ahead_end", ahead_end)


def _forget_what_windows_need(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PrefixCache._runs

    def runs(self: PrefixCache, has: object, group: int, first: int, limit: int) -> list[int]:
        return [run + 1 for run in original(self, has, group, first, limit)]  # type: ignore[arg-type]

    monkeypatch.setattr(PrefixCache, "_runs", runs)


def _leak_what_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Loads.on_loaded

    def on_loaded(self: Loads, report: LoadReport) -> Schedule:
        for group, index in report.lost:
            self._cache.pools[group].acquire([self._copies[report.ticket][1][group, index]])
        return original(self, report)

    monkeypatch.setattr(Loads, "on_loaded", on_loaded)


def _count_lost_blocks_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Sequence.count_computed

    def count(self: Sequence, start: int, tokens: int) -> None:
        original(self, start, tokens)
        if self.below.num_loading:
            self.num_own -= 1

    monkeypatch.setattr(Sequence, "count_computed", count)


def _reuse_what_gives_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(self: PrefixCache, seq: Sequence) -> list[list[int]]:
        return self.look_whole(seq.chain)

    monkeypatch.setattr(PrefixCache, "look", look)


def _publish_tails_that_are_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PrefixIndex.insert

    def insert(
        self: PrefixIndex, key: bytes, block: int, parent: bytes, tokens: bytes, *root: Any
    ) -> bool:
        if len(tokens) < BLOCK_SIZE * TOKEN_BYTES:
            tokens += sortable(np.array([1]))
        return original(self, key, block, parent, tokens, *root)

    monkeypatch.setattr(PrefixIndex, "insert", insert)


def _step_guided_rows_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def wants_step(self: Sequence) -> bool:
        if self.num_logits:
            return self.num_todo > 0
        return self.num_tokens + self.num_in_flight < self.max_tokens

    monkeypatch.setattr(Sequence, "wants_step", property(wants_step))


def _take_each_answer_of_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Scheduler.guide

    def guide(self: Scheduler, guidance: Guidance) -> Schedule:
        seq = self._sequences.get(guidance.request_id)
        if seq is not None:
            self._asking[seq.id] = seq
            guidance = guidance._replace(num_tokens=seq.num_tokens)
        return original(self, guidance)

    monkeypatch.setattr(Scheduler, "guide", guide)


def _forget_what_a_driver_appends(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PlanBuilder._guide

    def guide(self: PlanBuilder, seq: Sequence, mask: bytes) -> RowGuide:
        told = original(self, seq, mask)
        return replace(told, token_ids=told.token_ids[:1])

    monkeypatch.setattr(PlanBuilder, "_guide", guide)


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "plant",
    [
        _step_guided_rows_unasked,
        _take_each_answer_of_a_driver,
        _forget_what_a_driver_appends,
        _reuse_what_gives_logits,
        pytest.param(_publish_tails_that_are_too_long, marks=pytest.mark.slow),  # found late
        _fail_to_pin_shared_blocks,
        _match_one_token_too_many,
        _publish_before_computed,
        _skip_copy_on_write,
        _trust_failed_loads,
        _compute_into_what_loads,
        _let_copies_overtake_steps,
        _free_blocks_under_their_copies,
        _jump_over_a_hole,
        pytest.param(_forget_what_windows_need, marks=pytest.mark.slow),
        _leak_what_is_taken_over,
        _count_lost_blocks_as_found,
    ],
)
def test_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    quick = settings(
        max_examples=2000,
        stateful_step_count=50,
        deadline=None,
        database=None,
        derandomize=True,  # another search each time takes from a tenth of a second to ten
        print_blob=False,
        report_multiple_bugs=False,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any failure will do
        run_state_machine_as_test(SchedulerMachine, settings=quick)
    assert isinstance(caught.value, (AssertionError, KeyError, IndexError))


def test_a_second_request_waits_for_the_first_ones_prefill_instead_of_repeating_it() -> None:
    world = World(num_blocks=40, lower_tiers=False, max_batch_tokens=16)
    prompt = (0, 1, 1, 0) * 12
    world.submit(prompt, 4)
    world.submit((*prompt, 1), 4)
    world.run_until_idle()
    world.check_outputs()
    assert world.reused["r1"] == {"gpu": 48}
    assert world.computed_tokens < 2 * len(prompt)


def test_waiting_request_takes_over_when_the_owner_is_aborted() -> None:
    world = World(num_blocks=40, lower_tiers=False, max_batch_tokens=8)
    prompt = (0, 1, 1, 0) * 12
    world.submit(prompt, 4)
    world.submit((*prompt, 1), 4)
    world.step()
    world.take(world.scheduler.abort(["r0"]))
    world.run_until_idle()
    assert world.finished["r1"] in (FinishReason.STOP, FinishReason.LENGTH)
    world.check_outputs()


def test_partial_block_is_reused_to_the_token() -> None:
    world = World(num_blocks=20, lower_tiers=False)
    first = world.submit((0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1), 1)
    world.run_until_idle()
    second = world.submit((0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1), 1)
    world.run_until_idle()
    assert world.reused[first] == {}
    assert world.reused[second] == {"gpu": 13}
    world.check_outputs()


def test_full_hit_computes_one_token_and_writes_no_block() -> None:
    world = World(num_blocks=20, lower_tiers=False)
    prompt = (0, 1, 1, 0) * 4
    world.submit(prompt, 1)
    world.run_until_idle()
    before, computed = dict(world.blocks), world.computed_tokens
    again = world.submit(prompt, 1)
    world.run_until_idle()
    assert world.reused[again] == {"gpu": 16}
    assert world.computed_tokens - computed == 1
    assert world.blocks == before
    world.check_outputs()


def test_preempted_request_resumes_with_the_same_tokens() -> None:
    world = World(num_blocks=9, lower_tiers=False, max_requests=3)
    candidates = (tuple(int(bit) for bit in f"{n:010b}") for n in range(1024))
    long_ones = (p for p in candidates if len(expected_output(p, 40)) == 40)
    for _ in range(3):
        world.submit(next(long_ones), 40)
    world.run_until_idle()
    assert world.scheduler.preemptions > 0
    world.check_outputs()


def test_blocks_evicted_from_the_pool_come_back_from_the_lower_tier() -> None:
    world = World(num_blocks=20)
    prompt = (0, 1, 1, 0) * 9
    world.submit(prompt, 1)
    world.run_until_idle()
    world.scheduler.cache.evict_idle()
    again = world.submit(prompt, 1)
    world.run_until_idle()
    assert world.reused[again] == {"ram": 32}
    world.check_outputs()


def stored(blocks: int, **fields: object) -> tuple[World, tuple[int, ...]]:
    """A world whose lower tier holds so many blocks of a prompt, its pool none, and the prompt."""
    world = World(num_blocks=fields.pop("num_blocks", 60), **fields)  # type: ignore[arg-type]
    bits = "".join(f"{n + 170:08b}" for n in range(blocks))
    prompt = (*map(int, bits), 1)
    world.submit(prompt, 1)
    world.run_until_idle()
    world.scheduler.cache.evict_idle()
    world.plans.clear()
    world.results.clear()
    return world, prompt


def steps_of(world: World) -> list[list[tuple[int, int]]]:
    """(start, tokens) of all segments, per step since `stored`."""
    return [[(row.start, row.num_tokens) for row in plan.rows] for plan in world.plans]


def start_split(world: World, prompt: tuple[int, ...], load_from: int) -> str:
    """A request has been looked up and planned, and its first step has been launched."""
    world.costs.load_from = lambda first, end: load_from
    late = world.submit(prompt, 1)
    world.answer_stage(0, lambda key: True)
    world.step()
    return late


def test_chunks_go_from_the_front_while_blocks_land_from_the_back_until_they_meet() -> None:
    world, prompt = stored(10)
    late = start_split(world, prompt, 5)
    (load,) = world.loads
    assert [index for _, index in load.left] == [9, 8, 7, 6, 5]
    assert world.step()  # the second chunk is planned while the first one runs
    world.land(0, 5)
    # The last piece of the front and the question are two segments of one row in one step.
    assert world.step()
    assert steps_of(world) == [[(0, 16)], [(16, 16)], [(80, 1), (32, 8)]]
    while world.results:
        world.finish_step()
    world.run_until_idle()
    assert world.found[late] == {"ram": 80}
    assert world.reused[late] == {"ram": 40}
    world.check_outputs()


def test_a_plan_that_loads_everything_launches_no_chunk_in_front() -> None:
    world, prompt = stored(10)
    late = start_split(world, prompt, 0)
    assert not world.plans
    world.answer_load(0)
    world.run_until_idle()
    assert steps_of(world) == [[(80, 1)]]
    assert world.reused[late] == {"ram": 80}


def test_a_plan_that_computes_everything_gives_all_leases_back_at_once() -> None:
    world, prompt = stored(10)
    late = start_split(world, prompt, 10)
    assert not world.leases
    assert not world.loads
    world.run_until_idle()
    assert world.found[late] == {"ram": 80}
    assert world.reused[late] == {}


@pytest.mark.parametrize("load_from", range(11))
def test_a_load_split_anywhere_gives_the_same_tokens(load_from: int) -> None:
    for windowed, tail in ((False, (1,)), (True, (1, 0, 1)), (False, ())):
        world, prompt = stored(10, windowed=windowed, num_blocks=40)
        late = start_split(world, prompt[:80] + tail, load_from)
        while world.loads:
            world.step()
            world.land(0, 1)
        world.run_until_idle()
        world.check_outputs()
        # Computed by plan: the front, and where windows slide what they need behind it.
        assert world.reused[late].get("ram", 0) == 8 * (10 - load_from)


def test_a_late_load_is_taken_over_chunk_by_chunk_into_fresh_blocks() -> None:
    world, prompt = stored(8)
    world.costs.patient = False
    start_split(world, prompt, 2)
    tables = world.scheduler._queues.running[0].tables
    world.begin_copies(0, 6)  # all copies run: their blocks cannot be had
    before = list(tables[0])
    assert world.step()
    after = list(tables[0])
    assert [a != b for a, b in zip(after, before, strict=True)] == [False] * 2 + [True] * 2 + [
        False
    ] * 5
    world.check()
    assert world.step()
    world.answer_load(0)  # too late for what was taken over
    world.run_until_idle()
    assert steps_of(world)[:3] == [[(0, 16)], [(16, 16)], [(32, 16)]]
    world.check_outputs()


def test_what_was_lost_is_a_hole_that_is_computed_and_the_rest_is_jumped_over() -> None:
    world, prompt = stored(8)
    late = start_split(world, prompt, 0)
    world.answer_load(0, lambda number: number not in (3, 6))  # blocks 5 and 2
    world.run_until_idle()
    assert steps_of(world)[-1] == [(64, 1), (16, 8), (40, 8)]
    assert world.found[late] == world.reused[late] == {"ram": 48}
    world.check_outputs()


def test_a_stored_tail_is_loaded_though_its_head_is_gone() -> None:
    world, prompt = stored(10)
    head = world.scheduler._roots("")
    chain = KeyChain(tuple(head), BLOCK_SIZE)
    chain.extend(np.array(prompt, dtype=np.int64))
    for key in chain.keys[0][:4]:
        del world.stored[key]
    late = world.submit(prompt, 1)
    world.run_until_idle()
    assert world.reused[late] == world.found[late] == {"ram": 48}
    assert sum(tokens for step in steps_of(world) for _, tokens in step) == 33
    world.check_outputs()


def test_a_purely_sliding_model_loads_only_its_window() -> None:
    world = World(num_blocks=60)
    layout = KVLayout.from_specs([KVSpec(1, 8, 8, "float32", window=16)], BLOCK_SIZE)
    world.groups = layout.groups
    world.windowed = True
    cache = PrefixCache(layout.groups, 60)
    world.scheduler = Scheduler(
        cache, world.roots, max_requests=3, max_batch_tokens=24, cost=world.costs
    )
    prompt = (0, 1, 1, 0) * 20 + (1,)
    world.submit(prompt, 1)
    world.run_until_idle()
    cache.evict_idle()
    late = start_split(world, prompt, 0)
    (load,) = world.loads
    assert [index for _, index in load.left] == [9, 8, 7]
    world.run_until_idle()
    assert world.reused[late] == {"ram": 80}
    world.check_outputs()


def test_two_requests_that_need_the_same_blocks_load_them_once() -> None:
    world, prompt = stored(8, max_requests=4)
    first = start_split(world, prompt, 0)
    second = world.submit((*prompt, 0), 1)
    world.step()
    assert len(world.loads) == 1
    assert not world.stages
    world.run_until_idle()
    assert world.reused[first] == {"ram": 64}
    assert world.reused[second] == {"gpu": 64}
    world.check_outputs()


def test_nobody_waits_for_blocks_that_another_has_jumped_over() -> None:
    """Of a window's group it has loaded the last ones, and makes the others never."""
    world, prompt = stored(12, windowed=True, max_requests=2, num_blocks=200)
    prompt += (0, 0, 0, 1, 1, 0)
    assert len(expected_output(prompt, 40)) >= 20, "it goes on for long enough"
    first = world.submit(prompt, 40)
    second = ""
    while first not in world.finished:
        world.step()
        while world.results or world.stages or world.loads:
            if world.stages:
                world.answer_stage(0, lambda _: True)
            else:
                world.answer_load(0) if world.loads else world.finish_step()
        if world.outputs[first] and not second:
            second = world.submit((*prompt[:48], 1, 0, 0), 1)
        if second in world.finished:
            break
    assert first not in world.finished
    world.run_until_idle()
    world.check_outputs()


@pytest.mark.parametrize("landed", [0, 3])
def test_a_waiting_request_takes_over_when_the_owner_of_a_load_is_aborted(landed: int) -> None:
    world, prompt = stored(8, max_requests=4)
    first = start_split(world, prompt, 0)
    second = world.submit((*prompt, 0), 1)
    world.step()
    if landed:
        world.land(0, landed)
    world.take(world.scheduler.abort([first]))
    world.run_until_idle()
    assert world.finished[first] is FinishReason.ABORT
    # What had landed is of use though nobody had read it yet.
    found = {"ram": 64 - 8 * landed, "gpu": 8 * landed} if landed else {"ram": 64}
    assert world.reused[second] == found
    world.check_outputs()


def test_a_load_that_is_given_up_is_cancelled_and_keeps_only_what_has_landed() -> None:
    world, prompt = stored(4)
    late = start_split(world, prompt, 0)
    world.land(0, 1)
    world.begin_copies(0, 1)
    world.take(world.scheduler.abort([late]))
    stats = world.scheduler.cache.stats()
    assert (stats["loading"], stats["idle"]) == (3, 1)
    world.report(0)
    stats = world.scheduler.cache.stats()
    assert (stats["loading"], stats["idle"]) == (1, 1)  # the copy that has begun
    world.answer_load(0, lambda number: False)
    stats = world.scheduler.cache.stats()
    assert (stats["loading"], stats["idle"]) == (0, 1)
    world.check()


def test_a_load_is_extended_and_given_up_as_the_plan_changes_while_blocks_land() -> None:
    world, prompt = stored(40, num_blocks=90)
    start_split(world, prompt, 20)
    world.costs.load_from = lambda first, end: 10
    world.land(0, 16)
    world.step()
    assert [index for _, index in world.loads[-1].left] == list(range(19, 9, -1))
    world.costs.load_from = lambda first, end: 18
    world.land(1, 2)
    world.land(0, 4)
    world.step()
    world.land(0, 0) if world.loads else None
    world.run_until_idle()
    world.check_outputs()
    assert not world.leases


def test_a_lookup_begins_when_a_request_arrives_and_holds_up_nobody_behind_it() -> None:
    world, prompt = stored(8, max_requests=4)
    slow = world.submit(prompt, 1)
    assert len(world.stages) == 1
    other = world.submit((1, 1, 0), 1)
    world.run_steps()
    assert other in world.finished
    assert slow not in world.finished
    # One that never answers is not waited for.
    world.now += 1.0
    world.run_steps()
    assert slow in world.finished
    world.run_until_idle()
    assert not world.leases


def test_a_lookup_is_waited_for_as_long_as_it_is_worth_and_no_longer_than_a_call() -> None:
    world, prompt = stored(8)
    for tokens in (8, 16, 32):  # as slow as a large model on a CPU
        world.costs.note_step(
            prefill_tokens=tokens, context_tokens=0, num_decodes=0, seconds=0.5 * tokens
        )
    late = world.submit(prompt, 1)
    world.run_steps()
    world.now += 1.0
    world.run_steps()
    assert not world.outputs[late]
    world.answer_stage(0, lambda _: True)
    world.run_until_idle()
    assert world.found[late] == world.reused[late] == {"ram": 64}
    other = world.submit((1, *prompt), 1)
    world.now += 2.0
    world.run_steps()
    assert other in world.finished
    world.run_until_idle()


def test_a_look_at_a_prefix_tells_of_each_block_whether_it_is_there_coming_or_missing() -> None:
    world = World(num_blocks=40)
    prompt = (0, 1, 1, 0) * 8 + (1,)
    world.submit(prompt, 1)
    world.run_until_idle()
    cache = world.scheduler.cache
    chain = KeyChain(world.roots(""), BLOCK_SIZE)
    chain.extend(np.array(prompt, dtype=np.int64))
    (blocks,) = cache.look_whole(chain)
    assert min(blocks) > 0
    assert len(set(blocks)) == 4
    index = cache.indexes[0]
    for position in (1, 2):
        cache.pools[0].acquire([blocks[position]])
    cache.evict_idle()
    index.set_pending([chain.keys[0][3]], "somebody")
    assert cache.look_whole(chain) == [[MISSING, blocks[1], blocks[2], PENDING]]
    index.clear_pending(chain.keys[0], "somebody")
    cache.pools[0].release(blocks[1:3])


def test_sliding_window_gives_back_what_it_has_left_behind() -> None:
    world = World(num_blocks=20, windowed=True, lower_tiers=False)
    world.submit((0, 1, 1, 0) * 10, 30)
    while not world.finished and len(world.outputs["r0"]) < 2:
        world.step()
        world.finish_step()
    full, sliding = (pool.stats() for pool in world.scheduler.cache.pools)
    assert sliding["private"] + sliding["published"] < full["private"] + full["published"]
    world.run_until_idle()
    world.check_outputs()


def test_deadline_ends_a_request_with_what_it_has() -> None:
    world = World(num_blocks=20, lower_tiers=False)
    world.submit((0, 1, 1), 20, max_time_s=5.0)
    world.step()
    world.finish_step()
    world.now = 6.0
    world.step()
    assert world.finished["r0"] is FinishReason.LENGTH
    assert len(world.outputs["r0"]) == 1


def test_lower_priority_value_runs_first() -> None:
    world = World(num_blocks=20, lower_tiers=False, max_requests=1)
    world.submit((0, 1, 1), 1, priority=5)
    world.submit((1, 0, 1), 1, priority=0)
    order: list[str] = []
    while len(order) < 2:
        world.step()
        world.finish_step()
        order += [name for name in world.finished if name not in order]
    assert order == ["r1", "r0"]


def test_a_low_priority_request_does_not_starve_under_a_stream_of_urgent_ones() -> None:
    world = World(num_blocks=20, lower_tiers=False, max_requests=1)
    low = world.submit((0, 1, 1), 1, priority=3)
    while low not in world.finished:
        world.now += 1.0
        assert world.now < 60, "starved"
        world.submit((1, 0, int(world.now) % 2), 1)
        world.step()
        world.finish_step()
    assert world.now > 20, "priority has no effect"


def test_who_runs_alone_after_an_error_gets_what_others_hold() -> None:
    world = World(num_blocks=6, lower_tiers=False)
    names = [world.submit(tokens * 4, 8) for tokens in ((1, 0, 0, 1), (0, 1, 1, 0))]
    for _ in range(3):
        world.step()
        world.finish_step()
    world.step()
    assert len(world.plans[-1].rows) == 2, "both decode, and have all blocks"
    assert world.scheduler.cache.stats()["free"] == 0
    world.fail_last_step(out_of_memory=False)
    # the first to run alone goes on, and has a row and blocks that the second wants
    world.run_until_idle()
    assert set(world.finished) == set(names)
    world.check_outputs()


@pytest.mark.parametrize("raised", [0, 1])
def test_a_step_behind_one_that_raised_draws_nothing_for_its_requests(raised: int) -> None:
    """And the one in front of it draws as ever."""
    world = World(num_blocks=20, lower_tiers=False)
    names = [world.submit(tokens * 3, 6) for tokens in ((1, 0, 0, 1), (0, 1, 1, 0))]
    world.step()
    world.finish_step()
    world.step()
    world.step()
    other = world.results.pop(1 - raised)  # one was planned while the other ran
    world.fail_last_step(out_of_memory=False)
    world.results.append(other)
    world.finish_step()
    assert [len(world.outputs[name]) for name in names] == [1 + raised] * 2
    world.run_until_idle()
    assert set(world.finished) == set(names)
    world.check_outputs()


@pytest.mark.parametrize("why", ["others run alone", "they are paused"])
def test_who_cannot_start_keeps_no_lookup_from_those_who_can(why: str) -> None:
    """As many as may be looked up at once, all in front of the one that can."""
    world, prompt = stored(4, max_requests=2, max_batch_tokens=48)
    able = [world.submit((0, 1, n) * 10, 4, priority=1) for n in range(2)]
    while world.stages:
        world.answer_stage(0, lambda _: False)
    assert world.step()
    names = [world.submit((*prompt, n % 2, n // 2), 1) for n in range(MAX_STAGING)]
    while world.stages:
        world.answer_stage(0, lambda _: True)
    assert not world.scheduler.loads.has_room
    if why == "they are paused":
        world.finish_step()
        world.scheduler.set_paused(names, True)
        able = [world.submit((1, *prompt), 4, priority=1)]
    else:
        world.fail_last_step(out_of_memory=False)
    for _ in range(60):
        world.step()
        while world.stages or world.results:
            world.answer_stage(0, lambda _: False) if world.stages else world.finish_step()
    assert world.finished.keys() >= {*able}
    world.scheduler.set_paused(names, False)
    world.run_until_idle()
    assert world.finished.keys() >= {*names}
    world.check_outputs()
    assert not world.leases


def test_a_forward_whose_step_raises_hands_out_each_position_once() -> None:
    world = World(num_blocks=40, lower_tiers=False, max_batch_tokens=16)
    name = world.submit((0, 1, 1, 0) * 10, 0, logits=37)
    world.step()
    world.finish_step()
    assert world.plans[-1].rows[0].logits == 13
    world.step()
    world.fail_last_step(out_of_memory=True)
    world.run_until_idle()
    assert world.finished[name] is FinishReason.LENGTH
    world.check_outputs()


def test_a_forward_of_one_token_more_computes_that_token_alone() -> None:
    world = World(num_blocks=40, lower_tiers=False, max_batch_tokens=64)
    prompt = (0, 1, 1, 0) * 5 + (1,)
    row = (*prompt, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1)
    for length in range(len(prompt), len(row) + 1):
        name = world.submit(
            (*prompt, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1)[:length], 0, logits=1
        )
        before = world.computed_tokens
        world.run_until_idle()
        assert world.computed_tokens - before == (1 if world.reused[name] else length)
    world.check_outputs()
    # what is left behind is the first to go
    pool, index = world.scheduler.cache.pools[0], world.scheduler.cache.indexes[0]
    whole = BLOCK_SIZE * TOKEN_BYTES
    full = [key for key in index.published_keys() if len(index._entries[key].tokens) == whole]
    pool.release(pool.allocate(pool.num_available - len(full)))
    assert set(full) == set(index.published_keys())
    assert not pool.evictions


def test_two_rows_go_on_from_one_tail_without_touching_it() -> None:
    world = World(num_blocks=40, lower_tiers=False, max_batch_tokens=64)
    prompt = (0, 1, 1, 0) * 5
    world.submit(prompt, 0, logits=1)
    world.run_until_idle()
    before = world.computed_tokens
    for last in (0, 1, 2):
        world.submit((*prompt, last), 0, logits=1)
    world.run_until_idle()
    assert world.computed_tokens - before == 3
    world.check_outputs()


@pytest.mark.parametrize("windowed", [False, True])
def test_samples_of_one_prompt_are_one_prefill(windowed: bool) -> None:
    world = World(num_blocks=60, windowed=windowed, lower_tiers=False, max_requests=5)
    prompt = (0, 1, 1, 0) * 5 + (1,)
    names = [world.submit(prompt, 6) for _ in range(4)]
    world.step()
    world.finish_step()
    world.step()
    assert [plan.num_tokens for plan in world.plans] == [len(prompt), 1 + 3]
    world.run_until_idle()
    assert [world.reused[name] for name in names] == [{}, *3 * [{"gpu": len(prompt) - 1}]]
    world.check_outputs()


def test_a_tail_of_a_sequence_that_shares_nothing_is_copied_by_nobody() -> None:
    world = World(num_blocks=60, lower_tiers=False)
    prompt = (0, 1, 1, 0) * 5 + (1,)
    world.submit(prompt, 6, cache="no-store")
    world.step()
    world.finish_step()
    name = world.submit(prompt, 6)
    world.run_until_idle()
    assert world.reused[name] == {}
