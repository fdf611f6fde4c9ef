"""Shard actors of one `LocalCacheService`: no group, no coordinator, one actor per folder.

A `CacheShard` is a `StorageShard` that also remembers what became of each block, because the
service tells a task's end by it. `start_shards` makes them on the caller's node, which is where the
tensor is; they end with the process that made them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from litecache.actors import storage_shard
from litecache.actors.calls import result
from litecache.actors.storage_shard import StorageShard
from litecache.errors import LiteCacheError
from litecache.hashing import BlockKey

PENDING, STORED, ABSENT = "pending", "stored", "absent"
_REMEMBERED = 1 << 20
_START_TIMEOUT_S = 60.0


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


class _NoReporter:
    """In place of the coordinator's reporter."""

    def notify(self) -> None:
        return

    def close(self) -> None:
        return


class CacheShard(StorageShard):
    """Plain class behind the actor; see `StorageShard`."""

    def __init__(
        self, group: str, index: int, options: dict[str, Any], lock_patience_s: float
    ) -> None:
        self._outcomes = Outcomes()
        noting = {**options, "on_written": self._outcomes.note}
        super().__init__(group, index, noting, lock_patience_s)

    def _make_reporter(self) -> Any:
        return _NoReporter()

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


def start_shards(name: str, options: Sequence[dict[str, Any]]) -> list[Any]:
    """Start one actor per folder on this node and wait until their stores are open.

    Args:
        name: stands in logs and metrics.
        options: arguments of `ShardStore`, per shard.

    Raises:
        LiteCacheError: what kept a store from opening; then none is left running.
    """
    here = ray.get_runtime_context().get_node_id()
    actor = ray.remote(concurrency_groups={"bulk": 4})(CacheShard).options(
        num_cpus=0,
        max_concurrency=8,
        max_restarts=-1,
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
    )
    patience_s = storage_shard.LOCK_PATIENCE_S
    handles = [actor.remote(name, index, each, patience_s) for index, each in enumerate(options)]
    try:
        result([handle.info.remote() for handle in handles], _START_TIMEOUT_S, "starting shards")
    except LiteCacheError:
        stop_shards(handles, 0.0)
        raise
    return handles


def stop_shards(handles: Sequence[Any], timeout_s: float) -> None:
    """Flush, close and end actors; one that does not answer is killed all the same."""
    stopping = [handle.stop.remote(timeout_s) for handle in handles]
    for handle, ref in zip(handles, stopping, strict=True):
        try:
            result(ref, timeout_s + _START_TIMEOUT_S, "closing a shard")
        except LiteCacheError:
            pass
        finally:
            ray.kill(handle, no_restart=True)
