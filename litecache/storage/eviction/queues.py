"""All eviction queues of one tier: one per block size, and one more per namespace with a quota.

Room for a block of one size is made among blocks of that size, unless the oldest block of all is of
another size: then the whole segment in which it lies is emptied. So a model that nobody uses any
more gives its segments to those in use. A namespace over its quota pays first.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from . import get_policy
from .base import EvictionPolicy, Links


class Queue:
    """One policy and what it is for."""

    __slots__ = ("namespace", "pages", "policy")

    def __init__(self, policy: EvictionPolicy, pages: int, namespace: int) -> None:
        self.policy = policy
        self.pages = pages
        self.namespace = namespace


class Queues:
    """Routes handles to their queue.

    Args:
        policy: name of the eviction policy.
    """

    def __init__(self, policy: str) -> None:
        self._policy = get_policy(policy)
        self._links = Links()
        self._queues: list[Queue] = []
        self._by_kind: dict[tuple[int, int], int] = {}
        self._where = array("h")
        self._tick = array("q")
        self._clock = 0
        self.quota_pages: dict[int, int] = {}

    def _queue_of(self, pages: int, namespace: int) -> int:
        kind = (pages, namespace if namespace in self.quota_pages else -1)
        if kind not in self._by_kind:
            self._by_kind[kind] = len(self._queues)
            self._queues.append(Queue(self._policy(self._links), pages, kind[1]))
        return self._by_kind[kind]

    def _ensure(self, handle: int) -> None:
        missing = handle + 1 - len(self._where)
        if missing > 0:
            extra = max(missing, 256, len(self._where) // 8)
            self._where.frombytes(b"\xff\xff" * extra)
            self._tick.frombytes(bytes(8 * extra))

    def __contains__(self, handle: int) -> bool:
        return handle < len(self._where) and self._where[handle] >= 0

    def insert(self, handle: int, pages: int, namespace: int, fingerprint: int) -> None:
        """A handle enters the queue of its block size."""
        self._ensure(handle)
        number = self._queue_of(pages, namespace)
        self._where[handle] = number
        self._clock += 1
        self._tick[handle] = self._clock
        self._queues[number].policy.insert(handle, fingerprint)

    def insert_all(
        self, handles: Sequence[int], pages: int, namespace: int, fingerprints: Sequence[int]
    ) -> None:
        """Some handles enter one queue, oldest first."""
        self._ensure(max(handles))
        number = self._queue_of(pages, namespace)
        insert, where, ticks = self._queues[number].policy.insert, self._where, self._tick
        clock = self._clock
        for handle, fingerprint in zip(handles, fingerprints, strict=True):
            clock += 1
            where[handle], ticks[handle] = number, clock
            insert(handle, fingerprint)
        self._clock = clock

    def extend(
        self,
        handles: npt.NDArray[np.int64],
        pages: npt.NDArray[np.int64],
        namespaces: npt.NDArray[np.int64],
        fingerprints: npt.NDArray[np.uint64],
    ) -> None:
        """Many enter at once, oldest first, while a store is read back."""
        if not len(handles):
            return
        self._ensure(int(handles.max()))
        np.frombuffer(self._tick, np.int64)[handles] = self._clock + 1 + np.arange(len(handles))
        self._clock += len(handles)
        limited = np.isin(namespaces, list(self.quota_pages)) if self.quota_pages else None
        kinds = (
            np.where(limited, namespaces, -1) if limited is not None else np.full(len(pages), -1)
        )
        for size, namespace in {*zip(pages.tolist(), kinds.tolist(), strict=True)}:
            rows = (pages == size) & (kinds == namespace)
            number = self._queue_of(size, namespace)
            np.frombuffer(self._where, np.int16)[handles[rows]] = number
            self._queues[number].policy.extend(handles[rows], fingerprints[rows])

    def touch(self, handle: int) -> None:
        """A handle was used."""
        self._clock += 1
        self._tick[handle] = self._clock
        self._queues[self._where[handle]].policy.touch(handle)

    def remove(self, handle: int) -> None:
        """A handle leaves for another reason than eviction."""
        self._queues[self._where[handle]].policy.remove(handle)
        self._where[handle] = -1

    def evict(self, pages: int, allowed: Callable[[int], bool], namespace: int = -1) -> int | None:
        """Take out the first that may go among blocks of one size; None when none may.

        Args:
            pages: block size.
            allowed: whether a handle may go now.
            namespace: only this one, when it has a quota.
        """
        mine = [q for q in self._queues if q.pages == pages and len(q.policy)]
        if namespace >= 0:
            mine = [queue for queue in mine if queue.namespace == namespace]
        for queue in sorted(mine, key=self._debt) if len(mine) > 1 else mine:
            handle = queue.policy.evict(allowed)
            if handle is not None:
                self._where[handle] = -1
                return handle
        return None

    def _debt(self, queue: Queue) -> tuple[bool, int]:
        limit = self.quota_pages.get(queue.namespace)
        within = limit is None or len(queue.policy) * queue.pages <= limit
        oldest = queue.policy.peek()
        return within, self._tick[oldest] if oldest is not None else 0

    def held_pages(self, namespace: int) -> int:
        """Pages held by a namespace that has a quota."""
        return sum(len(q.policy) * q.pages for q in self._queues if q.namespace == namespace)

    def oldest_elsewhere(self, pages: int) -> int | None:
        """The oldest of all, when it is of another block size than `pages`; else None."""
        best, best_tick, best_pages = None, self._clock + 1, pages
        for queue in self._queues:
            handle = queue.policy.peek()
            if handle is not None and self._tick[handle] < best_tick:
                best, best_tick, best_pages = handle, self._tick[handle], queue.pages
        return best if best_pages != pages else None

    @property
    def single(self) -> bool:
        """Whether all handles stand in one queue, so that they leave in one order."""
        return sum(len(queue.policy) > 0 for queue in self._queues) == 1

    def tick(self, handle: int) -> int:
        """Order of last use."""
        return self._tick[handle] if handle < len(self._tick) else 0

    def ticks(self, handles: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Order of last use of many handles."""
        if not len(handles):
            return np.zeros(0, np.int64)
        self._ensure(int(handles.max()))
        ticks: npt.NDArray[np.int64] = np.frombuffer(self._tick, np.int64)[handles]
        return ticks

    def __iter__(self) -> Iterator[int]:
        for queue in self._queues:
            yield from queue.policy

    def __len__(self) -> int:
        return sum(len(queue.policy) for queue in self._queues)
