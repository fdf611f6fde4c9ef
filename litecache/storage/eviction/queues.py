"""All eviction queues of one tier: one per block size, and one more per namespace with a quota.

A block leaves before the blocks that it follows: as long as one that follows it is in the same
tier, it is *held*, out of its policy's order, and when the last of those leaves it takes that one's
place. So a use of a block counts for all before it, at no cost for the length of the chain: only
the last block of each piece that is used has to be touched. Held blocks go only where nothing else
may (all that follow are leased, or a chain bites its own tail).

Room for a block of one size is made among blocks of that size, unless the oldest block of all is of
another size: then the whole segment in which it lies is emptied. So a model that nobody uses any
more gives its segments to those in use. A namespace over its quota pays first.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...hashing import BlockKey
from ..block_index import grown_by
from ..key_dict import BATCH_KEYS
from ..segments import SegmentSpace
from .policies import Chain, EvictionPolicy, Links, get_policy

_MOST_LOOKS = 1024
"""Blocks in use that one search for a victim passes by; they go to the end of the line."""
_MOST_MOVES = 16_384
"""Blocks that one search looks at."""


class Kin(Protocol):
    """Who follows whom, by the handles of a tier."""

    def key_at(self, handle: int) -> BlockKey:
        """The block's key."""
        ...

    def parent_of(self, handle: int) -> BlockKey:
        """Key of the block before it."""
        ...

    def find(self, key: BlockKey) -> int:
        """Handle of a key, or -1."""
        ...


class Queue:
    """One policy and what it is for; `held` are blocks that others follow."""

    __slots__ = ("held", "namespace", "pages", "policy")

    def __init__(self, policy: EvictionPolicy, pages: int, namespace: int) -> None:
        self.policy = policy
        self.held = Chain(policy.links)
        self.pages = pages
        self.namespace = namespace

    def __len__(self) -> int:
        return len(self.policy) + self.held.count


class Queues:
    """Routes handles to their queue.

    Args:
        policy: name of the eviction policy.
        kin: knows keys and parents of the handles.
    """

    def __init__(self, policy: str, kin: Kin) -> None:
        self._policy = get_policy(policy)
        self._kin = kin
        self._links = Links()
        self._queues: list[Queue] = []
        self._by_kind: dict[tuple[int, int], int] = {}
        self._where = array("h")
        self._tick = array("q")
        self._followers = array("I")
        self._held = array("B")
        self._clock = 0
        # blocks that are in and whose parent is not, by the parent's key
        self._orphans: dict[BlockKey, int] = {}
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
            rows = grown_by(len(self._where), missing)
            self._where.frombytes(b"\xff\xff" * rows)
            self._tick.frombytes(bytes(8 * rows))
            self._followers.frombytes(bytes(4 * rows))
            self._held.frombytes(bytes(rows))
            self._links.ensure(len(self._where) - 1)

    def __contains__(self, handle: int) -> bool:
        return 0 <= handle < len(self._where) and self._where[handle] >= 0

    def _member(self, key: BlockKey) -> int:
        handle = self._kin.find(key)
        return handle if handle >= 0 and handle in self else -1

    def insert(self, handle: int, pages: int, namespace: int) -> None:
        """A handle enters the queue of its block size."""
        self._ensure(handle)
        key, parent = self._kin.key_at(handle), self._kin.parent_of(handle)
        number = self._queue_of(pages, namespace)
        queue = self._queues[number]
        self._clock += 1
        self._tick[handle] = self._clock
        queue.policy.insert(handle, key)
        self._where[handle] = number
        self._followers[handle] = self._orphans.pop(key, 0) if self._orphans else 0
        self._held[handle] = 0
        before = self._member(parent) if parent != key else -1
        if before >= 0:
            self._followers[before] += 1
            self._hold(before)
        elif parent != key:
            self._orphans[parent] = self._orphans.get(parent, 0) + 1

    def extend(
        self,
        handles: npt.NDArray[np.int64],
        pages: npt.NDArray[np.int64],
        namespaces: npt.NDArray[np.int64],
        keys: list[BlockKey],
        parents: list[BlockKey],
    ) -> None:
        """Many enter empty queues at once, oldest first, while a store is read back.

        Args:
            handles: int64 `[n]`, distinct.
            pages, namespaces: of each of them.
            keys, parents: by handle.
        """
        if not len(handles):
            return
        assert not len(self), "the queues are not empty"
        self._ensure(int(handles.max()))
        np.frombuffer(self._tick, np.int64)[handles] = self._clock + 1 + np.arange(len(handles))
        self._clock += len(handles)
        numbers = handles.tolist()
        before = np.array([self._kin.find(parents[handle]) for handle in numbers], np.int64)
        inside = np.zeros(max(int(handles.max()), int(before.max())) + 2, bool)
        inside[handles] = True
        known = inside[before]
        other = before != handles
        orphans = (parents[handle] for handle in handles[~known].tolist())
        self._orphans = dict(Counter(orphans))
        followers = np.bincount(before[known & other], minlength=len(self._followers))
        np.frombuffer(self._followers, np.uint32)[:] = followers
        # in order stay those that were used long after all that follow them
        places = np.arange(len(handles))
        youngest = np.full(len(self._followers), -len(handles) - BATCH_KEYS)
        np.maximum.at(youngest, before[known & other], places[known & other])
        held = youngest[handles] > places - BATCH_KEYS
        np.frombuffer(self._held, np.uint8)[handles] = held
        limited = np.isin(namespaces, list(self.quota_pages))
        kinds = np.where(limited, namespaces, -1)
        for size, namespace in {*zip(pages.tolist(), kinds.tolist(), strict=True)}:
            rows = (pages == size) & (kinds == namespace)
            number = self._queue_of(size, namespace)
            np.frombuffer(self._where, np.int16)[handles[rows]] = number
            self._queues[number].policy.extend(handles[rows & ~held], keys)
            self._queues[number].held.extend(handles[rows & held])
            np.frombuffer(self._links.mark, np.uint8)[handles[rows & held]] = 0

    def _hold(self, handle: int) -> None:
        """Take a block that others follow out of its policy's order."""
        if not self._held[handle]:
            self._held[handle] = 1
            queue = self._queues[self._where[handle]]
            queue.policy.remove(handle)
            queue.held.push(handle)

    def _let_go(self, handle: int, before: int = -1) -> None:
        """Put a held block back into order, at the place of the block `before`, or to go next."""
        self._held[handle] = 0
        queue = self._queues[self._where[handle]]
        queue.held.unlink(handle)
        same = before >= 0 and self._where[before] == self._where[handle] and not self._held[before]
        queue.policy.restore(handle, before if same else -1)

    def _part(self, handle: int, before: int = -1) -> None:
        """Undo what a block that leaves means for those that it follows, and that follow it."""
        key, parent = self._kin.key_at(handle), self._kin.parent_of(handle)
        if self._followers[handle]:
            self._orphans[key] = self._followers[handle]
            self._followers[handle] = 0
        holder = self._member(parent) if parent != key else -1
        if holder >= 0:
            self._followers[holder] -= 1
            if not self._followers[holder] and self._held[holder]:
                self._tick[holder] = max(self._tick[holder], self._tick[handle])
                self._let_go(holder, before)
        elif parent != key:
            self._orphans[parent] -= 1
            if not self._orphans[parent]:
                del self._orphans[parent]
        self._where[handle] = -1

    def use(self, handle: int, *, ends: bool) -> None:
        """A handle was used, if it is in; with it all that it follows.

        Args:
            handle: of a block.
            ends: none that follows it was used at the same time.
        """
        if handle not in self:
            return
        policy = self._queues[self._where[handle]].policy
        if ends:
            self._clock += 1
            self._tick[handle] = self._clock
            if self._held[handle]:
                self._let_go(handle)
            policy.touch(handle)
        elif not policy.counts_uses:
            return
        elif self._held[handle]:
            policy.count(handle)
        else:
            policy.touch(handle)

    def remove(self, handle: int) -> None:
        """A handle leaves for another reason than eviction."""
        queue, held = self._queues[self._where[handle]], self._held[handle]
        self._part(handle, handle)
        if held:
            queue.held.unlink(handle)
        else:
            queue.policy.remove(handle)

    def evict(self, pages: int, allowed: Callable[[int], bool], namespace: int = -1) -> int | None:
        """Take out the first that may go among blocks of one size; None when none may.

        Args:
            pages: block size.
            allowed: whether a handle may go now.
            namespace: only this one, when it has a quota.
        """
        mine = [q for q in self._queues if q.pages == pages and len(q)]
        if namespace >= 0:
            mine = [queue for queue in mine if queue.namespace == namespace]
        for queue in sorted(mine, key=self._debt) if len(mine) > 1 else mine:
            for choose in (self._first, self._first_held):
                handle = choose(queue, allowed)
                if handle is not None:
                    self._part(handle)
                    return handle
        return None

    def _first(self, queue: Queue, allowed: Callable[[int], bool]) -> int | None:
        policy, passed = queue.policy, 0
        for _ in range(_MOST_MOVES):
            handle = policy.pop()
            if handle is None:
                break
            if self._followers[handle]:
                # it was used for itself, and then one that follows it: that one is younger
                self._held[handle] = 1
                queue.held.push(handle)
            elif allowed(handle):
                policy.evicted(handle, self._kin.key_at(handle))
                return handle
            else:
                policy.put_back(handle)
                passed += 1
                if passed > min(16 * len(policy), _MOST_LOOKS):
                    break
        return None

    def _first_held(self, queue: Queue, allowed: Callable[[int], bool]) -> int | None:
        held = queue.held
        for _ in range(min(held.count, _MOST_LOOKS)):
            handle = held.oldest
            held.unlink(handle)
            if allowed(handle):
                self._held[handle] = 0
                return handle
            held.push(handle)
        return None

    def _debt(self, queue: Queue) -> tuple[bool, int]:
        limit = self.quota_pages.get(queue.namespace)
        within = limit is None or len(queue) * queue.pages <= limit
        oldest = self._oldest(queue)
        return within, self._tick[oldest] if oldest is not None else self._clock

    def _oldest(self, queue: Queue) -> int | None:
        """About the next to go; held from now on is what others follow."""
        for _ in range(_MOST_MOVES):
            handle = queue.policy.peek()
            if handle is None or not self._followers[handle]:
                return handle
            self._hold(handle)
        return None

    def held_pages(self, namespace: int) -> int:
        """Pages taken by a namespace that has a quota."""
        return sum(len(q) * q.pages for q in self._queues if q.namespace == namespace)

    def oldest_elsewhere(self, pages: int) -> int | None:
        """The oldest of all, when it is of another block size than `pages`; else None."""
        best, best_tick, best_pages = None, self._clock + 1, pages
        for queue in self._queues:
            handle = self._oldest(queue)
            if handle is not None and self._tick[handle] < best_tick:
                best, best_tick, best_pages = handle, self._tick[handle], queue.pages
        return best if best_pages != pages else None

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
            yield from queue.held

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def check_integrity(self) -> None:
        """AssertionError unless each block is held exactly while others follow it."""
        followers: Counter[int] = Counter()
        orphans: Counter[BlockKey] = Counter()
        members = list(self)
        assert len(members) == len(set(members)) == len(self), "a block is queued twice"
        for handle in members:
            key, parent = self._kin.key_at(handle), self._kin.parent_of(handle)
            before = self._member(parent)
            if before >= 0:
                followers[before] += before != handle
            elif parent != key:
                orphans[parent] += 1
        for handle in members:
            assert self._followers[handle] == followers[handle], "followers are off"
            assert followers[handle] or not self._held[handle], "held, and nothing follows"
        assert orphans == self._orphans, "orphans are off"


def make_room(
    queues: Queues,
    space: SegmentSpace,
    pages: int,
    n: int,
    *,
    slot_of: Callable[[int], int],
    allowed: Callable[[int], bool],
    give_up: Callable[[int], None],
) -> None:
    """Let the oldest leave first, whatever their size.

    Slots are given back one by one among blocks of the size that needs them. Where the oldest
    block of all has another size, the segments in which it lies are emptied for that.
    It ends when `n` slots of a block size are free, or a region of it can be assigned, or what
    is left is in use.

    Args:
        queues, space: of the tier.
        pages: block size.
        n: slots wanted.
        slot_of: where a handle lies.
        allowed: whether a handle may go now.
        give_up: called with each handle that left the queues.
    """
    stuck = False
    while n > 0:
        # asked anew for each victim: behind one old block of this size may come one of another
        other = None if stuck else queues.oldest_elsewhere(pages)
        if other is None or not space.worth_emptying(slot_of(other), pages):
            victim = queues.evict(pages, allowed)
            if victim is None:
                return
            give_up(victim)
            n -= 1
            continue
        for handle in space.in_the_way(slot_of(other), pages):
            if handle in queues and allowed(handle):
                queues.remove(handle)
                give_up(handle)
        if space.available(pages):
            return
        # one emptied segment may not be enough: another must go to make room for metadata
        stuck = other in queues or not space.over_bound(pages)
