"""`RayEngine`: the storage engine of `LocalCacheService` on shard actors.

`LocalCacheService(..., engine="ray")` finds it by its entry point, as it would find one of a third
party. Both processes map a shard's arena. A shard that dies is started again by Ray and attached
anew; until then its blocks are misses, and writes that it had not finished are Aborted.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from litecache.actors.cache_shard import ABSENT, PENDING, STORED, start_shards, stop_shards
from litecache.actors.calls import ActorEndedError, result
from litecache.actors.cluster import open_ray
from litecache.actors.shard_client import RayShardClient
from litecache.errors import LiteCacheError
from litecache.hashing import BlockKey
from litecache.metrics import Metrics
from litecache.storage.service import EngineOptions
from litecache.storage.service.engine import LOST, Shard, ShardEngine
from litecache.threads import start_service

logger = logging.getLogger(__name__)

# throughput matters here, not latency: a slow answer is better than a block given up
_CALL_TIMEOUT_S = 30.0
_POLL_S = (0.002, 0.05)
_REATTACH_S = 0.5

Tell = Callable[[Sequence[tuple[BlockKey, str | None]]], None]


class RayEngine(ShardEngine):
    """Shard actors on this node; joins the Ray that is up, or starts a local one."""

    def _open(self, options: EngineOptions) -> None:
        open_ray()
        name = f"cache-service-{os.path.basename(options.path)}"
        per_shard = [
            {
                "directory": f"{options.path}_{index}",
                "storage_bytes": options.storage_bytes // options.shards,
                "ram_bytes": options.ram_bytes // options.shards,
                "io_threads": options.io_threads,
                "shards": options.shards,
            }
            for index in range(options.shards)
        ]
        self._handles = start_shards(name, per_shard)
        self._watch = WriteWatch(self._handles, options.on_written)
        for index, handle in enumerate(self._handles):
            shard = _RayShard(handle, f"{name}:{index}", index, self._watch, self.metrics)
            self._shards.append(shard)

    def shard_pids(self) -> list[int]:
        """Process ids of the shard actors."""
        return [int(result(handle.info.remote())["pid"]) for handle in self._handles]

    def close(self) -> None:
        """Write out, sync, and end the actors."""
        if self._shards:
            self._watch.close()
        super().close()
        handles, self._handles = getattr(self, "_handles", []), []
        if ray.is_initialized():
            stop_shards(handles, _CALL_TIMEOUT_S)


class _RayShard(Shard):
    """One actor and this process's client of its present life."""

    def __init__(
        self, handle: Any, name: str, index: int, watch: WriteWatch, metrics: Metrics
    ) -> None:
        self._handle, self._name, self._index = handle, name, index
        self._watch, self._metrics = watch, metrics
        self._lock = threading.Lock()
        self._retry_at = 0.0
        self._client: RayShardClient | None = None

    def client(self) -> RayShardClient | None:
        with self._lock:
            # a lost client is dropped, not closed: other threads may still copy from its mapping
            if self._client is not None and not self._client.lost:
                return self._client
            if time.monotonic() < self._retry_at:
                return None
            try:
                self._client = RayShardClient(
                    self._handle, self._name, timeout_s=_CALL_TIMEOUT_S, metrics=self._metrics
                )
            except LiteCacheError as error:
                logger.info("%s is not there: %s", self._name, error)
                self._client = None
                self._retry_at = time.monotonic() + _REATTACH_S
            return self._client

    def awaits(self, key: BlockKey) -> bool:
        return self._watch.watches(key)

    def announce(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        return self._watch.announce(keys)

    def committed(self, keys: Sequence[BlockKey], lost: Sequence[BlockKey]) -> None:
        self._watch.committed(self._index, keys, lost)

    def wait_for_room(self, tries: int) -> None:
        # room comes when a write ends in the other process: nothing to wait on here
        time.sleep(min(_POLL_S[0] * 2 ** min(tries, 10), _POLL_S[1]))

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


class WriteWatch:
    """Asks shards what became of committed blocks, from a thread that sleeps when none are open.

    Args:
        handles: the actors.
        tell: hears which blocks reached the disk (None), or why they did not.
    """

    def __init__(self, handles: Sequence[Any], tell: Tell) -> None:
        self._handles, self._tell = handles, tell
        self._work = threading.Condition()
        # key -> its shard; None while it is about to be committed
        self._open: dict[BlockKey, int | None] = {}
        self._absent: set[BlockKey] = set()
        self._closing = False
        self._thread = start_service(self._run, "block-outcomes")

    def announce(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Blocks are about to be committed; those of them that no other task has announced."""
        with self._work:
            fresh = [key for key in dict.fromkeys(keys) if key not in self._open]
            self._open.update(dict.fromkeys(fresh))
            return fresh

    def committed(self, shard: int, keys: Sequence[BlockKey], lost: Sequence[BlockKey]) -> None:
        """Tell what becomes of `keys`; `lost` were announced and not taken after all."""
        with self._work:
            for key in lost:
                self._open.pop(key, None)
            self._open.update(dict.fromkeys(keys, shard))
            self._work.notify()

    def watches(self, key: BlockKey) -> bool:
        """Whether a block is on its way."""
        with self._work:
            return key in self._open

    def close(self) -> None:
        """End the thread; what is open stays untold."""
        with self._work:
            self._closing = True
            self._work.notify()
        self._thread.join()

    def _run(self) -> None:
        delay = _POLL_S[0]
        while True:
            with self._work:
                while not self._closing and not (by_shard := self._questions()):
                    self._work.wait()
                if self._closing:
                    return
            told = [each for shard, keys in by_shard.items() for each in self._ask(shard, keys)]
            with self._work:
                for key, _ in told:
                    self._open.pop(key, None)
            if told:
                self._tell(told)
            delay = _POLL_S[0] if told else min(2 * delay, _POLL_S[1])
            with self._work:
                if not self._closing:
                    self._work.wait(delay)

    def _questions(self) -> dict[int, list[BlockKey]]:
        by_shard: dict[int, list[BlockKey]] = {}
        for key, shard in self._open.items():
            if shard is not None:
                by_shard.setdefault(shard, []).append(key)
        return by_shard

    def _ask(self, shard: int, keys: list[BlockKey]) -> list[tuple[BlockKey, str | None]]:
        try:
            call = self._handles[shard].outcomes.remote(keys)
            found: list[str] = result(call, _CALL_TIMEOUT_S, "asking what became of blocks")
        except ActorEndedError:
            return [(key, LOST) for key in keys]
        except LiteCacheError as error:
            logger.info("shard %d does not say what became of blocks: %s", shard, error)
            return []
        told: list[tuple[BlockKey, str | None]] = []
        for key, outcome in zip(keys, found, strict=True):
            if outcome == ABSENT and key not in self._absent:
                # perhaps it is just about to be noted: ask once more
                self._absent.add(key)
                continue
            self._absent.discard(key)
            if outcome != PENDING:
                reason = LOST if outcome == ABSENT else outcome
                told.append((key, None if outcome == STORED else reason))
        return told
