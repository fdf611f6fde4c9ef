"""Staging: lease what is in RAM, begin to read what is on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from ..errors import StorageError
from ..hashing import BlockKey
from .key_dict import batches
from .leases import Client
from .protocol import PAGE_BYTES, StageResult, StageStatus
from .ram_tier import RamState
from .shard_parts import ShardParts

_COUNTERS: tuple[tuple[StageStatus, str, dict[str, str]], ...] = (
    (StageStatus.READY, "litecache_hits", {"tier": "ram"}),
    (StageStatus.LOADING, "litecache_hits", {"tier": "disk"}),
    (StageStatus.MISS, "litecache_misses", {"tier": "shard", "reason": "absent"}),
    (StageStatus.BUSY, "litecache_misses", {"tier": "shard", "reason": "busy"}),
)
_MISS, _BUSY = StageResult(StageStatus.MISS), StageResult(StageStatus.BUSY)
_READY, _LOADING = StageStatus.READY, StageStatus.LOADING
# a NamedTuple's own constructor takes three times as long
_staged = partial(tuple.__new__, StageResult)


class Staging:
    """Answers `stage` and `cancel`.

    Args:
        parts: of the store.
    """

    def __init__(self, parts: ShardParts) -> None:
        self._tiers = parts.tiers
        self._io = parts.io
        self._leases = parts.leases
        self._growth = parts.growth
        self._lock = parts.lock
        self._metrics = parts.metrics

    def stage(self, client: Client, keys: Sequence[BlockKey]) -> list[StageResult]:
        """See `ShardStore.stage`."""
        results: list[StageResult] = []
        for batch in batches(keys):
            results += self._stage(client, batch)
        self._io.drain()
        return results

    def _stage(self, client: Client, keys: Sequence[BlockKey]) -> list[StageResult]:
        results = self._once(client, keys)
        busy = self._busy(results)
        space, grown = self._tiers.ram.space, -1
        while busy and space.grown != grown:
            # another client, or another block size, took the segment that was grown for these: ask
            # again for as long as the arena grows, now that growth and eviction see their need
            grown = space.grown
            again = self._once(client, [keys[i] for i in busy])
            for i, result in zip(busy, again, strict=True):
                results[i] = result
            busy = self._busy(results)
        self._count(results)
        return results

    @staticmethod
    def _busy(results: list[StageResult]) -> list[int]:
        if _BUSY not in results:
            return []
        return [i for i, result in enumerate(results) if result == _BUSY]

    def _once(self, client: Client, keys: Sequence[BlockKey]) -> list[StageResult]:
        tiers = self._tiers
        with self._lock:
            entries = tiers.find(keys)
            wanting = self._wanting(entries)
            if not wanting:
                return self._lease(client, entries)
        for pages, count in wanting.items():
            self._growth.ensure(pages, count)
        with self._lock:
            return self._lease(client, tiers.find(keys))

    def _wanting(self, entries: Iterable[int]) -> dict[int, int]:
        """Block sizes in pages for whose loads the arena should grow, with the slots they need."""
        index, space = self._tiers.index, self._tiers.ram.space
        needs: dict[int, int] = {}
        for entry in entries:
            if entry >= 0 and not index.ram[entry]:
                needs[index.pages[entry]] = needs.get(index.pages[entry], 0) + 1
        return {
            pages: count
            for pages, count in needs.items()
            if space.available(pages) < count and space.growth(pages) is not None
        }

    def _lease(self, client: Client, entries: list[int]) -> list[StageResult]:
        if client.gone:
            raise StorageError(f"client_id={client.client_id} has been detached")
        tiers, leases, staged = self._tiers, client.leases, _staged
        handles, blocks, loading = tiers.index.ram, tiers.ram.blocks, RamState.LOADING
        results = [_MISS] * len(entries)
        leased: list[int] = []
        loads: dict[int, list[int]] = {}
        for i, entry in enumerate(entries):
            if entry < 0:
                continue
            handle = handles[entry]
            if not handle:
                loads.setdefault(tiers.index.pages[entry], []).append(i)
                continue
            # as `LeaseBook.give`, which is called once a block and not once for each of 64
            block = blocks[handle - 1]
            slot, generation = block.slot, block.generation
            held = leases.get(slot)
            if held is None:
                leases[slot] = [generation, 1]
            else:
                held[1] += 1
            block.leases += 1
            status = _LOADING if block.state is loading else _READY
            results[i] = staged((status, slot, generation))
            leased.append(entry)
        if loads:
            for pages, wanted in loads.items():
                self._begin_loads(client, pages, wanted, entries, results)
            leased = [e for e, result in zip(entries, results, strict=True) if result[1] >= 0]
        tiers.use(leased)
        if tiers.writes:
            self._io.kick()
        return results

    def _begin_loads(
        self,
        client: Client,
        pages: int,
        wanted: list[int],
        entries: list[int],
        results: list[StageResult],
    ) -> None:
        tiers = self._tiers
        distinct = list(dict.fromkeys(entries[i] for i in wanted))
        free = tiers.ram.allocate(pages * PAGE_BYTES, len(distinct))
        # making room may have dropped nothing that is on disk, so all entries still stand
        blocks = dict(zip(distinct, free, strict=False))
        if blocks:
            tiers.begin_loads(list(blocks), free)
            self._io.queue_reads(free)
            self._io.kick()
        for i in wanted:
            block = blocks.get(entries[i])
            if block is None:
                results[i] = _BUSY
                continue
            self._leases.give(client, block)
            results[i] = StageResult(StageStatus.LOADING, block.slot, block.generation)

    def _count(self, results: Sequence[StageResult]) -> None:
        statuses = [result[0] for result in results]
        for status, name, labels in _COUNTERS:
            count = statuses.count(status)
            if count:
                self._metrics.inc(name, count, **labels)

    def cancel(self, client: Client, entry: int) -> bool:
        """Give up one read that has not begun, under the lock; whether a lease ended."""
        block = self._tiers.block_of(entry) if entry >= 0 else None
        if block is None or block.state is not RamState.LOADING or block.started:
            return False
        if self._leases.end(client, block.slot, block.generation) is None:
            return False
        if not block.leases:
            self._tiers.cancel_load(block)
        return True
