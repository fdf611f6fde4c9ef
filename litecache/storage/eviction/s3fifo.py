"""S3-FIFO: three queues (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 23).

A newcomer enters a small queue, a tenth of the whole. Used again before it reaches the end, it
moves to the main queue; otherwise it leaves and only its key stays, in a ghost queue. A key that
returns while its ghost lives enters the main queue at once. So one-time scans pass by.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from ...hashing import BlockKey
from .base import Chain, EvictionPolicy, Links

_SMALL_SHARE = 10
_MAX_USES = 3
_IN_MAIN = 0x80
_GHOSTS = 100_000
_MOST_MOVES = 1024
"""Used blocks that one `pop` gives another round; then one leaves although it was used."""


class S3Fifo(EvictionPolicy):
    """Scan-resistant; a use only counts up, nothing moves on a hit."""

    counts_uses = True

    def __init__(self, links: Links) -> None:
        super().__init__(links)
        self._small = Chain(links)
        self._main = Chain(links)
        # a plain dict takes longer and longer to find its first key
        self._ghosts: OrderedDict[BlockKey, None] = OrderedDict()
        self._in_use = 0

    def _chain_of(self, handle: int) -> Chain:
        return self._main if self.links.mark[handle] & _IN_MAIN else self._small

    def insert(self, handle: int, key: BlockKey) -> None:
        """Enter the small queue, or the main one when its ghost is there."""
        known = key in self._ghosts
        if known:
            del self._ghosts[key]
        self.links.mark[handle] = _IN_MAIN if known else 0
        self._chain_of(handle).push(handle)

    def touch(self, handle: int) -> None:
        """Count one use, up to three."""
        mark = self.links.mark[handle]
        if mark & ~_IN_MAIN < _MAX_USES:
            self.links.mark[handle] = mark + 1

    count = touch

    def remove(self, handle: int) -> None:
        """Leave without a ghost."""
        self._chain_of(handle).unlink(handle)

    def restore(self, handle: int, before: int) -> None:
        """Be the oldest of the queue in which it was."""
        self._chain_of(handle).push_before(handle)

    def pop(self) -> int | None:
        """From the small queue while it is over its share, else from the main one.

        By turns, as long as what comes is in use: else one queue could hide the other.
        """
        mark, small, main = self.links.mark, self._small, self._main
        for _ in range(_MOST_MOVES):
            over = (small.count * _SMALL_SHARE >= len(self)) ^ (self._in_use & 1)
            if small.count and (over or not main.count):
                handle = small.oldest
                small.unlink(handle)
                if not mark[handle]:
                    return handle
                mark[handle] = _IN_MAIN
            elif main.count:
                handle = main.oldest
                main.unlink(handle)
                if not mark[handle] & ~_IN_MAIN:
                    return handle
                mark[handle] -= 1
            else:
                return None
            main.push(handle)
        handle = main.oldest
        main.unlink(handle)
        return handle

    def put_back(self, handle: int) -> None:
        """Become the newest of the queue from which it came."""
        self._in_use += 1
        self._chain_of(handle).push(handle)

    def evicted(self, handle: int, key: BlockKey) -> None:
        """Remember what left without having been used."""
        self._in_use = 0
        if self.links.mark[handle] & _IN_MAIN:
            return
        self._ghosts[key] = None
        for _ in range(min(2, len(self._ghosts) - max(64, min(_GHOSTS, self._main.count)))):
            self._ghosts.popitem(last=False)

    def peek(self) -> int | None:
        """The oldest of the queue that would give way."""
        return next(iter(self), None)

    def __iter__(self) -> Iterator[int]:
        yield from self._small
        yield from self._main

    def __len__(self) -> int:
        return self._small.count + self._main.count
