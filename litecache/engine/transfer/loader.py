"""Finds blocks in the lower tiers and copies them into the pool.

A lookup leases slots under the request's ticket; loads copy the wanted ones as their reads
complete, in the order's order as far as the disk keeps it, and every lease is given back. Each
ordered block is told once, as landed or as lost. Before a block counts as landed, its slot's
generation is read again: changed means miss. A failure of any kind is a miss with a counted reason.
A copy that has not begun can be cancelled: that is answered at once, however long a read takes.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from litecache.engine.kv_layout import KVPool
from litecache.engine.scheduling.orders import CancelOrder, LoadOrder, LoadReport, StageOrder
from litecache.engine.scheduling.sequence import BlockRef
from litecache.engine.transfer.block_copier import BlockCopier, Codec, Mark, Numbers, Slot
from litecache.engine.transfer.shard_set import Lease, ShardSet
from litecache.metrics import Metrics
from litecache.spans import note_span
from litecache.storage.block_index import key_words
from litecache.storage.protocol import SlotState
from litecache.types import Tier

logger = logging.getLogger(__name__)

LOAD_THREADS = 8
LOOKUP_THREADS = 2
LOAD_TIMEOUT_S = 10.0
"""A load in which nothing arrives for so long is given up."""
FETCH_BYTES = 32 << 20
"""Bytes of one message from a remote shard."""
PART_BYTES = 64 << 20
"""Bytes that are copied, and told, together."""


class _Load:
    """An order under way, and the leases of its blocks that nothing was begun with.

    `tier` is the slowest of its blocks'.
    """

    def __init__(self, order: LoadOrder, waiting: dict[BlockRef, Lease]) -> None:
        self.order = order
        self.waiting = waiting
        self.tier = _slowest(waiting.values())


class _ShardLeases:
    """The leases of a load on one shard, as columns: a few numpy calls tell what has arrived.

    Attributes:
        refs, leases: in the order in which they are wanted.
        slots, groups: int64 `[n]`.
    """

    def __init__(
        self, refs: list[BlockRef], leases: list[Lease], sizes: Sequence[int], room: int
    ) -> None:
        shard = leases[0].shard
        assert shard is not None
        self.shard = shard
        self.refs, self.leases = refs, leases
        slots = [lease.slot for lease in leases if lease.slot is not None]
        self.slots = np.fromiter([slot for slot, _ in slots], np.int64, len(slots))
        self._generations = np.fromiter([number for _, number in slots], np.uint64, len(slots))
        self._keys = key_words([lease.key for lease in leases])
        self.groups = np.fromiter([group for group, _ in refs], np.int64, len(refs))
        self._nbytes = np.array(sizes, dtype=np.int64)[self.groups]
        self._room = room
        # places of what was neither begun nor lost
        self._left = np.arange(len(refs))

    def sorted(self) -> tuple[Numbers, list[int]]:
        """Places of what can be copied next, and of what will never come; each is told once."""
        left = self._left
        if not len(left):
            return left, []
        states = self.shard.arena.states(self.slots[left], self._generations[left])
        ready = left[states == SlotState.READY]
        # at least one, however large a block is
        fits = np.cumsum(self._nbytes[ready]) - self._nbytes[ready] < self._room
        ready = ready[fits]
        lost = self.shard.lost
        gone = left[(states != SlotState.READY) & ((states != SlotState.LOADING) | lost)]
        if len(ready) or len(gone):
            self._left = np.setdiff1d(left, np.concatenate([ready, gone]), assume_unique=True)
        return ready, gone.tolist()

    def confirmed(self, places: Numbers) -> list[bool]:
        """Which slots still hold what was leased."""
        generations, keys = self._generations[places], self._keys[places]
        fine: list[bool] = self.shard.arena.confirm(self.slots[places], generations, keys).tolist()
        return fine


class _Part(NamedTuple):
    """Blocks that are copied, and told, together; `waited`: they had not been read ahead."""

    of: _ShardLeases
    places: Numbers
    waited: bool

    @property
    def refs(self) -> list[BlockRef]:
        return [self.of.refs[place] for place in self.places.tolist()]

    @property
    def leases(self) -> list[Lease]:
        return [self.of.leases[place] for place in self.places.tolist()]


class Loader:
    """A few threads that look up and a few that load, each order in one of them.

    Args:
        pools: one per KV group.
        shards: who is asked.
        make_copier: a copier for the calling thread.
        staged: called with (ticket, found blocks -> source), a source being "tier:shard".
        loaded: called with what has become of ordered blocks.
        codec: between the bytes of pool and tiers.
        metrics: counts bytes, misses and latencies.
    """

    def __init__(
        self,
        pools: Sequence[KVPool],
        shards: ShardSet,
        make_copier: Callable[[], BlockCopier],
        *,
        staged: Callable[[int, dict[BlockRef, str]], None],
        loaded: Callable[[LoadReport], None],
        metrics: Metrics,
        codec: Codec,
    ) -> None:
        self._pools = pools
        self._shards = shards
        self._make_copier = make_copier
        self._local = threading.local()
        self._staged = staged
        self._loaded = loaded
        self._metrics = metrics
        self._codec = codec
        # of what is begun, what is cancelled: one of the two takes a lease out of `waiting`
        self._lock = threading.Lock()
        self._leases: dict[int, dict[BlockRef, Lease]] = {}
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
            leases = self._leases.get(order.ticket, {})
            mine = {ref: leases.pop(ref) for ref in order.blocks if ref in leases}
            far = {ref: lease for ref, lease in mine.items() if lease.slot is None}
            near = {ref: lease for ref, lease in mine.items() if lease.slot is not None}
            jobs = [
                (job, _Load(order, part))
                for job, part in ((self._load_near, near), (self._load_far, far))
                if part
            ]
            self._under_way.setdefault(order.ticket, []).extend(load for _, load in jobs)
        self._tell(order.ticket, lost=[ref for ref in order.blocks if ref not in mine])
        for job, load in jobs:
            self._loads.submit(self._run, job, load).add_done_callback(_note_fault)

    def cancel(self, order: CancelOrder) -> None:
        """Copy these blocks only where that has begun; the others are told as lost at once."""
        with self._lock:
            spare = {} if order.blocks is not None else self._leases.pop(order.ticket, {})
            lost: dict[BlockRef, Lease] = {}
            for load in self._under_way.get(order.ticket, ()):
                refs = tuple(load.waiting) if order.blocks is None else order.blocks
                lost |= {ref: load.waiting.pop(ref) for ref in refs if ref in load.waiting}
        self._tell(order.ticket, lost=list(lost))
        self._give_back([*spare.values(), *lost.values()])

    def discard(self, ticket: int) -> None:
        """Give back the leases of a lookup nobody wants any more."""
        with self._lock:
            leases = self._leases.pop(ticket, {})
        self._give_back(list(leases.values()))

    def close(self) -> None:
        """Finish the lookups and the copies that have begun, and end the threads."""
        self._lookups.shutdown(wait=True)
        with self._lock:
            tickets = {*self._leases, *self._under_way}
        for ticket in tickets:
            self.cancel(CancelOrder(ticket))
        self._loads.shutdown(wait=True)

    def _give_back(self, leases: Sequence[Lease]) -> None:
        """Without waiting for the shards."""
        if leases:
            try:
                self._lookups.submit(self._shards.give_back, leases)
            except RuntimeError:  # the loader is closing
                self._shards.give_back(leases)

    def _stage(self, order: StageOrder) -> None:
        started = time.perf_counter()
        found: dict[BlockRef, Lease] = {}
        try:
            leases = self._shards.stage(list(order.blocks.values()))
            found = {ref: lease for ref, lease in zip(order.blocks, leases, strict=True) if lease}
        except Exception:
            logger.exception("looking up %d blocks failed", len(order.blocks))
        self._metrics.observe(
            "litecache_io_seconds", time.perf_counter() - started, direction="stage", tier="shard"
        )
        if found:
            with self._lock:
                self._leases.setdefault(order.ticket, {}).update(found)
        self._staged(order.ticket, {ref: lease.source for ref, lease in found.items()})

    def _run(self, job: Callable[[_Load], None], load: _Load) -> None:
        started = time.perf_counter()
        try:
            job(load)
        except Exception:
            # Blocks that were not confirmed are misses; the request recomputes them.
            logger.exception("loading %d blocks failed", len(load.order.blocks))
            self._metrics.inc("litecache_misses", tier="shard", reason="error")
            self._lose(load, list(load.waiting), "error")
        finally:
            with self._lock:
                loads = self._under_way[load.order.ticket]
                loads.remove(load)
                if not loads:
                    del self._under_way[load.order.ticket]
        note_span("load", started, blocks=len(load.order.blocks), tier=load.tier)
        elapsed = time.perf_counter() - started
        self._metrics.observe("litecache_io_seconds", elapsed, direction="load", tier=load.tier)

    def _take(self, load: _Load, refs: Iterable[BlockRef]) -> dict[BlockRef, Lease]:
        """Of these blocks, those that are not cancelled: they are this thread's from now on."""
        with self._lock:
            return {ref: load.waiting.pop(ref) for ref in refs if ref in load.waiting}

    def _lose(self, load: _Load, refs: Sequence[BlockRef], reason: str) -> None:
        """Nothing can be begun with these blocks."""
        mine = self._take(load, refs)
        for lease in mine.values():
            self._miss(lease, reason)
        failed = {lease.source for lease in mine.values()}
        self._tell(load.order.ticket, lost=list(mine), failed=frozenset(failed))
        self._shards.give_back(list(mine.values()))

    def _tell(
        self,
        ticket: int,
        landed: Sequence[BlockRef] = (),
        lost: Sequence[BlockRef] = (),
        failed: frozenset[str] = frozenset(),
        waited: bool = True,
    ) -> None:
        if landed or lost:
            self._loaded(LoadReport(ticket, landed, lost, failed, time.monotonic(), waited))

    def _load_near(self, load: _Load) -> None:
        """Copy what becomes ready in slots of this node; a part is told as it lands."""
        copier = self._copier()
        shards = self._by_shard(load)
        copying: deque[tuple[Mark | None, _Part]] = deque()
        spent: list[Lease] = []
        heard_s, pause_s, waited = time.monotonic(), 0.0002, False
        try:
            while load.waiting or copying:
                busy = False
                for leases in shards:
                    ready, gone = leases.sorted()
                    if gone:
                        self._lose(load, [leases.refs[place] for place in gone], "failed")
                    part = _Part(leases, self._taken(load, leases, ready), waited)
                    busy = busy or bool(len(part.places) or gone)
                    if len(part.places):
                        copying.append((None, part))
                        self._copy_in(copier, load.order, part)
                        copying[-1] = (copier.mark(), part)
                # What has landed is told at once; where nothing else is to be begun, the next part
                # is waited for, and not all of them: the engine takes them in one by one.
                while copying and (mark := copying[0][0]):
                    if not mark.passed():
                        if load.waiting:
                            break
                        # beside the copy: behind the last one the engine would wait for it
                        self._shards.give_back(spent)
                        spent = []
                        mark.wait()
                    self._landed(load.order.ticket, copying[0][1])
                    spent += copying.popleft()[1].leases
                    busy = True
                if busy:
                    heard_s, pause_s = time.monotonic(), 0.0002
                elif load.waiting and time.monotonic() > heard_s + LOAD_TIMEOUT_S:
                    self._lose(load, list(load.waiting), "timeout")
                elif spent:
                    self._shards.give_back(spent)  # a call, for which no copy has to wait
                    spent = []
                else:
                    # Progress shows in shared memory only; there is nothing to block on.
                    time.sleep(pause_s)
                    pause_s, waited = min(pause_s * 2, 0.002), True
        except BaseException:
            copier.synchronize()
            for _, part in copying:
                self._tell(load.order.ticket, lost=part.refs)
                spent += part.leases
            raise
        finally:
            self._shards.give_back(spent)

    def _by_shard(self, load: _Load) -> list[_ShardLeases]:
        with self._lock:
            waiting = dict(load.waiting)
        by_shard: dict[str, list[BlockRef]] = {}
        for ref, lease in waiting.items():
            by_shard.setdefault(lease.shard_id, []).append(ref)
        room = PART_BYTES // max(1, len(by_shard))
        sizes = [pool.group.tier_bytes for pool in self._pools]
        return [
            _ShardLeases(refs, [waiting[ref] for ref in refs], sizes, room)
            for refs in by_shard.values()
        ]

    def _taken(self, load: _Load, leases: _ShardLeases, places: Numbers) -> Numbers:
        """Of these places, those whose blocks are not cancelled."""
        if not len(places):
            return places
        taken = self._take(load, [leases.refs[place] for place in places.tolist()])
        if len(taken) == len(places):
            return places
        return np.array([p for p in places.tolist() if leases.refs[p] in taken], dtype=np.int64)

    def _landed(self, ticket: int, part: _Part) -> None:
        """The copies of a part are done: what is confirmed holds its bytes; the leases are left."""
        fine = part.of.confirmed(part.places)
        refs = part.refs
        done = [ref for ref, good in zip(refs, fine, strict=True) if good]
        lost = [ref for ref, good in zip(refs, fine, strict=True) if not good]
        for lease, good in zip(part.leases, fine, strict=True):
            if not good:
                self._miss(lease, "changed")
        self._tell(ticket, done, lost, waited=part.waited)
        confirmed = itertools.compress(part.leases, fine)
        self._count_copied(zip(done, confirmed, strict=True))

    def _count_copied(self, part: Iterable[tuple[BlockRef, Lease]]) -> None:
        counts = Counter((lease.tier, group) for (group, _), lease in part)
        for (tier, group), count in counts.items():
            nbytes = count * self._tier_bytes(group)
            self._metrics.inc("litecache_copied_bytes", nbytes, direction="load", tier=tier.value)

    def _load_far(self, load: _Load) -> None:
        """Fetch blocks from shards of other nodes, many in a message."""
        copier = self._copier()
        while load.waiting:
            with self._lock:
                waiting = dict(load.waiting)
            shard_id = next((lease.shard_id for lease in waiting.values()), "")
            refs = [ref for ref, lease in waiting.items() if lease.shard_id == shard_id]
            size = max((self._tier_bytes(group) for group, _ in refs), default=1)
            refs = refs[: max(1, FETCH_BYTES // size)]
            leases = [waiting[ref] for ref in refs]
            blocks = self._shards.fetch(leases)
            good = [
                data is not None and len(data) == self._tier_bytes(group)
                for (group, _), data in zip(refs, blocks, strict=True)
            ]
            lost = [ref for ref, fine in zip(refs, good, strict=True) if not fine]
            if lost:
                self._lose(load, lost, "absent")
            part = self._take(load, refs)
            views = {
                ref: [torch.frombuffer(bytearray(data), dtype=torch.uint8)]
                for ref, data in zip(refs, blocks, strict=True)
                if ref in part and data is not None
            }
            if views:
                self._copy_message(copier, load.order, views)
                copier.synchronize()
            self._metrics.inc("litecache_remote_blocks", len(part), shard=shard_id)
            self._count_copied(part.items())
            self._tell(load.order.ticket, list(part))

    def _copy_in(self, copier: BlockCopier, order: LoadOrder, part: _Part) -> None:
        """Start to fill blocks of the pool from their slots."""
        targets = np.array([order.blocks[ref] for ref in part.refs], dtype=np.int64)
        groups = part.of.groups[part.places]
        for at in copier.in_order(targets[:, 1]):
            for group in np.unique(groups[at]).tolist():
                mine = at[groups[at] == group]
                nbytes, numbers = self._tier_bytes(group), part.of.slots[part.places[mine]]
                slots = copier.slots(part.of.shard.arena, numbers, nbytes)
                self._codec.load(copier, self._pools[group], targets[mine, 0], slots)

    def _copy_message(
        self, copier: BlockCopier, order: LoadOrder, part: Mapping[BlockRef, Slot]
    ) -> None:
        """Start to fill blocks of the pool from bytes of another node."""
        refs = list(part)
        targets = np.array([order.blocks[ref] for ref in refs], dtype=np.int64)
        groups = np.array([group for group, _ in refs])
        for at in copier.in_order(targets[:, 1]):
            for group in np.unique(groups[at]).tolist():
                mine = at[groups[at] == group]
                views = [part[refs[place]] for place in mine.tolist()]
                self._codec.load(copier, self._pools[group], targets[mine, 0], views)

    def _tier_bytes(self, group: int) -> int:
        return self._pools[group].group.tier_bytes

    def _miss(self, lease: Lease, reason: str) -> None:
        self._metrics.inc("litecache_misses", tier=lease.tier.value, reason=reason)

    def _copier(self) -> BlockCopier:
        if not hasattr(self._local, "copier"):
            self._local.copier = self._make_copier()
        copier: BlockCopier = self._local.copier
        return copier


def _slowest(leases: Iterable[Lease]) -> str:
    """The tier that a load of these waits for."""
    tiers = {lease.tier for lease in leases}
    return next((t for t in (Tier.REMOTE, Tier.DISK) if t in tiers), Tier.RAM).value


def _note_fault(order: Future[None]) -> None:
    error = order.exception()
    if error is not None:
        logger.error("an order could not be answered", exc_info=error)
