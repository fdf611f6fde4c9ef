from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from litecache.actors import router as router_module
from litecache.actors.naming import MEMBER_TIMEOUT_S
from litecache.actors.router import (
    LOAD_COST,
    MOVE_COST,
    REUSE_WORTH,
    ROW_TOKENS,
    WAITING_TOKENS,
    Placement,
    ReplicaLoad,
    RoutedPrompt,
)


class Router(router_module.Router):
    """Tells the index alone."""

    def route(self, *args: Any, **kwargs: Any) -> int | None:
        placed = self.place(*args, **kwargs)
        return None if placed is None else placed.replica


KEYS = [bytes([i]) * 16 for i in range(8)]
BLOCK = 16


def prompt(keys: list[bytes], *, leaves_blocks: bool = True) -> RoutedPrompt:
    return RoutedPrompt(keys, BLOCK * len(keys), leaves_blocks)


def fresh(number: int, num_tokens: int = BLOCK) -> RoutedPrompt:
    return RoutedPrompt([bytes([100 + number]) * 16], num_tokens)


def router(first: int = 0, second: int = 0) -> Router:
    made = Router(BLOCK)
    made.report(0, "n0", ReplicaLoad(first))
    made.report(1, "n1", ReplicaLoad(second))
    return made


def test_without_live_replicas_there_is_no_route() -> None:
    now = [0.0]
    made = Router(clock=lambda: now[0])
    assert made.route(prompt(KEYS), {}) is None
    made.report(0, "n0", ReplicaLoad())
    assert made.route(prompt(KEYS), {}) == 0
    now[0] = MEMBER_TIMEOUT_S + 1
    assert made.route(prompt(KEYS), {}) is None


def test_the_longest_prefix_in_the_shards_wins() -> None:
    assert router().route(prompt(KEYS), {"n0": 2, "n1": 5}) == 1
    assert router().route(prompt(KEYS), {"n0": 6, "n1": 5}) == 0


def test_a_prefix_returns_to_the_replica_that_computed_it() -> None:
    made = router(3)
    assert made.route(prompt(KEYS[:4]), {}) == 1
    made.report(1, "n1", ReplicaLoad(6))
    assert made.route(prompt(KEYS), {}) == 1
    assert made.route(fresh(0), {}) == 0


def test_a_prefix_in_the_pool_is_worth_more_than_in_the_shards_of_another_node() -> None:
    made = router(3)
    assert made.route(prompt(KEYS[:6]), {}) == 1
    made.report(0, "n0", ReplicaLoad())
    made.report(1, "n1", ReplicaLoad())
    assert made.route(prompt(KEYS), {"n0": 6}) == 1


def test_a_prompt_that_leaves_no_blocks_draws_nobody_after_it() -> None:
    made = router(3)
    assert made.route(prompt(KEYS[:4], leaves_blocks=False), {}) == 1
    made.report(1, "n1", ReplicaLoad(6))
    assert made.route(prompt(KEYS), {}) == 0


def test_a_replica_with_too_much_to_do_is_passed_over() -> None:
    saved = 8 * BLOCK - 1
    worth = round(saved * (REUSE_WORTH - LOAD_COST))
    assert router(0, worth + 5).route(prompt(KEYS), {"n1": 8}) == 0
    assert router(0, worth - 5).route(prompt(KEYS), {"n1": 8}) == 1


def test_requests_without_a_prefix_go_to_the_least_loaded_replica_in_turn() -> None:
    made = router()
    chosen = [made.route(fresh(i), {}) for i in range(4)]
    assert chosen == [0, 1, 0, 1]


def test_load_is_counted_in_tokens_and_not_in_requests() -> None:
    made = router()
    assert made.route(fresh(0, 5000), {}) == 0
    assert [made.route(fresh(1 + i, 100), {}) for i in range(20)] == [1] * 20


def test_requests_that_only_decode_count_and_those_without_a_row_count_more() -> None:
    made = router()
    made.report(0, "n0", ReplicaLoad(0, requests=9, rows=16))
    assert made.route(fresh(0), {}) == 1
    made.report(0, "n0", ReplicaLoad(0, requests=16, rows=16))
    made.report(1, "n1", ReplicaLoad(1000, requests=3, rows=16))
    assert made.route(fresh(1), {}) == 1


def test_what_was_sent_since_a_report_is_taken_for_done_as_fast_as_before() -> None:
    now = [0.0]
    made = Router(BLOCK, clock=lambda: now[0])
    made.report(0, "n0", ReplicaLoad(1000))
    made.report(1, "n1", ReplicaLoad(900))
    now[0] = 1.0
    made.report(0, "n0", ReplicaLoad(200))  # 800 tokens in a second
    assert made.route(fresh(0, 500), {}) == 1  # it is as far, though its report is older
    assert made.replicas()[1]["load"] == 900 + 500 - 800 + ROW_TOKENS
    now[0] = 2.0
    assert made.replicas()[1]["load"] == ROW_TOKENS


def test_the_memory_of_choices_is_bounded_and_forgets_tails_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(router_module, "MAX_REMEMBERED_KEYS", 4)
    made = router(1)
    assert made.route(prompt(KEYS[:4]), {}) == 1
    made.report(0, "n0", ReplicaLoad())
    made.report(1, "n1", ReplicaLoad())
    # two of four keys are left on replica 1: worth their tokens, and no more
    gain = REUSE_WORTH * 2 * BLOCK
    made.report(1, "n1", ReplicaLoad(gain - 1))
    assert made.route(prompt(KEYS[:4], leaves_blocks=False), {}) == 1
    made.report(1, "n1", ReplicaLoad(gain + 1))
    assert made.route(prompt(KEYS[:4], leaves_blocks=False), {}) == 0


def test_a_prefix_is_forgotten_with_the_pool_that_held_it() -> None:
    small = ReplicaLoad(pool_blocks=4, epoch="first")
    made = router(1)
    made.report(1, "n1", small)
    assert made.route(prompt(KEYS[:4]), {}) == 1
    made.report(0, "n0", ReplicaLoad(1000))
    assert made.route(prompt(KEYS[4:]), {}) == 1
    made.report(0, "n0", ReplicaLoad())
    made.report(1, "n1", small)
    assert made.route(prompt(KEYS[:4], leaves_blocks=False), {}) == 0, "it had been evicted"
    made.report(0, "n0", ReplicaLoad())
    assert made.route(prompt(KEYS[4:], leaves_blocks=False), {}) == 1
    made.report(0, "n0", ReplicaLoad())
    made.report(1, "n1", small._replace(queued_tokens=1, epoch="second"))
    assert made.route(prompt(KEYS[4:], leaves_blocks=False), {}) == 0, "its process was restarted"


def test_a_replica_that_ended_itself_is_chosen_once_it_reports_and_its_reasons_are_kept() -> None:
    now = [0.0]
    router = Router(clock=lambda: now[0])
    router.report(0, "a", ReplicaLoad())
    router.note_failure(0, "the first")
    assert router.route(prompt(KEYS[:1]), {}) is None
    router.report(0, "a", ReplicaLoad())
    assert router.route(prompt(KEYS[:1]), {}) == 0
    now[0] = 500.0
    router.note_failure(0, "the second")
    assert router.failures(0) == ["the first", "the second"]
    assert router.failures(1) == []
    now[0] = 601.0
    assert router.failures(0) == ["the second"]


def test_a_replica_that_is_to_go_gets_nothing_until_it_reports_again() -> None:
    made = router(first=0, second=100)
    made.forget(0)
    made.forget(7)
    assert [made.route(fresh(number), {}) for number in range(4)] == [1] * 4
    made.report(0, "n0", ReplicaLoad())
    assert made.route(fresh(9), {}) == 0


def test_a_replica_that_somebody_found_silent_is_left_out_until_it_reports() -> None:
    now = [0.0]
    made = Router(BLOCK, clock=lambda: now[0])
    for index in (0, 1):
        made.report(index, f"n{index}", ReplicaLoad())
    now[0] = 1.0
    made.report(0, "n0", ReplicaLoad(10_000))
    made.note_silence(1, 0.5)
    assert made.route(fresh(0), {}) == 0
    now[0] = 2.0
    made.report(1, "n1", ReplicaLoad())
    made.note_silence(1, 1.5)  # it does not answer that one, but it is there
    assert made.route(fresh(1), {}) == 1
    assert made.route(fresh(2), {}, avoid=[1]) == 0
    assert made.route(fresh(2), {}, avoid=[0, 1]) is None


@given(
    sizes=st.lists(st.integers(1, 30_000), min_size=1, max_size=60),
    count=st.integers(1, 6),
)
def test_without_prefixes_no_replica_gets_more_than_its_share_and_one_prompt(
    sizes: list[int], count: int
) -> None:
    made = Router(BLOCK)
    for index in range(count):
        made.report(index, f"n{index}", ReplicaLoad())
    given_tokens = [0] * count
    for size in sizes:
        chosen = made.route(RoutedPrompt([], size), {})
        assert chosen is not None
        given_tokens[chosen] += size + ROW_TOKENS
    # what list scheduling promises; taking turns promises nothing
    largest = max(sizes) + ROW_TOKENS
    assert max(given_tokens) <= sum(given_tokens) / count + largest * (1 - 1 / count)


CHAINS = [[bytes([chain, i]) * 8 for i in range(6)] for chain in range(3)]
POOL = 8


class RouterMachine(RuleBasedStateMachine):
    """The router against lists: what each replica was given, and its pool, block by block."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.router = Router(BLOCK, clock=lambda: self.now)
        self.queued: dict[int, float] = {}
        self.requests: dict[int, int] = {}
        self.pools: dict[int, list[bytes]] = {}
        self.last_seen: dict[int, float] = {}
        self.out: set[int] = set()
        self.turns: dict[int, int] = {}
        self.turn = 0

    def live(self) -> set[int]:
        oldest = self.now - MEMBER_TIMEOUT_S
        return {i for i, seen in self.last_seen.items() if seen >= oldest} - self.out

    @rule(index=st.integers(0, 3), tokens=st.integers(0, 300), requests=st.integers(0, 6))
    def report(self, index: int, tokens: int, requests: int) -> None:
        self.router.report(index, f"n{index % 2}", ReplicaLoad(tokens, requests, 4, POOL, "e"))
        self.router._tokens_per_s = 0.0  # the machine's replicas do nothing
        self.queued[index], self.requests[index] = tokens, requests
        self.last_seen[index] = self.now
        self.pools.setdefault(index, [])
        self.turns.setdefault(index, -1)
        self.out.discard(index)

    @rule(seconds=st.sampled_from([0.5, 3.0, 8.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(index=st.integers(0, 3), silent_s=st.sampled_from([0.0, 1.0]))
    def silence(self, index: int, silent_s: float) -> None:
        self.router.note_silence(index, silent_s)
        if self.last_seen.get(index, math.inf) < self.now - silent_s:
            self.out.add(index)

    @rule(index=st.integers(0, 3))
    def fail(self, index: int) -> None:
        self.router.note_failure(index, "it broke")
        for known in (self.queued, self.requests, self.pools, self.last_seen, self.turns):
            known.pop(index, None)
        self.out.discard(index)

    @rule(
        chain=st.sampled_from(CHAINS),
        length=st.integers(0, 6),
        rest=st.integers(0, 20),
        nodes=st.dictionaries(st.sampled_from(["n0", "n1"]), st.integers(0, 6)),
        avoid=st.sets(st.integers(0, 3), max_size=2),
        leaves_blocks=st.booleans(),
    )
    def route(
        self,
        chain: list[bytes],
        length: int,
        rest: int,
        nodes: dict[str, int],
        avoid: set[int],
        leaves_blocks: bool,
    ) -> None:
        keys, tokens = chain[:length], length * BLOCK + rest
        work: dict[int, float] = {}
        ranks: dict[int, tuple[float, int, int]] = {}
        for index in self.live() - avoid:
            pool = self.pools[index]
            here = next((i for i, key in enumerate(keys) if key not in pool), len(keys))
            below = min(nodes.get(f"n{index % 2}", 0) * BLOCK, tokens - 1)
            in_pool = max(0, min(here * BLOCK, tokens - 1))
            found = max(in_pool, below)
            loading = LOAD_COST * (found - in_pool)
            work[index] = tokens - found + loading
            requests = self.requests[index]
            load = self.queued[index] + ROW_TOKENS * requests
            load += WAITING_TOKENS * max(0, requests - 3)
            rank = load + REUSE_WORTH * (tokens - found) + loading
            ranks[index] = rank, self.turns[index], index
        chosen = self.router.route(RoutedPrompt(keys, tokens, leaves_blocks), nodes, avoid=avoid)
        if not ranks:
            assert chosen is None
            return
        assert chosen is not None
        assert ranks[chosen][0] == pytest.approx(min(ranks.values())[0])
        self.queued[chosen] += work[chosen]
        self.requests[chosen] += 1
        self.turns[chosen], self.turn = self.turn, self.turn + 1
        if leaves_blocks:
            left = [key for key in self.pools[chosen] if key not in keys]
            self.pools[chosen] = (left + keys[::-1])[-POOL:]

    @invariant()
    def agrees(self) -> None:
        shown = self.router.replicas()
        assert {i for i, each in shown.items() if each["alive"]} == self.live()
        for index, replica in self.router._replicas.items():
            assert list(replica.pool) == self.pools[index]


TestRouterMachine = pytest.mark.no_cover(RouterMachine.TestCase)


def beside(first: int = 0, second: int = 0, node: str = "n0") -> Router:
    """Two replicas that share a node's shards, unless told otherwise."""
    made = Router(BLOCK)
    made.report(0, "n0", ReplicaLoad(first))
    made.report(1, node, ReplicaLoad(second))
    return made


def test_a_prefix_of_a_busy_replica_is_moved_to_one_beside_it() -> None:
    worth = MOVE_COST * (BLOCK * len(KEYS) - 1)
    for busy in (False, True):
        made = beside()
        assert made.place(prompt(KEYS), {}) == Placement(0)
        # it has computed that, and decodes for so many
        made.report(0, "n0", ReplicaLoad(0, requests=int(worth / ROW_TOKENS) + busy))
        placed = made.place(prompt(KEYS), {})
        assert placed == (Placement(1, 0, len(KEYS), True) if busy else Placement(0))
    made.report(1, "n0", ReplicaLoad())
    assert made.place(prompt(KEYS), {}) == Placement(1), "it has it by now"


def test_nobody_is_asked_for_what_the_shards_hold_or_what_is_not_computed_yet() -> None:
    for held, expected in ((8, Placement(1)), (3, Placement(1, 0, 8, True))):
        made = beside()
        made.place(prompt(KEYS), {}, avoid=[1])
        made.report(0, "n0", ReplicaLoad(0))
        assert made.place(prompt(KEYS), {"n0": held}, avoid=[0]) == Placement(1)
        made = beside()
        made.place(prompt(KEYS), {}, avoid=[1])
        made.report(0, "n0", ReplicaLoad(0, requests=500))
        assert made.place(prompt(KEYS), {"n0": held}) == expected
    made = beside()
    made.place(prompt(KEYS), {}, avoid=[1])
    made.report(0, "n0", ReplicaLoad(100_000))
    assert made.place(prompt(KEYS), {}) == Placement(1)


def test_a_replica_of_another_node_is_asked_where_no_shard_has_it() -> None:
    for by_node, expected in (({}, Placement(1, 0, 8, False)), ({"n0": 8}, Placement(1))):
        made = beside(node="n1")
        made.place(prompt(KEYS), {}, avoid=[1])
        made.report(0, "n0", ReplicaLoad(0, requests=500))
        assert made.place(prompt(KEYS), by_node) == expected


def test_a_replica_that_is_avoided_or_gone_is_not_asked_for_anything() -> None:
    made = beside()
    made.place(prompt(KEYS), {}, avoid=[1])
    made.report(0, "n0", ReplicaLoad(0))
    assert made.place(prompt(KEYS), {}, avoid=[0]) == Placement(1)
    made.report(0, "n0", ReplicaLoad(0, epoch="another life"))
    assert made.place(prompt(KEYS), {}, avoid=[0]) == Placement(1)
