"""S3-FIFO: three queues (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 23).

A newcomer enters a small queue, a tenth of the whole. Used again before it reaches the end, it
moves to the main queue; otherwise it leaves and only its fingerprint stays, in a ghost queue. A key
that returns while its ghost lives enters the main queue at once. So one-time scans pass by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .base import Chain, EvictionPolicy, Links

_SMALL_SHARE = 10
_MAX_USES = 3
_IN_MAIN = 0x80
_GHOSTS = 100_000


class S3Fifo(EvictionPolicy):
    """Scan-resistant; a use only counts up, nothing moves on a hit."""

    def __init__(self, links: Links) -> None:
        super().__init__(links)
        self._small = Chain(links)
        self._main = Chain(links)
        self._ghosts: dict[int, None] = {}
        self._fingerprints: dict[int, int] = {}

    def insert(self, handle: int, fingerprint: int) -> None:
        """Enter the small queue, or the main one when its ghost is there."""
        self.links.ensure(handle)
        if fingerprint in self._ghosts:
            del self._ghosts[fingerprint]
            self.links.mark[handle] = _IN_MAIN
            self._main.push(handle)
            return
        self.links.mark[handle] = 0
        self._fingerprints[handle] = fingerprint
        self._small.push(handle)

    def touch(self, handle: int) -> None:
        """Count one use, up to three."""
        mark = self.links.mark[handle]
        if mark & ~_IN_MAIN < _MAX_USES:
            self.links.mark[handle] = mark + 1

    def remove(self, handle: int) -> None:
        """Leave without a ghost."""
        if self.links.mark[handle] & _IN_MAIN:
            self._main.unlink(handle)
        else:
            self._small.unlink(handle)
            del self._fingerprints[handle]

    def evict(self, allowed: Callable[[int], bool]) -> int | None:
        """From the small queue while it is over its share, else from the main one."""
        small_first = self._small.count * _SMALL_SHARE >= len(self) or not self._main.count
        order = (self._from_small, self._from_main)
        for take in order if small_first else reversed(order):
            victim = take(allowed)
            if victim is not None:
                return victim
        return None

    def _from_small(self, allowed: Callable[[int], bool]) -> int | None:
        for handle in self._small:
            if self.links.mark[handle]:
                self._small.unlink(handle)
                del self._fingerprints[handle]
                self.links.mark[handle] = _IN_MAIN
                self._main.push(handle)
            elif allowed(handle):
                self._small.unlink(handle)
                self._remember(self._fingerprints.pop(handle))
                return handle
        return None

    def _remember(self, fingerprint: int) -> None:
        self._ghosts[fingerprint] = None
        while len(self._ghosts) > max(64, min(_GHOSTS, self._main.count)):
            del self._ghosts[next(iter(self._ghosts))]

    def _from_main(self, allowed: Callable[[int], bool]) -> int | None:
        # each pass takes one use off what it skips, so the number of passes is bounded
        for _ in range(_MAX_USES + 1):
            for handle in list(self._main):
                mark = self.links.mark[handle]
                if mark & ~_IN_MAIN:
                    self._main.unlink(handle)
                    self.links.mark[handle] = mark - 1
                    self._main.push(handle)
                elif allowed(handle):
                    self._main.unlink(handle)
                    return handle
        return None

    def peek(self) -> int | None:
        """The oldest of the queue that would give way."""
        return next(iter(self), None)

    def __iter__(self) -> Iterator[int]:
        yield from self._small
        yield from self._main

    def __len__(self) -> int:
        return self._small.count + self._main.count
