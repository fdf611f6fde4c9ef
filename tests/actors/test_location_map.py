from __future__ import annotations

import random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from litecache.actors.locations import (
    MAX_SHARDS,
    LocationMap,
    LocationReport,
)
from litecache.actors.naming import MEMBER_TIMEOUT_S
from litecache.storage.key_dict import BATCH_KEYS, join_keys, split_keys

KEYS = [bytes([i]) * 16 for i in range(12)]
# One number is drawn much faster than a set.
SOME_KEYS = st.integers(0, 2 ** len(KEYS) - 1).map(
    lambda bits: {key for i, key in enumerate(KEYS) if bits >> i & 1}
)


def changes(located: LocationMap, *fields: Any) -> bool:
    return located.report(LocationReport(*fields))


def begin_resync(located: LocationMap, *fields: Any) -> bool:
    return located.report(LocationReport(*fields, added=[], part=0))


def add_keys(
    located: LocationMap, shard_id: str, epoch: int, keys: list[bytes], last: bool
) -> bool:
    known = located.shards().get(shard_id, {"node_id": "", "seq": 0})
    at = known["node_id"], epoch, known["seq"]
    return located.report(LocationReport(shard_id, *at, keys, part=1, last=last))


def joined(*shards: tuple[str, str]) -> LocationMap:
    located = LocationMap()
    for shard_id, node in shards:
        assert begin_resync(located, shard_id, node, 1, 0)
        assert add_keys(located, shard_id, 1, [], True)
    return located


def test_keys_survive_packing() -> None:
    assert split_keys(join_keys(KEYS)) == KEYS
    assert split_keys(b"") == []


def test_a_key_is_found_on_another_node_only() -> None:
    located = joined(("a", "n1"), ("b", "n2"))
    assert changes(located, "a", "n1", 1, 1, KEYS[:2], [])
    assert changes(located, "b", "n2", 1, 1, KEYS[1:3], [])
    assert located.locate(KEYS[:4], exclude_node="n1") == [None, "b", "b", None]
    assert located.locate(KEYS[:4], exclude_node="n2") == ["a", "a", None, None]
    assert located.remote_shards("n1") == 1
    assert located.remote_shards("n3") == 2


def test_a_run_of_keys_stays_with_one_shard() -> None:
    located = joined(("a", "n1"), ("b", "n1"))
    assert changes(located, "a", "n1", 1, 1, KEYS[:3], [])
    assert changes(located, "b", "n1", 1, 1, KEYS[1:6], [])
    assert located.locate(KEYS[:6]) == ["a", "a", "a", "b", "b", "b"]


def test_the_prefix_of_a_node_is_what_its_shards_hold_together() -> None:
    located = joined(("a", "n1"), ("b", "n1"), ("c", "n2"))
    assert changes(located, "a", "n1", 1, 1, [KEYS[0], KEYS[2]], [])
    assert changes(located, "b", "n1", 1, 1, [KEYS[1]], [])
    assert changes(located, "c", "n2", 1, 1, [KEYS[1]], [])
    assert located.prefix_by_node(KEYS[:5]) == {"n1": 3, "n2": 0}


def test_messages_of_an_unknown_shard_epoch_or_after_a_gap_ask_for_a_resync() -> None:
    located = joined(("a", "n1"))
    assert not changes(located, "b", "n1", 1, 1, KEYS[:1], [])
    assert not changes(located, "a", "n1", 2, 1, KEYS[:1], [])
    assert not changes(located, "a", "n1", 1, 2, KEYS[:1], [])
    assert len(located) == 0


def test_a_message_sent_twice_is_applied_once() -> None:
    located = joined(("a", "n1"))
    assert changes(located, "a", "n1", 1, 1, KEYS[:2], [])
    assert changes(located, "a", "n1", 1, 2, [], KEYS[:1])
    assert changes(located, "a", "n1", 1, 2, [], KEYS[:1])
    assert located.keys_of("a") == {KEYS[1]}
    assert changes(located, "a", "n1", 1, 3, [], [])


def test_a_resync_replaces_what_was_known_and_takes_several_parts() -> None:
    located = joined(("a", "n1"))
    assert changes(located, "a", "n1", 1, 1, KEYS[:3], [])
    assert begin_resync(located, "a", "n1", 2, 7)
    assert not changes(located, "a", "n1", 2, 8, [], [])  # not before all parts are there
    assert add_keys(located, "a", 2, KEYS[2:4], False)
    assert add_keys(located, "a", 2, KEYS[4:5], True)
    assert not add_keys(located, "a", 2, KEYS[5:6], True)
    assert located.keys_of("a") == set(KEYS[2:5])
    assert changes(located, "a", "n1", 2, 8, [], KEYS[2:3])
    assert located.keys_of("a") == set(KEYS[3:5])
    located.check_integrity()


def test_a_silent_shard_is_not_offered_until_it_reports_again() -> None:
    now = [0.0]
    located = LocationMap(clock=lambda: now[0])
    begin_resync(located, "a", "n1", 1, 0)
    add_keys(located, "a", 1, KEYS[:1], True)
    now[0] = MEMBER_TIMEOUT_S + 1
    assert located.locate(KEYS[:1]) == [None]
    assert located.prefix_by_node(KEYS[:1]) == {}
    assert changes(located, "a", "n1", 1, 1, [], [])
    assert located.locate(KEYS[:1]) == ["a"]


def test_more_shards_than_the_sets_can_name_stay_local_until_one_dies() -> None:
    now = [0.0]
    located = LocationMap(clock=lambda: now[0])
    for index in range(MAX_SHARDS):
        assert begin_resync(located, f"s{index}", "n", 1, 0)
        assert add_keys(located, f"s{index}", 1, KEYS[:1], True)
    assert not begin_resync(located, "one more", "n", 1, 0)
    now[0] = MEMBER_TIMEOUT_S + 1
    assert begin_resync(located, "one more", "n", 1, 0)
    located.check_integrity()


class LocationMachine(RuleBasedStateMachine):
    """The map against one set of keys per shard."""

    def __init__(self) -> None:
        super().__init__()
        self.located = LocationMap()
        self.held: dict[str, set[bytes]] = {}
        self.at: dict[str, tuple[int, int]] = {}

    @rule(shard=st.sampled_from("abc"), keys=SOME_KEYS)
    def resync(self, shard: str, keys: set[bytes]) -> None:
        epoch = self.at.get(shard, (0, 0))[0] + 1
        assert begin_resync(self.located, shard, shard, epoch, 3)
        assert add_keys(self.located, shard, epoch, sorted(keys), True)
        self.held[shard], self.at[shard] = set(keys), (epoch, 3)

    @rule(
        shard=st.sampled_from("abc"),
        added=SOME_KEYS,
        removed=SOME_KEYS,
        skip=st.booleans(),
    )
    def message(self, shard: str, added: set[bytes], removed: set[bytes], skip: bool) -> None:
        removed -= added
        epoch, seq = self.at.get(shard, (1, 0))
        taken = changes(
            self.located, shard, shard, epoch, seq + 1 + skip, sorted(added), sorted(removed)
        )
        assert taken == (shard in self.held and not skip)
        if taken:
            self.at[shard] = (epoch, seq + 1)
            self.held[shard] = self.held[shard] - removed | added

    @invariant()
    def agrees(self) -> None:
        self.located.check_integrity()
        for shard in "abc":
            assert self.located.keys_of(shard) == self.held.get(shard, set())
        found = self.located.locate(KEYS, exclude_node="a")
        for key, shard_id in zip(KEYS, found, strict=True):
            holders = {s for s in "bc" if key in self.held.get(s, ())}
            assert (shard_id in holders) if holders else shard_id is None


TestLocationMachine = pytest.mark.no_cover(LocationMachine.TestCase)


def random_keys(count: int, seed: int) -> list[bytes]:
    raw = random.Random(seed).randbytes(16 * count)
    return [raw[at : at + 16] for at in range(0, len(raw), 16)]


class CountedSteps(dict[bytes, int]):
    """A part of the map that counts what is read from it."""

    steps = 0

    def get(self, key: bytes, default: int = 0) -> int:  # type: ignore[override]
        CountedSteps.steps += 1
        return super().get(key, default)


def test_a_large_shard_is_forgotten_in_small_steps_with_the_calls_that_follow() -> None:
    located = joined(("a", "n1"), ("b", "n2"))
    keys = random_keys(60_000, 1)
    for shard, mine in (("a", keys[:50_000]), ("b", keys[40_000:])):
        assert begin_resync(located, shard, f"n-{shard}", 2, 0)
        for start in range(0, len(mine), BATCH_KEYS):
            part = mine[start : start + BATCH_KEYS]
            assert add_keys(located, shard, 2, part, part[-1] is mine[-1])
    parts = {id(part): CountedSteps(part) for part in located._holders.dicts}
    located._holders.parts = [parts[id(part)] for part in located._holders.parts]
    located._holders.dicts = list(parts.values())
    CountedSteps.steps = 0
    assert begin_resync(located, "a", "n-a", 3, 0)
    assert add_keys(located, "a", 3, [], True)
    assert CountedSteps.steps <= 2 * BATCH_KEYS, "forgetting took all its steps at once"
    assert located.keys_of("a") == set()
    assert set(located.locate(keys[:40_000])) == {None}
    assert set(located.locate(keys[40_000:], exclude_node="n-a")) == {"b"}
    for seq in range(1, 40):
        CountedSteps.steps = 0
        assert changes(located, "a", "n-a", 3, seq, [keys[seq]], [])
        assert CountedSteps.steps <= BATCH_KEYS + 1
        located.check_integrity()
    assert len(located) == 20_000 + 39, "what nobody holds any more was not forgotten"
    assert located.keys_of("a") == set(keys[1:40])


def test_bits_of_shards_that_restart_again_and_again_are_used_again() -> None:
    located = joined(("a", "n1"))
    for epoch in range(2, 300):
        assert begin_resync(located, "a", "n1", epoch, 0)
        assert add_keys(located, "a", epoch, KEYS[:3], True)
    assert max(part.get(key, 0) for part in located._holders.dicts for key in part) < 1 << 8
    located.check_integrity()
