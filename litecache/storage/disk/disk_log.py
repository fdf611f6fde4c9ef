"""What the disk tier writes down about itself: names, blocks placed and given up, sync marks.

The journal takes changes as they come, a snapshot replaces it when it has outgrown its share.
Methods that only append run under the store's lock and touch no file; `compact` runs outside it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgpack
import numpy as np

from ..block_index import BlockIndex, Entries
from . import journal as journal_file
from . import snapshot
from .files import Files
from .journal import Journal
from .records import FLAG_DOUBTFUL, RECORD_BYTES, seal
from .recovery import MAX_NAMES, Recovered

_JOURNAL_FREE_BYTES = 32 << 10
_SLOT = struct.Struct("<I")
_PER_RECORD = 10_000


class DiskLog:
    """Journal and snapshot of one folder.

    Args:
        files: the file system.
        index: the shard's blocks.
        recovered: what was read back; its names are known from the start.
        on_name: called with number and text of each namespace.

    Attributes:
        journal: the file; `names` its namespaces by number; `name_bytes` what they take.
        synced_seq: records up to this one survive a power cut.
        compacting: a snapshot is being written.
    """

    def __init__(
        self,
        files: Files,
        index: BlockIndex,
        recovered: Recovered,
        on_name: Callable[[int, str], None],
    ) -> None:
        self._files = files
        self._index = index
        self._on_name = on_name
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self.name_bytes = 0
        self._removed: list[bytes] = []
        self.synced_seq = 0
        self.compacting = False
        for name in recovered.names:
            self._add_name(name)
        self.journal = Journal(files, "journal", recovered.seq, recovered.journal_end)

    def _add_name(self, name: str) -> int:
        number = len(self.names)
        self.names.append(name)
        self._numbers.setdefault(name, number)
        self.name_bytes += len(name.encode()) + 8
        self._on_name(number, name)
        return number

    def name_number(self, name: str, most_bytes: int) -> int:
        """Number of a namespace; a new one goes to the journal; 0 when the table is full."""
        number = self._numbers.get(name)
        if number is None:
            if len(self.names) >= MAX_NAMES or 3 * self.name_bytes > most_bytes:
                return 0
            number = self._add_name(name)
            self.journal.append(journal_file.NAME, msgpack.packb([number, name]))
        return number

    def put(self, entries: Entries) -> int:
        """Blocks are where the index says; the sequence number of their record."""
        self._append_removed()
        return self.journal.append(journal_file.PUT, seal(self._index.records(entries)))

    def removed(self, entry: int, slot: int) -> None:
        """A block's slot was given up; written before the next record or sync."""
        self._removed.append(self._index.key_at(entry) + _SLOT.pack(slot))

    def _append_removed(self) -> None:
        # a record stays far below what replay accepts
        for start in range(0, len(self._removed), _PER_RECORD):
            body = b"".join(self._removed[start : start + _PER_RECORD])
            self.journal.append(journal_file.DEL, body)
        self._removed.clear()

    def keep_doubts(self) -> None:
        """Write down which blocks are doubtful, before a mark of a later sync covers them."""
        flags = self._index.column("flags").astype(np.uint8)
        doubtful = np.flatnonzero(flags & FLAG_DOUBTFUL)
        for start in range(0, len(doubtful), _PER_RECORD):
            self.put(doubtful[start : start + _PER_RECORD])

    def wants_compaction(self, slots: int) -> bool:
        """Whether the journal has outgrown its share of the bound, with so many slots."""
        if self.compacting:
            return False
        share = _JOURNAL_FREE_BYTES + RECORD_BYTES * slots
        return self.journal.broken or self.journal.buffered_bytes() > share

    def full(self, slots: int) -> bool:
        """Whether the journal may not grow at all any more (compaction keeps failing)."""
        share = _JOURNAL_FREE_BYTES + (RECORD_BYTES + 20) * slots
        return self.journal.buffered_bytes() > 2 * share

    def begin_sync(self) -> int:
        """The sequence that a sync from now on covers."""
        self._append_removed()
        return self.journal.seq

    def mark_synced(self, seq: int) -> int:
        """The slab is synced up to `seq`; the sequence of the mark if nothing came in between,
        else `seq`.
        """
        mark = self.journal.append(journal_file.SYNC, seq.to_bytes(8, "little"))
        return mark if mark == seq + 1 else seq

    def capture(self, entries: Entries) -> snapshot.Snapshot:
        """A copy of all that a new snapshot will hold: blocks on disk, oldest use first."""
        self._append_removed()
        self.compacting = True
        seq = self.journal.begin_rewrite()
        return snapshot.Snapshot(seq, list(self.names), self._index.records(entries), 0)

    def compact(self, captured: snapshot.Snapshot) -> None:
        """Write the snapshot, then a journal of what came since.

        Raises:
            OSError: the disk refused; the old files stay in force.
        """
        try:
            snapshot.write(self._files, "snapshot", captured)
        except OSError:
            self.journal.abandon_rewrite()
            raise
        finally:
            self.compacting = False
        self.journal.finish_rewrite(captured.seq)

    def abandon_compaction(self) -> None:
        """What was captured will not be written."""
        self.compacting = False
        self.journal.abandon_rewrite()
