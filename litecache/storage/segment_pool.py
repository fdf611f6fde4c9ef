"""Which segments of a tier exist, and which of them belong to no region.

A segment is spare, taken (by a region), leaving (its owner is emptying it), or retired: it holds no
bytes until it is made again. Runs of segments start at multiples of their length.
"""

from __future__ import annotations

from collections.abc import Iterable


class SegmentPool:
    """Gives segments out and takes them back.

    Attributes:
        grown: segments from here on have never been made.
    """

    def __init__(self) -> None:
        self.grown = 0
        self._spare: set[int] = set()
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
            first = min(self._spare, default=-1)
            return range(first, first + 1) if first >= 0 else None
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
        self._spare.update(run)

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
        self._spare.update(s for s in run if s >= self.grown or s in self._retired)
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
        self._spare.update(segments)

    def check_integrity(self, taken: int) -> None:
        """AssertionError unless each segment is in one state.

        Args:
            taken: segments of all regions.
        """
        idle = len(self._spare) + len(self._retired) + len(self._leaving)
        assert idle + taken == self.grown, "segments were lost"
        assert not self._spare & (self._retired | self._leaving), "a segment is in two states"
