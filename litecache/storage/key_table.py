"""An open-addressing hash table from 16-byte keys to dense entry numbers, with columns beside it.

A Python dict costs 130 bytes an entry; this costs 16 for the key, 7 to 14 for the index and what
the columns take. Keys lie in one array by entry number; the index is an int32 array probed
linearly at a load of at most 0.6 and repaired on removal by shifting back, so there are no
tombstones. Batches are looked up with numpy, single keys with plain Python. Shards and the
coordinator use it. Not thread-safe.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..hashing import KEY_BYTES, BlockKey

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_MULTIPLIER = 0x9E37_79B9_7F4A_7C15
_SHIFT = 29
_FEW = 12
_MAX_LOAD = 0.6

Entries = npt.NDArray[np.int64]
KeyWords = npt.NDArray[np.uint64]


def key_words(keys: Sequence[BlockKey]) -> KeyWords:
    """Keys as uint64 `[n, 2]`, little-endian.

    Raises:
        ConfigError: a key is not 16 bytes.
    """
    if keys and set(map(len, keys)) != {KEY_BYTES}:
        bad = next(key for key in keys if len(key) != KEY_BYTES)
        raise ConfigError("key", bad, f"{KEY_BYTES} bytes")
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)


def _hash(low: int, high: int) -> int:
    # explicit hash values of LocalCacheService need not be random: mix both words
    word = ((low ^ (high >> _SHIFT)) * _MULTIPLIER + high) & _MASK
    word = ((word ^ (word >> 32)) * _MULTIPLIER) & _MASK
    return word ^ (word >> _SHIFT)


def _hash_many(words: KeyWords) -> KeyWords:
    low, high = words[:, 0], words[:, 1]
    multiplier = np.uint64(_MULTIPLIER)
    word = (low ^ (high >> np.uint64(_SHIFT))) * multiplier + high
    word = (word ^ (word >> np.uint64(32))) * multiplier
    mixed: KeyWords = word ^ (word >> np.uint64(_SHIFT))
    return mixed


class KeyTable:
    """Keys to entry numbers `0 .. high - 1`; numbers of removed keys are given out again.

    Args:
        columns: name to `array` type code ("Q", "q", "I", "i", "H", "B"); each becomes an
            attribute indexed by entry number, zero for a new entry. `key_at` gives the key back.
    """

    def __init__(self, columns: dict[str, str] | None = None) -> None:
        self._keys = array("Q")
        self._columns = dict(columns or {})
        for name, code in self._columns.items():
            setattr(self, name, array(code))
        self._capacity = 0
        self._free = array("i")
        self.high = 0
        self._count = 0
        self._index: npt.NDArray[np.int32] = np.zeros(1024, np.int32)
        self._bind()

    def _bind(self) -> None:
        self._slots = self._index.data
        self._mask = len(self._index) - 1

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: BlockKey) -> bool:
        return self.find(key) >= 0

    def column(self, name: str) -> npt.NDArray[np.generic]:
        """A column as a numpy view of the first `high` entries; drop it before the next insert."""
        data: array[int] = getattr(self, name)
        return np.frombuffer(data, dtype=data.typecode, count=self.high)

    def key_at(self, entry: int) -> BlockKey:
        """The key of an entry."""
        return self._keys[2 * entry : 2 * entry + 2].tobytes()

    def words_at(self, entries: Entries) -> KeyWords:
        """Keys of entries as uint64 `[n, 2]`, copied."""
        keys = np.frombuffer(self._keys, dtype="<u8").reshape(-1, 2)
        return keys[entries]

    def find(self, key: BlockKey) -> int:
        """Entry of a key, or -1."""
        low = int.from_bytes(key[:8], "little")
        high = int.from_bytes(key[8:], "little")
        slots, mask, keys = self._slots, self._mask, self._keys
        at = _hash(low, high) & mask
        while (entry := slots[at]) != 0:
            if keys[2 * entry - 2] == low and keys[2 * entry - 1] == high:
                return int(entry) - 1
            at = (at + 1) & mask
        return -1

    def find_many(self, keys: Sequence[BlockKey]) -> Entries:
        """Entries of keys, int64 `[n]`, -1 where missing."""
        words = key_words(keys)
        if len(keys) <= _FEW:
            return np.fromiter((self.find(key) for key in keys), np.int64, len(keys))
        return self.find_words(words)

    def find_words(self, words: KeyWords) -> Entries:
        """`find_many` for keys given as uint64 `[n, 2]`."""
        found = np.full(len(words), -1, np.int64)
        if not self._count:
            return found
        mask = np.uint64(self._mask)
        stored = np.frombuffer(self._keys, dtype="<u8").reshape(-1, 2)
        at = (_hash_many(words) & mask).astype(np.int64)
        active = np.arange(len(words))
        while active.size:
            entries = self._index[at[active]].astype(np.int64) - 1
            occupied = entries >= 0
            active, entries = active[occupied], entries[occupied]
            same = (stored[entries] == words[active]).all(axis=1)
            found[active[same]] = entries[same]
            active = active[~same]
            at[active] = (at[active] + 1) & self._mask
        return found

    def insert(self, key: BlockKey) -> int:
        """Add a key that is not in the table; its entry, all columns zero."""
        if len(key) != KEY_BYTES:
            raise ConfigError("key", key, f"{KEY_BYTES} bytes")
        entry = self._free.pop() if self._free else self._append(1)
        low = int.from_bytes(key[:8], "little")
        high = int.from_bytes(key[8:], "little")
        self._keys[2 * entry], self._keys[2 * entry + 1] = low, high
        self._count += 1
        if self._count > _MAX_LOAD * len(self._index):
            self._rebuild(self._live_entries(without=entry))
        slots, mask = self._slots, self._mask
        at = _hash(low, high) & mask
        while slots[at] != 0:
            at = (at + 1) & mask
        slots[at] = entry + 1
        return entry

    def insert_words(self, words: KeyWords) -> Entries:
        """Add many distinct keys to an EMPTY table; their entries, in order."""
        if self._count or self.high:
            raise AssertionError("bulk insertion needs an empty table")
        n = len(words)
        self._append(n)
        np.frombuffer(self._keys, dtype="<u8").reshape(-1, 2)[:n] = words
        self._count = n
        entries = np.arange(n, dtype=np.int64)
        self._rebuild(entries)
        return entries

    def remove(self, key: BlockKey) -> int:
        """Take a key out; its former entry, whose columns are zeroed.

        Raises:
            KeyError: it is not there.
        """
        entry = self.find(key)
        if entry < 0:
            raise KeyError(key)
        slots, mask, keys = self._slots, self._mask, self._keys
        hole = _hash(keys[2 * entry], keys[2 * entry + 1]) & mask
        while slots[hole] != entry + 1:
            hole = (hole + 1) & mask
        at = hole
        while True:
            at = (at + 1) & mask
            other = slots[at]
            if other == 0:
                break
            home = _hash(keys[2 * other - 2], keys[2 * other - 1]) & mask
            # move back unless its home lies between the hole and where it is (cyclically)
            if (at - home) & mask >= (at - hole) & mask:
                slots[hole] = other
                hole = at
        slots[hole] = 0
        for name in self._columns:
            getattr(self, name)[entry] = 0
        self._free.append(entry)
        self._count -= 1
        return entry

    def _append(self, n: int) -> int:
        first = self.high
        if first + n > self._capacity:
            extra = max(first + n - self._capacity, 1024, self._capacity // 8)
            self._keys.frombytes(bytes(16 * extra))
            for name in self._columns:
                column: array[int] = getattr(self, name)
                column.frombytes(bytes(column.itemsize * extra))
            self._capacity += extra
        self.high = first + n
        return first

    def _live_entries(self, without: int = -1) -> Entries:
        live = np.ones(self.high, bool)
        live[np.frombuffer(self._free, np.int32)] = False
        if without >= 0:
            live[without] = False
        return np.flatnonzero(live)

    def entries(self) -> Entries:
        """Entry numbers of all keys, ascending."""
        return self._live_entries()

    def keys(self) -> list[BlockKey]:
        """All keys, in entry order."""
        raw = self.words_at(self.entries()).tobytes()
        return [raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES)]

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(self.keys())

    def _rebuild(self, entries: Entries) -> None:
        size = len(self._index)
        while self._count > _MAX_LOAD * size / 2:
            size *= 2
        self._index = np.zeros(size, np.int32)
        self._bind()
        stored = np.frombuffer(self._keys, dtype="<u8").reshape(-1, 2)
        at = (_hash_many(stored[entries]) & np.uint64(self._mask)).astype(np.int64)
        todo = np.arange(len(entries))
        while todo.size:
            free = self._index[at[todo]] == 0
            # several may want one place: all write, the last one stays, the others see it and go on
            want = todo[free]
            self._index[at[want]] = entries[want] + 1
            lost = self._index[at[todo]] != entries[todo] + 1
            todo = todo[lost]
            at[todo] = (at[todo] + 1) & self._mask

    def nbytes(self) -> int:
        """Bytes that the table holds."""
        columns: list[array[int]] = [getattr(self, name) for name in self._columns]
        own = sum(column.itemsize * len(column) for column in columns)
        return own + 8 * len(self._keys) + self._index.nbytes + 4 * len(self._free)

    def check_integrity(self) -> None:
        """AssertionError unless index, keys and free list agree."""
        live = self.entries()
        assert len(live) == self._count == np.count_nonzero(self._index), "counts differ"
        found = self.find_words(self.words_at(live)) if len(live) else live
        assert (found == live).all(), "a key is not found at its entry"
        assert len(set(self._free)) == len(self._free), "an entry is free twice"
