"""Slots of several block sizes from one linear space, cut into segments.

Both tiers use it: the arena over shared memory, the slab over a file. A segment belongs to one
block size from its first slot to its last; an empty one returns to the pool. A block larger than a
segment takes a run of segments as one region. Slots are named by page (`PAGE_BYTES`). Not
thread-safe: the store's lock guards it.

Slots are given out in ascending runs as long as the free space allows, so that neighbours of a
chain are neighbours on the disk.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from .protocol import PAGE_BYTES

_CANDIDATES = 64
_LARGEST_REGION_BYTES = 64 << 20
_WASTE = 0.125


def pick_segment_bytes(total_bytes: int) -> int:
    """Segment size for a tier: 64 MiB, or a sixteenth of a small tier, a power of two."""
    size = 64 << 20
    while size > 64 << 10 and size * 16 > total_bytes:
        size //= 2
    return size


class Region:
    """One segment (or run of segments) in use, with a bit set for each free slot."""

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

    def used(self) -> Iterator[int]:
        """Slots in use, as pages."""
        taken = ~self.free & ((1 << self.slots) - 1)
        while taken:
            low = taken & -taken
            yield self.base + (low.bit_length() - 1) * self.block_pages
            taken ^= low


class SegmentSpace:
    """Allocates slots.

    Args:
        segment_bytes: bytes of a segment, a multiple of `PAGE_BYTES`.
        may_grow: `may_grow(new_segments, new_slots) -> bool`: whether the owner's bound allows
            that many more segments in existence and slots in use.
    """

    def __init__(self, segment_bytes: int, may_grow: Callable[[int, int], bool]) -> None:
        self.segment_bytes = segment_bytes
        self.segment_pages = segment_bytes // PAGE_BYTES
        self._may_grow = may_grow
        self.grown = 0
        self.slots_assigned = 0
        self._spare: set[int] = set()
        self._regions: dict[int, Region] = {}
        self._partial: dict[int, dict[int, Region]] = {}
        self._used: dict[int, int] = {}

    def allocate(self, block_pages: int, n: int) -> list[int]:
        """Up to `n` slots in runs, from what exists; fewer when there is no room."""
        slots: list[int] = []
        while len(slots) < n:
            region, run = self._best(block_pages, n - len(slots))
            if run < n - len(slots):
                fresh = self._assign(block_pages)
                if fresh is not None:
                    region = fresh
            if region is None:
                break
            slots += region.take(*region.longest_run(n - len(slots)))
            if not region.free_count:
                del self._partial[block_pages][region.base]
        self._used[block_pages] = self._used.get(block_pages, 0) + len(slots)
        return slots

    def _best(self, block_pages: int, n: int) -> tuple[Region | None, int]:
        best, best_run = None, 0
        for seen, region in enumerate(self._partial.get(block_pages, {}).values()):
            if region.free_count > best_run:
                run = region.longest_run(n)[1]
                if run > best_run:
                    best, best_run = region, run
            if best_run >= n or seen >= _CANDIDATES:
                break
        return best, best_run

    def region_segments(self, block_pages: int) -> int:
        """Segments in a region of this block size: the fewest that waste little of their end.

        It depends on the sizes alone and regions start at multiples of it, so a slot's region is
        known without being written down.
        """
        smallest = -(-block_pages // self.segment_pages)
        largest = max(smallest, _LARGEST_REGION_BYTES // self.segment_bytes)
        for count in range(smallest, min(largest, smallest + 16) + 1):
            if count * self.segment_pages % block_pages <= _WASTE * count * self.segment_pages:
                return count
        return smallest

    def _assign(self, block_pages: int) -> Region | None:
        count = self.region_segments(block_pages)
        first = self._spare_run(count)
        slots = count * self.segment_pages // block_pages
        if first is None or not self._may_grow(0, slots):
            return None
        self._spare.difference_update(range(first, first + count))
        return self._adopt(first, count, block_pages)

    def _adopt(self, first: int, count: int, block_pages: int) -> Region:
        region = Region(first * self.segment_pages, count, self.segment_pages, block_pages)
        for segment in range(first, first + count):
            self._regions[segment] = region
        self.slots_assigned += region.slots
        self._partial.setdefault(block_pages, {})[region.base] = region
        return region

    def _spare_run(self, count: int) -> int | None:
        if count == 1:
            return min(self._spare) if self._spare else None
        for first in sorted(segment for segment in self._spare if segment % count == 0):
            if self._spare.issuperset(range(first, first + count)):
                return first
        return None

    def growth(self, block_pages: int) -> range | None:
        """Segments that the owner may make exist now for this block size; None at the bound.

        The owner makes them outside its lock and then calls `grow`, or does not.
        """
        count = self.region_segments(block_pages)
        first = self.grown // count * count
        if not self._spare.issuperset(range(first, self.grown)):
            first += count
        new = range(self.grown, first + count)
        slots = count * self.segment_pages // block_pages
        return new if self._may_grow(len(new), slots) else None

    def bind(self, slot: int, handle: int) -> None:
        """Note whose slot it is."""
        region = self._regions[slot // self.segment_pages]
        region.owners[(slot - region.base) // region.block_pages] = handle

    def grow(self, segments: range) -> None:
        """The segments exist now."""
        self.grown = max(self.grown, segments.stop)
        self._spare.update(segments)

    def free(self, slot: int) -> None:
        """Take a slot back; its region returns to the pool when it is empty."""
        region = self._regions[slot // self.segment_pages]
        bit = 1 << (slot - region.base) // region.block_pages
        if region.free & bit:
            raise AssertionError(f"slot {slot} freed twice")
        region.free |= bit
        region.free_count += 1
        self._used[region.block_pages] -= 1
        region.owners[(slot - region.base) // region.block_pages] = -1
        self._partial.setdefault(region.block_pages, {})[region.base] = region
        if region.free_count == region.slots:
            self._return(region)

    def _return(self, region: Region) -> None:
        self._partial[region.block_pages].pop(region.base, None)
        first = region.base // self.segment_pages
        for segment in range(first, first + region.segments):
            del self._regions[segment]
            self._spare.add(segment)
        self.slots_assigned -= region.slots

    def occupy(
        self,
        slots: npt.NDArray[np.int64],
        block_pages: npt.NDArray[np.int64],
        handles: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.bool_]:
        """Mark slots as used while a store is read back.

        Args:
            slots, block_pages, handles: int64 `[n]`, in order of trust, the best last.

        Returns:
            bool `[n]`: which fit; the others overlap better ones or lie outside.
        """
        accepted = np.zeros(len(slots), bool)
        segments = slots // self.segment_pages
        order = np.argsort(segments, kind="stable")
        starts = np.flatnonzero(np.diff(segments[order], prepend=-1))
        for rows in np.split(order, starts[1:]):
            if len(rows):
                accepted[rows] = self._occupy_segment(
                    int(segments[rows[0]]), slots[rows], block_pages[rows], handles[rows]
                )
        return accepted

    def _occupy_segment(
        self,
        segment: int,
        slots: npt.NDArray[np.int64],
        block_pages: npt.NDArray[np.int64],
        handles: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.bool_]:
        none = np.zeros(len(slots), bool)
        region = self._regions.get(segment)
        pages = int(block_pages[-1]) if region is None else region.block_pages
        if pages <= 0 or segment >= self.grown:
            return none
        if region is None:
            region = self._adopt_at(segment, pages)
            if region is None:
                return none
        index, odd = np.divmod(slots - region.base, pages)
        fits = (block_pages == pages) & (odd == 0) & (index >= 0) & (index < region.slots)
        # of several for one slot the last wins
        _, last = np.unique(index[::-1], return_index=True)
        unique = none.copy()
        unique[len(slots) - 1 - last] = True
        fits &= unique
        wanted = np.zeros(region.slots, bool)
        wanted[index[fits]] = True
        mask = int.from_bytes(np.packbits(wanted, bitorder="little").tobytes(), "little")
        taken = mask & ~region.free
        if taken:
            clash = [bool(taken >> i & 1) for i in range(region.slots)]
            fits[fits] = ~np.array(clash)[index[fits]]
            mask &= region.free
        region.free &= ~mask
        region.free_count -= mask.bit_count()
        np.frombuffer(region.owners, np.int32)[index[fits]] = handles[fits]
        self._used[pages] = self._used.get(pages, 0) + mask.bit_count()
        if not region.free_count:
            self._partial[pages].pop(region.base, None)
        elif region.free_count == region.slots:
            self._return(region)
        accepted: npt.NDArray[np.bool_] = fits
        return accepted

    def _adopt_at(self, segment: int, pages: int) -> Region | None:
        count = self.region_segments(pages)
        first = segment // count * count
        run = range(first, first + count)
        if not self._spare.issuperset(run):
            return None
        self._spare.difference_update(run)
        return self._adopt(first, count, pages)

    def owner(self, slot: int) -> int:
        """Handle that the slot was bound to, or -1."""
        region = self._regions[slot // self.segment_pages]
        return region.owners[(slot - region.base) // region.block_pages]

    def rebind(self, renumbered: npt.NDArray[np.int64]) -> None:
        """Replace every handle `h` by `renumbered[h]`."""
        for region in {id(r): r for r in self._regions.values()}.values():
            owners = np.frombuffer(region.owners, np.int32)
            held = owners >= 0
            owners[held] = renumbered[owners[held]]

    def in_the_way(self, slot: int, block_pages: int) -> list[int]:
        """Handles that would have to leave for a region of `block_pages` where `slot` lies."""
        count = self.region_segments(block_pages)
        first = slot // self.segment_pages // count * count
        run = range(first, first + count)
        regions = {id(r): r for s in run if (r := self._regions.get(s)) is not None}
        return [h for region in regions.values() for h in region.owners if h >= 0]

    def available(self, block_pages: int) -> int:
        """Slots of a block size that can be given out now, at least."""
        held = sum(region.free_count for region in self._partial.get(block_pages, {}).values())
        count = self.region_segments(block_pages)
        if count == 1:
            return held + len(self._spare) * (self.segment_pages // block_pages)
        spare = self._spare_run(count) is not None
        return held + spare * (count * self.segment_pages // block_pages)

    def allocatable(self, block_pages: int) -> bool:
        """Whether a slot can be given out now."""
        return self.available(block_pages) > 0

    def used_slots(self, block_pages: int) -> int:
        """Slots in use of one block size."""
        return self._used.get(block_pages, 0)

    def check_integrity(self, used: dict[int, int], extra: set[int]) -> None:
        """Compare with what the owner knows; AssertionError if they differ.

        Args:
            used: slots in use to their block pages.
            extra: slots in use whose block size the owner does not say.
        """
        mine: dict[int, int] = {}
        for region in {id(r): r for r in self._regions.values()}.values():
            assert region.free_count == region.free.bit_count(), "free count is off"
            assert region.free_count < region.slots, "an empty region was not returned"
            partial = region.base in self._partial.get(region.block_pages, {})
            assert partial == (region.free_count > 0), "a region with free slots is not listed"
            mine.update(dict.fromkeys(region.used(), region.block_pages))
        assert set(mine) == {*used, *extra}, f"slots differ: {set(mine) ^ {*used, *extra}}"
        assert all(mine[slot] == pages for slot, pages in used.items()), "block sizes differ"
        assert len(self._spare) + len(self._regions) == self.grown, "segments were lost"
        for pages, count in self._used.items():
            assert count == sum(p == pages for p in mine.values()), "used counter is off"
