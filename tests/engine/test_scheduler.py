"""The scheduler against a plain model: right tokens, right KV, nothing lost, nobody starved."""

from __future__ import annotations

from collections.abc import Callable

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
from scheduler_world import BLOCK_SIZE, WINDOW, World, expected_output

from litecache.engine.scheduling.block_pool import BlockPool
from litecache.engine.scheduling.orders import LoadOrder
from litecache.engine.scheduling.plan_builder import PlanBuilder
from litecache.engine.scheduling.prefix_index import MISSING, PENDING, PartialMatch, PrefixIndex
from litecache.engine.scheduling.sequence import KeyChain
from litecache.engine.scheduling.tier_orders import TierOrders
from litecache.types import FinishReason

PROMPTS = st.builds(
    lambda shared, own: (0, 1, 1, 0) * (shared // 4) + tuple(own),
    st.sampled_from([0, 8, 16, 24, 40]),
    st.lists(st.integers(0, 1), min_size=0, max_size=20),
).filter(bool)


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, events and failures in random order, up to two steps in flight."""

    @initialize(
        num_blocks=st.integers(11, 24),
        windowed=st.booleans(),
        # of whole blocks: a row trims its window in the very step in which it needs a block
        window=st.sampled_from([16, WINDOW]),
        lower_tiers=st.booleans(),
        admission=st.sampled_from(["all", "reused", "none"]),
        deterministic=st.booleans(),
        warm=st.booleans(),
    )
    def start(self, warm: bool, **settings: object) -> None:
        if warm:
            settings |= {"lower_tiers": True, "admission": "all"}
        self.world = World(**settings)  # type: ignore[arg-type]
        if warm:
            # What an earlier life left in the lower tier.
            self.world.submit((0, 1, 1, 0) * 10, 1)
            self.world.run_until_idle()
            self.world.scheduler.cache.evict_idle()

    @rule(prompt=PROMPTS, new=st.integers(1, 20), salt=st.sampled_from(["", "", "", "b"]))
    def submit(self, prompt: tuple[int, ...], new: int, salt: str) -> None:
        if len(self.world.requests) < 12:
            self.world.submit(prompt, new, cache_salt=salt)

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

    @rule(pick=st.integers(0, 9), fail=st.integers(0, 6))
    def loaded(self, pick: int, fail: int) -> None:
        if self.world.loads:
            self.world.answer_load(pick % len(self.world.loads), lambda number: number != fail)

    @rule(pick=st.integers(0, 9), count=st.integers(1, 3))
    def lands(self, pick: int, count: int) -> None:
        if self.world.loads:
            self.world.land_part(pick % len(self.world.loads), count)

    @rule(fail=st.integers(0, 6), part=st.integers(0, 3))
    def stage_and_load(self, fail: int, part: int) -> None:
        """The usual order of things, which random rules hit rarely."""
        while self.world.stages:
            self.world.answer_stage(0, lambda key: True)
        self.step(1)
        if self.world.loads and part:
            self.world.land_part(0, part)
            self.step(1)
        while self.world.loads:
            self.world.answer_load(0, lambda number: number != fail)
        self.step(1)

    @rule(pick=st.integers(0, 9), works=st.booleans())
    def saved(self, pick: int, works: bool) -> None:
        if self.world.saves:
            self.world.answer_save(pick % len(self.world.saves), works)

    @rule(pick=st.integers(0, 11))
    def abort(self, pick: int) -> None:
        if f"r{pick}" in self.world.requests:
            self.world.take(self.world.scheduler.abort([f"r{pick}"]))

    @rule(pick=st.integers(0, 11), paused=st.booleans())
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
                del self._idle[block]
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
    original = TierOrders.publish_computed

    def publish(self: TierOrders, seq: object, end: int, out: object) -> None:
        original(self, seq, end + BLOCK_SIZE, out)  # type: ignore[arg-type]

    monkeypatch.setattr(TierOrders, "publish_computed", publish)


def _skip_copy_on_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PlanBuilder, "copy_block", lambda self, group, src, dst: None)


def _trust_failed_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    original = TierOrders.on_loaded

    def on_loaded(self: TierOrders, order: LoadOrder, loaded: object, *, ended: bool) -> None:
        seq = self._active.get(order.ticket)
        claimed = [ref for ref in order.blocks if seq is not None and ref in seq.loading]
        original(self, order, claimed if ended else loaded, ended=ended)  # type: ignore[arg-type]

    monkeypatch.setattr(TierOrders, "on_loaded", on_loaded)


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "plant",
    [
        _fail_to_pin_shared_blocks,
        _match_one_token_too_many,
        _publish_before_computed,
        _skip_copy_on_write,
        _trust_failed_loads,
    ],
)
def test_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    quick = settings(
        max_examples=400,
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


def test_blocks_of_a_load_are_of_use_to_others_as_they_land() -> None:
    """Another request starts from the landed half, while the rest is still being copied."""
    world = World(num_blocks=40, max_requests=4)
    prompt = (0, 1, 1, 0) * 8 + (1,)
    world.submit(prompt, 1)
    world.run_until_idle()
    world.scheduler.cache.evict_idle()
    first = world.submit(prompt, 1)
    world.step()
    world.answer_stage(0, lambda key: True)
    world.step()
    (order,) = world.loads
    assert len(order.blocks) == 4
    world.land_part(0, 2)
    world.check()
    short = world.submit(prompt[:16], 1)
    assert world.step()
    assert world.reused.get(short) is None
    world.finish_step()
    assert world.reused[short] == {"gpu": 16}
    assert first not in world.finished
    world.run_until_idle()
    assert world.reused[first] == {"ram": 32}
    world.check_outputs()


def test_a_load_that_is_given_up_is_cancelled_and_keeps_only_what_has_landed() -> None:
    world = World(num_blocks=40)
    prompt = (0, 1, 1, 0) * 8 + (1,)
    world.submit(prompt, 1)
    world.run_until_idle()
    world.scheduler.cache.evict_idle()
    late = world.submit(prompt, 1)
    world.step()
    world.answer_stage(0, lambda key: True)
    world.step()
    world.land_part(0, 1)
    out = world.scheduler.abort([late])
    assert out.cancels == [order.ticket for order in world.loads]
    world.take(out)
    stats = world.scheduler.cache.stats()
    assert (stats["loading"], stats["idle"]) == (3, 1)
    world.check()
    world.answer_load(0, lambda number: False)
    stats = world.scheduler.cache.stats()
    assert (stats["loading"], stats["idle"]) == (0, 1)


def test_a_load_may_be_followed_by_another_of_the_same_request() -> None:
    """The seam for loads that grow: the request waits until the last of them has ended."""
    world = World(num_blocks=40)
    prompt = (0, 1, 1, 0) * 8 + (1,)
    world.submit(prompt, 1)
    world.run_until_idle()
    world.scheduler.cache.evict_idle()
    late = world.submit(prompt, 1)
    world.step()
    world.answer_stage(0, lambda key: True)
    world.step()
    (order,) = world.loads
    refs = list(order.blocks.items())
    tail, head = dict(refs[2:]), dict(refs[:2])
    world.loads[:] = [LoadOrder(order.ticket, tail, more=True), LoadOrder(order.ticket, head)]
    world.answer_load(0, lambda number: True)
    world.check()
    assert not world.step(), "it started before its head was there"
    world.answer_load(0, lambda number: True)
    world.run_until_idle()
    assert world.reused[late] == {"ram": 32}
    world.check_outputs()


def test_a_look_at_a_prefix_tells_of_each_block_whether_it_is_there_coming_or_missing() -> None:
    world = World(num_blocks=40)
    prompt = (0, 1, 1, 0) * 8 + (1,)
    world.submit(prompt, 1)
    world.run_until_idle()
    cache = world.scheduler.cache
    chain = KeyChain(world.roots(""), BLOCK_SIZE)
    chain.extend(np.array(prompt, dtype=np.int64))
    (blocks,) = cache.look(chain)
    assert min(blocks) > 0
    assert len(set(blocks)) == 4
    index = cache.indexes[0]
    for position in (1, 2):
        cache.pools[0].acquire([blocks[position]])
    cache.evict_idle()
    index.set_pending(chain.keys[0][3], "somebody")
    assert cache.look(chain) == [[MISSING, blocks[1], blocks[2], PENDING]]
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
