"""Removing and pinning: what is done to blocks by name, whatever the policies would do.

A removal must hold after kill -9 too, so the log goes to its file before a call returns.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..hashing import BlockKey
from .key_dict import BATCH_KEYS, batches
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
        dropped: list[bool] = []
        for batch in batches(keys):
            with self._changed:
                dropped += [self._drop(key) for key in batch]
                if any(dropped):
                    self._keeper.note_change()
                self._changed.notify_all()
        self._keeper.flush_log()
        return dropped

    def _drop(self, key: BlockKey) -> bool:
        entry = self._tiers.index.find(key)
        if entry >= 0:
            self._tiers.drop(entry)
        return entry >= 0

    def clear(self, tier: str) -> None:
        """See `ShardStore.clear`; what was dirty has been written."""
        tiers = self._tiers
        index = tiers.index
        for start in range(0, index.high, BATCH_KEYS):
            with self._changed:
                for entry in range(start, min(start + BATCH_KEYS, index.high)):
                    if not index.keys[entry]:
                        continue
                    if tier == "all":
                        tiers.drop(entry)
                    elif tier == "ram":
                        tiers.drop_ram_copy(entry)
                    elif index.disk[entry]:
                        tiers.drop_disk_copy(entry)
                self._keeper.note_change()
                self._changed.notify_all()
        self._keeper.flush_log()

    def set_pinned(self, keys: Sequence[BlockKey], pinned: bool) -> list[bool]:
        """See `ShardStore.pin`."""
        tiers, found = self._tiers, []
        for batch in batches(keys):
            with self._changed:
                entries = tiers.find(batch)
                for entry in entries:
                    if entry >= 0 and tiers.disk is not None:
                        tiers.disk.set_pinned(entry, pinned)
                self._keeper.note_change()
            found += [entry >= 0 for entry in entries]
        self._keeper.flush_log()
        return found
