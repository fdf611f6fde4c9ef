"""Key table, segments, eviction policies, journal and snapshot against plain models."""

from __future__ import annotations

import os
import random
import time

import numpy as np
import pytest
from fault_files import FaultFiles
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_help import key_of

from litecache.errors import ConfigError, StorageFormatError
from litecache.storage import KeyTable, eviction
from litecache.storage.block_index import BlockIndex
from litecache.storage.disk import folder, journal, recovery, snapshot
from litecache.storage.disk.files import Files
from litecache.storage.disk.records import RECORD, seal, unseal
from litecache.storage.disk.tier import DiskTier
from litecache.storage.eviction import Links, get_policy, register
from litecache.storage.eviction.lru import Lru
from litecache.storage.segment_sizes import pick_segment_bytes
from litecache.storage.segments import SegmentSpace

OPS = st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=200)


@settings(max_examples=100, deadline=None)
@given(OPS, st.booleans())
def test_key_table_equals_a_dict(ops, clustered):
    table, model = KeyTable({"value": "q"}), {}
    # explicit keys need not be random: small integers must not make one long cluster
    keys = [n.to_bytes(16, "big" if clustered else "little") for n in range(61)]
    for add, n in ops:
        key = keys[n]
        if add and key not in model:
            entry = table.insert(key)
            assert table.value[entry] == 0
            table.value[entry] = model[key] = n + 1
        elif not add and key in model:
            table.remove(key)
            del model[key]
    table.check_integrity()
    assert set(table.keys()) == set(model)
    found = table.find_many(keys)
    for key, entry in zip(keys, found.tolist(), strict=True):
        assert (entry >= 0) == (key in model) == (key in table)
        if entry >= 0:
            assert table.value[entry] == model[key]


def test_key_table_grows_and_takes_many_at_once():
    words = np.random.default_rng(0).integers(0, 2**64, (50_000, 2), np.uint64)
    table = KeyTable()
    table.insert_words(words)
    table.check_integrity()
    assert (table.find_words(words) == np.arange(50_000)).all()
    for n in range(2000):
        table.insert(key_of(n))
    table.check_integrity()
    with pytest.raises(ConfigError, match="16 bytes"):
        table.find_many([b"short"])


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
            assert len(slots) == count or not space.allocatable(pages)
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


@pytest.mark.parametrize("name", ["lru", "lfu", "s3fifo"])
@settings(max_examples=100, deadline=None)
@given(ops=st.lists(st.tuples(st.sampled_from("itre"), st.integers(0, 20)), max_size=150))
def test_a_policy_holds_exactly_what_was_put_in(name, ops):
    policy, inside = get_policy(name)(Links()), set()
    for op, handle in ops:
        if op == "i" and handle not in inside:
            policy.insert(handle, handle)
            inside.add(handle)
        elif op == "t" and handle in inside:
            policy.touch(handle)
        elif op == "r" and handle in inside:
            policy.remove(handle)
            inside.remove(handle)
        elif op == "e":
            victim = policy.evict(lambda h: h % 3 != 0)
            allowed = {h for h in inside if h % 3}
            assert (victim in allowed) if allowed else victim is None
            inside.discard(victim)
        assert sorted(policy) == sorted(inside)
        assert len(policy) == len(inside)
        assert policy.peek() in inside or not inside


def trace(name: str, accesses: list[int], capacity: int) -> float:
    policy, inside, hits = get_policy(name)(Links()), {}, 0
    handles = list(range(capacity))
    for item in accesses:
        if item in inside:
            hits += 1
            policy.touch(inside[item])
            continue
        if not handles:
            victim = policy.evict(lambda handle: True)
            gone = next(key for key, handle in inside.items() if handle == victim)
            handles.append(inside.pop(gone))
        inside[item] = handles.pop()
        policy.insert(inside[item], item)
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
    policy = get_policy("lfu")(Links())
    for handle in range(4):
        policy.insert(handle, handle)
    for _ in range(15):
        policy.touch(0)
    for _ in range(400):
        policy.touch(1)
        policy.touch(2)
        policy.touch(3)
    assert policy.evict(lambda handle: True) == 0


def test_policies_register_by_name(monkeypatch):
    monkeypatch.setattr(eviction, "_POLICIES", dict(eviction._POLICIES))
    register("mine", Lru)
    assert get_policy("mine") is Lru
    with pytest.raises(ConfigError, match="lfu, lru"):
        get_policy("none such")


def records_of(numbers, slot=0):
    records = np.zeros(len(numbers), RECORD)
    for i, n in enumerate(numbers):
        records[i]["key"] = np.frombuffer(key_of(n), "<u8")
        records[i]["slot"], records[i]["pages"] = slot + i, 1
    return records


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 79), st.integers(0, 7), st.integers(0, 4))
def test_a_flipped_bit_costs_its_record_alone(at, bit, row):
    raw = bytearray(seal(records_of(range(5))))
    raw[row * 80 + at] ^= 1 << bit
    sound = unseal(bytes(raw))
    kept = [key.tobytes() for key in sound["key"]]
    assert kept == [key_of(n) for n in range(5) if n != row]


def test_journal_replay_applies_the_last_word():
    files = FaultFiles(random.Random(0))
    book = journal.Journal(files, "journal", 0, 0)
    dead = key_of(1) + (1).to_bytes(4, "little")
    book.append(journal.PUT, seal(records_of(range(3))))
    book.append(journal.DEL, dead)
    book.append(journal.PUT, seal(records_of([2], slot=9)))
    book.append(journal.DEL, key_of(2) + (2).to_bytes(4, "little"))
    book.append(journal.PUT, seal(records_of([5], slot=1)))
    book.flush()
    found = recovery.recover(files)
    slots = {r["key"].tobytes(): int(r["slot"]) for r in found.records}
    assert slots == {key_of(0): 0, key_of(2): 9, key_of(5): 1}
    assert found.seq == 5


def test_a_rewritten_journal_keeps_what_came_meanwhile():
    files = FaultFiles(random.Random(0))
    book = journal.Journal(files, "journal", 0, 0)
    book.append(journal.PUT, seal(records_of([0])))
    seq = book.begin_rewrite()
    book.append(journal.PUT, seal(records_of([1], slot=1)))
    book.flush()
    book.append(journal.PUT, seal(records_of([2], slot=2)))
    book.finish_rewrite(seq)
    book.append(journal.PUT, seal(records_of([3], slot=3)))
    book.flush()
    changes, _ = journal.parse(files.read_all("journal", 1 << 20), "journal")
    assert [change.seq for change in changes] == [2, 3, 4]


def test_journals_and_snapshots_of_other_versions_are_refused(monkeypatch):
    files = FaultFiles(random.Random(0))
    snapshot.write(files, "snapshot", snapshot.Snapshot(3, ["a"], records_of(range(2)), 0))
    head = journal.header_bytes(0)
    monkeypatch.setattr(journal, "VERSION", 2)
    with pytest.raises(StorageFormatError, match="version 1"):
        journal.parse(head, "journal")
    monkeypatch.setattr(snapshot, "VERSION", 2)
    with pytest.raises(StorageFormatError, match="version 1"):
        snapshot.read(files, "snapshot", 1 << 20)


def test_half_a_million_blocks_are_back_in_two_seconds_of_cpu(tmp_path, monkeypatch):
    count, segment = 500_000, 64 << 20
    a_segment, pages = segment // (90 * 4096), segment // 4096
    blocks = np.arange(count)
    records = np.zeros(count, RECORD)
    records["key"] = np.random.default_rng(0).integers(0, 2**64, (count, 2), np.uint64)
    records["slot"] = blocks // a_segment * pages + blocks % a_segment * 90
    records["pages"] = 90
    # a sparse slab of 184 GB stands in for a real one
    monkeypatch.setattr(folder, "disk_room_bytes", lambda path: 1 << 50)

    def open_tier() -> DiskTier:
        return DiskTier(
            Files(),
            str(tmp_path),
            storage_bytes=1 << 40,
            index=BlockIndex(),
            policy="lru",
            on_evict=lambda entry: None,
            before_evict=lambda: None,
            before_snapshot=lambda: None,
            quotas={},
        )

    open_tier().close(clean=True)
    files = Files()
    files.folder, _ = folder.open_folder(str(tmp_path))
    snapshot.write(files, "snapshot", snapshot.Snapshot(1, [""], records, 0))
    os.close(files.folder)
    os.truncate(tmp_path / "slab", (int(records["slot"].max()) // pages + 1) * segment)
    begun = time.process_time()
    tier = open_tier()
    spent = time.process_time() - begun
    assert len(tier.on_disk()) == count
    tier.close(clean=True)
    assert spent < 2
