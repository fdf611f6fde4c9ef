"""Key table, segments and eviction policies against plain models."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_help import key_of, puts

from litecache.errors import ConfigError
from litecache.storage import admission
from litecache.storage.block_index import BlockIndex
from litecache.storage.eviction import get_policy, policies, register
from litecache.storage.eviction.policies import Lru
from litecache.storage.eviction.queues import Queues
from litecache.storage.segments import SegmentSpace, pick_segment_bytes

OPS = st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=200)


@settings(max_examples=100, deadline=None)
@given(OPS, st.booleans())
def test_the_index_equals_a_dict(ops, big_endian):
    index, model = BlockIndex(), {}
    # explicit keys need not be random
    keys = [n.to_bytes(16, "big" if big_endian else "little") for n in range(61)]
    for add, n in ops:
        key, parent = keys[n], keys[n // 2]
        if add and key not in model:
            entry = index.insert(key, parent)
            assert index.hits[entry] == 0
            index.hits[entry] = model[key] = n + 1
        elif not add and key in model:
            index.remove(index.find(key))
            del model[key]
        index.check_integrity()
        assert len(index) == len(model)
    assert set(index) == set(model)
    for key, entry in zip(keys, index.get_many(keys), strict=True):
        assert (entry >= 0) == (key in model) == (key in index)
        if entry >= 0:
            assert index.hits[entry] == model[key]
            assert index.key_at(entry) == key
            assert index.parent_of(entry) == keys[(model[key] - 1) // 2]


def test_the_index_takes_many_at_once_and_refuses_keys_of_another_length():
    index = BlockIndex()
    index.load(puts(range(5000)))
    assert index.get_many([key_of(n) for n in range(5000)]) == list(range(5000))
    for n in range(5000, 7000):
        index.insert(key_of(n), key_of(n - 1))
    index.check_integrity()
    for bad in (b"", b"short", bytes(17)):
        with pytest.raises(ConfigError, match="16 bytes"):
            index.get_many([key_of(0), bad])
        with pytest.raises(ConfigError, match="16 bytes"):
            index.insert(bad)
    assert len(index) == 7000


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 3, 10, 16, 40]), st.integers(1, 12), st.booleans()),
        max_size=60,
    ),
    st.randoms(use_true_random=False),
)
def test_slots_never_overlap_and_all_space_returns(ops, draw):
    limit = 24
    space = SegmentSpace(16 * 4096, lambda new, slots: space.grown + new <= limit)
    used: dict[int, int] = {}
    for pages, count, give_back in ops:
        if give_back and used:
            for slot in draw.sample(sorted(used), max(1, len(used) // 2)):
                space.free(slot)
                del used[slot]
            continue
        slots = space.allocate(pages, count)
        while len(slots) < count and (new := space.growth(pages)) is not None:
            space.grow(new)
            slots += space.allocate(pages, count - len(slots))
        used.update(dict.fromkeys(slots, pages))
        taken = [page for slot, size in used.items() for page in range(slot, slot + size)]
        assert len(taken) == len(set(taken)), "slots overlap"
        assert max(taken, default=0) < limit * 16
        space.check_integrity(used, set())
    for slot in used:
        space.free(slot)
    space.check_integrity({}, set())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 3, 16, 40]),
            st.integers(1, 40),
            st.sampled_from(["take", "take", "give back", "cannot shrink"]),
        ),
        max_size=60,
    ),
    st.randoms(use_true_random=False),
)
def test_a_space_shrinks_for_small_blocks_and_never_passes_its_bound(ops, draw):
    limit, a_slot = 24 * 16 * 10, 3  # a segment counts 160, a slot in it 3

    def may_grow(new: int, slots: int) -> bool:
        return (space.present + new) * 160 + (space.slots_assigned + slots) * a_slot <= limit

    space = SegmentSpace(16 * 4096, may_grow)
    space.may_shrink = True
    used: dict[int, int] = {}
    retired: set[int] = set()
    for pages, count, what in ops:
        if what == "give back":
            for slot in draw.sample(sorted(used), len(used) // 2):
                space.free(slot)
                del used[slot]
        elif what == "take":
            slots = space.allocate(pages, count)
            while len(slots) < count:
                if (new := space.growth(pages)) is not None:
                    space.grow(new)
                    retired -= set(new)
                elif surplus := space.take_surplus(pages):
                    space.check_integrity({**used, **dict.fromkeys(slots, pages)}, set())
                    space.retire(surplus)
                    retired |= set(surplus)
                else:
                    break
                slots += space.allocate(pages, count - len(slots))
            assert len(slots) == count or not space.available(pages)
            used.update(dict.fromkeys(slots, pages))
        elif surplus := space.take_surplus(pages):
            space.keep(surplus)
            assert not space.take_surplus(pages)
            space.may_shrink = True
        assert space.present * 160 + space.slots_assigned * a_slot <= limit
        assert not retired & {page // 16 for s, n in used.items() for page in range(s, s + n)}
        space.check_integrity(used, set())


def test_a_chain_gets_neighbouring_slots():
    space = SegmentSpace(64 << 20, lambda new, slots: True)
    space.grow(range(2))
    slots = space.allocate(512, 32)
    assert slots == list(range(0, 32 * 512, 512))
    for slot in slots[8:24]:
        space.free(slot)
    assert space.allocate(512, 16) == slots[8:24]


@pytest.mark.parametrize("total", [1 << 20, 100 << 20, 1 << 30, 1 << 40])
def test_segments_are_a_sixteenth_or_64_mib(total):
    size = pick_segment_bytes(total)
    assert size == 64 << 20 or size * 16 <= total
    assert size & (size - 1) == 0


class World:
    """Queues of one tier over handles whose keys and parents the test chooses."""

    def __init__(self, name, parents=()):
        self.parents = dict(parents)
        self.queues = Queues(name, self)

    def key_at(self, handle):
        return handle.to_bytes(16, "little")

    def parent_of(self, handle):
        return self.key_at(self.parents.get(handle, 1 << 40))

    def find(self, key):
        handle = int.from_bytes(key, "little")
        return handle if handle < 1 << 20 else -1

    def insert(self, handle):
        self.queues.insert(handle, 1, 0)

    def evict(self, allowed=lambda handle: True):
        return self.queues.evict(1, allowed)


@pytest.mark.parametrize("name", ["lru", "lfu", "s3fifo"])
@settings(max_examples=100, deadline=None)
@given(
    ops=st.lists(st.tuples(st.sampled_from("iiutre"), st.integers(0, 20)), max_size=150),
    parents=st.dictionaries(st.integers(0, 20), st.integers(0, 22)),
)
def test_queues_hold_exactly_what_was_put_in_and_evict_what_nothing_follows(name, ops, parents):
    world, inside = World(name, parents), set()
    for op, handle in ops:
        if op == "i" and handle not in inside:
            world.insert(handle)
            inside.add(handle)
        elif op in "ut":
            world.queues.use(handle, ends=op == "t")
        elif op == "r" and handle in inside:
            world.queues.remove(handle)
            inside.remove(handle)
        elif op == "e":
            victim = world.evict(lambda h: h % 3 != 0)
            allowed = {h for h in inside if h % 3}
            followed = {parents[h] for h in inside if parents.get(h, h) != h}
            if allowed - followed:
                assert victim in allowed - followed
            else:
                assert (victim in allowed) if allowed else victim is None
            inside.discard(victim)
        assert sorted(world.queues) == sorted(inside)
        world.queues.check_integrity()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=100),
    st.dictionaries(st.integers(1, 12), st.integers(0, 11)),
)
def test_lru_evicts_the_block_that_was_not_used_for_longest_through_what_follows_it(ops, drawn):
    parents = {child: parent for child, parent in drawn.items() if parent < child}
    world, used = World("lru", parents), {}
    for clock, (add, handle) in enumerate(ops):
        if add and handle not in used:
            world.insert(handle)
            used[handle] = clock
        elif handle in used:
            world.queues.use(handle, ends=True)
            used[handle] = clock
        above = parents.get(handle)
        while handle in used and above in used:  # a use of a block is one of all before it
            used[above] = clock
            above = parents.get(above)
    followed = {parents.get(handle) for handle in used}
    while used:
        victim = world.evict()
        assert victim not in followed
        assert used[victim] == min(used.values())
        del used[victim]
        followed = {parents.get(handle) for handle in used}


@pytest.mark.parametrize("name", ["lru", "lfu", "s3fifo"])
def test_restored_queues_evict_as_those_that_were_filled(name):
    parents = {n: n - 1 for n in range(1, 300) if n % 20}
    filled, restored = World(name, parents), World(name, parents)
    for n in range(300):
        filled.insert(n)
    column = np.ones(300, np.int64)
    restored.queues.extend(np.arange(300), column, 0 * column, 0 * column)
    restored.queues.check_integrity()
    order = [restored.evict() for _ in range(300)]
    assert order == [filled.evict() for _ in range(300)]
    assert order[:20] == list(range(19, -1, -1))


class Steps:
    """Counts how often the links of a tier are looked at."""

    def __init__(self, links):
        self.count = 0
        for name in ("older", "newer", "mark"):
            setattr(links, name, self._counted(getattr(links, name)))

    def _counted(self, column):
        outer = self

        class Counted(type(column)):
            def __getitem__(self, at):
                outer.count += 1
                return super().__getitem__(at)

        return Counted(column.typecode, column)


@pytest.mark.parametrize("name", ["lru", "lfu", "s3fifo"])
@pytest.mark.parametrize("shape", ["single blocks", "one chain"])
def test_an_eviction_takes_as_many_steps_at_ten_times_the_size(name, shape):
    def steps(size):
        world = World(name, {n: n - 1 for n in range(1, size)} if shape == "one chain" else {})
        for n in range(size):
            world.insert(n)
        steps = Steps(world.queues._links)
        for n in range(0, size, 3):
            world.queues.use(n, ends=True)
        for _ in range(size // 2):
            world.evict()
        return steps.count / size

    assert 1 < steps(20_000) < 1.2 * steps(2_000)


@pytest.mark.parametrize("name", ["lru", "lfu", "s3fifo"])
def test_one_search_among_blocks_in_use_is_bounded_and_the_next_goes_on_behind_them(name):
    def steps(size):
        world = World(name)
        for n in range(size):
            world.insert(n)
        steps = Steps(world.queues._links)
        assert world.evict(lambda handle: False) is None
        once = steps.count
        while world.evict(lambda handle: handle == size - 1) is None:
            assert steps.count < 100 * size
        return once

    assert 0 < steps(60_000) < 1.2 * steps(6_000)


def trace(name: str, accesses: list[int], capacity: int) -> float:
    world, inside, hits = World(name), {}, 0
    for item in accesses:
        if item in inside:
            hits += 1
            world.queues.use(item, ends=True)
            continue
        if len(inside) == capacity:
            del inside[world.evict()]
        inside[item] = True
        world.insert(item)
    return hits / len(accesses)


def test_s3fifo_and_lfu_resist_a_scan_that_empties_lru():
    draw = random.Random(0)
    accesses, scan = [], 1000
    for _ in range(60):
        accesses += [draw.randrange(30) for _ in range(60)]
        accesses += range(scan, scan + 60)
        scan += 60
    rates = {name: trace(name, accesses, 50) for name in ("lru", "lfu", "s3fifo")}
    assert rates["s3fifo"] > rates["lru"] + 0.03
    assert rates["lfu"] > rates["lru"] + 0.03


def test_lfu_forgets_what_was_popular_long_ago():
    world = World("lfu")
    for handle in range(4):
        world.insert(handle)
    for _ in range(15):
        world.queues.use(0, ends=True)
    for _ in range(400):
        for handle in (1, 2, 3):
            world.queues.use(handle, ends=True)
    assert world.evict() == 0


def test_policies_register_by_name(monkeypatch):
    monkeypatch.setattr(policies, "_POLICIES", dict(policies._POLICIES))
    register("mine", Lru)
    assert get_policy("mine") is Lru
    with pytest.raises(ConfigError, match="lfu, lru"):
        get_policy("none such")


def test_remembering_what_was_seen_once_costs_the_same_when_much_is_remembered(monkeypatch):
    def seconds(remembered):
        monkeypatch.setattr(admission, "_REMEMBERED", remembered)
        policy = admission.Admission("reused")
        keys = [n.to_bytes(16, "little") for n in range(remembered + 30_000)]
        begun = 0.0
        for n, key in enumerate(keys):
            if n == remembered:
                begun = time.thread_time()
            assert not policy.first(key)
        return time.thread_time() - begun

    assert min(seconds(60_000) for _ in range(2)) < 8 * seconds(100)
