"""Promises of the shard store, one by one."""

from __future__ import annotations

import collections
import contextlib
import errno
import gc
import os
import threading
import time
from unittest.mock import Mock

import pytest
from storage_help import KIB, MIB, ROOT, bytes_of, fill, get, key_of, put, taken_bytes

from litecache.errors import (
    ConfigError,
    StorageError,
    StorageFormatError,
    StorageFullError,
    StorageLockedError,
)
from litecache.storage import (
    CommitItem,
    CommitStatus,
    LocalShardClient,
    ShardStore,
    SlotRef,
    SlotState,
    StageStatus,
    inspect_store,
    verify_store,
)
from litecache.storage.disk.files import Files
from litecache.storage.namespaces import namespace_of, salt_digest

NBYTES = 64 * KIB


def make(folder, **options) -> ShardStore:
    options = {"storage_bytes": 16 * MIB, "ram_bytes": 4 * MIB, "io_threads": 2, **options}
    return ShardStore(str(folder) if folder is not None else None, **options)


def keys_of(numbers) -> list[bytes]:
    return [key_of(number) for number in numbers]


def test_a_committed_block_is_read_back_from_ram_disk_and_after_a_restart(tmp_path):
    with make(tmp_path / "s") as store:
        keys = fill(store, range(20), NBYTES)
        client = LocalShardClient(store)
        assert all(get(client, keys, NBYTES))
        store.clear("ram")
        assert {r.status for r in client.stage(keys[:1])} == {StageStatus.LOADING}
        assert all(get(client, keys, NBYTES))
        assert all(store.durable(keys))
        client.close()
    with make(tmp_path / "s") as store:
        client = LocalShardClient(store)
        assert all(get(client, keys, NBYTES))
        store.check_integrity()


def test_without_a_folder_nothing_is_durable_and_eviction_forgets():
    with make(None) as store:
        keys = fill(store, range(200), NBYTES)
        assert not any(store.durable(keys))
        found = store.query(keys)
        assert 0 < sum(found) < 200
        assert found[-1]
        store.check_integrity()


def test_the_client_sees_completion_in_the_slot_table(tmp_path):
    with make(tmp_path) as store:
        client = LocalShardClient(store)
        put(client, keys_of(range(1)), NBYTES)
        store.flush()
        store.clear("ram")
        (result,) = client.stage(keys_of(range(1)))
        assert client.wait([SlotRef(result.slot, result.generation)]) == [True]
        assert client.arena.entry(result.slot) == (SlotState.READY, result.generation, key_of(0))
        client.release([SlotRef(result.slot, result.generation)])


def test_a_slot_given_to_other_contents_has_another_generation():
    with make(None, ram_bytes=1 * MIB) as store:
        client = LocalShardClient(store)
        put(client, [key_of(0)], NBYTES)
        (old,) = client.stage([key_of(0)])
        client.release([SlotRef(old.slot, old.generation)])
        fill(store, range(1, 60), NBYTES)
        assert not client.arena.holds(old.slot, old.generation)
        assert client.commit([CommitItem(old.slot, old.generation, key_of(99), ROOT)]) == [
            CommitStatus.STALE
        ]


def test_a_second_commit_of_a_key_gives_the_slot_back(tmp_path):
    with make(tmp_path) as store:
        client = LocalShardClient(store)
        assert put(client, [key_of(0)], NBYTES) == [CommitStatus.STORED]
        assert put(client, [key_of(0)], NBYTES) == [CommitStatus.EXISTS]
        assert store.stats()["leases"] == 0
        store.check_integrity()


def test_reserve_never_waits_and_leased_slots_are_back_pressure():
    with make(None, ram_bytes=1 * MIB) as store:
        client = LocalShardClient(store)
        refs = client.reserve(NBYTES, 100)
        assert 0 < len(refs) < 100
        assert client.reserve(NBYTES, 1) == []
        client.release(refs)
        assert len(client.reserve(NBYTES, 100)) == len(refs)


@pytest.mark.parametrize("block_bytes", [2**62, 2**40])
def test_a_block_that_no_arena_holds_is_refused_and_evicts_nothing(block_bytes):
    with contextlib.closing(make(None, ram_bytes=MIB)) as store:
        client = LocalShardClient(store)
        keys = keys_of(range(4))
        put(client, keys, NBYTES)
        with pytest.raises(ConfigError, match=r"block_bytes=\d+ is invalid: at most the 1,048,576"):
            client.reserve(block_bytes, 1)
        assert all(client.query(keys))
        assert len(client.reserve(NBYTES, 2**62)) <= MIB // NBYTES


def test_stage_answers_busy_when_every_slot_is_leased(tmp_path):
    with make(tmp_path, ram_bytes=1 * MIB) as store:
        keys = fill(store, range(40), NBYTES)
        store.clear("ram")
        client = LocalShardClient(store)
        statuses = [result.status for result in client.stage(keys)]
        assert statuses.count(StageStatus.BUSY) >= 20
        assert StageStatus.MISS not in statuses


def test_of_keys_behind_those_that_may_be_read_what_is_in_ram_is_leased(tmp_path):
    with make(tmp_path) as store:
        keys = fill(store, range(12), NBYTES)
        store.clear("ram")
        client = LocalShardClient(store)
        assert all(get(client, keys[8:10], NBYTES))
        before = store.metrics.value("litecache_storage_bytes", direction="read", tier="disk")
        results = client.stage_async([*keys, key_of(99)], reads=3).result()
        expected = [StageStatus.LOADING] * 3 + [StageStatus.ON_DISK] * 5
        expected += [StageStatus.READY] * 2 + [StageStatus.ON_DISK] * 2 + [StageStatus.MISS]
        assert [result.status for result in results] == expected
        held = [SlotRef(r.slot, r.generation) for r in results if r.slot >= 0]
        assert len(held) == 5
        assert all(client.wait(held))
        after = store.metrics.value("litecache_storage_bytes", direction="read", tier="disk")
        assert after - before == 3 * NBYTES
        client.release(held)
        nothing = {r.status for r in client.stage_async(keys[10:], reads=0).result()}
        assert nothing == {StageStatus.ON_DISK}
        assert store.stats()["leases"] == 0
        store.check_integrity()


def test_cancel_drops_reads_that_have_not_begun(tmp_path):
    with make(tmp_path) as store:
        keys = fill(store, range(30), NBYTES)
        store.clear("ram")
        client = LocalShardClient(store)
        gate = threading.Event()
        slab = store._tiers.disk.slab
        read = slab.read
        slab.read = lambda transfers: (gate.wait(10), read(transfers))[1]
        results = [client.stage([key])[0] for key in keys]
        cancelled = client.cancel(keys)
        gate.set()
        assert sum(cancelled) >= 26
        rest = [
            SlotRef(r.slot, r.generation)
            for r, gone in zip(results, cancelled, strict=True)
            if not gone
        ]
        assert all(client.wait(rest))
        client.release(rest)
        assert store.stats()["leases"] == 0
        store.check_integrity()
        assert all(get(client, keys, NBYTES))


def test_hits_promotions_and_demotions_of_the_ram_tier_are_counted(tmp_path):
    with make(tmp_path, ram_bytes=1 * MIB, io_threads=0) as store:
        keys = fill(store, range(20), NBYTES)  # the arena holds 16: four leave, the disk has them
        stats = store.stats()
        assert stats["hits"] == {"ram": 0, "disk": 0}
        assert (stats["promotions"], stats["demotions"]) == (0, 4)
        client = LocalShardClient(store)
        in_ram = [key for key in keys if store._tiers.index.ram[store._tiers.index.find(key)]]
        gone = [key for key in keys if key not in in_ram]
        assert all(get(client, in_ram[:3], NBYTES))
        assert all(get(client, gone[:2], NBYTES))
        stats = store.stats()
        assert stats["hits"] == {"ram": 3, "disk": 2}
        assert (stats["promotions"], stats["demotions"]) == (2, 6)
        assert stats["evictions"] == {"ram": 6, "disk": 0, "expired": 0}
        assert get(client, gone[:2], NBYTES) == [True, True]
        assert store.stats()["hits"] == {"ram": 5, "disk": 2}
        client.close()
    with make(None, ram_bytes=1 * MIB) as store:
        fill(store, range(20), NBYTES)
        assert store.stats()["evictions"]["ram"] == 4
        assert store.stats()["demotions"] == 0, "without a disk the block is gone, not demoted"


def test_eviction_takes_tails_before_heads(tmp_path):
    with make(tmp_path, storage_bytes=4 * MIB, ram_bytes=1 * MIB) as store:
        chain = fill(store, range(30), NBYTES)
        store.flush()
        store.clear("ram")
        fill(store, range(100, 140), NBYTES)
        store.flush()
        store.clear("ram")
        found = store.query(chain)
        assert 0 < sum(found) < 30
        assert found == sorted(found, reverse=True), "a head left before its tail"


def test_touching_a_chain_keeps_it(tmp_path):
    with make(tmp_path, storage_bytes=4 * MIB, ram_bytes=1 * MIB) as store:
        chain = fill(store, range(20), NBYTES)
        for start in range(100, 300, 10):
            fill(store, range(start, start + 10), NBYTES)
            store.touch(chain)
        assert all(store.query(chain))


def test_recency_survives_a_restart(tmp_path):
    with make(tmp_path, storage_bytes=4 * MIB, ram_bytes=1 * MIB) as store:
        old, new = fill(store, range(20), NBYTES), fill(store, range(20, 40), NBYTES)
        store.touch(old)
    with make(tmp_path, storage_bytes=4 * MIB, ram_bytes=1 * MIB) as store:
        fill(store, range(100, 125), NBYTES)
        store.flush()
        store.clear("ram")
        assert sum(store.query(old)) > sum(store.query(new))


def test_a_pinned_prefix_stays_over_churn_and_restart_until_unpinned(tmp_path):
    options = {"storage_bytes": 4 * MIB, "ram_bytes": 1 * MIB}
    with make(tmp_path, **options) as store:
        chain = fill(store, range(8), NBYTES)
        store.flush()
        assert all(store.pin(chain))
        fill(store, range(100, 200), NBYTES)
    with make(tmp_path, **options) as store:
        fill(store, range(200, 300), NBYTES)
        assert all(store.query(chain))
        store.unpin(chain)
        fill(store, range(300, 400), NBYTES)
        store.flush()
        store.clear("ram")
        assert not any(store.query(chain))
        store.check_integrity()


def test_a_namespace_keeps_to_its_quota(tmp_path):
    with make(tmp_path, quotas={"test": 1 * MIB}) as store:
        keys = fill(store, range(60), NBYTES)
        store.flush()
        store.clear("ram")
        assert sum(store.query(keys)) <= 16
        assert sum(store.query(keys)) >= 8
        store.check_integrity()


def test_a_salt_keeps_to_its_quota_and_others_are_not_touched(tmp_path):
    assert namespace_of("model", "", {"alice"}) == "model"
    names = [namespace_of(model, "alice", {"alice"}) for model in ("model", "other")]
    assert not any("alice" in name for name in names), "a salt may be a secret"
    quotas = {salt_digest("alice"): 1 * MIB}
    for _ in range(2):  # the second time with names read back
        with make(tmp_path, quotas=quotas) as store:
            client = LocalShardClient(store)
            for start, name in ((0, "model"), (100, names[0]), (200, names[1])):
                for number in range(start, start + 40):
                    for ref in client.reserve(NBYTES, 1):
                        data = bytes_of(key_of(number), NBYTES)
                        client.arena.buffer(ref.slot, NBYTES)[:] = data
                        client.commit([CommitItem(*ref, key_of(number), ROOT, name)])
                    store.flush()
            store.clear("ram")
            kept = [sum(store.query(keys_of(range(at, at + 40)))) for at in (0, 100, 200)]
            assert kept[0] == 40
            assert all(8 <= count <= 16 for count in kept[1:])
            client.close()


def test_a_block_older_than_its_ttl_is_a_miss(tmp_path, monkeypatch):
    with make(tmp_path, ttl_s=100) as store:
        keys = fill(store, range(3), NBYTES)
        assert all(store.query(keys))
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 101)
        assert not any(store.query(keys))
        store.check_integrity()


@pytest.mark.parametrize(
    ("admission", "on_disk"), [("all", 5), ("frequent", 2), ("reused", 2), ("none", 0)]
)
def test_admission_decides_what_is_written(tmp_path, admission, on_disk):
    with make(tmp_path, admission=admission) as store:
        keys = fill(store, range(5), NBYTES)
        client = LocalShardClient(store)
        get(client, keys[:2], NBYTES)
        store.flush()
        assert sum(store.durable(keys)) == on_disk
        client.close()


@pytest.mark.parametrize("eviction", ["lru", "lfu", "s3fifo"])
def test_disk_and_memory_stay_within_their_bounds(tmp_path, eviction):
    with make(tmp_path, storage_bytes=6 * MIB, ram_bytes=2 * MIB, eviction=eviction) as store:
        for start in range(0, 400, 20):
            fill(store, range(start, start + 20), (16 + start % 3 * 20) * KIB)
            used = taken_bytes(tmp_path)
            assert used <= 6 * MIB
            assert store._arena.resident_bytes() <= 2 * MIB + store._arena.segment_bytes + 64 * KIB
        store.check_integrity()


def test_block_sizes_share_the_store_and_idle_ones_give_way(tmp_path):
    with make(tmp_path, storage_bytes=4 * MIB, ram_bytes=2 * MIB) as store:
        fill(store, range(100), 32 * KIB)
        later = fill(store, range(1000, 1030), 64 * KIB)
        store.flush()
        store.clear("ram")
        assert sum(store.query(later)) >= 20
        store.check_integrity()


@pytest.mark.parametrize(("on_disk", "count"), [(True, 110), (False, 56)])
def test_one_old_block_of_a_size_does_not_cost_the_new_ones_of_that_size(tmp_path, on_disk, count):
    """The oldest of all leaves, then the next oldest, which may be of another size."""
    folder = tmp_path if on_disk else None
    with make(folder, storage_bytes=8 * MIB, ram_bytes=4 * MIB, io_threads=0) as store:
        for number in range(5):
            fill(store, [number], 100 * KIB)
        old = fill(store, range(100, 100 + count), 64 * KIB)
        store.touch(keys_of(range(1, 5)))
        new = fill(store, range(1000, 1005), 100 * KIB, batch=5)
        assert store.query(keys_of([0, 1, 2, 3, 4])) == [False, True, True, True, True]
        assert all(store.query(new))
        assert count - 9 <= sum(store.query(old)) < count
        store.check_integrity()


@pytest.mark.parametrize("punch", [True, False])
def test_small_blocks_take_the_space_of_older_large_ones(tmp_path, monkeypatch, punch):
    """Their metadata takes more of the bound, so the slab must shrink where it can."""
    if not punch:
        refuse = OSError(errno.EOPNOTSUPP, "no holes here")
        monkeypatch.setattr(Files, "punch", Mock(side_effect=refuse))
    with make(tmp_path, storage_bytes=12 * MIB, ram_bytes=2 * MIB, io_threads=0) as store:
        fill(store, range(180), 64 * KIB)
        full = store.stats()["slab_bytes"]
        small = fill(store, range(1000, 1000 + 1200), 4 * KIB)
        store.check_integrity()
        store.flush()
        assert sum(store.durable(small)) == (1200 if punch else 896)
        assert (store.stats()["slab_bytes"] < full) == punch
        used = taken_bytes(tmp_path)
        assert used <= 12 * MIB
        # nothing is dropped, nothing leaves beyond the room that is needed, tails first
        assert not store.metrics.value("litecache_drops", reason="no_room")
        assert sum(store.query(keys_of(range(180)))) > 80
        assert store.query(keys_of([0, 179])) == [True, False]
        again = fill(store, range(5000, 5150), 64 * KIB)  # what was given back is made again
        assert all(store.query(again[-100:]))
        store.check_integrity()
    with make(tmp_path, storage_bytes=12 * MIB, ram_bytes=2 * MIB) as store:
        store.check_integrity()
        client = LocalShardClient(store)
        assert all(get(client, again[-20:], 64 * KIB))
        client.close()


def test_deleted_blocks_stay_deleted_after_kill_9(tmp_path):
    store = make(tmp_path)
    keys = fill(store, range(4), NBYTES)
    store.flush()
    assert store.delete(keys[:2]) == [True, True]
    store.abandon()
    with make(tmp_path) as store:
        assert store.query(keys) == [False, False, True, True]


def test_deleting_a_leased_block_keeps_its_bytes_until_release(tmp_path):
    with make(tmp_path) as store:
        client = LocalShardClient(store)
        put(client, [key_of(0)], NBYTES)
        (lease,) = client.stage([key_of(0)])
        store.delete([key_of(0)])
        fill(store, range(1, 50), NBYTES)
        assert bytes(client.arena.buffer(lease.slot, NBYTES)) == bytes_of(key_of(0), NBYTES)
        assert not client.arena.holds(lease.slot, lease.generation)
        client.release([SlotRef(lease.slot, lease.generation)])
        store.check_integrity()


def test_deltas_tell_net_changes_once():
    with make(None) as store:
        keys = fill(store, range(3), NBYTES)
        store.delete(keys[:1])
        first = store.drain_deltas()
        assert (set(first.added), first.removed, first.resync) == (set(keys[1:]), [], False)
        second = store.drain_deltas()
        assert (second.seq, second.added, second.removed) == (first.seq + 1, [], [])
        store.delete(keys[1:2])
        assert store.drain_deltas().removed == keys[1:2]
        assert store.keys() == keys[2:]


def test_fetch_reads_through_the_disk_without_a_slot(tmp_path):
    with make(tmp_path) as store:
        keys = fill(store, range(3), NBYTES)
        store.flush()
        store.clear("ram")
        found = store.fetch([*keys, key_of(9)])
        assert [data for _, data in found[:3]] == [bytes_of(key, NBYTES) for key in keys]
        assert found[3] == (key_of(9), None)
        assert store.stats()["ram_slots"]["clean"] == 0


def test_a_fetch_is_one_bounded_message_of_merged_reads(tmp_path, monkeypatch):
    with make(tmp_path, storage_bytes=16 * MIB, io_threads=0) as store:
        keys = fill(store, range(40), NBYTES)
        store.clear("ram")
        reads: list[int] = []
        real = store._tiers.disk.slab._files.read

        def read(fd, buffers, offset):
            reads.append(sum(map(len, buffers)))
            return real(fd, buffers, offset)

        monkeypatch.setattr(store._tiers.disk.slab._files, "read", read)
        monkeypatch.setattr("litecache.storage.disk.slab.MAX_REQUEST_BYTES", 16 * NBYTES)
        wanted = [keys[3], *keys, key_of(99)]
        assert [data == bytes_of(key, NBYTES) for key, data in store.fetch(wanted)] == (
            [True] * 41 + [False]
        )
        assert len(reads) <= 5, "neighbours are read together"
        assert max(reads) <= 16 * NBYTES
        monkeypatch.setattr("litecache.storage.shard_store.MAX_FETCH_BYTES", 10 * NBYTES)
        answer = store.fetch(keys)
        assert [data is not None for _, data in answer] == [True] * 10 + [False] * 30
        assert store.metrics.value("litecache_drops", reason="fetch_too_large") == 30
        assert all(store.query(keys)), "what did not fit is still there"
        store.check_integrity()


def test_a_damaged_block_in_a_fetch_costs_itself_alone(tmp_path):
    with make(tmp_path, storage_bytes=16 * MIB, io_threads=0) as store:
        keys = fill(store, range(8), NBYTES)
        store.clear("ram")
        slot = store._tiers.index.disk[store._tiers.index.find(keys[2])] - 1
        with open(tmp_path / "slab", "r+b") as slab:
            slab.seek(slot * 4096 + 100)
            slab.write(b"\0" * 8)
        found = dict(store.fetch(keys))
        assert [found[key] == bytes_of(key, NBYTES) for key in keys] == [n != 2 for n in range(8)]
        assert found[keys[2]] is None
        assert store.metrics.value("litecache_misses", tier="disk", reason="corrupt") == 1
        assert store.query([keys[2]]) == [False]
        store.check_integrity()


def test_a_read_only_shard_serves_and_takes_nothing(tmp_path):
    with make(tmp_path) as store:
        keys = fill(store, range(3), NBYTES)
    with make(tmp_path, accepts_writes=False) as store:
        client = LocalShardClient(store)
        assert client.reserve(NBYTES, 1) == []
        assert all(get(client, keys, NBYTES))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"storage_bytes": 1 << 44}, StorageFullError, "storage_bytes"),
        ({"ram_bytes": 1 << 50}, StorageFullError, "ram_bytes"),
        ({"fsync": "sometimes"}, ConfigError, "always, interval, never"),
        ({"eviction": "fifo"}, ConfigError, "lfu, lru, s3fifo"),
        ({"admission": "some"}, ConfigError, "all, frequent, reused, none"),
        ({"storage_bytes": 5}, ConfigError, "1 MiB"),
        ({"ttl_s": 0}, ConfigError, "ttl_s"),
    ],
)
def test_a_refused_construction_leaves_nothing_behind(tmp_path, options, error, text):
    gc.collect()  # what earlier tests left may go at any time; what is new must not stay
    threads, files = set(threading.enumerate()), open_files()
    with pytest.raises(error, match=text):
        make(tmp_path / "new" / "shard", **options)
    assert not (tmp_path / "new").exists()
    assert set(threading.enumerate()) <= threads
    assert not open_files() - files


def open_files() -> collections.Counter[str]:
    """What this process has open, by name and number of descriptors."""
    opened: collections.Counter[str] = collections.Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            opened[os.readlink(f"/proc/self/fd/{fd}")] += 1
    return opened


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    with make(tmp_path) as store:
        keys = fill(store, range(3), NBYTES)
        with pytest.raises(StorageLockedError, match=str(os.getpid())):
            make(tmp_path)
        with pytest.raises(StorageLockedError):
            verify_store(str(tmp_path))
        assert all(store.query(keys))


def test_a_relative_path_and_a_file_as_folder_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in ("relative/path", str(tmp_path / "file")):
        with pytest.raises(ConfigError, match="storage_dir"):
            ShardStore(path, storage_bytes=16 * MIB, ram_bytes=1 * MIB)


@pytest.mark.parametrize("name", ["superblock", "slab", "log", "lock"])
def test_symlinks_and_fifos_in_a_store_are_refused(tmp_path, name):
    make(tmp_path / "s").close()
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    target = tmp_path / "s" / name
    target.unlink()
    target.symlink_to(victim)
    with pytest.raises(StorageFormatError, match="regular"):
        make(tmp_path / "s")
    target.unlink()
    os.mkfifo(target)
    with pytest.raises(StorageFormatError, match="regular"):
        make(tmp_path / "s")
    assert victim.read_bytes() == b"precious"


def test_another_format_version_is_refused(tmp_path):
    import struct

    import xxhash

    make(tmp_path).close()
    head = struct.pack("<8sIIQ", b"LCSLAB\r\n", 99, 0, 65536)
    raw = head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
    (tmp_path / "superblock").write_bytes(raw.ljust(4096, b"\0"))
    with pytest.raises(StorageFormatError, match="99"):
        make(tmp_path)


def test_a_smaller_bound_at_the_next_start_holds_at_once(tmp_path):
    with make(tmp_path, storage_bytes=16 * MIB) as store:
        keys = fill(store, range(150), NBYTES)
    with make(tmp_path, storage_bytes=4 * MIB) as store:
        assert taken_bytes(tmp_path) <= 4 * MIB
        store.check_integrity()
        client = LocalShardClient(store)
        assert 0 < sum(get(client, keys, NBYTES)) < 150
        client.close()


def test_files_are_private(tmp_path):
    make(tmp_path / "s").close()
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "s").iterdir()} == {0o600}


def test_inspect_and_verify_tell_the_truth(tmp_path):
    with make(tmp_path / "shard-0") as store:
        keys = fill(store, range(10), NBYTES)
    (report,) = inspect_store(str(tmp_path))
    assert (report.blocks, report.bytes) == (10, 10 * NBYTES)
    assert [(n.name, n.blocks) for n in report.namespaces] == [("test", 10)]
    calls = []
    (verdict,) = verify_store(str(tmp_path), lambda done, total: calls.append((done, total)))
    assert verdict.ok
    assert verdict.checked == 10
    assert calls[-1] == (10 * NBYTES, 10 * NBYTES)
    with open(tmp_path / "shard-0" / "slab", "r+b") as slab:
        slab.seek(3 * NBYTES + 5)
        slab.write(b"\xaa\x55")
    (verdict,) = verify_store(str(tmp_path))
    assert [reason for _, reason in verdict.bad] == ["corrupt"]
    assert bytes.fromhex(verdict.bad[0][0]) in keys
    with pytest.raises(ConfigError, match="storage folder"):
        inspect_store(str(tmp_path / "nowhere"))


def test_inspect_and_verify_tell_why_a_file_cannot_be_read(tmp_path, monkeypatch):
    with make(tmp_path) as store:
        fill(store, range(3), NBYTES)
    refuse = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Files, "read_all", Mock(side_effect=refuse))
    for look in (inspect_store, verify_store):
        with pytest.raises(StorageError, match=r"cannot be read: .*Permission denied"):
            look(str(tmp_path))


@pytest.mark.parametrize("fsync", ["always", "interval", "never"])
def test_durable_follows_the_fsync_policy(tmp_path, fsync):
    with make(tmp_path, fsync=fsync, fsync_interval_s=30) as store:
        client = LocalShardClient(store)
        put(client, keys_of(range(4)), NBYTES)
        deadline = time.monotonic() + 60
        while store.awaits_disk(keys_of(range(4))) != [False] * 4 and time.monotonic() < deadline:
            store.wait_for_change(0.1)
        if fsync == "always":
            while not all(store.durable(keys_of(range(4)))) and time.monotonic() < deadline:
                store.wait_for_change(0.1)
        expected = {"always": True, "interval": False}.get(fsync)
        if expected is not None:
            assert store.durable(keys_of(range(4))) == [expected] * 4
        assert store.flush().complete
        assert all(store.durable(keys_of(range(4))))
        client.close()


def test_a_closed_store_refuses_and_its_threads_are_gone(tmp_path):
    before = set(threading.enumerate())
    store = make(tmp_path)
    LocalShardClient(store)
    store.close()
    store.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(StorageError, match="closed"):
        store.attach(os.getpid())


def test_the_fallback_arena_works_and_leaves_no_file(tmp_path):
    with make(tmp_path, use_memfd=False) as store:
        client = LocalShardClient(store)
        path = client.arena.attachment.arena_path
        assert path is not None
        assert os.path.exists(path)
        put(client, [key_of(0)], NBYTES)
        assert all(get(client, [key_of(0)], NBYTES))
        client.close()
    assert not os.path.exists(path)


def test_after_a_power_cut_blocks_hit_but_are_durable_only_once_read(tmp_path, monkeypatch):
    from litecache.storage.disk.files import Files

    store = make(tmp_path)
    keys = fill(store, range(6), NBYTES)
    store.flush()
    assert all(store.durable(keys))
    store.abandon()
    with make(tmp_path) as killed:  # the machine ran on: nothing is in doubt
        assert all(killed.durable(keys))
        killed.abandon()
    monkeypatch.setattr(Files, "boot_id", lambda self: "another")
    with make(tmp_path) as store:
        assert all(store.query(keys))
        assert not any(store.durable(keys))
        client = LocalShardClient(store)
        assert all(get(client, keys[:2], NBYTES))
        store.flush()
        assert store.durable(keys) == [True] * 2 + [False] * 4
        client.close()
    with make(tmp_path) as store:
        assert store.durable(keys) == [True] * 2 + [False] * 4


def test_buffered_io_works_where_o_direct_is_refused(tmp_path):
    with make(tmp_path, direct=False) as store:
        assert store.stats()["direct_io"] is False
        keys = fill(store, range(10), NBYTES)
        store.clear("ram")
        client = LocalShardClient(store)
        assert all(get(client, keys, NBYTES))
        client.close()


def test_a_client_that_detaches_during_stage_gets_no_lease(tmp_path):
    with make(tmp_path) as store:
        put(LocalShardClient(store), [key_of(0)], NBYTES)
    with make(tmp_path) as store:
        client = LocalShardClient(store)
        ensure = store._grow_for
        store._grow_for = lambda pages, n: (client.close(), ensure(pages, n))
        with pytest.raises(StorageError, match="detached"):
            client.stage([key_of(0)])
        assert store.stats()["leases"] == 0
        store.check_integrity()
