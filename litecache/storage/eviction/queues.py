"""All eviction queues of one tier: one per block size and retention, and more per namespace with a
quota.

A block leaves before the blocks that it follows: as long as one that follows it is in the same
tier, it is *held*, out of its policy's order, and when the last of those leaves it takes that one's
place. So a use of a block counts for all before it, at no cost for the length of the chain: only
the last block of each piece that is used has to be touched. Held blocks go only where nothing else
may (all that follow are leased, or a chain bites its own tail).

Room for a block of one size is made among blocks of that size, unless the oldest block of all is of
another size: then the whole segment in which it lies is emptied. So a model that nobody uses any
more gives its segments to those in use. A namespace over its quota pays first, then what is of low
retention, what is of high retention last.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import compress
from typing import Protocol

import numpy as np

from ...hashing import BlockKey
from ..block_index import grown_by
from ..key_dict import BATCH_KEYS
from ..protocol import Retention
from ..segments import Ints, SegmentSpace
from .policies import Chain, EvictionPolicy, Links, get_policy

_MOST_LOOKS = 1024
"""Blocks in use that one search for a victim passes by; they go to the end of the line."""
_MOST_MOVES = 16_384
"""Blocks that one search looks at."""


_RANKS: dict[int, int] = {Retention.LOW: -1, Retention.NORMAL: 0, Retention.HIGH: 1}


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
    """One policy and what it is for; `held` are blocks that others follow; low ranks go first."""

    __slots__ = ("held", "namespace", "pages", "policy", "rank")

    def __init__(self, policy: EvictionPolicy, pages: int, namespace: int, rank: int) -> None:
        self.policy = policy
        self.held = Chain(policy.links)
        self.pages = pages
        self.namespace = namespace
        self.rank = rank

    def __len__(self) -> int:
        return len(self.policy) + self.held.count


class Queues:
    """Routes handles to their queue.

    Args:
        policy: name of the eviction policy.
        kin: knows keys and parents of the handles.

    Attributes:
        quota_pages: by namespace.
    """

    def __init__(self, policy: str, kin: Kin) -> None:
        self.quota_pages: dict[int, int] = {}
        self._policy = get_policy(policy)
        self._key_at, self._parent_of, self._find = kin.key_at, kin.parent_of, kin.find
        self._links = Links()
        self._queues: list[Queue] = []
        self._by_kind: dict[tuple[int, int, int], int] = {}
        self._by_pages: dict[int, list[Queue]] = {}
        # by handle: number of its queue, order of its last use, how many in the tier follow it
        self._where = array("h")
        self._tick = array("q")
        self._followers = array("I")
        self._held = array("B")
        self._clock = 0
        # blocks that are in and whose parent is not, by the parent's key
        self._orphans: Counter[BlockKey] = Counter()

    def _queue_of(self, pages: int, namespace: int, retention: int) -> int:
        # what a damaged or later store says of it passes for normal
        rank = _RANKS.get(retention, 0)
        kind = (pages, namespace if namespace in self.quota_pages else -1, rank)
        number = self._by_kind.get(kind)
        if number is None:
            number = self._by_kind[kind] = len(self._queues)
            queue = Queue(self._policy(self._links), *kind)
            self._queues.append(queue)
            self._by_pages.setdefault(pages, []).append(queue)
        return number

    def _ensure(self, handle: int) -> None:
        missing = handle + 1 - len(self._where)
        if missing > 0:
            rows = grown_by(len(self._where), missing)
            self._where.frombytes(b"\xff\xff" * rows)
            for column in (self._tick, self._followers, self._held):
                column.frombytes(bytes(column.itemsize * rows))
            self._links.ensure(len(self._where) - 1)

    @property
    def counts_uses(self) -> bool:
        """Whether the use of a block that another follows changes anything."""
        return self._policy.counts_uses

    def __contains__(self, handle: int) -> bool:
        return 0 <= handle < len(self._where) and self._where[handle] >= 0

    def _before(self, handle: int) -> tuple[int, BlockKey | None]:
        """The block that one follows, -1 if it is not in; its key, None if it follows itself."""
        parent = self._parent_of(handle)
        before = self._find(parent)
        if before == handle:
            return -1, None
        inside = 0 <= before < len(self._where) and self._where[before] >= 0
        return before if inside else -1, parent

    def insert(self, handle: int, pages: int, namespace: int, retention: int = 0) -> None:
        """A handle enters the queue of its block size and retention."""
        if handle >= len(self._where):
            self._ensure(handle)
        key = self._key_at(handle)
        number = self._queue_of(pages, namespace, retention)
        self._queues[number].policy.insert(handle, key)
        self._where[handle] = number
        self._touch(handle)
        self._followers[handle] = self._orphans.pop(key, 0) if self._orphans else 0
        self._held[handle] = 0
        before, parent = self._before(handle)
        if before >= 0:
            self._followers[before] += 1
            self._hold(before)
        elif parent is not None:
            self._orphans[parent] += 1

    def _touch(self, handle: int) -> None:
        self._clock += 1
        self._tick[handle] = self._clock

    def extend(self, handles: Ints, pages: Ints, namespaces: Ints, retentions: Ints) -> None:
        """Many distinct handles enter empty queues, oldest first, while a store is read back."""
        if not len(handles):
            return
        assert not len(self), "the queues are not empty"
        self._ensure(int(handles.max()))
        places = np.arange(len(handles))
        np.frombuffer(self._tick, np.int64)[handles] = self._clock + 1 + places
        self._clock += len(handles)
        parents = list(map(self._parent_of, handles.tolist()))
        before = np.array(list(map(self._find, parents)), np.int64)
        inside = np.zeros(len(self._where) + 1, bool)  # and a place for -1
        inside[handles] = True
        self._orphans = Counter(compress(parents, (~inside[before]).tolist()))
        follows = inside[before] & (before != handles)
        size = len(self._followers)
        np.frombuffer(self._followers, np.uint32)[:] = np.bincount(before[follows], minlength=size)
        # in order stay those that were used long after all that follow them
        youngest = np.full(size, -len(handles) - BATCH_KEYS)
        np.maximum.at(youngest, before[follows], places[follows])
        held = youngest[handles] > places - BATCH_KEYS
        np.frombuffer(self._held, np.uint8)[handles] = held
        kinds = np.where(np.isin(namespaces, list(self.quota_pages)), namespaces, -1)
        for kind in {*zip(pages.tolist(), kinds.tolist(), retentions.tolist(), strict=True)}:
            rows = (pages == kind[0]) & (kinds == kind[1]) & (retentions == kind[2])
            number = self._queue_of(*kind)
            np.frombuffer(self._where, np.int16)[handles[rows]] = number
            self._queues[number].policy.extend(handles[rows & ~held], self._key_at)
            self._queues[number].held.extend(handles[rows & held])
            np.frombuffer(self._links.mark, np.uint8)[handles[rows & held]] = 0

    def _hold(self, handle: int) -> None:
        """Take a block that others follow out of its policy's order."""
        if not self._held[handle]:
            self._held[handle] = 1
            queue = self._queues[self._where[handle]]
            queue.policy.remove(handle)
            queue.held.add(handle)

    def _let_go(self, handle: int, before: int = -1) -> None:
        """Put a held block back into order, at the place of the block `before`, or to go next."""
        self._held[handle] = 0
        queue = self._queues[self._where[handle]]
        queue.held.unlink(handle)
        same = before >= 0 and self._where[before] == self._where[handle] and not self._held[before]
        queue.policy.restore(handle, before if same else -1)

    def _part(self, handle: int, place: int = -1) -> None:
        """Undo what a block that leaves means for those that it follows, and that follow it."""
        if self._followers[handle]:
            self._orphans[self._key_at(handle)] = self._followers[handle]
            self._followers[handle] = 0
        before, parent = self._before(handle)
        if before >= 0:
            self._followers[before] -= 1
            if not self._followers[before] and self._held[before]:
                self._tick[before] = max(self._tick[before], self._tick[handle])
                self._let_go(before, place)
        elif parent is not None:
            if left := self._orphans[parent] - 1:
                self._orphans[parent] = left
            else:
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
            self._touch(handle)
            if self._held[handle]:
                self._let_go(handle)
            policy.touch(handle)
        elif policy.counts_uses:
            (policy.count if self._held[handle] else policy.touch)(handle)

    def remove(self, handle: int) -> None:
        """A handle leaves for another reason than eviction."""
        queue, held = self._queues[self._where[handle]], self._held[handle]
        self._part(handle, handle)
        (queue.held.unlink if held else queue.policy.remove)(handle)

    def evict(self, pages: int, allowed: Callable[[int], bool], namespace: int = -1) -> int | None:
        """Take out the first that may go among blocks of one size; None when none may.

        Args:
            pages: block size.
            allowed: whether a handle may go now.
            namespace: only this one, when it has a quota.
        """
        mine = self._by_pages.get(pages, [])
        if namespace >= 0:
            mine = [queue for queue in mine if queue.namespace == namespace]
        mine = sorted(mine, key=self._debt) if len(mine) > 1 else mine
        for choose in (self._first, self._first_held):
            for queue in mine:
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
                queue.held.add(handle)
            elif allowed(handle):
                policy.evicted(handle, self._key_at(handle))
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
            held.add(handle)
        return None

    def _debt(self, queue: Queue) -> tuple[bool, int, int]:
        limit = self.quota_pages.get(queue.namespace)
        within = limit is None or len(queue) * queue.pages <= limit
        oldest = self._oldest(queue)
        return within, queue.rank, self._tick[oldest] if oldest is not None else self._clock

    def _oldest(self, queue: Queue) -> int | None:
        """About the next to go; held from now on is what others follow."""
        for _ in range(_MOST_MOVES):
            handle = queue.policy.peek()
            if handle is None or not self._followers[handle]:
                return handle
            self._hold(handle)
        return None

    def total_pages(self) -> int:
        """Pages of all blocks."""
        return sum(len(queue) * queue.pages for queue in self._queues)

    def held_pages(self, namespace: int) -> int:
        """Pages taken by a namespace that has a quota."""
        return sum(len(q) * q.pages for q in self._queues if q.namespace == namespace)

    def oldest_elsewhere(self, pages: int) -> int | None:
        """The next to go of all, when it is of another block size than `pages`; else None."""
        if self._by_pages.keys() <= {pages}:
            return None
        oldest = [(queue, self._oldest(queue)) for queue in self._queues]
        ages = [(q.rank, self._tick[at], at, q.pages) for q, at in oldest if at is not None]
        *_, handle, size = min(ages, default=(-1, pages))
        return handle if size != pages else None

    def ticks(self, handles: Ints) -> Ints:
        """Order of last use of many handles."""
        if not len(handles):
            return np.zeros(0, np.int64)
        self._ensure(int(handles.max()))
        ticks: Ints = np.frombuffer(self._tick, np.int64)[handles]
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
            before, parent = self._before(handle)
            if before >= 0:
                followers[before] += 1
            elif parent is not None:
                orphans[parent] += 1
        for handle in members:
            assert self._followers[handle] == followers[handle], "followers are off"
            assert followers[handle] or not self._held[handle], "held, and nothing follows"
        assert orphans == self._orphans, "orphans are off"


def allocate(
    queues: Queues,
    space: SegmentSpace,
    pages: int,
    n: int,
    *,
    slot_of: Callable[[int], int],
    allowed: Callable[[int], bool],
    give_up: Callable[[int], None],
) -> list[int]:
    """Up to `n` slots, by eviction once the space may not grow; fewer when the rest is in use.

    The oldest leave first, whatever their size. Slots are given back one by one among blocks of
    the size that needs them. Where the oldest block of all has another size, the segments in which
    it lies are emptied for that.

    Args:
        queues, space: of the tier.
        pages: block size.
        n: slots wanted.
        slot_of: where a handle lies.
        allowed: whether a handle may go now.
        give_up: called with each handle that left the queues.
    """

    def make_room(wanted: int) -> None:
        stuck = False
        while wanted > 0:
            # asked anew for each victim: behind one old block of this size may come another's
            other = None if stuck else queues.oldest_elsewhere(pages)
            if other is None or not space.worth_emptying(slot_of(other), pages):
                victim = queues.evict(pages, allowed)
                if victim is None:
                    return
                give_up(victim)
                wanted -= 1
                continue
            for handle in space.in_the_way(slot_of(other), pages):
                if handle in queues and allowed(handle):
                    queues.remove(handle)
                    give_up(handle)
            if space.available(pages):
                return
            # one emptied segment may not be enough: another must go to make room for metadata
            stuck = other in queues or not space.over_bound(pages)

    slots = space.allocate(pages, n)
    while len(slots) < n and space.growth(pages) is None:
        make_room(n - len(slots))
        more = space.allocate(pages, n - len(slots))
        if not more:
            break
        slots += more
    return slots
