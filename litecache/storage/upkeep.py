"""Removing and pinning: what is done to blocks by name, whatever the policies would do.

A removal must hold after kill -9 too, so the journal goes to its file before a call returns.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..hashing import BlockKey
from .shard_parts import ShardParts


class Upkeep:
    """Answers `delete`, `clear`, `pin` and `unpin` of `ShardStore`.

    Args:
        parts: of the store.
    """

    def __init__(self, parts: ShardParts) -> None:
        self._tiers = parts.tiers
        self._keeper = parts.keeper
        self._changed = parts.changed

    def delete(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `ShardStore.delete`."""
        with self._changed:
            dropped = [self._drop(key) for key in keys]
            if any(dropped):
                self._keeper.note_change()
            self._changed.notify_all()
        self._keeper.flush_journal()
        return dropped

    def _drop(self, key: BlockKey) -> bool:
        entry = self._tiers.index.find(key)
        if entry >= 0:
            self._tiers.drop(entry)
        return entry >= 0

    def clear(self, tier: str) -> None:
        """See `ShardStore.clear`; what was dirty has been written."""
        tiers = self._tiers
        with self._changed:
            for entry in tiers.index.entries().tolist():
                if tier == "all":
                    tiers.drop(entry)
                elif tier == "ram":
                    tiers.drop_ram_copy(entry)
                elif tiers.index.disk[entry]:
                    tiers.drop_disk_copy(entry)
            self._keeper.note_change()
            self._changed.notify_all()
        self._keeper.flush_journal()

    def set_pinned(self, keys: Sequence[BlockKey], pinned: bool) -> list[bool]:
        """See `ShardStore.pin`."""
        tiers = self._tiers
        with self._changed:
            entries = tiers.find(keys)
            for entry in entries:
                if entry >= 0 and tiers.disk is not None:
                    tiers.disk.set_pinned(entry, pinned)
            self._keeper.note_change()
        self._keeper.flush_journal()
        return [entry >= 0 for entry in entries]
