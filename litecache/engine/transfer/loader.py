"""Finds blocks in the lower tiers and copies them into the pool.

A lookup leases slots under the request's ticket; loads copy the wanted ones as their reads
complete, in the order's order as far as the disk keeps it, and every lease is given back. Each
ordered block is told once, as landed or as lost. Before a block counts as landed, its slot's
generation is read again: changed means miss. A failure of any kind is a miss with a counted reason.
A copy that has not begun can be cancelled: that is answered at once, however long a read takes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from litecache.engine.kv_layout import KVPool
from litecache.engine.scheduling.below import NO_REFS, FoundBelow, Numbers, Refs
from litecache.engine.scheduling.orders import CancelOrder, LoadOrder, LoadReport, StageOrder
from litecache.engine.transfer.block_copier import BlockCopier, Mark
from litecache.engine.transfer.codec import Codec
from litecache.engine.transfer.shard_set import UNREAD, Leases, ShardSet
from litecache.metrics import Metrics
from litecache.spans import note_span
from litecache.storage.block_index import key_words
from litecache.storage.client import ShardClient
from litecache.storage.protocol import SlotState
from litecache.types import Tier

logger = logging.getLogger(__name__)

LOAD_THREADS = 8
LOOKUP_THREADS = 2
LOAD_TIMEOUT_S = 10.0
"""A load in which nothing arrives for so long is given up."""
FETCH_BYTES = 32 << 20
"""Bytes of one message from a remote shard."""
PART_BYTES = 128 << 20
"""Bytes that are copied, and told, together: 2.4 ms of the link, 1 to 2 of the host."""


FIRST_BLOCKS, PART_BLOCKS = 64, 512
"""Of the first part of a load, which is copied while the rest is looked at, and of any other."""


class _Held(NamedTuple):
    """What a ticket's lookups have found and no load has taken."""

    refs: Refs
    leases: Leases

    def places(self, refs: Refs) -> Numbers:
        """Where some blocks are; -1 = nowhere."""
        if np.array_equal(self.refs, refs):  # all of it is loaded, as a rule
            return np.arange(len(refs))
        if not len(self.refs):
            return np.full(len(refs), -1, dtype=np.int64)
        mine, wanted = _numbered(self.refs), _numbered(refs)
        order = np.argsort(mine)
        found = order[np.searchsorted(mine, wanted, sorter=order) % len(mine)]
        return np.where(mine[found] == wanted, found, -1)

    def part(self, places: Numbers) -> _Held:
        """Those at some places."""
        return _Held(self.refs[places], self.leases.part(places))


_NOTHING = _Held(NO_REFS, Leases.none(()))


class _Load:
    """An order under way, in columns.

    Attributes:
        order: what of it was leased; `leases` are its leases.
        waiting: bool `[n]`, the blocks with which nothing was begun, nor given up.
        tier: the slowest of its blocks'.
    """

    def __init__(self, order: LoadOrder, leases: Leases) -> None:
        self.order, self.leases = order, leases
        self.waiting = np.ones(len(order.refs), dtype=bool)
        self.tier = _slowest(leases.tiers())

    def part(self, places: Numbers) -> _Load:
        """Those at some places, waiting."""
        columns = (column[places] for column in self.order[1:])
        return _Load(LoadOrder(self.order.ticket, *columns), self.leases.part(places))

    @property
    def places(self) -> Numbers:
        """Of the blocks that are waiting."""
        return np.flatnonzero(self.waiting)


class _ShardLeases:
    """The blocks of a load on one shard: a few numpy calls tell what has arrived.

    Args:
        load: in whose order they are wanted.
        shard: which leased their slots.
        places: of them in the load.
        nbytes: of the tiers' blocks, by KV group.
        room: bytes of a part.
    """

    def __init__(
        self, load: _Load, shard: ShardClient, places: Numbers, nbytes: Numbers, room: int
    ) -> None:
        self.shard = shard
        self._slots, self._generations = load.leases.slots, load.leases.generations
        self._nbytes = nbytes[load.order.refs[:, 0]]
        self._room, self._most = room, FIRST_BLOCKS
        # places of what was neither begun nor lost
        self._left = places

    def sorted(self) -> tuple[Numbers, Numbers]:
        """Places of what can be copied next, and of what will never come; each is told once.

        The next ones are looked at alone, and all only where none of them is there: the work of a
        part must not grow with what is left.
        """
        for count in (PART_BLOCKS, len(self._left)):
            left = self._left[:count]
            states = self.shard.arena.states(self._slots[left], self._generations[left])
            ready = states == SlotState.READY
            # at least one, however large a block is
            nbytes = np.where(ready, self._nbytes[left], 0)
            ready &= (np.cumsum(nbytes) - nbytes < self._room) & (np.cumsum(ready) <= self._most)
            gone = (states != SlotState.READY) & ((states != SlotState.LOADING) | self.shard.lost)
            if ready.any() or gone.any():
                self._left = np.concatenate((left[~(ready | gone)], self._left[count:]))
                self._most = PART_BLOCKS if ready.any() else self._most
                break
        return left[ready], left[gone]


NO_PLACES: Numbers = np.zeros(0, np.int64)


class _Part(NamedTuple):
    """Blocks that are copied, and told, together; `waited`: they had not been read ahead."""

    shard: ShardClient
    places: Numbers
    waited: bool


class Loader:
    """A few threads that look up and a few that load, each order in one of them.

    Args:
        pools: one per KV group.
        shards: who is asked.
        make_codec: for the calling thread.
        staged: called with a ticket and the blocks that were found.
        loaded: called with what has become of ordered blocks.
        metrics: counts bytes, misses and latencies.
    """

    def __init__(
        self,
        pools: Sequence[KVPool],
        shards: ShardSet,
        make_codec: Callable[[], Codec],
        *,
        staged: Callable[[int, FoundBelow], None],
        loaded: Callable[[LoadReport], None],
        metrics: Metrics,
    ) -> None:
        self._pools = pools
        self._shards = shards
        self._make_codec = make_codec
        self._local = threading.local()
        self._staged = staged
        self._loaded = loaded
        self._metrics = metrics
        self._tier_bytes = np.array([pool.group.tier_bytes for pool in pools], dtype=np.int64)
        # what is begun, or cancelled: one of the two takes a block out of `waiting`
        self._lock = threading.Lock()
        self._held: dict[int, _Held] = {}
        self._under_way: dict[int, list[_Load]] = {}
        # a lookup takes a call, a load the time of its disk: none waits behind the other kind
        self._lookups = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="litecache-lookup")
        self._loads = ThreadPoolExecutor(LOAD_THREADS, thread_name_prefix="litecache-load")

    def stage(self, order: StageOrder) -> None:
        """Look up blocks; answers through `staged`."""
        self._lookups.submit(self._stage, order).add_done_callback(_note_fault)

    def load(self, order: LoadOrder) -> None:
        """Copy staged blocks into the pool; answers through `loaded`."""
        with self._lock:
            held = self._held.get(order.ticket, _NOTHING)
            places = held.places(order.refs)
            known = places >= 0
            taken = held.part(places[known])
            if known.any():
                self._held[order.ticket] = held.part(_others(places[known], len(held.refs)))
            columns = (column[known] for column in order[1:])
            mine = _Load(LoadOrder(order.ticket, *columns), taken.leases)
            near = taken.leases.slots >= 0
            jobs = [
                (job, mine.part(np.flatnonzero(chosen)))
                for job, chosen in ((self._load_near, near), (self._load_far, ~near))
                if chosen.any()
            ]
            self._under_way.setdefault(order.ticket, []).extend(load for _, load in jobs)
        self._tell(order.ticket, lost=order.refs[~known])
        for job, load in jobs:
            self._loads.submit(self._run, job, load).add_done_callback(_note_fault)

    def cancel(self, order: CancelOrder) -> None:
        """Copy these blocks only where that has begun; the others are told as lost at once."""
        spare, lost = [], []
        with self._lock:
            if order.refs is None and order.ticket in self._held:
                spare.append(self._held.pop(order.ticket).leases)
            for load in self._under_way.get(order.ticket, ()):
                ended = load.waiting.copy()
                if order.refs is not None:
                    ended &= np.isin(_numbered(load.order.refs), _numbered(order.refs))
                load.waiting &= ~ended
                lost.append(load.order.refs[ended])
                spare.append(load.leases.part(np.flatnonzero(ended)))
        for refs in lost:
            self._tell(order.ticket, lost=refs)
        for leases in spare:
            self._give_back(leases)

    def discard(self, ticket: int) -> None:
        """Give back the leases of a lookup nobody wants any more."""
        with self._lock:
            held = self._held.pop(ticket, _NOTHING)
        self._give_back(held.leases)

    def close(self) -> None:
        """Finish the lookups and the copies that have begun, and end the threads."""
        self._lookups.shutdown(wait=True)
        with self._lock:
            tickets = {*self._held, *self._under_way}
        for ticket in tickets:
            self.cancel(CancelOrder(ticket))
        self._loads.shutdown(wait=True)

    def _give_back(self, leases: Leases) -> None:
        """Without waiting for the shards."""
        if len(leases.places):
            try:
                self._lookups.submit(self._shards.give_back, leases)
            except RuntimeError:  # the loader is closing
                self._shards.give_back(leases)

    def _stage(self, order: StageOrder) -> None:
        started = time.perf_counter()
        leases = Leases.none(())
        try:
            leases = self._shards.stage(order.keys, order.reads)
        except Exception:
            logger.exception("looking up %d blocks failed", len(order.keys))
        self._metrics.observe(
            "litecache_io_seconds", time.perf_counter() - started, direction="stage", tier="shard"
        )
        there = np.flatnonzero(leases.origins >= 0)
        unread = order.refs[np.flatnonzero(leases.origins == UNREAD)]
        leases, refs = leases.part(there), order.refs[there]
        names = tuple(origin.name for origin in leases.of)
        found = FoundBelow(refs, leases.origins, names, unread)
        if len(there):
            with self._lock:
                held = self._held.get(order.ticket)
                if held is not None:  # numbers the origins anew
                    refs, leases = np.concatenate((held.refs, refs)), held.leases.and_more(leases)
                self._held[order.ticket] = _Held(refs, leases)
        self._staged(order.ticket, found)

    def _run(self, job: Callable[[_Load], None], load: _Load) -> None:
        started = time.perf_counter()
        try:
            job(load)
        except Exception:
            # Blocks that were not confirmed are misses; the request recomputes them.
            logger.exception("loading %d blocks failed", len(load.order.refs))
            self._metrics.inc("litecache_misses", tier="shard", reason="error")
            self._lose(load, load.places, "error")
        finally:
            with self._lock:
                loads = self._under_way[load.order.ticket]
                loads.remove(load)
                if not loads:
                    del self._under_way[load.order.ticket]
        note_span("load", started, blocks=len(load.order.refs), tier=load.tier)
        elapsed = time.perf_counter() - started
        self._metrics.observe("litecache_io_seconds", elapsed, direction="load", tier=load.tier)

    def _take(self, load: _Load, places: Numbers) -> Numbers:
        """Of these blocks, those that are not cancelled: they are this thread's from now on."""
        with self._lock:
            mine = places[load.waiting[places]]
            load.waiting[mine] = False
        return mine

    def _lose(self, load: _Load, places: Numbers, reason: str) -> None:
        """Nothing can be begun with these blocks."""
        mine = self._take(load, places)
        leases = load.leases.part(mine)
        self._miss(leases, reason)
        failed = {leases.of[origin].name for origin in np.unique(leases.origins).tolist()}
        self._tell(load.order.ticket, lost=load.order.refs[mine], failed=frozenset(failed))
        self._shards.give_back(leases)

    def _tell(
        self,
        ticket: int,
        landed: Refs = NO_REFS,
        lost: Refs = NO_REFS,
        failed: frozenset[str] = frozenset(),
        waited: bool = True,
    ) -> None:
        if len(landed) or len(lost):
            self._loaded(LoadReport(ticket, landed, lost, failed, time.monotonic(), waited))

    def _load_near(self, load: _Load) -> None:
        """Copy what becomes ready in slots of this node; a part is told as it lands."""
        codec = self._codec()
        shards = self._by_shard(load)
        copying: deque[tuple[Mark | None, _Part]] = deque()
        spent = NO_PLACES
        heard_s, pause_s, waited = time.monotonic(), 0.0002, False
        try:
            while load.waiting.any() or copying:
                busy = False
                for leases in shards:
                    ready, gone = leases.sorted()
                    if len(gone):
                        self._lose(load, gone, "failed")
                    part = _Part(leases.shard, self._take(load, ready), waited)
                    busy = busy or bool(len(part.places) or len(gone))
                    if len(part.places):
                        copying.append((None, part))
                        self._copy_in(codec, load, part)
                        copying[-1] = (codec.mark(), part)
                # What has landed is told at once; where nothing else is to be begun, the next part
                # is waited for, and not all of them: the engine takes them in one by one.
                while copying and (mark := copying[0][0]):
                    if not mark.passed():
                        if load.waiting.any():
                            break
                        # beside the copy: behind the last one the engine would wait for it
                        self._shards.give_back(load.leases.part(spent))
                        spent = NO_PLACES
                        mark.wait()
                    self._landed(load, copying[0][1])
                    spent = np.concatenate((spent, copying.popleft()[1].places))
                    busy = True
                if busy:
                    heard_s, pause_s = time.monotonic(), 0.0002
                elif load.waiting.any() and time.monotonic() > heard_s + LOAD_TIMEOUT_S:
                    self._lose(load, load.places, "timeout")
                elif len(spent):
                    # a call, for which no copy has to wait
                    self._shards.give_back(load.leases.part(spent))
                    spent = NO_PLACES
                else:
                    # Progress shows in shared memory only; there is nothing to block on.
                    time.sleep(pause_s)
                    pause_s, waited = min(pause_s * 2, 0.002), True
        except BaseException:
            codec.synchronize()
            for _, part in copying:
                self._tell(load.order.ticket, lost=load.order.refs[part.places])
                spent = np.concatenate((spent, part.places))
            raise
        finally:
            self._shards.give_back(load.leases.part(spent))

    def _by_shard(self, load: _Load) -> list[_ShardLeases]:
        shards = [(shard, at) for _, shard, at in load.leases.by_shard() if shard is not None]
        room = PART_BYTES // max(1, len(shards))
        return [_ShardLeases(load, shard, at, self._tier_bytes, room) for shard, at in shards]

    def _landed(self, load: _Load, part: _Part) -> None:
        """The copies of a part are done: what is confirmed holds its bytes; the leases are left."""
        places, leases = part.places, load.leases.part(part.places)
        arena, words = part.shard.arena, key_words(leases.keys)
        fine = arena.confirm(leases.slots, leases.generations, words)
        self._miss(leases.part(np.flatnonzero(~fine)), "changed")
        refs = load.order.refs[places]
        self._tell(load.order.ticket, refs[fine], refs[~fine], waited=part.waited)
        self._count_copied(refs[fine], leases.part(np.flatnonzero(fine)))

    def _count_copied(self, refs: Refs, leases: Leases) -> None:
        for origin in np.unique(leases.origins).tolist():
            nbytes = int(self._tier_bytes[refs[leases.origins == origin, 0]].sum())
            tier = leases.of[origin].tier.value
            self._metrics.inc("litecache_copied_bytes", nbytes, direction="load", tier=tier)

    def _load_far(self, load: _Load) -> None:
        """Fetch blocks from shards of other nodes, many in a message."""
        codec = self._codec()
        for shard_id, _, places in load.leases.by_shard():
            size = int(self._tier_bytes[load.order.refs[places, 0]].max())
            count = max(1, FETCH_BYTES // size)
            for first in range(0, len(places), count):
                part = places[first : first + count]
                self._fetch(codec, load, shard_id, part[load.waiting[part]])

    def _fetch(self, codec: Codec, load: _Load, shard_id: str, places: Numbers) -> None:
        blocks = self._shards.fetch(load.leases.part(places))
        sizes = self._tier_bytes[load.order.refs[places, 0]]
        good = np.array([len(data or b"") for data in blocks], dtype=np.int64) == sizes
        self._lose(load, places[~good], "absent")
        mine = self._take(load, places[good])
        if len(mine):
            data = dict(zip(places.tolist(), blocks, strict=True))
            self._copy_message(codec, load, mine, data)
            codec.synchronize()
        refs = load.order.refs[mine]
        self._metrics.inc("litecache_remote_blocks", len(mine), shard=shard_id)
        self._count_copied(refs, load.leases.part(mine))
        self._tell(load.order.ticket, refs)

    def _copy_in(self, codec: Codec, load: _Load, part: _Part) -> None:
        """Start to fill blocks of the pool from their slots."""
        for group, mine in self._in_order(codec.copier, load, part.places):
            nbytes, numbers = int(self._tier_bytes[group]), load.leases.slots[mine]
            slots = codec.copier.slots(part.shard.arena, numbers, nbytes)
            codec.load(self._pools[group], load.order.blocks[mine], slots)

    def _copy_message(
        self, codec: Codec, load: _Load, places: Numbers, data: Mapping[int, bytes | None]
    ) -> None:
        """Start to fill blocks of the pool from bytes of another node."""
        for group, mine in self._in_order(codec.copier, load, places):
            views = [
                [torch.frombuffer(bytearray(data[place] or b""), dtype=torch.uint8)]
                for place in mine.tolist()
            ]
            codec.load(self._pools[group], load.order.blocks[mine], views)

    def _in_order(
        self, copier: BlockCopier, load: _Load, places: Numbers
    ) -> Iterator[tuple[int, Numbers]]:
        """By KV group, places in an order in which they may be copied to."""
        groups = load.order.refs[places, 0]
        for at in copier.in_order(load.order.steps[places]):
            for group in np.unique(groups[at]).tolist():
                yield group, places[at[groups[at] == group]]

    def _miss(self, leases: Leases, reason: str) -> None:
        for origin in leases.origins.tolist():
            self._metrics.inc("litecache_misses", tier=leases.of[origin].tier.value, reason=reason)

    def _codec(self) -> Codec:
        if not hasattr(self._local, "codec"):
            self._local.codec = self._make_codec()
        codec: Codec = self._local.codec
        return codec


def _numbered(refs: Refs) -> Numbers:
    return refs[:, 0] << 40 | refs[:, 1]


def _others(places: Numbers, count: int) -> Numbers:
    """All places below `count` but these."""
    left = np.ones(count, dtype=bool)
    left[places] = False
    return np.flatnonzero(left)


def _slowest(tiers: Collection[Tier]) -> str:
    """The tier that a load from these waits for."""
    return next((t for t in (Tier.REMOTE, Tier.DISK) if t in tiers), Tier.RAM).value


def _note_fault(order: Future[None]) -> None:
    error = order.exception()
    if error is not None:
        logger.error("an order could not be answered", exc_info=error)
