from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from litecache.actors.shard_client import AttachedShards
from litecache.errors import GroupUnavailableError
from litecache.storage.client import LocalShardClient, ShardClient
from litecache.storage.shard_store import ShardStore


class Shards:
    """Stores by name that can be gone for a while."""

    def __init__(self, store: ShardStore) -> None:
        self.store = store
        self.gone: set[str] = set()
        self.on_lost: dict[str, Callable[[], None]] = {}

    def connect(self, name: str, on_lost: Callable[[], None]) -> ShardClient:
        if name in self.gone:
            raise GroupUnavailableError(f"there is no actor {name}")
        self.on_lost[name] = on_lost
        return LocalShardClient(self.store, name)


@pytest.fixture
def shards() -> Iterator[Shards]:
    with ShardStore(None, ram_bytes=1 << 20) as store:
        yield Shards(store)


def names(clients: list[ShardClient]) -> list[str]:
    return [client.shard_id for client in clients]


def test_a_shard_that_was_lost_is_attached_again(shards: Shards) -> None:
    watch = AttachedShards(["a", "b"], shards.connect)
    changes: queue.Queue[list[ShardClient]] = queue.Queue()
    first = watch.clients()
    watch.watch(changes.put)
    try:
        assert names(first) == ["a", "b"]
        shards.on_lost["a"]()
        after = changes.get(timeout=60)
        assert names(after) == ["a", "b"]
        assert after[0] is not first[0]
        assert after[1] is first[1]
    finally:
        watch.close()


def test_a_shard_that_is_missing_at_the_start_joins_when_it_comes(shards: Shards) -> None:
    shards.gone.add("b")
    watch = AttachedShards(["a", "b"], shards.connect)
    changes: queue.Queue[list[ShardClient]] = queue.Queue()
    assert names(watch.clients()) == ["a"]
    watch.watch(changes.put)
    try:
        shards.gone.clear()
        assert names(changes.get(timeout=60)) == ["a", "b"]
    finally:
        watch.close()


def test_a_shard_that_hangs_keeps_neither_the_start_nor_the_others_waiting(shards: Shards) -> None:
    answers = threading.Event()

    def connect(name: str, on_lost: Callable[[], None]) -> ShardClient:
        if name == "a":
            answers.wait()
        return shards.connect(name, on_lost)

    watch = AttachedShards(["a", "b", "c"], connect, patience_s=0.05)
    changes: queue.Queue[list[ShardClient]] = queue.Queue()
    try:
        while names(watch.clients()) != ["b", "c"]:
            time.sleep(0.01)
        watch.watch(changes.put)
        shards.on_lost["b"]()
        assert names(changes.get(timeout=60)) == ["b", "c"]
        answers.set()
        assert names(changes.get(timeout=60)) == ["a", "b", "c"]
    finally:
        answers.set()
        watch.close()
