"""All blocks of a cache salt can be deleted, and no others, over kill -9 too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from storage_help import MIB, ROOT, bytes_of, get, key_of

from litecache.storage import CommitItem, LocalShardClient, ShardStore
from litecache.storage.disk import log
from litecache.storage.namespaces import namespace_of, salt_digest

NBYTES = 8192
ALICE = salt_digest("alice")


def open_store(folder: Path | str | None) -> ShardStore:
    return ShardStore(
        None if folder is None else f"{folder}/shard-0",
        storage_bytes=16 * MIB if folder else 0,
        ram_bytes=8 * MIB,
    )


def put(store: ShardStore, first: int, namespace: str, count: int = 10) -> list[bytes]:
    """A chain of blocks; its keys."""
    keys = [key_of(number) for number in range(first, first + count)]
    parents = [ROOT, *keys]
    items = [(k, p, namespace, bytes_of(k, NBYTES)) for k, p in zip(keys, parents, strict=False)]
    assert all(store.take_in(items))
    return keys


def held(store: ShardStore, keys: Sequence[bytes]) -> int:
    client = LocalShardClient(store)
    hits = get(client, keys, NBYTES)
    client.close()
    return sum(hits)


@pytest.mark.parametrize("tier", ["ram", "disk", "both"])
def test_deleting_a_salt_takes_all_of_its_blocks_and_no_others(tmp_path: Path, tier: str) -> None:
    with open_store(None if tier == "ram" else tmp_path) as store:
        of_alice = put(store, 0, namespace_of("model", "alice", {}))
        of_alice += put(store, 100, namespace_of("another", "alice", {}))
        of_bob = put(store, 200, namespace_of("model", "bob", {}))
        of_none = put(store, 300, namespace_of("model", "", {}))
        del of_alice[5]
        store.delete([key_of(5)])  # the rest of that chain is not linked to its start any more
        store.flush()
        if tier == "disk":
            store.clear("ram")
        assert store.delete_salt(salt_digest("nobody")) == 0
        assert store.delete_salt(ALICE) == len(of_alice)
        assert store.delete_salt(ALICE) == 0
        assert held(store, of_alice) == 0
        assert held(store, of_bob) == held(store, of_none) == 10
        removed = store.drain_deltas().removed
        assert not set(removed) - set(of_alice) - {key_of(5)}
        assert store.delete_salt(salt_digest("")) == 10
        assert held(store, of_bob) == 10
        store.check_integrity()


def test_blocks_that_an_earlier_version_stored_without_their_salt_are_found_by_their_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, other = key_of(10**6), key_of(10**6 + 1)
    passes, change = [], ShardStore._change
    with open_store(tmp_path) as store:
        for start, of in ((0, root), (50, other)):
            keys = [key_of(start + i) for i in range(8)]
            chain = list(zip(keys, [of, *keys], strict=False))
            items = [(k, p, "model", bytes_of(k, NBYTES)) for k, p in reversed(chain)]
            assert all(store.take_in(items))

        def counted(*args: Any) -> list[bool]:
            passes.append(1)
            return change(*args)

        monkeypatch.setattr(ShardStore, "_change", counted)
        assert store.delete_salt(ALICE, [root]) == 8
        assert len(passes) <= 3, "as many passes over all as the chain is long"
        assert held(store, [key_of(50 + i) for i in range(8)]) == 8


def test_a_full_table_of_names_hides_nothing_from_a_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "MAX_NAMES", 3)
    with open_store(tmp_path) as store:
        of_others = put(store, 0, namespace_of("model", "bob", {}))
        put(store, 100, namespace_of("model", "carol", {}))
        of_alice = put(store, 200, namespace_of("model", "alice", {}))
        store.delete_salt(ALICE)
        assert held(store, of_alice) == 0
        assert held(store, of_others) == 10


def test_blocks_that_still_move_in_from_an_earlier_shard_are_deleted_too(tmp_path: Path) -> None:
    sizes = {"storage_bytes": 16 * MIB, "ram_bytes": 8 * MIB}
    with ShardStore(f"{tmp_path}/shard-1", **sizes) as store:
        of_alice = put(store, 0, namespace_of("model", "alice", {}))
        of_bob = put(store, 100, namespace_of("model", "bob", {}))
    with ShardStore(f"{tmp_path}/shard-0", shards=1, **sizes) as store:
        assert store.delete_salt(ALICE) == 10
        assert not os.path.exists(f"{tmp_path}/shard-1")
        assert held(store, of_alice) == 0
        assert held(store, of_bob) == 10


def test_a_salt_with_leased_slots_is_deleted_under_its_readers(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        keys = put(store, 0, namespace_of("model", "alice", {}))
        client = LocalShardClient(store)
        leased = client.stage(keys)
        assert store.delete_salt(ALICE) == 10
        assert held(store, keys) == 0
        client.release([(r.slot, r.generation) for r in leased])
        store.check_integrity()
        client.close()


KILLED = """
import os, signal, sys
from test_delete_salt import ALICE, open_store, put
from litecache.storage.namespaces import namespace_of
store = open_store(sys.argv[1])
put(store, 0, namespace_of("model", "alice", {}))
put(store, 100, namespace_of("model", "bob", {}))
assert store.flush().complete
store.delete_salt(ALICE)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_deleted_salt_stays_deleted_after_kill_9(tmp_path: Path) -> None:
    here = os.path.dirname(__file__)
    path = f"{here}:{os.environ.get('PYTHONPATH', '')}"
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}
    )
    assert child.returncode == -signal.SIGKILL
    with open_store(tmp_path) as store:
        assert held(store, [key_of(n) for n in range(10)]) == 0
        assert held(store, [key_of(n) for n in range(100, 110)]) == 10


def test_blocks_taken_in_are_hits_at_once_and_those_without_room_are_told(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        keys = put(store, 0, "model")
        assert store.take_in([(keys[0], ROOT, "model", bytes_of(keys[0], NBYTES))]) == [True]
        client = LocalShardClient(store)
        assert store.flush().complete  # so that what is there can make room
        slots = []
        while more := client.reserve(1 * MIB, 100):
            slots += more
        item = (key_of(77), ROOT, "model", bytes_of(key_of(77), 1 * MIB))
        assert store.take_in([item], timeout_s=0.2) == [False]
        assert client.commit([CommitItem(*slots[0], key_of(78), ROOT, "m")])
        client.release(slots[1:])
        assert store.take_in([item]) == [True]
        client.close()
        store.check_integrity()
