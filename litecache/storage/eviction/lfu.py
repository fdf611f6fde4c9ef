"""Least frequently used: one list per count, oldest first within a count."""

from __future__ import annotations

from collections.abc import Iterator

from ...hashing import BlockKey
from .base import Chain, EvictionPolicy, Links

_LEVELS = 16
_AGE_AFTER = 8
_FADE_STEPS = 4


class Lfu(EvictionPolicy):
    """What was used least often leaves first; counts stop at 15 and fade.

    After eight touches per resident handle the two lowest levels are merged and all others move
    down by one, so that a block that was popular last week does not stay for ever. The merging
    takes a few handles per touch: it is done long before the next one is due.
    """

    counts_uses = True

    def __init__(self, links: Links) -> None:
        super().__init__(links)
        # the first is what a fading has still to move into the second
        self._levels = [Chain(links) for _ in range(1 + _LEVELS)]
        self._base = 0
        self._touches = 0
        self._len = 0

    def _level(self, handle: int) -> int:
        # marks count from the number of fadings on, so that a fading need not visit each handle;
        # one that was out for more than a hundred of them may come back as popular as any
        level = (self.links.mark[handle] - self._base) & 0xFF
        return min(level, _LEVELS - 1) if level < 0x80 else -1

    def _push(self, handle: int, level: int) -> None:
        self.links.mark[handle] = (self._base + level) & 0xFF
        self._levels[1 + level].push(handle)
        self._len += 1

    def insert(self, handle: int, key: BlockKey) -> None:
        """Enter with a count of zero."""
        self._push(handle, 0)

    def touch(self, handle: int) -> None:
        """Count one use; the newest among its equals."""
        level = self._level(handle)
        self.remove(handle)
        self._push(handle, min(level + 1, _LEVELS - 1))
        self._touches += 1
        fading = self._levels[0]
        if fading.count:
            for _ in range(min(_FADE_STEPS, fading.count)):
                moved = fading.oldest
                self.remove(moved)
                self._push(moved, 0)
        elif self._touches > _AGE_AFTER * self._len:
            self._touches = 0
            self._base = (self._base + 1) & 0xFF
            self._levels = [*self._levels[1:], fading]

    def count(self, handle: int) -> None:
        """Count one use of a handle that is out."""
        level = min(self._level(handle) + 1, _LEVELS - 1)
        self.links.mark[handle] = (self._base + level) & 0xFF

    def remove(self, handle: int) -> None:
        """Leave."""
        self._levels[1 + self._level(handle)].unlink(handle)
        self._len -= 1

    def restore(self, handle: int, before: int) -> None:
        """Be the oldest among its equals."""
        level = max(0, self._level(handle))
        self.links.mark[handle] = (self._base + level) & 0xFF
        self._levels[1 + level].push_before(handle)
        self._len += 1

    def pop(self) -> int | None:
        """The oldest of the lowest count."""
        handle = self.peek()
        if handle is not None:
            self.remove(handle)
        return handle

    def put_back(self, handle: int) -> None:
        """Being in use counts as one more use."""
        self._push(handle, min(self._level(handle) + 1, _LEVELS - 1))

    def evicted(self, handle: int, key: BlockKey) -> None:
        """Nothing is remembered."""

    def peek(self) -> int | None:
        """The oldest of the lowest count."""
        return next((level.oldest for level in self._levels if level.count), None)

    def __iter__(self) -> Iterator[int]:
        for level in self._levels:
            yield from level

    def __len__(self) -> int:
        return self._len
