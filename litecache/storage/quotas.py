"""Quotas: bounds on what some namespaces take of a disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .eviction.queues import Queues
from .namespaces import quota_of
from .protocol import PAGE_BYTES


class Quotas:
    """Holds namespaces to their quotas; under the store's lock.

    Args:
        limits: namespace, or digest of a salt (`namespaces.py`), to the bytes it may take.
        queues: of the disk tier; they know what each namespace holds, and are told its quota.
    """

    def __init__(self, limits: Mapping[str, int], queues: Queues) -> None:
        self._limits = limits
        self._queues = queues
        self._unplaced: dict[int, int] = {}

    def note_name(self, number: int, name: str) -> None:
        """A namespace has got its number."""
        limit = quota_of(name, self._limits)
        if limit is not None:
            self._queues.quota_pages[number] = limit // PAGE_BYTES

    def room_for(self, namespace: int, pages: int, n: int, evict: Callable[[], bool]) -> int:
        """How many of `n` blocks a namespace may add, after its oldest have made room.

        Args:
            namespace: its number.
            pages: size of a block.
            n: blocks wanted.
            evict: lets the namespace's oldest block of that size go; False when none may.
        """
        quota = self._queues.quota_pages.get(namespace)
        if quota is None:
            return n
        free = quota - self._unplaced.get(namespace, 0)
        n = min(n, max(0, free // pages))
        while self._queues.held_pages(namespace) + n * pages > free:
            if not evict():
                return max(0, (free - self._queues.held_pages(namespace)) // pages)
        return n

    def begin_writes(self, namespace: int, pages: int) -> None:
        """Slots were allocated; their blocks are not in the queues yet."""
        self._unplaced[namespace] = self._unplaced.get(namespace, 0) + pages

    def end_writes(self, namespace: int, pages: int) -> None:
        """Slots that were allocated have been placed or freed."""
        self._unplaced[namespace] -= pages
