"""`RayEngine`: the storage engine of `LocalCacheService` on shard actors.

`LocalCacheService(..., engine="ray")` finds it by its entry point, as it would find one of a third
party. Control goes by actor calls, a batch per shard and call; a block's bytes are copied once,
between the tensor and the shard's arena, which both processes map. A shard that dies is started
again by Ray; until then its blocks are misses, and writes that it had not finished are Aborted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import ray

from litecache.actors.cache_fates import CALL_TIMEOUT_S, LOST, POLL_S, AttachedShard, Fates
from litecache.actors.cache_shard import start_shards, stop_shards
from litecache.actors.calls import result
from litecache.actors.cluster import open_ray
from litecache.actors.shard_client import RayShardClient
from litecache.hashing import BlockKey
from litecache.metrics import Metrics
from litecache.storage.protocol import CommitItem, CommitStatus, SlotRef, SlotState, StageStatus
from litecache.storage.service import EngineOptions, Get, Put, StorageEngine

_NAMESPACE = "local-cache-service"
_LOAD_TIMEOUT_S = 60.0


class RayEngine(StorageEngine):
    """Shard actors on this node, chosen by key; joins the Ray that is up, or starts a local one."""

    keeps_folders = True

    def __init__(self, options: EngineOptions) -> None:
        open_ray()
        self.metrics = Metrics()
        self._block_bytes = options.block_bytes
        name = f"cache-service-{os.path.basename(options.path)}"
        per_shard = [
            {
                "directory": f"{options.path}_{index}",
                "storage_bytes": options.storage_bytes // options.shards,
                "ram_bytes": options.ram_bytes // options.shards,
                "io_threads": options.io_threads,
            }
            for index in range(options.shards)
        ]
        handles = start_shards(name, per_shard)
        self._shards = [
            AttachedShard(handle, f"{name}:{index}", self.metrics)
            for index, handle in enumerate(handles)
        ]
        self._fates = Fates(self._shards, options.on_written)

    def shard_pids(self) -> list[int]:
        """Process ids of the shard actors."""
        return [int(result(shard.handle.info.remote())["pid"]) for shard in self._shards]

    def _by_shard(self, keys: Sequence[BlockKey]) -> dict[int, list[int]]:
        groups: dict[int, list[int]] = {}
        for i, key in enumerate(keys):
            shard = int.from_bytes(key, "little") % len(self._shards)
            groups.setdefault(shard, []).append(i)
        return groups

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `StorageEngine.contains`."""
        found = [False] * len(keys)
        for shard, positions in self._by_shard(keys).items():
            client = self._shards[shard].client()
            if client is None:
                continue
            there = client.query([keys[i] for i in positions])
            present = [i for i, hit in zip(positions, there, strict=True) if hit]
            client.touch([keys[i] for i in present])
            for i in present:
                found[i] = True
        return found

    def put(self, items: Sequence[Put], stop: Callable[[], bool], wait_s: float) -> list[str]:
        """See `StorageEngine.put`; `shard_lost` when its shard is gone."""
        deadline = time.monotonic() + wait_s
        outcome = [LOST] * len(items)
        for shard, positions in self._by_shard([item.key for item in items]).items():
            client = self._shards[shard].client()
            if client is None:
                continue
            left = []
            there = client.query([items[i].key for i in positions])
            for i, present in zip(positions, there, strict=True):
                if present:
                    outcome[i] = "pending" if self._fates.watches(items[i].key) else "exists"
                else:
                    left.append(i)
            delay = POLL_S[0]
            while left:
                taken = self._put_some(client, shard, items, left, outcome)
                left = left[taken:]
                if taken or not left:
                    delay = POLL_S[0]
                    continue
                if client.lost or stop() or time.monotonic() > deadline:
                    reason = LOST if client.lost else "stopped" if stop() else "dropped"
                    for i in left:
                        outcome[i] = reason
                    break
                # room comes when a write ends in the other process: nothing to wait on here
                time.sleep(delay)
                delay = min(2 * delay, POLL_S[1])
        return outcome

    def _put_some(
        self,
        client: RayShardClient,
        shard: int,
        items: Sequence[Put],
        wanted: Sequence[int],
        outcome: list[str],
    ) -> int:
        """Fill and commit as many as there are slots; how many of `wanted` are settled."""
        refs = client.reserve(self._block_bytes, len(wanted))
        filled: list[tuple[int, CommitItem, bool]] = []
        unfilled: list[SlotRef] = []
        for i, ref in zip(wanted, refs, strict=False):
            item = items[i]
            if item.fill(client.arena.buffer(ref.slot, self._block_bytes)):
                fresh = self._fates.watch(item.key)
                commit = CommitItem(*ref, item.key, item.parent, _NAMESPACE)
                filled.append((i, commit, fresh))
            else:
                outcome[i] = "stopped"
                unfilled.append(ref)
        client.release(unfilled)
        statuses = client.commit([commit for _, commit, _ in filled]) if filled else []
        stored = [
            commit.key
            for (_, commit, _), status in zip(filled, statuses, strict=True)
            if status is CommitStatus.STORED
        ]
        for (i, commit, fresh), status in zip(filled, statuses, strict=True):
            if status is CommitStatus.STORED or (status is CommitStatus.EXISTS and not fresh):
                outcome[i] = "pending"
            else:
                outcome[i] = "exists" if status is CommitStatus.EXISTS else LOST
                if fresh:
                    self._fates.forget(commit.key)
        self._fates.ask_for(stored, shard)
        return len(refs)

    def get(self, items: Sequence[Get], stop: Callable[[], bool], wait_s: float) -> list[str]:
        """See `StorageEngine.get`."""
        deadline = time.monotonic() + wait_s
        outcome = ["miss"] * len(items)
        for shard, positions in self._by_shard([item.key for item in items]).items():
            client = self._shards[shard].client()
            left = positions if client is not None else []
            delay = POLL_S[0]
            while client is not None and left:
                left = self._get_some(client, items, left, outcome)
                if left and (stop() or time.monotonic() > deadline):
                    for i in left:
                        outcome[i] = "stopped" if stop() else "busy"
                    break
                if left:
                    time.sleep(delay)
                    delay = min(2 * delay, POLL_S[1])
        return outcome

    def _get_some(
        self,
        client: RayShardClient,
        items: Sequence[Get],
        wanted: list[int],
        outcome: list[str],
    ) -> list[int]:
        """One attempt; the positions that found no free slot."""
        results = client.stage([items[i].key for i in wanted])
        busy: list[int] = []
        leased: list[SlotRef] = []
        try:
            for i, staged in zip(wanted, results, strict=True):
                if staged.slot >= 0:
                    leased.append(SlotRef(staged.slot, staged.generation))
                if staged.status is StageStatus.BUSY:
                    busy.append(i)
            for i, staged in zip(wanted, results, strict=True):
                ref = SlotRef(staged.slot, staged.generation)
                if ref.slot < 0 or not _loaded(client, ref):
                    continue
                took = items[i].take(client.arena.buffer(ref.slot, self._block_bytes))
                outcome[i] = "hit" if took and client.arena.holds(*ref) else "miss"
        finally:
            client.release(leased)
        return busy

    def flush(self, timeout_s: float) -> bool:
        """See `StorageEngine.flush`."""
        clients = [shard.client() for shard in self._shards]
        done = [client is not None and client.flush(timeout_s).complete for client in clients]
        return all(done)

    def close(self) -> None:
        """Write out, sync, and end the actors."""
        self._fates.close()
        for shard in self._shards:
            shard.close()
        if ray.is_initialized():
            stop_shards([shard.handle for shard in self._shards], CALL_TIMEOUT_S)
        self._shards = []


def _loaded(client: RayShardClient, ref: SlotRef) -> bool:
    """Wait until a leased slot holds its block; False when it will not."""
    deadline = time.monotonic() + _LOAD_TIMEOUT_S
    delay = 0.0002
    while client.arena.state(*ref) is SlotState.LOADING:
        if client.lost or time.monotonic() > deadline:
            return False
        # completion shows in shared memory, where nothing can be awaited
        time.sleep(delay)
        delay = min(2 * delay, 0.002)
    return client.arena.holds(*ref)
