"""Which committed blocks are worth a disk write, asked under the store's lock.

Each use of a prefix that the shard hears of is told once: as `first` when the block was computed
and is committed, as `again` when it was found in RAM, on disk or in a pool. `frequent` counts them
in a sketch of fixed size, as TinyLFU does (Einziger, Friedman and Manes, arXiv 1512.00727): what
was asked for twice lately is written, a scan of prompts that never come back is not, and a block
that has left the disk keeps its fame. Other policies remember single keys.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from ..config import check_setting
from ..hashing import BlockKey

_REMEMBERED = 200_000
_ROWS = 4
_MOST = 15


class FrequencySketch:
    """Counts of keys, never too low, in `2 * width` bytes: a count-min sketch of four-bit counters.

    All counts are halved after `width / 2` uses, so that they tell of late. Until then few places
    are taken, and a key that was never seen passes for one that was in less than 3 % of the cases.

    Args:
        width: counters in each of four rows, a power of two.
    """

    def __init__(self, width: int = 1 << 20) -> None:
        self._mask = width - 1
        self._rows = [bytearray(width // 2) for _ in range(_ROWS)]
        self._period = self._left = width // 2

    def add(self, key: BlockKey) -> int:
        """Count a use; how many there were lately, with this one, at most 15."""
        number = hash(key)
        step = number >> 32 | 1
        places = [number + row * step & self._mask for row in range(_ROWS)]
        pairs = list(zip(self._rows, places, strict=True))
        counts = [row[at >> 1] >> (at & 1) * 4 & _MOST for row, at in pairs]
        least = min(counts)
        if least < _MOST:
            # the others are too high already, by keys that share their place
            for (row, at), count in zip(pairs, counts, strict=True):
                if count == least:
                    row[at >> 1] += 1 << (at & 1) * 4
        self._left -= 1
        if not self._left:
            self._left = self._period
            for row in self._rows:
                halves = np.frombuffer(row, np.uint8)
                halves >>= 1
                halves &= 0x77
        return min(_MOST, least + 1)


class Admission:
    """A policy.

    Args:
        name: `all`, `reused` (on second sight, while the first is among the last 200,000),
            `frequent` (used at least twice lately), `none`.

    Attributes:
        sketch: of `frequent`; then uses of blocks that the disk has are told too.

    Raises:
        ConfigError: there is no such policy; the message lists the names.
    """

    def __init__(self, name: str) -> None:
        self._name: str = check_setting("admission", "admission", name)
        self.sketch = FrequencySketch() if self._name == "frequent" else None
        # a plain dict would take longer and longer to find its first key
        self._seen: OrderedDict[BlockKey, None] = OrderedDict()

    def first(self, key: BlockKey) -> bool:
        """A block is committed that the shard does not hold: write it to disk?"""
        if self.sketch is not None:
            return self.sketch.add(key) > 1
        if self._name != "reused":
            return self._name == "all"
        if key in self._seen:
            del self._seen[key]
            return True
        self._seen[key] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return False

    def again(self, key: BlockKey) -> bool:
        """A block was used or committed again: write it now, if it is only in RAM?"""
        if self.sketch is not None:
            return self.sketch.add(key) > 1
        self._seen.pop(key, None)
        return self._name != "none"
