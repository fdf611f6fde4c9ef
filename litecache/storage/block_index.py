"""Which blocks a shard holds, in RAM, on disk or both: keys to entry numbers, and typed columns.

Entries are dense numbers, given out again when a block is gone; eviction queues go by them too. A
block takes about 150 bytes for its key, 50 for its columns, and 25 for its place in a queue. Zero
means none in every column, so places are stored plus one. No insert moves many others: the keys
are a `KeyDict`, and columns grow by at most 65,536 rows at a time.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from itertools import compress, islice

import numpy as np
import numpy.typing as npt

from ..hashing import KEY_BYTES, BlockKey
from .disk.log import FLAG_PINNED, RECORD, Records
from .key_dict import BATCH_KEYS, KeyDict, check_keys, join_keys, split_keys
from .protocol import Deltas

Entries = npt.NDArray[np.int64]

_RECORDED = (
    "checksum",
    "pages",
    "namespace",
    "created_s",
    "expires_s",
    "used_s",
    "hits",
    "flags",
    "retention",
)
"""Columns that a record on disk holds as they are."""

LAST_S = 2**32 - 1
MOST_HITS = 1 << 31
"""Far from the column's end, so that one batch cannot carry a counter over it."""

_MOST_ROWS = 65_536
_NO_KEY = b""


def clock_s() -> int:
    """Unix seconds as the columns hold them, whatever the clock says."""
    return min(max(0, int(time.time())), LAST_S)


def grown_by(rows: int, missing: int) -> int:
    """By how many rows columns of `rows` grow when `missing` are wanted: never by very many."""
    return max(missing, 256, min(rows // 8, _MOST_ROWS))


def key_words(keys: Sequence[BlockKey]) -> npt.NDArray[np.uint64]:
    """Keys as uint64 `[n, 2]`, little-endian.

    Raises:
        ConfigError: a key is not 16 bytes.
    """
    return np.frombuffer(join_keys(keys), dtype="<u8").reshape(-1, 2)


class BlockIndex(KeyDict):
    """Blocks by key and by entry number. Not thread-safe.

    Attributes:
        keys, parents: key of each entry and of the block before it; of a free entry empty.
        key_at, parent_of: one of them.
        checksum: xxh3_64 of the bytes on disk.
        put_seq: log's number of the disk copy; durable once that is synced.
        disk: disk slot + 1.
        ram: RAM handle, from 1 on.
        pages: block bytes / 4096.
        created_s, expires_s, used_s: Unix seconds; `expires_s` 0 is never.
        hits: times it was staged.
        namespace: number of its name.
        flags: `FLAG_PINNED`.
        retention: of `protocol.Retention`.
        expiring: some block may expire.
        high: entries ever given out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.checksum = array("Q")
        self.put_seq = array("q")
        self.disk = array("I")
        self.ram = array("i")
        self.pages = array("I")
        self.created_s = array("I")
        self.expires_s = array("I")
        self.used_s = array("I")
        self.hits = array("I")
        self.namespace = array("H")
        self.flags = array("B")
        self.retention = array("B")
        self._columns: list[array[int]] = [c for c in vars(self).values() if isinstance(c, array)]
        self.keys: list[BlockKey] = []
        self.parents: list[BlockKey] = []
        self.key_at, self.parent_of = self.keys.__getitem__, self.parents.__getitem__
        self._free = array("i")
        self.expiring = False
        self._hand = 0

    @property
    def high(self) -> int:
        """Entries ever given out."""
        return len(self.keys)

    def insert(self, key: BlockKey, parent: BlockKey = bytes(KEY_BYTES)) -> int:
        """Add a key that is not there, and the key of the block before; its entry, all zero."""
        check_keys((key, parent))
        parts = self.parts
        before = self.find(parent)
        if before >= 0:
            parent = self.keys[before]  # one object for both
        if self._free:
            entry = self._free.pop()
            self.keys[entry], self.parents[entry] = key, parent
        else:
            entry = len(self.keys)
            if entry == len(self.flags):
                self._extend(grown_by(entry, 1))
            self.keys.append(key)
            self.parents.append(parent)
        parts[key[-1]][key] = entry
        return entry

    def _extend(self, rows: int) -> None:
        for column in self._columns:
            column.frombytes(bytes(column.itemsize * rows))

    def remove(self, entry: int) -> None:
        """Take an entry out; its columns are zeroed."""
        key = self.keys[entry]
        del self.parts[key[-1]][key]
        self.keys[entry] = self.parents[entry] = _NO_KEY
        for column in self._columns:
            column[entry] = 0
        self._free.append(entry)

    def column(self, name: str) -> npt.NDArray[np.generic]:
        """A column as a numpy view of all entries; drop it before the next insert."""
        data: array[int] = getattr(self, name)
        return np.frombuffer(data, dtype=data.typecode, count=self.high)

    def entries(self) -> Entries:
        """Entry numbers of all blocks, ascending."""
        live = np.ones(self.high, bool)
        live[np.frombuffer(self._free, np.int32)] = False
        return np.flatnonzero(live)

    def note_hits(self, entries: Sequence[int], now_s: int) -> None:
        """Count one hit for each entry given; a counter near its end stays there."""
        hits, used = self.hits, self.used_s
        for entry in entries:
            if hits[entry] < MOST_HITS:
                hits[entry] += 1
            used[entry] = now_s

    def expire(self, entry: int, at_s: int) -> None:
        """A block is a miss from a Unix second on, of those that the column holds; 0: never."""
        self.expires_s[entry] = min(at_s, LAST_S)
        self.expiring = self.expiring or at_s > 0

    def next_expired(self, now_s: int) -> list[int]:
        """Expired entries among the next few thousand: a hand goes round over all of them."""
        if not self.expiring:
            return []
        begin = self._hand if self._hand < self.high else 0
        self._hand = begin + BATCH_KEYS
        times = self.column("expires_s")[begin : self._hand].astype(np.int64)
        found: list[int] = (np.flatnonzero((times > 0) & (times <= now_s)) + begin).tolist()
        return found

    def namespaces_from(self, start: int, count: int) -> list[int]:
        """The namespaces of those of so many entries that are blocks."""
        rows = slice(start, start + count)
        live = self.column("pages")[rows] != 0
        numbers: list[int] = self.column("namespace")[rows][live].tolist()
        return numbers

    def pinned(self, entry: int) -> bool:
        """Whether it must not be evicted."""
        return bool(self.flags[entry] & FLAG_PINNED)

    def records(self, entries: Entries) -> Records:
        """Fixed-width records of entries that are on disk, not yet sealed."""
        records = np.zeros(len(entries), RECORD)
        numbers = entries.tolist()
        records["key"] = key_words([self.keys[entry] for entry in numbers])
        records["parent"] = key_words([self.parents[entry] for entry in numbers])
        records["slot"] = self.column("disk")[entries] - np.uint32(1)
        for name in _RECORDED:
            records[name] = self.column(name)[entries]
        return records

    def load(self, records: Records) -> Entries:
        """Fill an empty index from records with distinct keys; their entries."""
        assert not self.keys, "loading needs an empty index"
        n = len(records)
        self.keys += split_keys(records["key"].tobytes())
        parts = self.parts
        for entry, key in enumerate(self.keys):
            parts[key[-1]][key] = entry
        parents = split_keys(records["parent"].tobytes())
        before = self.get_many(parents)
        shared: dict[BlockKey, BlockKey] = {}
        self.parents += [
            self.keys[at] if at >= 0 else shared.setdefault(parent, parent)
            for at, parent in zip(before, parents, strict=True)
        ]
        self._extend(n)
        self.column("disk")[:] = records["slot"] + np.uint32(1)
        for name in _RECORDED:
            self.column(name)[:] = records[name]
        self.expiring = bool(records["expires_s"].any())
        return np.arange(n, dtype=np.int64)

    def check_integrity(self) -> None:
        """AssertionError unless keys, entries and free list agree."""
        live = self.entries().tolist()
        assert len(set(self._free)) == len(self._free), "an entry is free twice"
        assert len(self) == len(live) == len(self.keys) - len(self._free), "counts differ"
        for entry in live:
            assert self.find(self.keys[entry]) == entry, "a key is not found at its entry"
        assert all(not self.keys[entry] for entry in self._free), "a free entry has a key"


_MOST_CHANGES = 65_536


class Changes:
    """Which keys came and went since they were last asked for, for those who track a shard.

    Net changes: a key that came and went is none. Bounded, and says when it forgot some.

    Args:
        epoch: of the shard.
    """

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._seq = 0
        self._came: dict[BlockKey, bool] = {}
        self._lost = False

    def note(self, key: BlockKey, *, added: bool) -> None:
        """The shard has a key now, or has it no more."""
        if self._came.pop(key, added) != added:
            return
        self._came[key] = added
        if len(self._came) > _MOST_CHANGES:
            self._came.clear()
            self._lost = True

    def drain(self) -> Deltas:
        """What has changed since the last call, or a part of it."""
        self._seq += 1
        keys = list(islice(self._came, BATCH_KEYS))
        came = [self._came.pop(key) for key in keys]
        added = list(compress(keys, came))
        removed = [key for key, was_added in zip(keys, came, strict=True) if not was_added]
        deltas = Deltas(self._epoch, self._seq, added, removed, self._lost, bool(self._came))
        self._lost = False
        return deltas
