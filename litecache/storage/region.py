"""A region: segments cut into slots of one block size, with a bit set for each free slot."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt


class Region:
    """One segment (or run of segments) in use.

    Args:
        base: its first page.
        segments: how many it takes.
        segment_pages: pages of each.
        block_pages: pages of a slot.
    """

    __slots__ = ("base", "block_pages", "free", "free_count", "owners", "segments", "slots")

    def __init__(self, base: int, segments: int, segment_pages: int, block_pages: int) -> None:
        self.base = base
        self.segments = segments
        self.block_pages = block_pages
        self.slots = segments * segment_pages // block_pages
        self.free = (1 << self.slots) - 1
        self.free_count = self.slots
        self.owners = array("i", [-1]) * self.slots

    def longest_run(self, at_most: int) -> tuple[int, int]:
        """`(first, length)` of a free run, as long as there is up to `at_most`."""
        starts, length = self.free, 1
        while length < at_most:
            # doubling: starts of runs of 2L are starts of L that have a start of L, L further on
            step = min(length, at_most - length)
            longer = starts & (starts >> step)
            if not longer:
                break
            starts, length = longer, length + step
        while length < at_most:
            longer = starts & (self.free >> length)
            if not longer:
                break
            starts, length = longer, length + 1
        return (starts & -starts).bit_length() - 1, length

    def take(self, first: int, length: int) -> list[int]:
        """Mark a run as used; its slots as pages."""
        self.free &= ~(((1 << length) - 1) << first)
        self.free_count -= length
        step = self.block_pages
        return list(range(self.base + first * step, self.base + (first + length) * step, step))

    def occupy(
        self,
        slots: npt.NDArray[np.int64],
        block_pages: npt.NDArray[np.int64],
        handles: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.bool_]:
        """Mark slots as used while a store is read back.

        Args:
            slots, block_pages, handles: int64 `[n]`, the best last.

        Returns:
            bool `[n]`: which lie on free slots of this region; of several for one the last.
        """
        index, odd = np.divmod(slots - self.base, self.block_pages)
        fits = (block_pages == self.block_pages) & (odd == 0) & (index >= 0) & (index < self.slots)
        _, last = np.unique(index[::-1], return_index=True)
        unique = np.zeros(len(slots), bool)
        unique[len(slots) - 1 - last] = True
        fits &= unique
        raw = self.free.to_bytes(-(-self.slots // 8), "little")
        free = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little").astype(bool)
        fits[fits] = free[index[fits]]
        wanted = np.zeros(self.slots, bool)
        wanted[index[fits]] = True
        mask = int.from_bytes(np.packbits(wanted, bitorder="little").tobytes(), "little")
        self.free &= ~mask
        self.free_count -= mask.bit_count()
        np.frombuffer(self.owners, np.int32)[index[fits]] = handles[fits]
        accepted: npt.NDArray[np.bool_] = fits
        return accepted

    def used(self) -> Iterator[int]:
        """Slots in use, as pages."""
        taken = ~self.free & ((1 << self.slots) - 1)
        while taken:
            low = taken & -taken
            yield self.base + (low.bit_length() - 1) * self.block_pages
            taken ^= low
