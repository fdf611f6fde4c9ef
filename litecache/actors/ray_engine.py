"""`RayEngine`: the storage engine of `LocalCacheService` on shard actors.

`LocalCacheService(..., engine="ray")` finds it by its entry point, as it would find one of a third
party. Its shards belong to no group: one actor per folder, on the caller's node, which is where the
tensor is; they end with the process that made them. Both processes map a shard's arena. A shard
that dies is started again by Ray and attached anew; until then its blocks are misses, and writes
that it had not finished are Aborted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from litecache.actors import storage_shard
from litecache.actors.calls import ActorEndedError, result
from litecache.actors.cluster import open_ray
from litecache.actors.shard_client import AttachedShards, RayShardClient
from litecache.actors.storage_shard import StorageShard
from litecache.errors import LiteCacheError
from litecache.hashing import BlockKey
from litecache.storage.service import EngineOptions
from litecache.storage.service.engine import LOST, Shard, ShardEngine
from litecache.threads import start_service

logger = logging.getLogger(__name__)

PENDING, STORED, ABSENT = "pending", "stored", "absent"
_REMEMBERED = 1 << 20
_START_TIMEOUT_S = 60.0
# throughput matters here, not latency: a slow answer is better than a block given up
_CALL_TIMEOUT_S = 30.0
_POLL_S = (0.002, 0.05)

Tell = Callable[[Sequence[tuple[BlockKey, str | None]]], None]


class Outcomes:
    """What the store told about blocks and nobody has asked for yet. Thread-safe, bounded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[BlockKey, str] = {}

    def note(self, outcomes: Sequence[tuple[BlockKey, str | None]]) -> None:
        """As `ShardStore`'s `on_written`."""
        with self._lock:
            for key, reason in outcomes:
                self._told[key] = reason or STORED
                if len(self._told) > _REMEMBERED:
                    del self._told[next(iter(self._told))]

    def take(self, key: BlockKey) -> str | None:
        """The outcome, once: a block that is written again later has a new one."""
        with self._lock:
            return self._told.pop(key, None)


class CacheShard(StorageShard):
    """A `StorageShard` of no group, which remembers what became of each block.

    The service tells a task's end by it.
    """

    has_coordinator = False

    def __init__(
        self, group: str, index: int, options: dict[str, Any], lock_patience_s: float
    ) -> None:
        self._outcomes = Outcomes()
        options = {**options, "on_written": self._outcomes.note}
        super().__init__(group, index, options, lock_patience_s)

    def outcomes(self, keys: Sequence[BlockKey]) -> list[str]:
        """What became of committed blocks.

        Returns:
            Per key `pending`, `stored`, the reason for which it was dropped, or `absent`: it is not
            there and nothing was told about it (lost with an earlier life of the shard).
        """
        store = self._open_store
        # in this order: what ends between the questions is found by a later one
        waiting = store.awaits_disk(keys)
        told = [self._outcomes.take(key) for key in keys]
        there = store.query(keys)
        return [
            outcome or (PENDING if waits else STORED if present else ABSENT)
            for waits, outcome, present in zip(waiting, told, there, strict=True)
        ]


class RayEngine(ShardEngine):
    """Shard actors on this node; joins the Ray that is up, or starts a local one."""

    def _open(self, options: EngineOptions) -> None:
        open_ray()
        name = f"cache-service-{os.path.basename(options.path)}"
        here = ray.get_runtime_context().get_node_id()
        actor = ray.remote(concurrency_groups={"bulk": 4})(CacheShard).options(
            num_cpus=0,
            max_concurrency=8,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        self._handles: dict[str, Any] = {}
        for index in range(options.shards):
            store, patience_s = options.of_shard(index), storage_shard.LOCK_PATIENCE_S
            self._handles[f"{name}:{index}"] = actor.remote(name, index, store, patience_s)
        opening = [handle.info.remote() for handle in self._handles.values()]
        result(opening, _START_TIMEOUT_S, "starting shards")
        self._attached = AttachedShards(list(self._handles), self._connect)
        self._attached.watch()
        for each, handle in self._handles.items():
            self._shards.append(_RayShard(each, handle, self._attached, options.on_written))

    def _connect(self, name: str, on_lost: Callable[..., None]) -> RayShardClient:
        return RayShardClient(
            self._handles[name],
            name,
            timeout_s=_CALL_TIMEOUT_S,
            metrics=self.metrics,
            on_lost=on_lost,
        )

    def close(self) -> None:
        """Write out, sync, and end the actors; one that does not answer is killed all the same."""
        if self._shards:
            self._attached.close()
        super().close()
        handles, self._handles = getattr(self, "_handles", {}), {}
        if not ray.is_initialized():
            return
        stopping = [handle.stop.remote(_CALL_TIMEOUT_S) for handle in handles.values()]
        for handle, ref in zip(handles.values(), stopping, strict=True):
            with contextlib.suppress(LiteCacheError):
                result(ref, _CALL_TIMEOUT_S + _START_TIMEOUT_S, "closing a shard")
            ray.kill(handle, no_restart=True)


class _RayShard(Shard):
    """One actor, this process's client of its present life, and the blocks committed to it.

    A thread, which sleeps while there are none, asks the actor what became of them and tells which
    reached the disk (None), or why they did not.
    """

    def __init__(
        self, name: str, handle: Any, attached: AttachedShards[RayShardClient], tell: Tell
    ) -> None:
        self._name, self._handle, self._attached, self._tell = name, handle, attached, tell
        self._work = threading.Condition()
        # those whose end is not known; False: about to be committed
        self._open: dict[BlockKey, bool] = {}
        self._absent: set[BlockKey] = set()
        self._closing = False
        self._thread = start_service(self._run, "block-outcomes")

    def client(self) -> RayShardClient | None:
        return self._attached.client(self._name)

    def awaits(self, key: BlockKey) -> bool:
        with self._work:
            return key in self._open

    def announce(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        with self._work:
            fresh = [key for key in dict.fromkeys(keys) if key not in self._open]
            self._open.update(dict.fromkeys(fresh, False))
            return fresh

    def committed(self, keys: Sequence[BlockKey], lost: Sequence[BlockKey]) -> None:
        with self._work:
            for key in lost:
                self._open.pop(key, None)
            self._open.update(dict.fromkeys(keys, True))
            self._work.notify()

    def wait_for_room(self, tries: int) -> None:
        # room comes when a write ends in the other process: nothing to wait on here
        time.sleep(min(_POLL_S[0] * 2 ** min(tries, 10), _POLL_S[1]))

    def close(self) -> None:
        with self._work:
            self._closing = True  # what is open stays untold
            self._work.notify()
        self._thread.join()
        if (client := self.client()) is not None:
            client.close()

    def _run(self) -> None:
        delay = _POLL_S[0]
        while True:
            with self._work:
                self._work.wait_for(lambda: self._closing or any(self._open.values()))
                if self._closing:
                    return
                keys = [key for key, committed in self._open.items() if committed]
            told = self._ask(keys)
            with self._work:
                for key, _ in told:
                    self._open.pop(key, None)
            if told:
                self._tell(told)
            delay = _POLL_S[0] if told else min(2 * delay, _POLL_S[1])
            with self._work:
                if not self._closing:
                    self._work.wait(delay)

    def _ask(self, keys: list[BlockKey]) -> list[tuple[BlockKey, str | None]]:
        try:
            asked = self._handle.outcomes.remote(keys)
            found: list[str] = result(asked, _CALL_TIMEOUT_S, "asking what became of blocks")
        except ActorEndedError:
            return [(key, LOST) for key in keys]
        except LiteCacheError as error:
            logger.info("%s does not say what became of blocks: %s", self._name, error)
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
