"""Least recently used: one list."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ...hashing import BlockKey
from .base import Chain, EvictionPolicy, Links


class Lru(EvictionPolicy):
    """The default: what was not used for the longest time leaves first."""

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
