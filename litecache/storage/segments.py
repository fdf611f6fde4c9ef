"""Slots of several block sizes from one linear space, cut into segments.

Both tiers use it: the arena over shared memory, the slab over a file. A segment belongs to one
block size from its first slot to its last; an empty one is spare again. A block larger than a
segment takes a run of segments as one region; regions start at multiples of their segments, so a
slot's region is known without being written down. Slots are named by page (`PAGE_BYTES`). Not
thread-safe: the store's lock guards it.

Slots are given out in ascending runs as long as the free space allows, so that neighbours of a
chain are neighbours on the disk.
"""

from __future__ import annotations

import functools
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .protocol import PAGE_BYTES

Ints = npt.NDArray[np.int64]

_CANDIDATES = 64
_LARGEST_SEGMENT_BYTES = 64 << 20
_LARGEST_REGION_PAGES = (64 << 20) // PAGE_BYTES
_WASTE = 0.125

# what a segment is: free for any region, part of one, being emptied by the owner, without bytes
_SPARE, _TAKEN, _LEAVING, _RETIRED = range(4)


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
        run: its segments.
        segment_pages: pages of each.
        block_pages: pages of a slot.

    Attributes:
        base: its first page.
        free: a bit for each slot that nobody has.
        owners: handle that each slot is bound to, or -1.
    """

    __slots__ = ("base", "block_pages", "free", "free_count", "owners", "run")

    def __init__(self, run: range, segment_pages: int, block_pages: int) -> None:
        self.run = run
        self.base = run.start * segment_pages
        self.block_pages = block_pages
        self.free_count = len(run) * segment_pages // block_pages
        self.free = (1 << self.free_count) - 1
        self.owners = array("i", [-1]) * self.free_count

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

    def take(self, first: int, length: int) -> range:
        """Mark a run as used; its slots as pages."""
        self.free &= ~(((1 << length) - 1) << first)
        self.free_count -= length
        step = self.block_pages
        return range(self.base + first * step, self.base + (first + length) * step, step)

    def occupy(self, slots: Ints, block_pages: Ints, handles: Ints) -> npt.NDArray[np.bool_]:
        """Mark slots that nobody has as used; bool `[n]`: which are slots of this region."""
        index, odd = np.divmod(slots - self.base, self.block_pages)
        fits: npt.NDArray[np.bool_] = (block_pages == self.block_pages) & (odd == 0)
        fits &= index < len(self.owners)
        wanted = np.zeros(len(self.owners), bool)
        wanted[index[fits]] = True
        mask = int.from_bytes(np.packbits(wanted, bitorder="little").tobytes(), "little")
        assert mask.bit_count() == fits.sum(), "a slot is occupied twice"
        self.free ^= mask
        self.free_count -= mask.bit_count()
        np.frombuffer(self.owners, np.int32)[index[fits]] = handles[fits]
        return fits


class SegmentSpace:
    """Allocates slots.

    Args:
        segment_bytes: bytes of a segment, a multiple of `PAGE_BYTES`.
        may_grow: `may_grow(new_segments, new_slots) -> bool`: whether the owner's bound allows
            that many more segments in existence (or fewer, when negative) and slots in use.

    Attributes:
        readers: slots that are being read, each with the number of reads; one that is freed
            meanwhile goes to `given_up` and is taken back when the last of them ends.
        slots_assigned: slots of all regions.
        may_shrink: the owner can empty segments (`take_surplus`).
    """

    def __init__(self, segment_bytes: int, may_grow: Callable[[int, int], bool]) -> None:
        self.segment_bytes = segment_bytes
        self.segment_pages = segment_bytes // PAGE_BYTES
        self._may_grow = may_grow
        self.slots_assigned = 0
        self.may_shrink = False
        self.readers: dict[int, int] = {}
        self.given_up: set[int] = set()
        self._states = bytearray()
        self._count = [0, 0, 0, 0]  # segments in each state
        self._regions: dict[int, Region] = {}
        self._partial: dict[int, dict[int, Region]] = {}
        self._free: Counter[int] = Counter()

    @property
    def grown(self) -> int:
        """Segments that have ever been made."""
        return len(self._states)

    @property
    def present(self) -> int:
        """Segments that hold bytes."""
        return len(self._states) - self._count[_RETIRED]

    def _set(self, segments: Iterable[int], state: int) -> None:
        for segment in segments:
            self._count[self._states[segment]] -= 1
            self._count[state] += 1
            self._states[segment] = state

    def _region_size(self, block_pages: int) -> RegionSize:
        return region_size(self.segment_pages, block_pages)

    def _spare_run(self, count: int) -> range | None:
        """The first `count` spare segments that can be a region."""
        wanted = bytes([_SPARE]) * count
        at = self._states.find(wanted)
        while at % count:  # -1, nothing found, is a multiple of one alone
            if at < 0:
                return None
            at = self._states.find(wanted, at + count - at % count)
        return range(at, at + count) if at >= 0 else None

    def allocate(self, block_pages: int, n: int) -> list[int]:
        """Up to `n` slots in runs, from what exists; fewer when there is no room."""
        slots: list[int] = []
        while (wanted := n - len(slots)) > 0:
            region, run = self._best(block_pages, wanted)
            if run < wanted:
                region = self._assign(block_pages) or region
            if region is None:
                break
            slots += region.take(*region.longest_run(wanted))
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

    def _assign(self, block_pages: int) -> Region | None:
        size = self._region_size(block_pages)
        run = self._spare_run(size.segments)
        if run is None or not self._may_grow(0, size.slots):
            return None
        return self._adopt(run, block_pages)

    def _adopt(self, run: range, block_pages: int) -> Region:
        self._set(run, _TAKEN)
        region = Region(run, self.segment_pages, block_pages)
        self._regions.update(dict.fromkeys(run, region))
        self.slots_assigned += region.free_count
        self._free[block_pages] += region.free_count
        self._partial.setdefault(block_pages, {})[region.base] = region
        return region

    def growth(self, block_pages: int) -> range | None:
        """Segments that the owner may make exist now for this block size; None at the bound.

        The owner makes them outside its lock and then calls `grow`, or does not. Some in the range
        may exist already.
        """
        size = self._region_size(block_pages)
        run = self._next_run(size.segments)
        made = run.start < self.grown  # once
        missing = self._states.count(_RETIRED, run.start, run.stop) if made else len(run)
        return run if self._may_grow(missing, size.slots) else None

    def _next_run(self, count: int) -> range:
        """The run to make next, retired segments before new ones; some of it may be spare."""
        states = self._states
        at = states.find(_RETIRED)
        while at >= 0:
            run = _run_around(at, count)
            if run.stop <= self.grown and {*states[run.start : run.stop]} <= {_SPARE, _RETIRED}:
                return run
            at = states.find(_RETIRED, run.stop)
        run = _run_around(self.grown, count)
        whole = not any(states[run.start :])  # all spare
        return range(self.grown, run.stop if whole else run.stop + count)

    def grow(self, segments: range) -> None:
        """The segments exist now."""
        new = max(0, segments.stop - self.grown)
        self._states += bytes([_RETIRED]) * new
        self._count[_RETIRED] += new
        self._set([at for at in segments if self._states[at] == _RETIRED], _SPARE)

    def _surplus(self, block_pages: int) -> int | None:
        """Spare segments that must cease to exist before a region fits the bound.

        Small blocks need more bytes of metadata a segment than large ones do, so a space that grew
        to its bound with large blocks has to shrink before it can hold small ones. None: it does
        not help.
        """
        size = self._region_size(block_pages)
        most = self._count[_SPARE] - size.segments if self.may_shrink else 0
        for surplus in range(max(0, most) + 1):
            if self._may_grow(-surplus, size.slots):
                return surplus
        return None

    def take_surplus(self, block_pages: int) -> list[int]:
        """Spare segments that the owner should empty and `retire`, to assign a region after that.

        They are nobody's until then; `keep` takes them back.
        """
        run = self._spare_run(self._region_size(block_pages).segments)
        surplus = self._surplus(block_pages) if run is not None else None
        if run is None or not surplus:
            return []
        spare = [at for at, state in enumerate(self._states) if state == _SPARE and at not in run]
        self._set(spare[-surplus:], _LEAVING)
        return spare[-surplus:]

    def retire(self, segments: Iterable[int]) -> None:
        """Segments from `take_surplus` hold no bytes any more."""
        self._set(segments, _RETIRED)

    def keep(self, segments: Iterable[int]) -> None:
        """Segments from `take_surplus` could not be emptied; no others can."""
        self._set(segments, _SPARE)
        self.may_shrink = False

    def _place(self, slot: int) -> tuple[Region, int]:
        region = self._regions[slot // self.segment_pages]
        return region, (slot - region.base) // region.block_pages

    def bind(self, slot: int, handle: int) -> None:
        """Note whose slot it is."""
        region, index = self._place(slot)
        region.owners[index] = handle

    def owner(self, slot: int) -> int:
        """Handle that the slot was bound to, or -1."""
        region, index = self._place(slot)
        return region.owners[index]

    def begin_reads(self, slots: Iterable[int]) -> None:
        """Reads of slots begin: they keep their contents until `end_reads`."""
        for slot in slots:
            self.readers[slot] = self.readers.get(slot, 0) + 1

    def end_reads(self, slots: Iterable[int]) -> None:
        """Reads of slots ended."""
        for slot in slots:
            if left := self.readers.pop(slot) - 1:
                self.readers[slot] = left
            elif slot in self.given_up:
                self.given_up.remove(slot)
                self.free(slot)

    def free(self, slot: int) -> None:
        """Take a slot back, once nobody reads it; those of an empty region are spare segments."""
        if slot in self.readers:
            self.given_up.add(slot)
            return
        region, index = self._place(slot)
        if region.free >> index & 1:
            raise AssertionError(f"slot {slot} freed twice")
        region.free |= 1 << index
        region.free_count += 1
        region.owners[index] = -1
        self._free[region.block_pages] += 1
        self._settle(region)

    def _settle(self, region: Region) -> None:
        """List a region with free slots; give an empty one back."""
        partial = self._partial[region.block_pages]
        if region.free_count < len(region.owners):
            if region.free_count:
                partial[region.base] = region
            else:
                partial.pop(region.base, None)
            return
        partial.pop(region.base, None)
        for segment in region.run:
            del self._regions[segment]
        self._set(region.run, _SPARE)
        self.slots_assigned -= region.free_count
        self._free[region.block_pages] -= region.free_count

    def occupy(self, slots: Ints, block_pages: Ints) -> npt.NDArray[np.bool_]:
        """Mark slots of a space without any as used while a store is read back.

        Args:
            slots, block_pages: int64 `[n]`, in order of trust, the best last; no slot twice.

        Returns:
            bool `[n]`: which fit; the others overlap better ones or lie outside. Those that fit are
            bound to the handles 0, 1, ...
        """
        accepted = np.zeros(len(slots), bool)
        segments = slots // self.segment_pages
        order = np.argsort(segments, kind="stable")
        starts = np.flatnonzero(np.diff(segments[order], prepend=-1))
        for rows in np.split(order, starts[1:]) if len(order) else []:
            region = self._region_at(int(segments[rows[0]]), int(block_pages[rows[-1]]))
            if region is not None:
                fits = region.occupy(slots[rows], block_pages[rows], rows)
                self._free[region.block_pages] -= int(fits.sum())
                self._settle(region)
                accepted[rows] = fits
        numbers = np.cumsum(accepted) - 1
        for region in self._all_regions():
            owners = np.frombuffer(region.owners, np.int32)
            bound = owners >= 0
            owners[bound] = numbers[owners[bound]]
        return accepted

    def _region_at(self, segment: int, block_pages: int) -> Region | None:
        """The region of a segment, or a new one around it for a block size, where that is spare."""
        if segment in self._regions or block_pages <= 0:
            return self._regions.get(segment)
        run = _run_around(segment, self._region_size(block_pages).segments)
        if run.stop > self.grown or any(self._states[run.start : run.stop]):
            return None
        return self._adopt(run, block_pages)

    def _all_regions(self) -> list[Region]:
        return list({region.base: region for region in self._regions.values()}.values())

    def in_the_way(self, slot: int, block_pages: int) -> list[int]:
        """Handles that would have to leave for a region of `block_pages` where `slot` lies."""
        count = self._region_size(block_pages).segments
        run = _run_around(slot // self.segment_pages, count)
        regions = {r.base: r for at in run if (r := self._regions.get(at)) is not None}
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
            return held + max(0, self._count[_SPARE] - surplus) * size.slots
        return held + size.slots * (self._spare_run(size.segments) is not None)

    def wants_growth(self, block_pages: int, n: int) -> bool:
        """Whether fewer than `n` slots can be given out now, and more segments may be made."""
        return self.available(block_pages) < n and self.growth(block_pages) is not None

    def worth_emptying(self, slot: int, block_pages: int) -> bool:
        """Whether emptying the region where `slot` lies can give room to `block_pages`."""
        region = self._regions[slot // self.segment_pages]
        slots = self._region_size(block_pages).slots
        return self.may_shrink or self._may_grow(0, slots - len(region.owners))

    def over_bound(self, block_pages: int) -> bool:
        """Whether a spare region is there but may not be used before more segments are spare."""
        spare = self._spare_run(self._region_size(block_pages).segments) is not None
        return self.may_shrink and spare and self._surplus(block_pages) is None

    def check_integrity(self, used: dict[int, int], extra: set[int]) -> None:
        """Compare with what the owner knows; AssertionError if they differ.

        Args:
            used: slots in use to their block pages.
            extra: slots in use whose block size the owner does not say, but for `given_up`.
        """
        mine: dict[int, int] = {}
        free: Counter[int] = Counter()
        for region in self._all_regions():
            pages, slots = region.block_pages, len(region.owners)
            assert region.free_count == region.free.bit_count(), "free count is off"
            assert region.free_count < slots, "an empty region was not returned"
            listed = region.base in self._partial[pages]
            assert listed == (region.free_count > 0), "a region with free slots is not listed"
            free[pages] += region.free_count
            taken = [at for at in range(slots) if not region.free >> at & 1]
            mine.update((region.base + at * pages, pages) for at in taken)
        known = {*used, *extra, *self.given_up}
        assert set(mine) == known, f"slots differ: {set(mine) ^ known}"
        assert all(mine[slot] == pages for slot, pages in used.items()), "block sizes differ"
        assert free == +self._free, "free counter is off"
        taken = [at for at, state in enumerate(self._states) if state == _TAKEN]
        assert taken == sorted(self._regions), "segments of regions are off"
        assert self._count == [self._states.count(state) for state in range(4)], "counts are off"


def _run_around(segment: int, count: int) -> range:
    first = segment // count * count
    return range(first, first + count)
