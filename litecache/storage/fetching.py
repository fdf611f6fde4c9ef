"""Copies of blocks for other nodes, read through the disk without taking a RAM slot."""

from __future__ import annotations

import threading

from ..hashing import BlockKey
from ..metrics import Metrics
from .block_io import fault
from .keeper import Keeper
from .lease_book import LeaseBook
from .protocol import PAGE_BYTES
from .ram_tier import LOADED
from .scratch import scratch_memory
from .slab import Transfer
from .tiers import Tiers


class Fetching:
    """Answers `fetch`.

    Args:
        tiers, keeper, leases: parts of the store.
        lock: the store's lock.
        metrics: where damage is counted.
    """

    def __init__(
        self,
        tiers: Tiers,
        keeper: Keeper,
        leases: LeaseBook,
        lock: threading.Lock,
        metrics: Metrics,
    ) -> None:
        self._tiers = tiers
        self._keeper = keeper
        self._leases = leases
        self._lock = lock
        self._metrics = metrics

    def fetch(self, key: BlockKey) -> bytes | None:
        """A copy of a block, or None."""
        tiers = self._tiers
        with self._lock:
            entry = tiers.find([key])[0]
            block = tiers.block_of(entry) if entry >= 0 else None
            if block is not None and block.state in LOADED:
                self._leases.give(self._leases.own, block)
            elif entry >= 0 and tiers.disk is not None and tiers.index.disk[entry]:
                block = None
                slot = tiers.index.disk[entry] - 1
                nbytes, expected = (
                    tiers.index.pages[entry] * PAGE_BYTES,
                    tiers.index.checksum[entry],
                )
                tiers.disk.begin_use(slot)
            else:
                return None
        if block is not None:
            data = bytes(tiers.ram.arena.buffer(block.slot, block.nbytes))
            with self._lock:
                if self._leases.end(self._leases.own, block.slot, block.generation) is not None:
                    self._leases.abandon(block)
            return data
        return self._from_disk(key, slot, nbytes, expected)

    def _from_disk(self, key: BlockKey, slot: int, nbytes: int, expected: int) -> bytes | None:
        tiers, disk = self._tiers, self._tiers.disk
        assert disk is not None
        with scratch_memory(nbytes) as memory:
            error = disk.read([Transfer(slot, memory)])[0]
            reason = fault(memory, key, expected, error)
            data = bytes(memory) if reason is None else None
        with self._lock:
            if reason is not None:
                self._metrics.inc("litecache_misses", tier="disk", reason=reason)
                entry = tiers.index.find(key)
                if entry >= 0 and tiers.index.disk[entry] == slot + 1:
                    tiers.drop_disk_copy(entry)
                    self._keeper.note_change()
            disk.end_use(slot)
        return data
