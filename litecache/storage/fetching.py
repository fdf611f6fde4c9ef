"""Copies of blocks for other nodes, read through the disk without taking a RAM slot.

One call is one message to another node, so it is bounded; its reads from disk are merged into
requests of up to 16 MiB, as those of `stage` are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..hashing import BlockKey
from .block_io import fault
from .disk.slab import Transfer
from .protocol import PAGE_BYTES
from .ram_tier import LOADED, RamBlock
from .reads import MAX_REQUEST_BYTES
from .scratch import scratch_memory
from .shard_parts import ShardParts

MAX_FETCH_BYTES = 64 << 20
"""A block larger than this still goes, alone."""


class _OnDisk(NamedTuple):
    position: int
    key: BlockKey
    slot: int
    nbytes: int
    checksum: int


class Fetching:
    """Answers `fetch`.

    Args:
        parts: of the store.
    """

    def __init__(self, parts: ShardParts) -> None:
        self._tiers = parts.tiers
        self._keeper = parts.keeper
        self._leases = parts.leases
        self._lock = parts.lock
        self._metrics = parts.metrics

    def fetch(self, keys: Sequence[BlockKey]) -> list[tuple[BlockKey, bytes | None]]:
        """Copies of blocks, None for those that are not here or do not fit `MAX_FETCH_BYTES`."""
        found: list[bytes | None] = [None] * len(keys)
        in_ram, on_disk = self._hold(keys)
        for position, block in in_ram:
            found[position] = bytes(self._tiers.ram.arena.buffer(block.slot, block.nbytes))
        with self._lock:
            for _, block in in_ram:
                if self._leases.end(self._leases.own, block.slot, block.generation) is not None:
                    self._leases.abandon(block)
        for batch in _requests(on_disk):
            for wanted, data in zip(batch, self._read(batch), strict=True):
                found[wanted.position] = data
        return list(zip(keys, found, strict=True))

    def _hold(self, keys: Sequence[BlockKey]) -> tuple[list[tuple[int, RamBlock]], list[_OnDisk]]:
        """Lease what is in RAM and keep what is on disk where it is, up to the bound."""
        tiers = self._tiers
        in_ram: list[tuple[int, RamBlock]] = []
        on_disk: list[_OnDisk] = []
        total = 0
        with self._lock:
            for position, entry in enumerate(tiers.find(keys)):
                if entry < 0:
                    continue
                nbytes = tiers.index.pages[entry] * PAGE_BYTES
                if total and total + nbytes > MAX_FETCH_BYTES:
                    self._metrics.inc("litecache_drops", reason="fetch_too_large")
                    continue
                block = tiers.block_of(entry)
                if block is not None and block.state in LOADED:
                    self._leases.give(self._leases.own, block)
                    in_ram.append((position, block))
                elif tiers.disk is not None and tiers.index.disk[entry]:
                    slot = tiers.index.disk[entry] - 1
                    tiers.disk.in_use.begin([slot])
                    checksum = tiers.index.checksum[entry]
                    on_disk.append(_OnDisk(position, keys[position], slot, nbytes, checksum))
                else:
                    continue
                total += nbytes
        return in_ram, on_disk

    def _read(self, batch: Sequence[_OnDisk]) -> list[bytes | None]:
        disk = self._tiers.disk
        assert disk is not None
        with scratch_memory(sum(wanted.nbytes for wanted in batch)) as memory:
            pieces, start = [], 0
            for wanted in batch:
                pieces.append(memory[start : start + wanted.nbytes])
                start += wanted.nbytes
            errors = disk.read([Transfer(w.slot, p) for w, p in zip(batch, pieces, strict=True)])
            reasons = [
                fault(piece, wanted.key, wanted.checksum, error)
                for wanted, piece, error in zip(batch, pieces, errors, strict=True)
            ]
            blocks = [
                bytes(piece) if reason is None else None
                for piece, reason in zip(pieces, reasons, strict=True)
            ]
            for piece in pieces:
                piece.release()
        with self._lock:
            disk.in_use.end([wanted.slot for wanted in batch])
            for wanted, reason in zip(batch, reasons, strict=True):
                if reason is not None:
                    self._drop(wanted, reason)
        return blocks

    def _drop(self, wanted: _OnDisk, reason: str) -> None:
        tiers = self._tiers
        self._metrics.inc("litecache_misses", tier="disk", reason=reason)
        entry = tiers.index.find(wanted.key)
        if entry >= 0 and tiers.index.disk[entry] == wanted.slot + 1:
            tiers.drop_disk_copy(entry)
            self._keeper.note_change()


def _requests(wanted: Sequence[_OnDisk]) -> Iterator[list[_OnDisk]]:
    batch: list[_OnDisk] = []
    held = 0
    for each in sorted(wanted, key=lambda w: w.slot):
        if batch and held + each.nbytes > MAX_REQUEST_BYTES:
            yield batch
            batch, held = [], 0
        batch.append(each)
        held += each.nbytes
    if batch:
        yield batch
