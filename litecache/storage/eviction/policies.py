"""Orders in which blocks leave a tier: `lru`, `lfu`, `s3fifo`, and what `register` adds.

A policy sees handles (entry numbers of a tier), never bytes. A handle stands in one list of its
tier at a time, so all lists of a tier share one `Links`: doubly linked over two int32 columns, and
a byte for the policy. Not thread-safe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError
from ...hashing import BlockKey
from ..block_index import grown_by

_NONE = -1
_LEVELS = 16
_AGE_AFTER = 8
_FADE_STEPS = 4
_SMALL_SHARE = 10
_MAX_USES = 3
_IN_MAIN = 0x80
_GHOSTS = 100_000
_MOST_MOVES = 1024
"""Used blocks that one `pop` gives another round; then one leaves although it was used."""


class Links:
    """Storage of linked lists over handles `0 .. n - 1`, shared by the lists of one tier."""

    def __init__(self) -> None:
        self.older = array("i")
        self.newer = array("i")
        self.mark = array("B")

    def ensure(self, handle: int) -> None:
        """Make room for `handle`."""
        missing = handle + 1 - len(self.older)
        if missing > 0:
            rows = grown_by(len(self.older), missing)
            self.older.frombytes(bytes(4 * rows))
            self.newer.frombytes(bytes(4 * rows))
            self.mark.frombytes(bytes(rows))


class Chain:
    """One list, oldest to newest."""

    __slots__ = ("count", "links", "newest", "oldest")

    def __init__(self, links: Links) -> None:
        self.links = links
        self.oldest = self.newest = _NONE
        self.count = 0

    def push(self, handle: int) -> None:
        """Add as the newest."""
        older, newer = self.links.older, self.links.newer
        older[handle], newer[handle] = self.newest, _NONE
        if self.newest == _NONE:
            self.oldest = handle
        else:
            newer[self.newest] = handle
        self.newest = handle
        self.count += 1

    def push_before(self, handle: int, other: int = _NONE) -> None:
        """Add as the next older of `other`, which is in; without one as the oldest of all."""
        older, newer = self.links.older, self.links.newer
        after = self.oldest if other == _NONE else other
        if after == _NONE:
            return self.push(handle)
        before = older[after]
        older[handle], newer[handle] = before, after
        older[after] = handle
        if before == _NONE:
            self.oldest = handle
        else:
            newer[before] = handle
        self.count += 1
        return None

    def extend(self, handles: npt.NDArray[np.int64]) -> None:
        """Add many as the newest, in order."""
        if not len(handles):
            return
        older = np.frombuffer(self.links.older, np.int32)
        newer = np.frombuffer(self.links.newer, np.int32)
        older[handles[1:]], newer[handles[:-1]] = handles[:-1], handles[1:]
        first, last = int(handles[0]), int(handles[-1])
        older[first], newer[last] = self.newest, _NONE
        if self.newest == _NONE:
            self.oldest = first
        else:
            newer[self.newest] = first
        self.newest = last
        self.count += len(handles)

    def unlink(self, handle: int) -> None:
        """Take out; the caller knows that it is in this list."""
        links = self.links
        older, newer = links.older[handle], links.newer[handle]
        if older == _NONE:
            self.oldest = newer
        else:
            links.newer[older] = newer
        if newer == _NONE:
            self.newest = older
        else:
            links.older[newer] = older
        self.count -= 1

    def __iter__(self) -> Iterator[int]:
        handle = self.oldest
        while handle != _NONE:
            following = self.links.newer[handle]
            yield handle
            handle = following


class EvictionPolicy(ABC):
    """Decides what leaves first. Every method is O(1), amortised, and bounded in a single call.

    `Queues` takes blocks out for as long as others that follow them are in, so a policy sees no
    chains: `restore` brings such a block back.

    Args:
        links: shared by the policies of one tier; it has room for every handle that is given.
    """

    counts_uses = False
    """Whether `count` does anything."""

    def __init__(self, links: Links) -> None:
        self.links = links

    @abstractmethod
    def insert(self, handle: int, key: BlockKey) -> None:
        """A newcomer enters."""

    def extend(self, handles: npt.NDArray[np.int64], keys: list[BlockKey]) -> None:
        """Many newcomers enter, oldest first; `keys` are those of all handles of the tier."""
        for handle in handles.tolist():
            self.insert(handle, keys[handle])

    @abstractmethod
    def touch(self, handle: int) -> None:
        """A handle that is in was used."""

    @abstractmethod
    def count(self, handle: int) -> None:
        """A handle that was taken out by `remove`, to be restored, was used meanwhile."""

    @abstractmethod
    def remove(self, handle: int) -> None:
        """A handle leaves, or goes out until `restore`."""

    @abstractmethod
    def restore(self, handle: int, before: int) -> None:
        """A handle that was removed is back, with the uses that it had.

        Args:
            handle: to go next, or
            before: just before this one, if that is not -1; it is in.
        """

    @abstractmethod
    def pop(self) -> int | None:
        """Take out the first in the policy's order; None when empty."""

    @abstractmethod
    def put_back(self, handle: int) -> None:
        """What was popped is in use and may not go now; others come first."""

    @abstractmethod
    def evicted(self, handle: int, key: BlockKey) -> None:
        """What was popped has gone."""

    @abstractmethod
    def peek(self) -> int | None:
        """About the next to go, to compare policies with each other by age; None when empty."""

    @abstractmethod
    def __iter__(self) -> Iterator[int]:
        """All handles, about in the order in which they would leave."""

    @abstractmethod
    def __len__(self) -> int:
        """Handles that are in."""


class Lru(EvictionPolicy):
    """Least recently used, the default: what was not used for the longest time leaves first."""

    def __init__(self, links: Links) -> None:
        super().__init__(links)
        self._chain = Chain(links)

    def insert(self, handle: int, key: BlockKey) -> None:
        """Enter as the newest."""
        self._chain.push(handle)

    def extend(self, handles: npt.NDArray[np.int64], keys: list[BlockKey]) -> None:
        """Many enter, oldest first."""
        self._chain.extend(handles)

    def touch(self, handle: int) -> None:
        """Become the newest."""
        if self._chain.newest != handle:
            self._chain.unlink(handle)
            self._chain.push(handle)

    def count(self, handle: int) -> None:
        """Nothing: what follows it was touched."""

    def remove(self, handle: int) -> None:
        """Leave."""
        self._chain.unlink(handle)

    def restore(self, handle: int, before: int) -> None:
        """Take the place before another, or be the oldest."""
        self._chain.push_before(handle, before)

    def pop(self) -> int | None:
        """The oldest."""
        handle = self.peek()
        if handle is not None:
            self._chain.unlink(handle)
        return handle

    def put_back(self, handle: int) -> None:
        """Become the newest."""
        self._chain.push(handle)

    def evicted(self, handle: int, key: BlockKey) -> None:
        """Nothing is remembered."""

    def peek(self) -> int | None:
        """The oldest."""
        return self._chain.oldest if self._chain.count else None

    def __iter__(self) -> Iterator[int]:
        return iter(self._chain)

    def __len__(self) -> int:
        return self._chain.count


class Lfu(EvictionPolicy):
    """Least frequently used; counts stop at 15 and fade. One list a count, its oldest first.

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


class S3Fifo(EvictionPolicy):
    """Three queues (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 23).

    A newcomer enters a small queue, a tenth of the whole. Used again before it reaches the end, it
    moves to the main queue; otherwise it leaves and only its key stays, in a ghost queue. A key
    that returns while its ghost lives enters the main queue at once. So one-time scans pass by. A
    use only counts up, nothing moves on a hit.
    """

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


_POLICIES: dict[str, type[EvictionPolicy]] = {"lru": Lru, "lfu": Lfu, "s3fifo": S3Fifo}


def register(name: str, policy: type[EvictionPolicy]) -> None:
    """Make a policy available under `name`."""
    _POLICIES[name] = policy


def get_policy(name: str) -> type[EvictionPolicy]:
    """The policy called `name`.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    if name not in _POLICIES:
        raise ConfigError("eviction", name, "one of " + ", ".join(sorted(_POLICIES)))
    return _POLICIES[name]
