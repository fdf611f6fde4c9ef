"""Disk slots under I/O: what is being read keeps its place, whoever gives the slot up meanwhile."""

from __future__ import annotations

from collections.abc import Iterable

from .segments import SegmentSpace


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
