"""Finds blocks in the lower tiers and copies them into the pool.

A lookup leases slots under the request's ticket; a load copies the wanted ones as their reads
complete and gives every lease back. Before a block counts as loaded, its slot's generation is
read again: changed means miss. A failure of any kind is a miss with a counted reason.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from litecache.engine.kv_layout import KVPool
from litecache.engine.scheduling.orders import LoadOrder, StageOrder
from litecache.engine.scheduling.prefix_cache import BlockRef
from litecache.engine.transfer.block_copier import BlockCopier
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
        loaded: called with (order, blocks that hold their bytes now).
        metrics: counts bytes, misses and latencies.
    """

    def __init__(
        self,
        pools: Sequence[KVPool],
        shards: ShardSet,
        make_copier: Callable[[], BlockCopier],
        *,
        staged: Callable[[int, dict[BlockRef, str]], None],
        loaded: Callable[[LoadOrder, set[BlockRef]], None],
        metrics: Metrics,
    ) -> None:
        self._pools = pools
        self._shards = shards
        self._make_copier = make_copier
        self._local = threading.local()
        self._staged = staged
        self._loaded = loaded
        self._metrics = metrics
        self._leases: dict[int, dict[BlockRef, Lease]] = {}
        # a lookup takes a call, a load the time of its disk: none waits behind the other kind
        self._lookups = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="litecache-lookup")
        self._loads = ThreadPoolExecutor(LOAD_THREADS, thread_name_prefix="litecache-load")

    def stage(self, order: StageOrder) -> None:
        """Look up blocks; answers through `staged`."""
        self._lookups.submit(self._stage, order).add_done_callback(_note_fault)

    def load(self, order: LoadOrder) -> None:
        """Copy staged blocks into the pool; answers through `loaded`."""
        leases = self._leases.pop(order.ticket, {})
        self._loads.submit(self._load, order, leases).add_done_callback(_note_fault)

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

    def _load(self, order: LoadOrder, leases: dict[BlockRef, Lease]) -> None:
        started = time.perf_counter()
        done: set[BlockRef] = set()
        try:
            self._shards.give_back([le for ref, le in leases.items() if ref not in order.blocks])
            wanted = {ref: leases[ref] for ref in order.blocks if ref in leases}
            done = self._load_local(order, wanted) | self._load_remote(order, wanted)
        except Exception:
            # Blocks that were not confirmed are misses; the request recomputes them.
            logger.exception("loading %d blocks failed", len(order.blocks))
            self._metrics.inc("litecache_misses", tier="shard", reason="error")
        elapsed = time.perf_counter() - started
        self._metrics.observe("litecache_io_seconds", elapsed, direction="load")
        self._loaded(order, done)

    def _load_local(self, order: LoadOrder, wanted: dict[BlockRef, Lease]) -> set[BlockRef]:
        copier = self._copier()
        copier.begin_load()
        local = {ref: lease for ref, lease in wanted.items() if lease.slot is not None}
        waiting = list(local.items())
        copied: list[tuple[BlockRef, Lease]] = []
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        pause_s = 0.0002
        while waiting:
            still: list[tuple[BlockRef, Lease]] = []
            ready: list[tuple[BlockRef, Lease]] = []
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
            self._copy_in(copier, order, ready)
            copied += ready
            if still and time.monotonic() > deadline:
                for _, lease in still:
                    self._miss(lease, "timeout")
                break
            if len(still) == len(waiting):
                # Progress shows in shared memory only; there is nothing to block on.
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, 0.002)
            waiting = still
        copier.synchronize()
        done = {ref for ref, lease in copied if self._confirm(lease)}
        self._shards.give_back(list(local.values()))
        total = sum(self._pools[group].group.block_bytes for group, _ in done)
        self._metrics.inc("litecache_copied_bytes", total, direction="load")
        return done

    def _load_remote(self, order: LoadOrder, wanted: dict[BlockRef, Lease]) -> set[BlockRef]:
        done: set[BlockRef] = set()
        copier = self._copier()
        for shard_id in {le.shard_id for le in wanted.values() if le.tier is Tier.REMOTE}:
            refs = [ref for ref, le in wanted.items() if le.shard_id == shard_id]
            size = max(self._pools[group].group.block_bytes for group, _ in refs)
            count = max(1, FETCH_BYTES // size)
            for start in range(0, len(refs), count):
                part = refs[start : start + count]
                blocks = self._shards.fetch([wanted[ref] for ref in part])
                for ref, data in zip(part, blocks, strict=True):
                    target = self._pools[ref[0]].buffer[order.blocks[ref]]
                    if data is None or len(data) != target.numel():
                        self._miss(wanted[ref], "absent" if data is None else "size")
                        continue
                    source = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    copier.copy([(source, target)])
                    self._metrics.inc("litecache_remote_blocks", shard=shard_id)
                    done.add(ref)
                copier.synchronize()
        return done

    def _copy_in(
        self, copier: BlockCopier, order: LoadOrder, ready: list[tuple[BlockRef, Lease]]
    ) -> None:
        pairs: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for ref, lease in ready:
            assert lease.shard is not None
            assert lease.slot is not None
            pool = self._pools[ref[0]]
            (view,) = copier.slots(lease.shard.arena, [lease.slot.slot], pool.group.block_bytes)
            pairs.setdefault(ref[0], []).append((view, pool.buffer[order.blocks[ref]]))
        for group in pairs.values():
            copier.copy(group)

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
