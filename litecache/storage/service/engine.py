"""What `LocalCacheService` stores blocks in: an abstract engine, the local one, one in memory.

A third party registers a `StorageEngine` class under the entry point group
`litecache.storage_engines`; `LocalCacheService(..., engine="name")` finds it. So is the one over
shard actors, `ray`: it lives in `litecache.actors`, and nothing here imports Ray.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from itertools import compress
from typing import Any, ClassVar, NamedTuple

from ...errors import ConfigError, shown, told
from ...hashing import BlockKey
from ...metrics import Metrics
from ..client import LocalShardClient, ShardClient
from ..protocol import CommitItem, CommitStatus, SlotRef, StageStatus
from ..shard_store import ShardStore

ENTRY_POINT_GROUP = "litecache.storage_engines"
LOST = "shard_lost"
_NAMESPACE = "local-cache-service"
_RETRY_S = 0.5
_LOAD_TIMEOUT_S = 60.0


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

    def of_shard(self, number: int) -> dict[str, Any]:
        """Arguments of one shard's store."""
        return {
            "directory": f"{self.path}_{number}",
            "storage_bytes": self.storage_bytes // self.shards,
            "ram_bytes": self.ram_bytes // self.shards,
            "io_threads": self.io_threads,
            "shards": self.shards,
        }


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


class Shard(ABC):
    """One shard of a `ShardEngine`, local or remote."""

    @abstractmethod
    def client(self) -> ShardClient | None:
        """Attached to the shard as it lives now; None while it does not answer."""

    @abstractmethod
    def awaits(self, key: BlockKey) -> bool:
        """Whether a committed block is on its way to the disk: `on_written` will tell."""

    @abstractmethod
    def wait_for_room(self, tries: int) -> None:
        """Sleep until a slot may have become free, or a while: longer the more tries there were."""

    @abstractmethod
    def close(self) -> None:
        """Write out and end."""

    def announce(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """These are about to be committed; those of them that no other task has announced."""
        return []

    def committed(self, keys: Sequence[BlockKey], lost: Sequence[BlockKey]) -> None:
        """`keys` were taken; `lost` were announced first by this task, and were not."""
        return


class ShardEngine(StorageEngine):
    """Shards, chosen by key. A shard that does not answer costs misses, and writes to it are lost.

    Control goes a batch per shard and call; a block's bytes are copied once, between the caller's
    memory and the shard's arena.
    """

    keeps_folders = True

    def __init__(self, options: EngineOptions) -> None:
        self.metrics = Metrics()
        self._block_bytes = options.block_bytes
        self._shards: list[Shard] = []
        try:
            self._open(options)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _open(self, options: EngineOptions) -> None:
        """Fill `self._shards`."""

    def _by_shard(self, keys: Sequence[BlockKey]) -> list[tuple[Shard, ShardClient, list[int]]]:
        """Shards that answer, each with the positions of its keys."""
        groups: dict[int, list[int]] = {}
        for i, key in enumerate(keys):
            groups.setdefault(int.from_bytes(key, "little") % len(self._shards), []).append(i)
        found = []
        for number, positions in groups.items():
            shard = self._shards[number]
            if (client := shard.client()) is not None:
                found.append((shard, client, positions))
        return found

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `StorageEngine.contains`."""
        found = [False] * len(keys)
        for _, client, positions in self._by_shard(keys):
            there = client.query([keys[i] for i in positions])
            client.touch([keys[i] for i, hit in zip(positions, there, strict=True) if hit])
            for i, hit in zip(positions, there, strict=True):
                found[i] = hit
        return found

    def put(self, items: Sequence[Put], stop: Callable[[], bool], wait_s: float) -> list[str]:
        """See `StorageEngine.put`; `shard_lost` when its shard is gone."""
        deadline = time.monotonic() + wait_s
        outcome = [LOST] * len(items)
        for shard, client, positions in self._by_shard([item.key for item in items]):
            left, tries = [], 0
            there = client.query([items[i].key for i in positions])
            for i, present in zip(positions, there, strict=True):
                if present:
                    outcome[i] = _present(shard, items[i].key)
                else:
                    left.append(i)
            while left:
                refs = client.reserve(self._block_bytes, len(left))
                now, left = left[: len(refs)], left[len(refs) :]
                filled = self._fill(shard, client, [items[i] for i in now], refs)
                for i, each in zip(now, filled, strict=True):
                    outcome[i] = each
                if left and (client.lost or stop() or time.monotonic() > deadline):
                    reason = LOST if client.lost else "stopped" if stop() else "dropped"
                    for i in left:
                        outcome[i] = reason
                    break
                tries = 0 if refs else tries + 1
                if left and not refs:
                    shard.wait_for_room(tries)
        return outcome

    def _fill(
        self, shard: Shard, client: ShardClient, items: Sequence[Put], refs: Sequence[SlotRef]
    ) -> list[str]:
        """Fill a slot for each item and commit."""
        commits: dict[int, CommitItem] = {}
        for i, (item, ref) in enumerate(zip(items, refs, strict=True)):
            if item.fill(client.arena.buffer(ref.slot, self._block_bytes)):
                commits[i] = CommitItem(*ref, item.key, item.parent, _NAMESPACE)
        client.release([ref for i, ref in enumerate(refs) if i not in commits])
        outcome = ["stopped"] * len(refs)
        if not commits:
            return outcome
        fresh = shard.announce([commit.key for commit in commits.values()])
        statuses = client.commit(list(commits.values()))
        told = list(zip(commits, commits.values(), statuses, strict=True))
        stored = {commit.key for _, commit, status in told if status is CommitStatus.STORED}
        shard.committed(list(stored), [key for key in fresh if key not in stored])
        for i, commit, status in told:
            if status is CommitStatus.EXISTS:
                outcome[i] = _present(shard, commit.key)
            else:
                outcome[i] = "pending" if status is CommitStatus.STORED else LOST
        return outcome

    def get(self, items: Sequence[Get], stop: Callable[[], bool], wait_s: float) -> list[str]:
        """See `StorageEngine.get`."""
        deadline = time.monotonic() + wait_s
        outcome = ["miss"] * len(items)
        for shard, client, left in self._by_shard([item.key for item in items]):
            tries = 0
            while left:
                taken = self._take(client, [items[i] for i in left])
                for i, each in zip(left, taken, strict=True):
                    outcome[i] = each
                left = [i for i in left if outcome[i] == "busy"]
                if left and (stop() or time.monotonic() > deadline):
                    for i in left:
                        outcome[i] = "stopped" if stop() else "busy"
                    break
                tries += 1
                if left:
                    shard.wait_for_room(tries)
        return outcome

    def _take(self, client: ShardClient, items: Sequence[Get]) -> list[str]:
        """One attempt: per item `hit`, `miss`, or `busy` while there is no slot for it."""
        results = client.stage([item.key for item in items])
        outcome = ["busy" if each.status is StageStatus.BUSY else "miss" for each in results]
        leased = [SlotRef(each.slot, each.generation) for each in results]
        try:
            for i, (item, ref) in enumerate(zip(items, leased, strict=True)):
                if ref.slot >= 0 and client.wait([ref], _LOAD_TIMEOUT_S)[0]:
                    took = item.take(client.arena.buffer(ref.slot, self._block_bytes))
                    outcome[i] = "hit" if took and client.arena.holds(*ref) else "miss"
        finally:
            client.release([ref for ref in leased if ref.slot >= 0])
        return outcome

    def flush(self, timeout_s: float) -> bool:
        """See `StorageEngine.flush`."""
        clients = [shard.client() for shard in self._shards]
        done = [client is not None and client.flush(timeout_s).complete for client in clients]
        return all(done)

    def close(self) -> None:
        """Write out, sync and end all shards."""
        for shard in self._shards:
            shard.close()
        self._shards = []


def _present(shard: Shard, key: BlockKey) -> str:
    # another task may be writing it: its fate is then this one's
    return "pending" if shard.awaits(key) else "exists"


class _LocalShard(Shard):
    """A store of this process."""

    def __init__(self, store: ShardStore, name: str) -> None:
        self.store = store
        self._client = LocalShardClient(store, name)

    def client(self) -> ShardClient:
        return self._client

    def awaits(self, key: BlockKey) -> bool:
        return self.store.awaits_disk([key])[0]

    def wait_for_room(self, tries: int) -> None:
        self.store.wait_for_change(_RETRY_S)

    def close(self) -> None:
        self._client.close()
        self.store.close()


class LocalEngine(ShardEngine):
    """Shard stores in this process."""

    def _open(self, options: EngineOptions) -> None:
        self.stores: list[ShardStore] = []
        for shard in range(options.shards):
            store = ShardStore(
                **options.of_shard(shard), metrics=self.metrics, on_written=options.on_written
            )
            self.stores.append(store)
            self._shards.append(_LocalShard(store, str(shard)))


class MemoryEngine(StorageEngine):
    """A dict, for tests and as the shortest example of an engine; it forgets the oldest."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._blocks: OrderedDict[BlockKey, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `StorageEngine.contains`."""
        with self._lock:
            found = [key in self._blocks for key in keys]
            for key in compress(keys, found):
                self._blocks.move_to_end(key)
            return found

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
                    self._blocks.popitem(last=False)
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
        raise ConfigError("engine", name, f"{valid}; loading it failed: {told(error)}") from error
    if not (isinstance(found, type) and issubclass(found, StorageEngine)):
        raise ConfigError("engine", name, f"a StorageEngine, but {shown(found)} is registered")
    return found
