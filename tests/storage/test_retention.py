"""How long single blocks are kept: a time at which they end, and what leaves before what."""

from __future__ import annotations

import time

import pytest
from storage_help import KIB, MIB, ROOT, bytes_of, key_of

from litecache.errors import ConfigError
from litecache.storage import CommitItem, LocalShardClient, ShardStore, SlotRef
from litecache.storage.protocol import Retention

NBYTES = 64 * KIB


def make(folder, **options) -> ShardStore:
    options = {"storage_bytes": 4 * MIB, "ram_bytes": 2 * MIB, "io_threads": 0, **options}
    return ShardStore(str(folder) if folder is not None else None, **options)


def keys_of(numbers) -> list[bytes]:
    return [key_of(number) for number in numbers]


def save(store, numbers, *, chain=False, **kept) -> list[bytes]:
    """Blocks, each for itself or as a chain."""
    client, keys, parent = LocalShardClient(store), keys_of(numbers), ROOT
    for key in keys:
        (ref,) = client.reserve(NBYTES, 1)
        client.arena.buffer(ref.slot, NBYTES)[:] = bytes_of(key, NBYTES)
        client.commit([CommitItem(*ref, key, parent, "n", **kept)])
        parent = key if chain else ROOT
    client.close()
    return keys


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = float(int(time.time()))

    monkeypatch.setattr(time, "time", lambda: Clock.now)
    return Clock


@pytest.mark.parametrize("now", [-5, 0, 2**32, 1e18])
def test_a_clock_may_say_anything(tmp_path, clock, now):
    clock.now = now
    with make(tmp_path) as store:
        keys = save(store, range(3))
        assert all(store.query(keys))
        assert store.flush().complete
        store.check_integrity()


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_block_past_its_time_is_a_miss_at_once(tmp_path, clock, on_disk):
    with make(tmp_path if on_disk else None) as store:
        short = save(store, range(3), expires_s=int(clock.now) + 10)
        rest = save(store, range(10, 13))
        clock.now += 9.5
        assert all(store.query(short))
        clock.now += 0.5
        client = LocalShardClient(store)
        assert [r.slot for r in client.stage(short)] == [-1] * 3
        assert store.query(short + rest) == [False] * 3 + [True] * 3
        assert store.stats()["evictions"]["expired"] == 3
        store.check_integrity()
        client.close()


@pytest.mark.parametrize("compact", [False, True])
def test_time_and_retention_survive_restart_and_compaction(tmp_path, clock, compact):
    with make(tmp_path) as store:
        short = save(store, range(3), expires_s=int(clock.now) + 10)
        low = save(store, range(20, 24), retention=Retention.LOW)
        high = save(store, range(30, 40), retention=Retention.HIGH)
        store.flush()
        store.abandon(compact=compact)
    with make(tmp_path) as store:
        assert all(store.query(short + low + high))
        normal = save(store, range(100, 147))
        assert not any(store.query(low))
        assert all(store.query(high))
        clock.now += 10
        assert not any(store.query(short))
        assert sum(store.query(normal)) > 30
        store.check_integrity()


@pytest.mark.parametrize("eviction", ["lru", "lfu", "s3fifo"])
@pytest.mark.parametrize("on_disk", [True, False])
def test_low_leaves_before_normal_and_high_stays_longest(tmp_path, on_disk, eviction):
    with make(tmp_path if on_disk else None, eviction=eviction) as store:
        high = save(store, range(8), retention=Retention.HIGH)
        normal = save(store, range(10, 18))
        low = save(store, range(20, 28), retention=Retention.LOW)
        store.touch(low)
        number = 100
        while all(store.query(low)):
            save(store, [number])
            number += 1
        assert all(store.query(high + normal))
        save(store, range(number, number + 120))
        assert all(store.query(high))
        assert not any(store.query(normal + low))
        # blocks of high retention alone: the oldest of them leaves
        more = save(store, range(1000, 1100), retention=Retention.HIGH)
        assert not any(store.query(high))
        assert store.query(more[-8:]) == [True] * 8
        store.check_integrity()


def test_a_block_of_low_retention_stays_while_one_that_follows_it_does(tmp_path):
    with make(None) as store:
        head = save(store, [0], retention=Retention.LOW)
        client = LocalShardClient(store)
        (ref,) = client.reserve(NBYTES, 1)
        client.commit([CommitItem(*ref, key_of(1), head[0], "n", 0, Retention.HIGH)])
        save(store, range(100, 160))
        assert store.query(keys_of([0, 1])) == [True, True]
        store.check_integrity()
        client.close()


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_has_ended_leaves_before_what_has_not(tmp_path, clock, on_disk):
    with make(tmp_path if on_disk else None) as store:
        save(store, range(10))
        ending = save(store, range(10, 20), expires_s=int(clock.now) + 5, retention=Retention.HIGH)
        number = 100
        before = -1
        while len(store) > before:
            before = len(store)
            save(store, [number])
            number += 1
        others = [key for key in keys_of(range(number)) if key not in ending]
        kept = [key for key, there in zip(others, store.query(others), strict=True) if there]
        clock.now += 5
        save(store, range(1000, 1008))
        assert all(store.query(kept))
        assert not any(store.query(ending))
        store.check_integrity()


def test_the_earlier_end_counts_and_a_leased_block_may_end(tmp_path, clock):
    with make(tmp_path, ttl_s=20) as store:
        short = save(store, [0], expires_s=int(clock.now) + 10)
        long = save(store, [1], expires_s=int(clock.now) + 1000)
        client = LocalShardClient(store)
        held = [SlotRef(*r[1:]) for r in client.stage(short)]
        clock.now += 10
        assert store.query(short + long) == [False, True]
        assert not client.arena.holds(*held[0])
        client.release(held)
        clock.now += 10
        assert store.query(long) == [False]
        store.check_integrity()
        client.close()


@pytest.mark.parametrize(
    ("kept", "field"),
    [({"expires_s": -1}, "expires_s"), ({"expires_s": 2**32}, "expires_s"),
     ({"retention": 7}, "retention")],
)  # fmt: skip
def test_bad_values_are_refused_by_name_and_change_nothing(tmp_path, kept, field):
    with make(tmp_path) as store:
        with pytest.raises(ConfigError, match=field):
            save(store, [0], **kept)
        assert not len(store)
