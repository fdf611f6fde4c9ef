"""Waiting for a shard's I/O: for reads that clients lease, for writes, for any change.

When the store closes, all who wait give up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from .protocol import FlushReport, SlotRef
from .ram_tier import LOADED, RamState
from .shard_parts import ShardParts


class Waiting:
    """Answers `wait`, `wait_for_change` and `flush`.

    Args:
        parts: of the store.
    """

    def __init__(self, parts: ShardParts) -> None:
        self._parts = parts
        self._tiers = parts.tiers
        self._io = parts.io
        self._keeper = parts.keeper
        self._changed = parts.changed

    def for_change(self, timeout_s: float) -> None:
        """See `ShardStore.wait_for_change`."""
        with self._changed:
            if not self._parts.closed:
                self._changed.wait(timeout_s)

    def for_reads(self, slots: Sequence[SlotRef], timeout_s: float) -> list[bool]:
        """See `ShardStore.wait`."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            for slot, generation in slots:
                while (block := self._tiers.ram.by_slot.get(slot)) is not None:
                    loading = block.state is RamState.LOADING and not block.dead
                    left = deadline - time.monotonic()
                    closed = self._parts.closed
                    if block.generation != generation or not loading or left <= 0 or closed:
                        break
                    self._changed.wait(left)
            return [self._holds(slot, generation) for slot, generation in slots]

    def _holds(self, slot: int, generation: int) -> bool:
        block = self._tiers.ram.by_slot.get(slot)
        return (
            block is not None
            and block.generation == generation
            and block.state in LOADED
            and not block.dead
        )

    def for_writes(self, timeout_s: float) -> FlushReport:
        """See `ShardStore.flush`."""
        deadline = time.monotonic() + timeout_s
        self._io.drain()
        with self._changed:
            mine = self._io.pending(list(self._tiers.ram.by_slot.values()))
            failed = self._failures()
            while self._io.pending(mine) and not self._parts.closed:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            pending = len(self._io.pending(mine))
            failed = self._failures() - failed
        synced = self._keeper.sync(force=True)
        written = len(mine) - pending - failed
        complete = synced and not pending and not failed
        return FlushReport(max(0, written) if synced else 0, pending, failed, complete)

    def _failures(self) -> int:
        return self._io.failed_writes + self._keeper.lost_writes
