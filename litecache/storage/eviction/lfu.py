"""Least frequently used: one list per count, oldest first within a count."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .base import Chain, EvictionPolicy, Links

_LEVELS = 16
_AGE_AFTER = 8


class Lfu(EvictionPolicy):
    """What was used least often leaves first; counts stop at 15 and fade.

    After eight touches per resident handle the two lowest levels are merged and all others move
    down by one, so that a block that was popular last week does not stay for ever.
    """

    def __init__(self, links: Links) -> None:
        super().__init__(links)
        self._levels = [Chain(links) for _ in range(_LEVELS)]
        self._base = 0
        self._touches = 0

    def _level(self, handle: int) -> int:
        # marks count from the number of fadings on, so that a fading need not visit each handle
        return max(0, min(_LEVELS - 1, (self.links.mark[handle] - self._base) & 0xFF))

    def insert(self, handle: int, fingerprint: int) -> None:
        """Enter with a count of zero."""
        self.links.ensure(handle)
        self.links.mark[handle] = self._base
        self._levels[0].push(handle)

    def touch(self, handle: int) -> None:
        """Count one use; the newest among its equals."""
        level = self._level(handle)
        self._levels[level].unlink(handle)
        level = min(level + 1, _LEVELS - 1)
        self.links.mark[handle] = (self._base + level) & 0xFF
        self._levels[level].push(handle)
        self._touches += 1
        if self._touches > _AGE_AFTER * len(self):
            self._fade()

    def _fade(self) -> None:
        self._touches = 0
        lowest, second = self._levels[0], self._levels[1]
        self._base = (self._base + 1) & 0xFF
        for handle in list(lowest):
            lowest.unlink(handle)
            self.links.mark[handle] = self._base
            second.push(handle)
        self._levels = [*self._levels[1:], lowest]

    def remove(self, handle: int) -> None:
        """Leave."""
        self._levels[self._level(handle)].unlink(handle)

    def evict(self, allowed: Callable[[int], bool]) -> int | None:
        """The oldest of the lowest count that may go."""
        for level in self._levels:
            for handle in level:
                if allowed(handle):
                    level.unlink(handle)
                    return handle
        return None

    def peek(self) -> int | None:
        """The oldest of the lowest count."""
        return next(iter(self), None)

    def __iter__(self) -> Iterator[int]:
        for level in self._levels:
            yield from level

    def __len__(self) -> int:
        return sum(level.count for level in self._levels)
