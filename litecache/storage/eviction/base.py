"""What an eviction policy is: an order over small integers.

A policy sees handles (entry numbers of a tier), never bytes. A handle stands in one list of its
tier at a time, so all lists of a tier share one `Links`: doubly linked over two int32 columns, and
a byte for the policy. Not thread-safe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ...hashing import BlockKey
from ..block_index import grown_by

_NONE = -1


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
