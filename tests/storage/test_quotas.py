"""What a salt may take of RAM and of the disk, and that others keep theirs."""

from __future__ import annotations

import pytest
from storage_help import KIB, MIB, ROOT, bytes_of, key_of

from litecache.storage import CommitItem, LocalShardClient, ShardStore, SlotRef
from litecache.storage.namespaces import namespace_of, salt_digest

NBYTES = 64 * KIB
ALICE, BOB = (namespace_of("model", salt, ()) for salt in ("alice", "bob"))
QUOTA = {salt_digest("alice"): 8 * NBYTES}


def make(folder, **options) -> ShardStore:
    options = {"storage_bytes": 8 * MIB, "ram_bytes": 4 * MIB, "io_threads": 0, **options}
    return ShardStore(str(folder) if folder is not None else None, **options)


def save(store, numbers, namespace) -> list[bytes]:
    """Blocks as a chain."""
    client, parent, keys = LocalShardClient(store), ROOT, [key_of(number) for number in numbers]
    items = []
    for key, ref in zip(keys, client.reserve(NBYTES, len(keys)), strict=True):
        client.arena.buffer(ref.slot, NBYTES)[:] = bytes_of(key, NBYTES)
        items.append(CommitItem(*ref, key, parent, namespace))
        parent = key
    client.commit(items)
    client.close()
    return keys


def in_ram(store, keys) -> int:
    index = store._tiers.index
    return sum(bool(index.ram[entry]) for entry in map(index.find, keys) if entry >= 0)


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_salt_holds_no_more_ram_than_its_quota_and_others_lose_nothing(tmp_path, on_disk):
    with make(tmp_path if on_disk else None, ram_quotas=QUOTA) as store:
        mine = save(store, range(100, 120), BOB)
        others = save(store, range(20), ALICE)
        store.flush()
        assert in_ram(store, others) == 8
        assert in_ram(store, mine) == 20
        # the head of its chain is what stays, and the disk has no quota here
        assert store.query(others[:8]) == [True] * 8
        assert sum(store.query(others)) == (20 if on_disk else 8)
        save(store, range(20, 40), ALICE)
        store.flush()
        assert in_ram(store, mine) == 20
        store.check_integrity()


def test_what_is_loaded_from_disk_counts_once_its_leases_have_ended(tmp_path):
    for _ in range(2):  # the second time with names read back from disk
        with make(tmp_path, ram_quotas=QUOTA) as store:
            keys = save(store, range(20), ALICE)
            store.flush()
            store.clear("ram")
            client = LocalShardClient(store)
            slots = [SlotRef(r.slot, r.generation) for r in client.stage(keys)]
            assert all(store.wait(slots))
            assert in_ram(store, keys) == 20  # leased: nobody may take them away
            client.release(slots)
            client.stage([])
            assert in_ram(store, keys) <= 8
            store.check_integrity()
            client.close()


def test_pinned_blocks_count_towards_the_quota_of_a_salt(tmp_path):
    for _ in range(2):
        with make(tmp_path, quotas=QUOTA) as store:
            pinned = save(store, range(6), ALICE)
            store.flush()
            store.pin(pinned)
            more = save(store, range(50, 70), ALICE)
            store.flush()
            store.clear("ram")
            assert all(store.query(pinned))
            assert sum(store.query(more)) == 2
            store.check_integrity()
    with make(tmp_path, quotas=QUOTA) as store:
        store.unpin(pinned)
        store.delete(pinned[:3])
        store.check_integrity()
