"""What an eviction policy is: an order over small integers.

A policy sees handles (entry numbers of a tier), never bytes. Handles of one policy never overlap
with another's of the same tier, so all policies of a tier share one `Links`: doubly linked lists
over two int32 arrays and a byte each, 9 bytes a handle. Not thread-safe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

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
            extra = max(missing, 256, len(self.older) // 8)
            self.older.frombytes(b"\xff" * (4 * extra))
            self.newer.frombytes(b"\xff" * (4 * extra))
            self.mark.frombytes(bytes(extra))


class Chain:
    """One list, oldest to newest."""

    __slots__ = ("count", "links", "newest", "oldest")

    def __init__(self, links: Links) -> None:
        self.links = links
        self.oldest = self.newest = _NONE
        self.count = 0

    def push(self, handle: int) -> None:
        """Add as the newest."""
        links = self.links
        links.ensure(handle)
        links.older[handle], links.newer[handle] = self.newest, _NONE
        if self.newest == _NONE:
            self.oldest = handle
        else:
            links.newer[self.newest] = handle
        self.newest = handle
        self.count += 1

    def extend(self, handles: npt.NDArray[np.int64]) -> None:
        """Add many as the newest, in order."""
        if not len(handles):
            return
        links = self.links
        links.ensure(int(handles.max()))
        older, newer = np.frombuffer(links.older, np.int32), np.frombuffer(links.newer, np.int32)
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
    """Decides what leaves first.

    Args:
        links: shared by the policies of one tier.
    """

    def __init__(self, links: Links) -> None:
        self.links = links

    @abstractmethod
    def insert(self, handle: int, fingerprint: int) -> None:
        """A handle enters; `fingerprint` is 64 bits of its key, the same when the key returns."""

    def extend(self, handles: npt.NDArray[np.int64], fingerprints: npt.NDArray[np.uint64]) -> None:
        """Many handles enter, oldest first."""
        for handle, fingerprint in zip(handles.tolist(), fingerprints.tolist(), strict=True):
            self.insert(handle, fingerprint)

    @abstractmethod
    def touch(self, handle: int) -> None:
        """A handle that is in was used."""

    @abstractmethod
    def remove(self, handle: int) -> None:
        """A handle leaves for another reason than eviction."""

    @abstractmethod
    def evict(self, allowed: Callable[[int], bool]) -> int | None:
        """Take out the first in the policy's order that may go; None when none may."""

    @abstractmethod
    def peek(self) -> int | None:
        """About the next to go, to compare policies with each other by age; None when empty."""

    @abstractmethod
    def __iter__(self) -> Iterator[int]:
        """All handles, about in the order in which they would leave."""

    @abstractmethod
    def __len__(self) -> int:
        """Handles that are in."""
