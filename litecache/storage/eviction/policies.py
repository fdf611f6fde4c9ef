"""Orders in which blocks leave a tier: `lru`, `lfu`, `s3fifo`, and what `register` adds.

A policy sees handles (entry numbers of a tier), never bytes. A handle stands in one list of its
tier at a time, so all lists of a tier share one `Links`: doubly linked over two int32 columns, and
a byte for the policy. Not thread-safe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np

from ...checks import is_a
from ...errors import ConfigError
from ...hashing import BlockKey
from ..block_index import grown_by
from ..segments import Ints

_NONE = -1
_LEVELS = 16
_AGE_AFTER = 8
_AGE_CHECK = 16
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
            for column in (self.older, self.newer, self.mark):
                column.frombytes(bytes(column.itemsize * rows))


class Chain:
    """One list, oldest to newest."""

    __slots__ = ("count", "links", "newest", "oldest")

    def __init__(self, links: Links) -> None:
        self.links = links
        self.oldest = self.newest = _NONE
        self.count = 0

    def add(self, handle: int, before: int = _NONE) -> None:
        """Add as the next older of `before`, which is in; without one as the newest."""
        older, newer = self.links.older, self.links.newer
        previous = self.newest if before == _NONE else older[before]
        older[handle], newer[handle] = previous, before
        if previous == _NONE:
            self.oldest = handle
        else:
            newer[previous] = handle
        if before == _NONE:
            self.newest = handle
        else:
            older[before] = handle
        self.count += 1

    def extend(self, handles: Ints) -> None:
        """Add many as the newest, in order."""
        if len(handles):
            older = np.frombuffer(self.links.older, np.int32)
            newer = np.frombuffer(self.links.newer, np.int32)
            self.add(int(handles[0]))
            older[handles[1:]], newer[handles[:-1]] = handles[:-1], handles[1:]
            self.newest = int(handles[-1])
            newer[self.newest] = _NONE
            self.count += len(handles) - 1

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

    A handle that is in stands in one of a few chains, the one that `chain_of` names; the oldest of
    the first chain that is not empty goes next. `Queues` takes blocks out for as long as others
    that follow them are in, so a policy sees no families: `restore` brings such a block back.

    Args:
        links: shared by the policies of one tier; it has room for every handle that is given.
        chains: how many.
    """

    counts_uses = False
    """Whether `count` does anything."""

    def __init__(self, links: Links, chains: int = 1) -> None:
        self.links = links
        self.chains = [Chain(links) for _ in range(chains)]

    def chain_of(self, handle: int) -> Chain:
        """The chain in which a handle is, or to which it returns."""
        return self.chains[0]

    @abstractmethod
    def insert(self, handle: int, key: BlockKey) -> None:
        """A newcomer enters."""

    def extend(self, handles: Ints, key_at: Callable[[int], BlockKey]) -> None:
        """Many newcomers enter, oldest first."""
        for handle in handles.tolist():
            self.insert(handle, key_at(handle))

    @abstractmethod
    def touch(self, handle: int) -> None:
        """A handle that is in was used."""

    def count(self, handle: int) -> None:
        """A handle that was taken out by `remove`, to be restored, was used meanwhile."""
        return

    def remove(self, handle: int) -> None:
        """A handle leaves, or goes out until `restore`."""
        self.chain_of(handle).unlink(handle)

    def restore(self, handle: int, before: int) -> None:
        """A handle that was removed is back, with the uses that it had.

        Args:
            handle: to go next among its equals, or
            before: just before this one, if that is in and its equal.
        """
        chain = self.chain_of(handle)
        equal = before != _NONE and self.chain_of(before) is chain
        chain.add(handle, before if equal else chain.oldest)

    def peek(self) -> int | None:
        """About the next to go; None when empty."""
        for chain in self.chains:
            if chain.count:
                return chain.oldest
        return None

    def pop(self) -> int | None:
        """Take out the first in the policy's order; None when empty."""
        for chain in self.chains:
            if chain.count:
                handle = chain.oldest
                chain.unlink(handle)
                return handle
        return None

    def put_back(self, handle: int) -> None:
        """What was popped is in use and may not go now; others come first."""
        self.chain_of(handle).add(handle)

    def evicted(self, handle: int, key: BlockKey) -> None:
        """What was popped has gone."""
        return

    def __iter__(self) -> Iterator[int]:
        for chain in self.chains:
            yield from chain

    def __len__(self) -> int:
        return sum([chain.count for chain in self.chains])


class Lru(EvictionPolicy):
    """Least recently used, the default: what was not used for the longest time leaves first."""

    def insert(self, handle: int, key: BlockKey) -> None:
        """Enter as the newest."""
        self.chains[0].add(handle)

    def extend(self, handles: Ints, key_at: Callable[[int], BlockKey]) -> None:
        """Many enter, oldest first."""
        self.chains[0].extend(handles)

    def touch(self, handle: int) -> None:
        """Become the newest."""
        chain = self.chains[0]
        if chain.newest != handle:
            chain.unlink(handle)
            chain.add(handle)


class _Lfu(EvictionPolicy):
    """Least frequently used; counts stop at 15 and fade. One chain a count.

    After eight touches per resident handle the two lowest levels are merged and all others move
    down by one, so that a block that was popular last week does not stay for ever. The merging
    takes a few handles per touch: it is done long before the next one is due.
    """

    counts_uses = True

    def __init__(self, links: Links) -> None:
        # the first is what a fading has still to move into the second
        super().__init__(links, 1 + _LEVELS)
        self._base = 0
        self._touches = 0

    def _level(self, handle: int) -> int:
        # marks count from the number of fadings on, so that a fading need not visit each handle;
        # one that was out for more than a hundred of them may come back as popular as any
        level = (self.links.mark[handle] - self._base) & 0xFF
        return min(level, _LEVELS - 1) if level < 0x80 else -1

    def _set_level(self, handle: int, level: int) -> None:
        self.links.mark[handle] = (self._base + min(level, _LEVELS - 1)) & 0xFF

    def chain_of(self, handle: int) -> Chain:
        return self.chains[1 + self._level(handle)]

    def insert(self, handle: int, key: BlockKey) -> None:
        self._set_level(handle, 0)
        self.chains[1].add(handle)

    def touch(self, handle: int) -> None:
        self.remove(handle)
        self.put_back(handle)
        self._touches += 1
        fading = self.chains[0]
        if fading.count:
            for _ in range(min(_FADE_STEPS, fading.count)):
                moved = fading.oldest
                fading.unlink(moved)
                self.insert(moved, b"")
        elif not self._touches % _AGE_CHECK and self._touches > _AGE_AFTER * len(self):
            self._touches = 0
            self._base = (self._base + 1) & 0xFF
            self.chains = [*self.chains[1:], fading]

    def count(self, handle: int) -> None:
        self._set_level(handle, self._level(handle) + 1)

    def put_back(self, handle: int) -> None:
        # being in use counts as one more use
        self.count(handle)
        self.chain_of(handle).add(handle)

    def restore(self, handle: int, before: int) -> None:
        self._set_level(handle, max(0, self._level(handle)))
        super().restore(handle, before)


class _S3Fifo(EvictionPolicy):
    """Three queues (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 23).

    A newcomer enters a small queue, a tenth of the whole. Used again before it reaches the end, it
    moves to the main queue; otherwise it leaves and only its key stays, in a ghost queue. A key
    that returns while its ghost lives enters the main queue at once. So one-time scans pass by. A
    use only counts up, nothing moves on a hit.
    """

    counts_uses = True

    def __init__(self, links: Links) -> None:
        super().__init__(links, 2)
        # a plain dict takes longer and longer to find its first key
        self._ghosts: OrderedDict[BlockKey, None] = OrderedDict()
        self._in_use = 0

    def chain_of(self, handle: int) -> Chain:
        return self.chains[self.links.mark[handle] >= _IN_MAIN]

    def insert(self, handle: int, key: BlockKey) -> None:
        known = key in self._ghosts
        if known:
            del self._ghosts[key]
        self.links.mark[handle] = _IN_MAIN if known else 0
        self.chains[known].add(handle)

    def touch(self, handle: int) -> None:
        mark = self.links.mark[handle]
        if mark & ~_IN_MAIN < _MAX_USES:
            self.links.mark[handle] = mark + 1

    count = touch

    def pop(self) -> int | None:
        # from the small queue while it is over its share, else from the main one; by turns, as
        # long as what comes is in use: else one queue could hide the other
        mark, (small, main), in_turn = self.links.mark, self.chains, bool(self._in_use & 1)
        for _ in range(_MOST_MOVES):
            over = small.count * _SMALL_SHARE >= small.count + main.count
            if small.count and (over != in_turn or not main.count):
                handle = small.oldest
                small.unlink(handle)
                if not mark[handle]:
                    return handle
                mark[handle] = _IN_MAIN
            elif main.count:
                handle = main.oldest
                main.unlink(handle)
                if mark[handle] == _IN_MAIN:
                    return handle
                mark[handle] -= 1
            else:
                return None
            main.add(handle)
        handle = main.oldest
        main.unlink(handle)
        return handle

    def put_back(self, handle: int) -> None:
        self._in_use += 1
        self.chain_of(handle).add(handle)

    def evicted(self, handle: int, key: BlockKey) -> None:
        # what left without having been used is remembered
        self._in_use = 0
        if self.links.mark[handle] < _IN_MAIN:
            self._ghosts[key] = None
            most = max(64, min(_GHOSTS, self.chains[1].count))
            for _ in range(min(2, len(self._ghosts) - most)):
                self._ghosts.popitem(last=False)


_POLICIES: dict[str, type[EvictionPolicy]] = {"lru": Lru, "lfu": _Lfu, "s3fifo": _S3Fifo}


def register(name: str, policy: type[EvictionPolicy]) -> None:
    """Make a policy available under `name`."""
    _POLICIES[name] = policy


def get_policy(name: str) -> type[EvictionPolicy]:
    """The policy called `name`.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    if not is_a(name, str) or name not in _POLICIES:
        raise ConfigError("eviction", name, "one of " + ", ".join(sorted(_POLICIES)))
    return _POLICIES[name]
