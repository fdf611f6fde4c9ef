"""Least recently used: one list."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from .base import Chain, EvictionPolicy, Links


class Lru(EvictionPolicy):
    """The default: what was not used for the longest time leaves first."""

    def __init__(self, links: Links) -> None:
        super().__init__(links)
        self._chain = Chain(links)

    def insert(self, handle: int, fingerprint: int) -> None:
        """Enter as the newest."""
        self._chain.push(handle)

    def extend(self, handles: npt.NDArray[np.int64], fingerprints: npt.NDArray[np.uint64]) -> None:
        """Many enter, oldest first."""
        self._chain.extend(handles)

    def touch(self, handle: int) -> None:
        """Become the newest."""
        if self._chain.newest != handle:
            self._chain.unlink(handle)
            self._chain.push(handle)

    def remove(self, handle: int) -> None:
        """Leave."""
        self._chain.unlink(handle)

    def evict(self, allowed: Callable[[int], bool]) -> int | None:
        """The oldest that may go."""
        for handle in self._chain:
            if allowed(handle):
                self._chain.unlink(handle)
                return handle
        return None

    def peek(self) -> int | None:
        """The oldest."""
        return self._chain.oldest if self._chain.count else None

    def __iter__(self) -> Iterator[int]:
        return iter(self._chain)

    def __len__(self) -> int:
        return self._chain.count
