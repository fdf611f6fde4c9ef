"""Finds blocks in the lower tiers and copies them into the pool.

A lookup leases slots under the request's ticket; loads copy the wanted ones as their reads
complete, tell what has landed as it lands, and give every lease back. Before a block counts as
loaded, its slot's generation is read again: changed means miss. A failure of any kind is a miss
with a counted reason. A load that is cancelled copies nothing that it has not begun.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from litecache.engine.kv_layout import KVPool
from litecache.engine.scheduling.orders import LoadOrder, StageOrder
from litecache.engine.scheduling.sequence import BlockRef
from litecache.engine.transfer.block_copier import BlockCopier, Codec
from litecache.engine.transfer.shard_set import Lease, ShardSet
from litecache.metrics import Metrics
from litecache.storage.protocol import SlotState
from litecache.types import Tier

logger = logging.getLogger(__name__)

LOAD_THREADS = 4
LOOKUP_THREADS = 2
LOAD_TIMEOUT_S = 10.0
FETCH_BYTES = 32 << 20
"""Bytes of one message from a remote shard."""


class Loader:
    """A few threads that look up and a few that load, each order in one of them.

    Args:
        pools: one per KV group.
        shards: who is asked.
        make_copier: a copier for the calling thread.
        staged: called with (ticket, found blocks -> tier).
        loaded: called with (order, blocks that hold their bytes now, whether the load has ended).
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
        loaded: Callable[[LoadOrder, Iterable[BlockRef], bool], None],
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
        self._leases: dict[int, dict[BlockRef, Lease]] = {}
        self._cancelled: dict[int, threading.Event] = {}
        # a lookup takes a call, a load the time of its disk: none waits behind the other kind
        self._lookups = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="litecache-lookup")
        self._loads = ThreadPoolExecutor(LOAD_THREADS, thread_name_prefix="litecache-load")

    def stage(self, order: StageOrder) -> None:
        """Look up blocks; answers through `staged`."""
        self._lookups.submit(self._stage, order).add_done_callback(_note_fault)

    def load(self, order: LoadOrder) -> None:
        """Copy staged blocks into the pool; answers through `loaded`."""
        leases = self._leases.pop(order.ticket, {})
        wanted = {ref: leases.pop(ref) for ref in order.blocks if ref in leases}
        if order.more:
            self._leases[order.ticket], leases = leases, {}
        cancelled = self._cancelled.setdefault(order.ticket, threading.Event())
        load = self._loads.submit(self._load, order, wanted, list(leases.values()), cancelled)
        load.add_done_callback(_note_fault)

    def cancel(self, ticket: int) -> None:
        """Let the loads of a ticket end early: nobody wants what they have not begun to copy."""
        if ticket in self._cancelled:
            self._cancelled[ticket].set()
        self.discard(ticket)

    def discard(self, ticket: int) -> None:
        """Give back the leases of a lookup nobody wants any more."""
        leases = self._leases.pop(ticket, {})
        if leases:
            self._lookups.submit(self._shards.give_back, list(leases.values()))

    def close(self) -> None:
        """Finish the orders under way and end the threads."""
        self._lookups.shutdown(wait=True)
        self._loads.shutdown(wait=True)
        for leases in self._leases.values():
            self._shards.give_back(list(leases.values()))
        self._leases.clear()

    def _stage(self, order: StageOrder) -> None:
        started = time.perf_counter()
        found: dict[BlockRef, Lease] = {}
        try:
            leases = self._shards.stage(list(order.blocks.values()))
            found = {ref: lease for ref, lease in zip(order.blocks, leases, strict=True) if lease}
        except Exception:
            logger.exception("looking up %d blocks failed", len(order.blocks))
        self._metrics.observe(
            "litecache_io_seconds", time.perf_counter() - started, direction="stage"
        )
        self._leases[order.ticket] = found
        self._staged(order.ticket, {ref: lease.tier.value for ref, lease in found.items()})

    def _load(
        self,
        order: LoadOrder,
        wanted: dict[BlockRef, Lease],
        others: list[Lease],
        cancelled: threading.Event,
    ) -> None:
        started = time.perf_counter()
        last: list[BlockRef] = []
        try:
            self._shards.give_back(others)
            last = self._load_local(order, wanted, cancelled)
            self._load_remote(order, wanted, cancelled)
        except Exception:
            # Blocks that were not confirmed are misses; the request recomputes them.
            logger.exception("loading %d blocks failed", len(order.blocks))
            self._metrics.inc("litecache_misses", tier="shard", reason="error")
        elapsed = time.perf_counter() - started
        self._metrics.observe("litecache_io_seconds", elapsed, direction="load")
        if not order.more:
            self._cancelled.pop(order.ticket, None)
        self._loaded(order, last, True)

    def _load_local(
        self, order: LoadOrder, wanted: dict[BlockRef, Lease], cancelled: threading.Event
    ) -> list[BlockRef]:
        """Copy what becomes ready; each part that was copied together lands together.

        Returns:
            The part that landed last, which has not been told.
        """
        copier = self._copier()
        copier.begin_load()
        waiting = [(ref, lease) for ref, lease in wanted.items() if lease.slot is not None]
        copying: deque[tuple[Callable[[], bool], list[tuple[BlockRef, Lease]]]] = deque()
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        pause_s = 0.0002
        done: list[BlockRef] = []
        try:
            while waiting or copying:
                if cancelled.is_set() or (waiting and time.monotonic() > deadline):
                    for _, lease in waiting:
                        self._miss(lease, "cancelled" if cancelled.is_set() else "timeout")
                    self._shards.give_back([lease for _, lease in waiting])
                    waiting = []
                ready, gone, still = self._sorted(waiting)
                self._shards.give_back([lease for _, lease in gone])
                waiting = still + ready
                if ready:
                    self._copy_in(copier, order, ready)
                    copying.append((copier.mark(), ready))
                    waiting = still
                landed = False
                while copying and (copying[0][0]() or not waiting):
                    if not waiting and not copying[0][0]():
                        copier.synchronize()
                    if done:
                        self._loaded(order, done, False)
                    done = self._landed(copying[0][1])
                    copying.popleft()
                    landed = True
                if done and waiting:
                    self._loaded(order, done, False)
                    done = []
                if waiting and not (ready or gone or landed):
                    # Progress shows in shared memory only; there is nothing to block on.
                    time.sleep(pause_s)
                    pause_s = min(pause_s * 2, 0.002)
        except BaseException:
            copier.synchronize()
            left = [lease for _, part in copying for _, lease in part]
            self._shards.give_back([lease for _, lease in waiting] + left)
            raise
        return done

    def _sorted(
        self, waiting: list[tuple[BlockRef, Lease]]
    ) -> tuple[list[tuple[BlockRef, Lease]], ...]:
        """Of these, what can be copied, what is a miss, and what is still being read."""
        ready: list[tuple[BlockRef, Lease]] = []
        gone: list[tuple[BlockRef, Lease]] = []
        still: list[tuple[BlockRef, Lease]] = []
        for ref, lease in waiting:
            assert lease.shard is not None
            assert lease.slot is not None
            state = lease.shard.arena.state(lease.slot.slot, lease.slot.generation)
            if state is SlotState.READY:
                ready.append((ref, lease))
            elif state is SlotState.LOADING and not lease.shard.lost:
                still.append((ref, lease))
            else:
                self._miss(lease, "failed")
                gone.append((ref, lease))
        return ready, gone, still

    def _landed(self, part: list[tuple[BlockRef, Lease]]) -> list[BlockRef]:
        """The copies of a part are done; returns what is confirmed to hold its bytes."""
        done = [ref for ref, lease in part if self._confirm(lease)]
        self._shards.give_back([lease for _, lease in part])
        total = sum(self._pools[group].group.block_bytes for group, _ in done)
        self._metrics.inc("litecache_copied_bytes", total, direction="load")
        return done

    def _load_remote(
        self, order: LoadOrder, wanted: dict[BlockRef, Lease], cancelled: threading.Event
    ) -> None:
        copier = self._copier()
        for shard_id in {le.shard_id for le in wanted.values() if le.tier is Tier.REMOTE}:
            refs = [ref for ref, le in wanted.items() if le.shard_id == shard_id]
            size = max(self._tier_bytes(group) for group, _ in refs)
            count = max(1, FETCH_BYTES // size)
            for start in range(0, len(refs), count):
                if cancelled.is_set():
                    return
                part = refs[start : start + count]
                blocks = self._shards.fetch([wanted[ref] for ref in part])
                done: list[BlockRef] = []
                for ref, data in zip(part, blocks, strict=True):
                    if data is None or len(data) != self._tier_bytes(ref[0]):
                        self._miss(wanted[ref], "absent" if data is None else "size")
                        continue
                    source = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    target = self._pools[ref[0]].buffer[order.blocks[ref]]
                    self._codec.load(copier, [(source, target)])
                    self._metrics.inc("litecache_remote_blocks", shard=shard_id)
                    done.append(ref)
                copier.synchronize()
                if done:
                    self._loaded(order, done, False)

    def _copy_in(
        self, copier: BlockCopier, order: LoadOrder, ready: list[tuple[BlockRef, Lease]]
    ) -> None:
        pairs: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for ref, lease in ready:
            assert lease.shard is not None
            assert lease.slot is not None
            size = self._tier_bytes(ref[0])
            (view,) = copier.slots(lease.shard.arena, [lease.slot.slot], size)
            target = self._pools[ref[0]].buffer[order.blocks[ref]]
            pairs.setdefault(ref[0], []).append((view, target))
        for group in pairs.values():
            self._codec.load(copier, group)

    def _tier_bytes(self, group: int) -> int:
        return self._codec.tier_bytes(self._pools[group].group)

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


def _note_fault(order: Future[None]) -> None:
    error = order.exception()
    if error is not None:
        logger.error("an order could not be answered", exc_info=error)
