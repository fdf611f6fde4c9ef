"""Slots of several block sizes from one linear space, cut into segments.

Both tiers use it: the arena over shared memory, the slab over a file. A segment belongs to one
block size from its first slot to its last; an empty one returns to the pool. A block larger than a
segment takes a run of segments as one region. Slots are named by page (`PAGE_BYTES`). Not
thread-safe: the store's lock guards it.

Slots are given out in ascending runs as long as the free space allows, so that neighbours of a
chain are neighbours on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from .protocol import PAGE_BYTES
from .region import Region
from .segment_pool import SegmentPool
from .segment_sizes import RegionSize, region_size

_CANDIDATES = 64


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
        self._used[region.block_pages] -= 1
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
        self._used[pages] = self._used.get(pages, 0) + int(fits.sum())
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
        held = sum(region.free_count for region in self._partial.get(block_pages, {}).values())
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
        self._pool.check_integrity(len(self._regions))
        for pages, count in self._used.items():
            assert count == sum(p == pages for p in mine.values()), "used counter is off"
