"""What `LocalCacheService` stores blocks in: an abstract engine, the local one, one in memory.

A third party registers a `StorageEngine` class under the entry point group
`litecache.storage_engines`; `LocalCacheService(..., engine="name")` finds it. So is the one over
shard actors, `ray`: it lives in `litecache.actors`, and nothing here imports Ray.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import ClassVar, NamedTuple

from ...errors import ConfigError, shown
from ...hashing import BlockKey
from ...metrics import Metrics
from ..client import LocalShardClient
from ..protocol import CommitItem, CommitStatus, SlotRef, StageStatus
from ..shard_store import ShardStore

ENTRY_POINT_GROUP = "litecache.storage_engines"
_NAMESPACE = "local-cache-service"
_RETRY_S = 0.5


class Put(NamedTuple):
    """One block to store: `fill` writes its bytes; False means that the caller gave up."""

    key: BlockKey
    parent: BlockKey
    fill: Callable[[memoryview], bool]


class Get(NamedTuple):
    """One block to fetch: `take` reads its bytes; False means that they are not what was wanted."""

    key: BlockKey
    take: Callable[[memoryview], bool]


class EngineOptions(NamedTuple):
    """What an engine is opened with.

    Attributes:
        path: prefix of its files.
        block_bytes: size of every block, a multiple of 4096.
        storage_bytes: bound over all shards.
        shards: how many.
        ram_bytes: bound on memory over all shards.
        io_threads: threads of each shard.
        on_written: told which keys reached the storage (None), or why they were dropped.
    """

    path: str
    block_bytes: int
    storage_bytes: int
    shards: int
    ram_bytes: int
    io_threads: int
    on_written: Callable[[Sequence[tuple[BlockKey, str | None]]], None]


class StorageEngine(ABC):
    """Stores blocks of one size by key. Thread-safe.

    Args:
        options: see `EngineOptions`.

    Attributes:
        keeps_folders: its blocks lie in the folders `<path>_<shard>`; a store of another page size
            is then kept aside before the engine opens.
    """

    keeps_folders: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, options: EngineOptions) -> None: ...

    @abstractmethod
    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which keys are there; asking counts as a use."""

    @abstractmethod
    def put(self, items: Sequence[Put], stop: Callable[[], bool], wait_s: float) -> list[str]:
        """Take blocks over.

        Args:
            items: a chain, head first.
            stop: asked while waiting for room.
            wait_s: how long to wait for room.

        Returns:
            Per item `pending` (`on_written` will tell), `exists`, `dropped` (no room), `stopped`,
            or another reason for which the block is not stored.
        """

    @abstractmethod
    def get(self, items: Sequence[Get], stop: Callable[[], bool], wait_s: float) -> list[str]:
        """Hand blocks out.

        Returns:
            Per item `hit`, `miss`, `busy` or `stopped`.
        """

    @abstractmethod
    def flush(self, timeout_s: float) -> bool:
        """Make everything durable; whether that succeeded."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""


class LocalEngine(StorageEngine):
    """Shard stores in this process, chosen by key."""

    keeps_folders = True

    def __init__(self, options: EngineOptions) -> None:
        self.metrics = Metrics()
        self._block_bytes = options.block_bytes
        self._on_written = options.on_written
        self.stores: list[ShardStore] = []
        self._clients: list[LocalShardClient] = []
        try:
            for shard in range(options.shards):
                store = ShardStore(
                    f"{options.path}_{shard}",
                    storage_bytes=options.storage_bytes // options.shards,
                    ram_bytes=options.ram_bytes // options.shards,
                    io_threads=options.io_threads,
                    metrics=self.metrics,
                    on_written=options.on_written,
                )
                self.stores.append(store)
                self._clients.append(LocalShardClient(store, str(shard)))
        except BaseException:
            self.close()
            raise

    def _shard(self, key: BlockKey) -> int:
        return int.from_bytes(key, "little") % len(self.stores)

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `StorageEngine.contains`."""
        return [self.stores[self._shard(key)].query([key], touch=True)[0] for key in keys]

    def put(self, items: Sequence[Put], stop: Callable[[], bool], wait_s: float) -> list[str]:
        """See `StorageEngine.put`."""
        deadline = time.monotonic() + wait_s
        return [self._put(item, stop, deadline) for item in items]

    def _put(self, item: Put, stop: Callable[[], bool], deadline: float) -> str:
        shard = self._shard(item.key)
        store, client = self.stores[shard], self._clients[shard]
        if store.query([item.key])[0]:
            return self._present(store, item.key)
        while not (refs := client.reserve(self._block_bytes, 1)):
            if stop():
                return "stopped"
            if time.monotonic() > deadline:
                return "dropped"
            store.wait_for_change(_RETRY_S)
        ref = refs[0]
        if not item.fill(client.arena.buffer(ref.slot, self._block_bytes)):
            client.release([ref])
            return "stopped"
        (status,) = client.commit([CommitItem(*ref, item.key, item.parent, _NAMESPACE)])
        if status is CommitStatus.STORED:
            return "pending"
        return self._present(store, item.key)

    @staticmethod
    def _present(store: ShardStore, key: BlockKey) -> str:
        # another task may be writing it: its fate is then this one's
        return "pending" if store.awaits_disk([key])[0] else "exists"

    def get(self, items: Sequence[Get], stop: Callable[[], bool], wait_s: float) -> list[str]:
        """See `StorageEngine.get`."""
        deadline = time.monotonic() + wait_s
        outcome = ["miss"] * len(items)
        by_shard: dict[int, list[int]] = {}
        for i, item in enumerate(items):
            by_shard.setdefault(self._shard(item.key), []).append(i)
        for shard, wanted in by_shard.items():
            left = wanted
            while left:
                left = self._get(shard, items, left, outcome)
                if left and (stop() or time.monotonic() > deadline):
                    for i in left:
                        outcome[i] = "stopped" if stop() else "busy"
                    break
                if left:
                    self.stores[shard].wait_for_change(_RETRY_S)
        return outcome

    def _get(
        self, shard: int, items: Sequence[Get], wanted: list[int], outcome: list[str]
    ) -> list[int]:
        """One attempt; the positions that found no free slot."""
        client = self._clients[shard]
        results = client.stage([items[i].key for i in wanted])
        busy: list[int] = []
        for i, result in zip(wanted, results, strict=True):
            if result.status is StageStatus.BUSY:
                busy.append(i)
            if result.slot < 0:
                continue
            ref = SlotRef(result.slot, result.generation)
            try:
                if client.wait([ref], 60.0)[0]:
                    took = items[i].take(client.arena.buffer(ref.slot, self._block_bytes))
                    outcome[i] = "hit" if took else "miss"
            finally:
                client.release([ref])
        return busy

    def flush(self, timeout_s: float) -> bool:
        """See `StorageEngine.flush`."""
        reports = [store.flush(timeout_s) for store in self.stores]
        return all(report.complete for report in reports)

    def close(self) -> None:
        """Write out, sync and close all shards."""
        for client in self._clients:
            client.close()
        for store in self.stores:
            store.close()
        self._clients, self.stores = [], []


class MemoryEngine(StorageEngine):
    """A dict, for tests and as the shortest example of an engine; it forgets the oldest."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._blocks: dict[BlockKey, bytes] = {}
        self._lock = threading.Lock()

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `StorageEngine.contains`."""
        with self._lock:
            for key in keys:
                if key in self._blocks:
                    self._blocks[key] = self._blocks.pop(key)
            return [key in self._blocks for key in keys]

    def put(self, items: Sequence[Put], stop: Callable[[], bool], wait_s: float) -> list[str]:
        """See `StorageEngine.put`."""
        outcome = []
        for item in items:
            data = bytearray(self._options.block_bytes)
            if not item.fill(memoryview(data)):
                outcome.append("stopped")
                continue
            with self._lock:
                outcome.append("exists" if item.key in self._blocks else "pending")
                self._blocks.setdefault(item.key, bytes(data))
                while len(self._blocks) * len(data) > self._options.storage_bytes:
                    del self._blocks[next(iter(self._blocks))]
            if outcome[-1] == "pending":
                self._options.on_written([(item.key, None)])
        return outcome

    def get(self, items: Sequence[Get], stop: Callable[[], bool], wait_s: float) -> list[str]:
        """See `StorageEngine.get`."""
        outcome = []
        for item in items:
            with self._lock:
                data = self._blocks.get(item.key)
            hit = data is not None and item.take(memoryview(data))
            outcome.append("hit" if hit else "miss")
        return outcome

    def flush(self, timeout_s: float) -> bool:
        """Memory is as durable as it gets."""
        return True

    def close(self) -> None:
        """Forget everything."""
        self._blocks.clear()


_BUILT_IN: dict[str, type[StorageEngine]] = {"local": LocalEngine, "memory": MemoryEngine}


def get_engine(name: str | type[StorageEngine]) -> type[StorageEngine]:
    """An engine class, itself or by name: built in, or registered under the entry point group.

    Raises:
        ConfigError: there is none, or what is registered is no `StorageEngine`.
    """
    if issubclass(type(name), type) and issubclass(name, StorageEngine):  # type: ignore[arg-type]
        return name  # type: ignore[return-value]
    if type(name) is str and name in _BUILT_IN:
        return _BUILT_IN[name]
    registered = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    valid = f"a StorageEngine class, or one of {', '.join(sorted({*_BUILT_IN, *registered}))}"
    if type(name) is not str or name not in registered:
        raise ConfigError("engine", name, valid)
    try:
        found = registered[name].load()
    except Exception as error:  # a third party's module
        raise ConfigError("engine", name, f"{valid}; loading it failed: {error}") from error
    if not (isinstance(found, type) and issubclass(found, StorageEngine)):
        raise ConfigError("engine", name, f"a StorageEngine, but {shown(found)} is registered")
    return found
