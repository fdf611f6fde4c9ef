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
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from litecache.engine.kv_layout import KVPool
from litecache.engine.scheduling.orders import CancelOrder, LoadOrder, LoadReport, StageOrder
from litecache.engine.scheduling.sequence import BlockRef
from litecache.engine.transfer.block_copier import BlockCopier, Codec, Slot
from litecache.engine.transfer.shard_set import Lease, ShardSet
from litecache.metrics import Metrics
from litecache.spans import note_span
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
POLLED_BLOCKS = 128
"""Slots that are looked at in turn, of those still awaited: reads end about in their order."""


class _Load:
    """An order under way, and the leases of its blocks that nothing was begun with.

    `tier` is the slowest of its blocks'.
    """

    def __init__(self, order: LoadOrder, waiting: dict[BlockRef, Lease]) -> None:
        self.order = order
        self.waiting = waiting
        self.tier = _slowest(waiting.values())


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
        self._staged(order.ticket, {ref: _source(lease) for ref, lease in found.items()})

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
        failed = {_source(lease) for lease in mine.values()}
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
        copying: deque[tuple[Callable[[], bool], dict[BlockRef, Lease], bool]] = deque()
        spent: list[Lease] = []
        heard_s, pause_s, waited = time.monotonic(), 0.0002, False
        try:
            while load.waiting or copying:
                ready, gone = self._sorted(load)
                if gone:
                    self._lose(load, gone, "failed")
                part = self._take(load, ready)
                if part:
                    copying.append((_never, part, waited))
                    slots = {ref: self._slot(copier, ref[0], le) for ref, le in part.items()}
                    self._copy_in(copier, load.order, slots)
                    copying[-1] = (copier.mark(), part, waited)
                landed = False
                while copying and (copying[0][0]() or not load.waiting):
                    if not copying[0][0]():
                        copier.synchronize()
                    spent += self._landed(load.order.ticket, *copying[0][1:])
                    copying.popleft()
                    landed = True
                if part or gone or landed:
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
            for _, part, _ in copying:
                self._tell(load.order.ticket, lost=list(part))
                spent += part.values()
            raise
        finally:
            self._shards.give_back(spent)

    def _sorted(self, load: _Load) -> tuple[list[BlockRef], list[BlockRef]]:
        """Of the next blocks, what can be copied and what will never come."""
        ready: list[BlockRef] = []
        gone: list[BlockRef] = []
        room = PART_BYTES
        with self._lock:
            waiting = list(itertools.islice(load.waiting.items(), POLLED_BLOCKS))
        for ref, lease in waiting:
            assert lease.shard is not None
            assert lease.slot is not None
            state = lease.shard.arena.state(lease.slot.slot, lease.slot.generation)
            if state is SlotState.READY:
                ready.append(ref)
                room -= self._tier_bytes(ref[0])
                if room <= 0:
                    break
            elif state is not SlotState.LOADING or lease.shard.lost:
                gone.append(ref)
        return ready, gone

    def _landed(self, ticket: int, part: Mapping[BlockRef, Lease], waited: bool) -> list[Lease]:
        """The copies of a part are done: what is confirmed holds its bytes; the leases are left."""
        confirmed = {ref: self._confirm(lease) for ref, lease in part.items()}
        done = [ref for ref, fine in confirmed.items() if fine]
        lost = [ref for ref, fine in confirmed.items() if not fine]
        self._tell(ticket, done, lost, waited=waited)
        self._count_copied({ref: part[ref] for ref in done})
        return list(part.values())

    def _count_copied(self, part: Mapping[BlockRef, Lease]) -> None:
        totals: dict[str, int] = {}
        for (group, _), lease in part.items():
            tier = lease.tier.value
            totals[tier] = totals.get(tier, 0) + self._tier_bytes(group)
        for tier, nbytes in totals.items():
            self._metrics.inc("litecache_copied_bytes", nbytes, direction="load", tier=tier)

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
            self._copy_in(copier, load.order, views)
            copier.synchronize()
            self._metrics.inc("litecache_remote_blocks", len(part), shard=shard_id)
            self._count_copied(part)
            self._tell(load.order.ticket, list(part))

    def _slot(self, copier: BlockCopier, group: int, lease: Lease) -> Slot:
        assert lease.shard is not None
        assert lease.slot is not None
        (view,) = copier.slots(lease.shard.arena, [lease.slot.slot], self._tier_bytes(group))
        return view

    def _copy_in(
        self, copier: BlockCopier, order: LoadOrder, part: Mapping[BlockRef, Slot]
    ) -> None:
        """Start to fill blocks of the pool from their bytes in the tiers."""

        def step(ref: BlockRef) -> int:
            return order.blocks[ref][1]

        for last, refs in itertools.groupby(sorted(part, key=step), key=step):
            copier.after(last)
            by_group: dict[int, list[BlockRef]] = {}
            for ref in refs:
                by_group.setdefault(ref[0], []).append(ref)
            for group, mine in by_group.items():
                blocks = [order.blocks[ref][0] for ref in mine]
                self._codec.load(copier, self._pools[group], blocks, [part[ref] for ref in mine])

    def _tier_bytes(self, group: int) -> int:
        return self._pools[group].group.tier_bytes

    def _confirm(self, lease: Lease) -> bool:
        assert lease.shard is not None
        assert lease.slot is not None
        _, generation, key = lease.shard.arena.entry(lease.slot.slot)
        if generation == lease.slot.generation and key == lease.key:
            return True
        self._miss(lease, "changed")
        return False

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


def _source(lease: Lease) -> str:
    return f"{lease.tier.value}:{lease.shard_id}"


def _never() -> bool:
    return False


def _note_fault(order: Future[None]) -> None:
    error = order.exception()
    if error is not None:
        logger.error("an order could not be answered", exc_info=error)
