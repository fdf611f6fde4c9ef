"""Slots of several block sizes from one linear space, cut into segments.

Both tiers use it: the arena over shared memory, the slab over a file. A segment belongs to one
block size from its first slot to its last; an empty one returns to the pool. A block larger than a
segment takes a run of segments as one region; regions start at multiples of their segments, so a
slot's region is known without being written down. Slots are named by page (`PAGE_BYTES`). Not
thread-safe: the store's lock guards it.

Slots are given out in ascending runs as long as the free space allows, so that neighbours of a
chain are neighbours on the disk.
"""

from __future__ import annotations

import functools
import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .protocol import PAGE_BYTES

_CANDIDATES = 64
_LARGEST_SEGMENT_BYTES = 64 << 20
_LARGEST_REGION_PAGES = (64 << 20) // PAGE_BYTES
_WASTE = 0.125


def pick_segment_bytes(total_bytes: int) -> int:
    """Segment size for a tier: 64 MiB, or a sixteenth of a small tier, a power of two."""
    size = _LARGEST_SEGMENT_BYTES
    while size > 64 << 10 and size * 16 > total_bytes:
        size //= 2
    return size


class RegionSize(NamedTuple):
    """Segments of a region, and the slots that they are cut into."""

    segments: int
    slots: int


@functools.lru_cache(maxsize=256)
def region_size(segment_pages: int, block_pages: int) -> RegionSize:
    """Size of the regions of a block size: the fewest segments that waste little of their end."""
    smallest = -(-block_pages // segment_pages)
    largest = max(smallest, _LARGEST_REGION_PAGES // segment_pages)
    for count in range(smallest, min(largest, smallest + 16) + 1):
        slots, wasted = divmod(count * segment_pages, block_pages)
        if wasted <= _WASTE * count * segment_pages:
            return RegionSize(count, slots)
    return RegionSize(smallest, smallest * segment_pages // block_pages)


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


class SegmentPool:
    """Which segments of a tier exist, and which of them belong to no region.

    A segment is spare, taken (by a region), leaving (its owner is emptying it), or retired: it
    holds no bytes until it is made again.

    Attributes:
        grown: segments from here on have never been made.
    """

    def __init__(self) -> None:
        self.grown = 0
        self._spare: set[int] = set()
        self._lowest: list[int] = []  # a heap of all that are spare, and of some that were
        self._leaving: set[int] = set()
        self._retired: set[int] = set()

    @property
    def present(self) -> int:
        """Segments that hold bytes."""
        return self.grown - len(self._retired)

    @property
    def spare(self) -> int:
        """Segments that can be taken."""
        return len(self._spare)

    def spare_run(self, count: int) -> range | None:
        """The first run of `count` spare segments."""
        if count == 1:
            while self._lowest and self._lowest[0] not in self._spare:
                heapq.heappop(self._lowest)
            return range(self._lowest[0], self._lowest[0] + 1) if self._lowest else None
        for first in sorted(segment for segment in self._spare if segment % count == 0):
            if self._spare.issuperset(range(first, first + count)):
                return range(first, first + count)
        return None

    def take(self, run: range) -> bool:
        """A region begins in a run; False, and nothing changes, unless all of it is spare."""
        if not self._spare.issuperset(run):
            return False
        self._spare.difference_update(run)
        return True

    def give_back(self, run: range) -> None:
        """The region in a run is empty."""
        self._add_spare(run)

    def _add_spare(self, segments: Iterable[int]) -> None:
        for segment in segments:
            self._spare.add(segment)
            heapq.heappush(self._lowest, segment)

    def next_run(self, count: int) -> range:
        """The run to make next, retired segments before new ones; some of it may be spare."""
        usable = self._spare | self._retired
        for first in sorted({segment // count * count for segment in self._retired}):
            if usable.issuperset(range(first, first + count)):
                return range(first, first + count)
        first = self.grown // count * count
        if not self._spare.issuperset(range(first, self.grown)):
            first += count
        return range(self.grown, first + count)

    def missing(self, run: range) -> int:
        """How many of a run hold no bytes."""
        return sum(segment >= self.grown or segment in self._retired for segment in run)

    def grow(self, run: range) -> None:
        """The segments of a run exist now."""
        self._add_spare(s for s in run if s >= self.grown or s in self._retired)
        self._retired.difference_update(run)
        self.grown = max(self.grown, run.stop)

    def begin_leaving(self, n: int, but: range) -> list[int]:
        """The last `n` spare segments outside a run are to be emptied; nobody's until then."""
        leaving = sorted(self._spare.difference(but))[-n:]
        self._spare.difference_update(leaving)
        self._leaving.update(leaving)
        return leaving

    def retire(self, segments: Iterable[int]) -> None:
        """Segments that were leaving hold no bytes any more."""
        self._leaving.difference_update(segments)
        self._retired.update(segments)

    def keep(self, segments: Iterable[int]) -> None:
        """Segments that were leaving could not be emptied."""
        self._leaving.difference_update(segments)
        self._add_spare(segments)

    def check_integrity(self, taken: int) -> None:
        """AssertionError unless each segment is in one state.

        Args:
            taken: segments of all regions.
        """
        idle = len(self._spare) + len(self._retired) + len(self._leaving)
        assert idle + taken == self.grown, "segments were lost"
        assert not self._spare & (self._retired | self._leaving), "a segment is in two states"


class SegmentSpace:
    """Allocates slots.

    Args:
        segment_bytes: bytes of a segment, a multiple of `PAGE_BYTES`.
        may_grow: `may_grow(new_segments, new_slots) -> bool`: whether the owner's bound allows
            that many more segments in existence (or fewer, when negative) and slots in use.
    """

    def __init__(self, segment_bytes: int, may_grow: Callable[[int, int], bool]) -> None:
        self.segment_bytes = segment_bytes
        self.segment_pages = segment_bytes // PAGE_BYTES
        self._may_grow = may_grow
        self.slots_assigned = 0
        self.may_shrink = False
        self._pool = SegmentPool()
        self._regions: dict[int, Region] = {}
        self._partial: dict[int, dict[int, Region]] = {}
        self._free: Counter[int] = Counter()

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
        self._free[block_pages] -= len(slots)
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

    def _region_size(self, block_pages: int) -> RegionSize:
        return region_size(self.segment_pages, block_pages)

    def _assign(self, block_pages: int) -> Region | None:
        size = self._region_size(block_pages)
        run = self._pool.spare_run(size.segments)
        if run is None or not self._may_grow(0, size.slots):
            return None
        self._pool.take(run)
        return self._adopt(run, block_pages)

    def _adopt(self, run: range, block_pages: int) -> Region:
        region = Region(run.start * self.segment_pages, len(run), self.segment_pages, block_pages)
        for segment in run:
            self._regions[segment] = region
        self.slots_assigned += region.slots
        self._free[block_pages] += region.slots
        self._partial.setdefault(block_pages, {})[region.base] = region
        return region

    @property
    def grown(self) -> int:
        """Segments that have ever been made."""
        return self._pool.grown

    @property
    def present(self) -> int:
        """Segments that hold bytes."""
        return self._pool.present

    def growth(self, block_pages: int) -> range | None:
        """Segments that the owner may make exist now for this block size; None at the bound.

        The owner makes them outside its lock and then calls `grow`, or does not. Some in the range
        may exist already.
        """
        size = self._region_size(block_pages)
        run = self._pool.next_run(size.segments)
        return run if self._may_grow(self._pool.missing(run), size.slots) else None

    def grow(self, segments: range) -> None:
        """The segments exist now."""
        self._pool.grow(segments)

    def _surplus(self, block_pages: int) -> int | None:
        """Spare segments that must cease to exist before a region fits the bound.

        Small blocks need more bytes of metadata a segment than large ones do, so a space that grew
        to its bound with large blocks has to shrink before it can hold small ones. None: it does
        not help.
        """
        size = self._region_size(block_pages)
        most = self._pool.spare - size.segments if self.may_shrink else 0
        return next((k for k in range(max(0, most) + 1) if self._may_grow(-k, size.slots)), None)

    def take_surplus(self, block_pages: int) -> list[int]:
        """Spare segments that the owner should empty and `retire`, to assign a region after that.

        They are nobody's until then; `keep` takes them back.
        """
        run = self._pool.spare_run(self._region_size(block_pages).segments)
        surplus = self._surplus(block_pages) if run is not None else None
        if run is None or not surplus:
            return []
        return self._pool.begin_leaving(surplus, but=run)

    def retire(self, segments: Iterable[int]) -> None:
        """Segments from `take_surplus` hold no bytes any more."""
        self._pool.retire(segments)

    def keep(self, segments: Iterable[int]) -> None:
        """Segments from `take_surplus` could not be emptied; no others can."""
        self._pool.keep(segments)
        self.may_shrink = False

    def bind(self, slot: int, handle: int) -> None:
        """Note whose slot it is."""
        region = self._regions[slot // self.segment_pages]
        region.owners[(slot - region.base) // region.block_pages] = handle

    def free(self, slot: int) -> None:
        """Take a slot back; its region returns to the pool when it is empty."""
        region = self._regions[slot // self.segment_pages]
        bit = 1 << (slot - region.base) // region.block_pages
        if region.free & bit:
            raise AssertionError(f"slot {slot} freed twice")
        region.free |= bit
        region.free_count += 1
        self._free[region.block_pages] += 1
        region.owners[(slot - region.base) // region.block_pages] = -1
        self._partial.setdefault(region.block_pages, {})[region.base] = region
        if region.free_count == region.slots:
            self._return(region)

    def _return(self, region: Region) -> None:
        self._partial[region.block_pages].pop(region.base, None)
        first = region.base // self.segment_pages
        run = range(first, first + region.segments)
        for segment in run:
            del self._regions[segment]
        self._pool.give_back(run)
        self.slots_assigned -= region.slots
        self._free[region.block_pages] -= region.slots

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
        fits = region.occupy(slots, block_pages, handles)
        self._free[pages] -= int(fits.sum())
        if not region.free_count:
            self._partial[pages].pop(region.base, None)
        elif region.free_count == region.slots:
            self._return(region)
        return fits

    def _adopt_at(self, segment: int, pages: int) -> Region | None:
        run = self._run_around(segment, pages)
        return self._adopt(run, pages) if self._pool.take(run) else None

    def _run_around(self, segment: int, block_pages: int) -> range:
        count = self._region_size(block_pages).segments
        first = segment // count * count
        return range(first, first + count)

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
        run = self._run_around(slot // self.segment_pages, block_pages)
        regions = {id(r): r for s in run if (r := self._regions.get(s)) is not None}
        return [h for region in regions.values() for h in region.owners if h >= 0]

    def available(self, block_pages: int) -> int:
        """Slots of a block size that can be given out now, at least.

        Those behind a surplus that must be retired first count too.
        """
        held = self._free[block_pages]
        surplus = self._surplus(block_pages)
        if surplus is None:
            return held
        size = self._region_size(block_pages)
        if size.segments == 1:
            return held + max(0, self._pool.spare - surplus) * size.slots
        return held + size.slots * (self._pool.spare_run(size.segments) is not None)

    def allocatable(self, block_pages: int) -> bool:
        """Whether a slot can be given out now."""
        return self.available(block_pages) > 0

    def worth_emptying(self, slot: int, block_pages: int) -> bool:
        """Whether emptying the region where `slot` lies can give room to `block_pages`."""
        region = self._regions[slot // self.segment_pages]
        slots = self._region_size(block_pages).slots
        return self.may_shrink or self._may_grow(0, slots - region.slots)

    def over_bound(self, block_pages: int) -> bool:
        """Whether a spare region is there but may not be used before more segments are spare."""
        spare = self._pool.spare_run(self._region_size(block_pages).segments) is not None
        return self.may_shrink and spare and self._surplus(block_pages) is None

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
        self._pool.check_integrity(len(self._regions))
        for pages, count in self._free.items():
            free = sum(region.free_count for region in self._partial.get(pages, {}).values())
            assert count == free, "free counter is off"


class SlotUse:
    """Counts the readers of each slot; under the store's lock.

    Args:
        space: takes back slots that nobody reads any more.

    Attributes:
        given_up: slots without a block that wait for their last reader.
    """

    def __init__(self, space: SegmentSpace) -> None:
        self._space = space
        self._readers: dict[int, int] = {}
        self.given_up: set[int] = set()

    def __contains__(self, slot: int) -> bool:
        return slot in self._readers

    def __len__(self) -> int:
        return len(self._readers)

    def begin(self, slots: Iterable[int]) -> None:
        """Reads of slots begin: they keep their contents until `end`."""
        readers = self._readers
        for slot in slots:
            readers[slot] = readers.get(slot, 0) + 1

    def end(self, slots: Iterable[int]) -> None:
        """Reads of slots ended."""
        readers = self._readers
        for slot in slots:
            left = readers.pop(slot) - 1
            if left:
                readers[slot] = left
            elif slot in self.given_up:
                self.given_up.remove(slot)
                self._space.free(slot)

    def give_up(self, slot: int) -> None:
        """The slot has no block any more: free it, now or when its last reader ends."""
        if slot in self._readers:
            self.given_up.add(slot)
        else:
            self._space.free(slot)
