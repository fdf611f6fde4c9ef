"""How fast a shard writes to its disk, and what goes before."""

from __future__ import annotations

import threading
import time

import pytest
from storage_help import KIB, MIB, ROOT, fill, key_of, put

from litecache.errors import ConfigError
from litecache.storage import LocalShardClient, ShardStore, SlotRef
from litecache.storage.disk.files import Files

NBYTES = 64 * KIB
RATE = 8 * NBYTES


def make(folder, **options) -> ShardStore:
    options = {"storage_bytes": 64 * MIB, "ram_bytes": 4 * MIB, "io_threads": 0, **options}
    return ShardStore(str(folder), **options)


def written(store: ShardStore) -> int:
    return int(store.metrics.value("litecache_storage_bytes", direction="write", tier="disk"))


def test_writes_keep_to_their_budget_and_use_all_of_it(tmp_path, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with make(tmp_path, write_bytes_per_s=RATE) as store:
        client = LocalShardClient(store)
        begun, number = now, 0
        for _ in range(80):
            keys = [key_of(number + i) for i in range(2)]
            number += len(put(client, keys, NBYTES))
            # a second's worth saved up, and one request that overdraws
            assert written(store) <= RATE * (now - begun) + 2 * RATE
            now += 0.25
        assert number == 160
        assert written(store) >= RATE * (now - begun - 0.25) - NBYTES
        client.close()


def test_what_the_budget_keeps_in_ram_leads_to_counted_drops_and_no_loss(tmp_path, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with make(tmp_path, write_bytes_per_s=RATE) as store:
        client = LocalShardClient(store)
        keys = [key_of(number) for number in range(100)]
        stored = sum(len(put(client, [key], NBYTES)) for key in keys)
        assert 60 <= stored < 100
        assert store.stats()["drops"] == {"no_slot": 100 - stored}
        assert written(store) <= 2 * RATE
        assert all(store.query(keys[:stored]))
        # a flush does not wait for the budget, and owes it nothing
        report = store.flush()
        assert report.complete
        assert written(store) == stored * NBYTES
        now += 2
        assert len(put(client, [key_of(1000)], NBYTES)) == 1
        assert written(store) == (stored + 1) * NBYTES
        put(client, [key_of(2000 + number) for number in range(40)], NBYTES)
        client.close()
    with make(tmp_path) as store:
        assert all(store.query([key_of(2000 + number) for number in range(40)]))


def test_a_thread_goes_on_when_the_budget_allows_it(tmp_path):
    with make(tmp_path, io_threads=2, fsync="never", write_bytes_per_s=4 * MIB) as store:
        client = LocalShardClient(store)
        keys = [key_of(number) for number in range(60)]
        for start in range(0, 120, 20):
            batch = [key_of(start + number) for number in range(20)]
            while not put(client, batch, NBYTES):
                store.wait_for_change(1)
        deadline = time.monotonic() + 60
        while store.awaits_disk(keys) != [False] * 60 and time.monotonic() < deadline:
            store.wait_for_change(1)
        assert all(store.durable(keys[:20]))
        client.close()


class _SlowReads(Files):
    def __init__(self) -> None:
        super().__init__()
        self.may_read = threading.Event()
        self.may_read.set()

    def read(self, fd, buffers, offset):
        assert self.may_read.wait(20)
        return super().read(fd, buffers, offset)


@pytest.mark.parametrize("dirty", [2, 44])
def test_no_write_begins_while_reads_wait_unless_half_of_ram_is_dirty(tmp_path, dirty):
    files = _SlowReads()
    options = {"ram_bytes": 80 * MIB, "storage_bytes": 128 * MIB, "io_threads": 4, "files": files}
    with make(tmp_path, fsync="never", **options) as store:
        keys = fill(store, range(24), MIB)
        store.clear("ram")
        client = LocalShardClient(store)
        before = written(store)
        files.may_read.clear()
        try:
            held = [SlotRef(r.slot, r.generation) for r in client.stage(keys)]
            refs = client.reserve(MIB, dirty + 4)
            assert len(refs) >= dirty
            client.release(refs)
            new = [key_of(1000 + number) for number in range(dirty)]
            put(client, new, MIB, ROOT)
            if dirty == 2:
                for _ in range(4):
                    store.wait_for_change(0.05)
                assert written(store) == before
            else:
                deadline = time.monotonic() + 60
                while written(store) == before and time.monotonic() < deadline:
                    store.wait_for_change(1)
                assert written(store) > before
        finally:
            files.may_read.set()
        assert all(client.wait(held))
        assert store.flush().complete
        assert written(store) == before + dirty * MIB
        client.close()


@pytest.mark.parametrize("rate", [0, -5])
def test_a_budget_of_nothing_is_refused(tmp_path, rate):
    with pytest.raises(ConfigError, match="write_bytes_per_s"):
        make(tmp_path, write_bytes_per_s=rate)
