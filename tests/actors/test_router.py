from __future__ import annotations

import pytest

from litecache.actors import router as router_module
from litecache.actors.naming import MEMBER_TIMEOUT_S
from litecache.actors.router import Router

KEYS = [bytes([i]) * 16 for i in range(8)]


def router() -> Router:
    made = Router()
    made.report(0, "n0", 0)
    made.report(1, "n1", 0)
    return made


def test_without_live_replicas_there_is_no_route() -> None:
    now = [0.0]
    made = Router(clock=lambda: now[0])
    assert made.route(KEYS, {}) is None
    made.report(0, "n0", 0)
    assert made.route(KEYS, {}) == 0
    now[0] = MEMBER_TIMEOUT_S + 1
    assert made.route(KEYS, {}) is None


def test_the_longest_prefix_in_the_shards_wins() -> None:
    assert router().route(KEYS, {"n0": 2, "n1": 5}) == 1
    assert router().route(KEYS, {"n0": 6, "n1": 5}) == 0


def test_a_prefix_returns_to_the_replica_that_computed_it() -> None:
    made = router()
    made.report(0, "n0", 3)
    assert made.route(KEYS[:4], {}) == 1
    made.report(1, "n1", 6)
    assert made.route(KEYS, {}) == 1
    assert made.route([bytes([99]) * 16], {}) == 0


def test_a_prompt_that_leaves_no_blocks_draws_nobody_after_it() -> None:
    made = router()
    made.report(0, "n0", 3)
    assert made.route(KEYS[:4], {}, leaves_blocks=False) == 1
    made.report(1, "n1", 6)
    assert made.route(KEYS, {}) == 0


def test_a_replica_with_too_much_to_do_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "LOAD_SLACK", 4)
    made = router()
    made.report(1, "n1", 5)
    assert made.route(KEYS, {"n1": 8}) == 0
    made.report(1, "n1", 4)
    assert made.route(KEYS[:1], {"n1": 8}) == 1


def test_requests_without_a_prefix_go_to_the_least_loaded_replica_in_turn() -> None:
    made = router()
    chosen = [made.route([bytes([100 + i]) * 16], {}) for i in range(4)]
    assert chosen == [0, 1, 0, 1]


def test_the_memory_of_choices_is_bounded_and_forgets_tails_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(router_module, "MAX_REMEMBERED_KEYS", 4)
    made = router()
    made.report(0, "n0", 1)
    assert made.route(KEYS[:4], {}) == 1
    made.report(0, "n0", 0)
    assert made.route([bytes([9]) * 16, bytes([10]) * 16], {}) == 0
    assert made._sent_prefixes(KEYS[:4]) == {1: 2}


def test_a_replica_that_ended_itself_is_chosen_once_it_reports_and_its_reasons_are_kept() -> None:
    now = [0.0]
    router = Router(clock=lambda: now[0])
    router.report(0, "a", 0)
    router.note_failure(0, "the first")
    assert router.route([KEYS[0]], {}) is None
    router.report(0, "a", 0)
    assert router.route([KEYS[0]], {}) == 0
    now[0] = 500.0
    router.note_failure(0, "the second")
    assert router.failures(0) == ["the first", "the second"]
    assert router.failures(1) == []
    now[0] = 601.0
    assert router.failures(0) == ["the second"]
