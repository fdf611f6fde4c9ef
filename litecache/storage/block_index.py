"""Which blocks a shard holds, in RAM, on disk or both: a `KeyTable` with typed columns.

About 75 bytes a block, with the eviction queues 93. Zero means none in every column, so places
are stored plus one.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from ..hashing import BlockKey
from .disk.records import FLAG_PINNED, RECORD, Records
from .key_table import Entries, KeyTable, KeyWords

_COLUMNS = {
    "parent_low": "Q",
    "parent_high": "Q",
    "checksum": "Q",
    "put_seq": "q",
    "disk": "I",
    "ram": "i",
    "pages": "I",
    "created_s": "I",
    "expires_s": "I",
    "used_s": "I",
    "hits": "I",
    "namespace": "H",
    "flags": "B",
}

_MOST_HITS = 1 << 31
"""Far from the column's end, so that one batch cannot carry a counter over it."""


class BlockIndex(KeyTable):
    """Columns by entry number.

    Attributes:
        parent_low, parent_high: words of the parent's key.
        checksum: xxh3_64 of the bytes on disk.
        put_seq: journal sequence of the disk copy; durable once that is synced.
        disk: disk slot + 1.
        ram: RAM handle + 1.
        pages: block bytes / 4096.
        created_s, expires_s, used_s: Unix seconds; `expires_s` 0 is never.
        hits: times it was staged.
        namespace: number of its name.
        flags: `FLAG_PINNED`.
    """

    parent_low: array[int]
    parent_high: array[int]
    checksum: array[int]
    put_seq: array[int]
    disk: array[int]
    ram: array[int]
    pages: array[int]
    created_s: array[int]
    expires_s: array[int]
    used_s: array[int]
    hits: array[int]
    namespace: array[int]
    flags: array[int]

    def __init__(self) -> None:
        super().__init__(_COLUMNS)

    def parent_of(self, entry: int) -> BlockKey:
        """Key of the block before."""
        low, high = self.parent_low[entry], self.parent_high[entry]
        return low.to_bytes(8, "little") + high.to_bytes(8, "little")

    def set_parent(self, entry: int, parent: BlockKey) -> None:
        """Note the key of the block before."""
        self.parent_low[entry] = int.from_bytes(parent[:8], "little")
        self.parent_high[entry] = int.from_bytes(parent[8:16], "little")

    def parents_at(self, entries: Entries) -> KeyWords:
        """Keys of the blocks before, uint64 `[n, 2]`."""
        words = np.empty((len(entries), 2), np.uint64)
        words[:, 0] = self.column("parent_low")[entries]
        words[:, 1] = self.column("parent_high")[entries]
        return words

    def note_hits(self, entries: Entries, now_s: int) -> None:
        """Count one hit for each entry given; a counter near its end stays there."""
        hits = self.column("hits")
        # `add.at`, because an entry may be given more than once
        np.add.at(hits, entries[hits[entries].astype(np.int64) < _MOST_HITS], 1)
        self.column("used_s")[entries] = now_s

    def fingerprint(self, entry: int) -> int:
        """64 bits of the key."""
        return self._keys[2 * entry]

    def pinned(self, entry: int) -> bool:
        """Whether it must not be evicted."""
        return bool(self.flags[entry] & FLAG_PINNED)

    def records(self, entries: Entries) -> Records:
        """Fixed-width records of entries that are on disk, not yet sealed."""
        records = np.zeros(len(entries), RECORD)
        records["key"] = self.words_at(entries)
        records["parent"][:, 0] = self.column("parent_low")[entries]
        records["parent"][:, 1] = self.column("parent_high")[entries]
        records["slot"] = self.column("disk")[entries] - np.uint32(1)
        for name in ("checksum", "pages", "namespace", "created_s", "expires_s", "hits"):
            records[name] = self.column(name)[entries]
        records["used_s"] = self.column("used_s")[entries]
        records["flags"] = self.column("flags")[entries]
        return records

    def load(self, records: Records) -> Entries:
        """Fill an empty index from records with distinct keys; their entries."""
        entries = self.insert_words(np.ascontiguousarray(records["key"]))
        n = len(entries)
        self._fill("parent_low", records["parent"][:, 0], n)
        self._fill("parent_high", records["parent"][:, 1], n)
        self._fill("disk", records["slot"] + np.uint32(1), n)
        for name in ("checksum", "pages", "namespace", "created_s", "expires_s", "hits"):
            self._fill(name, records[name], n)
        self._fill("used_s", records["used_s"], n)
        self._fill("flags", records["flags"], n)
        return entries

    def _fill(self, name: str, values: npt.NDArray[np.generic], n: int) -> None:
        column: array[int] = getattr(self, name)
        np.frombuffer(column, dtype=column.typecode)[:n] = values
