"""Saves published blocks to the shards, in order, on a thread of its own, and tells of their use.

Never on the latency path and never queued without bound: what finds no room is dropped and
counted. A dropped block is saved on its next sight; the blocks after it do not wait for that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from litecache.engine.kv_layout import KVPool
from litecache.engine.scheduling.orders import SaveOrder
from litecache.engine.transfer.codec import Codec
from litecache.engine.transfer.shard_set import ShardSet
from litecache.errors import StorageError
from litecache.hashing import BlockKey
from litecache.metrics import Metrics
from litecache.spans import note_span
from litecache.storage.client import ShardClient
from litecache.storage.protocol import CommitItem, CommitStatus, SlotRef
from litecache.threads import start_service

logger = logging.getLogger(__name__)

FEWEST_BLOCKS, MOST_BLOCKS = 16, 256
"""Of a batch, which is a quarter of what waits: all rows of a step may end a block in it."""
TURN_S = 0.01
"""A batch waits so long at most until the engine's thread rests again."""
SLOT_WAIT_S = 0.5
"""How long a save waits for the shard to write dirty slots out before it is dropped."""

TOUCH_INTERVAL_S = 1.0
"""Uses of stored blocks are gathered for so long."""


class Saver:
    """One thread that copies blocks into reserved slots and commits them.

    Args:
        pools: one per KV group.
        shards: where the blocks go.
        codec: between the bytes of pool and tiers, for this thread.
        namespace_of: from a request's salt, the namespace stored with its blocks.
        max_queued: orders that may wait; more are dropped.
        done: called with (saved or already stored orders, dropped orders), from this thread.
        resting: set each time that the engine's thread begins to wait. One batch begins then, or
            after a while: what it and the shard take of the interpreter is spread over the steps.
        metrics: counts bytes and drops.
    """

    def __init__(
        self,
        pools: Sequence[KVPool],
        shards: ShardSet,
        codec: Codec,
        *,
        namespace_of: Callable[[str], str],
        max_queued: int,
        done: Callable[[list[SaveOrder], list[SaveOrder]], None],
        resting: threading.Event,
        metrics: Metrics,
    ) -> None:
        self._codec = codec
        self._pools = pools
        self._shards = shards
        self._namespace_of = namespace_of
        self._max_queued = max_queued
        self._done = done
        self._resting = resting
        self._metrics = metrics
        self._queue: deque[SaveOrder] = deque()
        self._stuck: set[str] = set()
        self._touched: dict[BlockKey, None] = {}
        self._touch_at = 0.0
        self._changed = threading.Condition()
        self._busy = False
        self._waited_for = 0
        self._batch: list[SaveOrder] = []  # being copied
        self._closing = False
        self._thread = start_service(self._run, "save")

    def submit(self, orders: Sequence[SaveOrder], *, first: bool = False) -> list[SaveOrder]:
        """Queue orders, behind all others or with `first` before them; returns those for which
        there is no room now, the last ones of the queue."""
        with self._changed:
            if first:
                self._queue.extendleft(reversed(orders))
            else:
                self._queue.extend(orders)
            over = max(0, len(self._queue) - self._max_queued)
            refused = [self._queue.pop() for _ in range(over)][::-1]
            self._changed.notify_all()
        self._drop(refused, "queue_full")
        return refused

    def wait_for(self, orders: Sequence[SaveOrder], timeout_s: float) -> bool:
        """Wait until these orders have been copied and told, or dropped; False on timeout."""
        mine = {id(order) for order in orders}

        def ended() -> bool:
            return not any(id(order) in mine for order in (*self._batch, *self._queue))

        return self._wait_until(ended, timeout_s)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Tell the shards, some time, that these blocks were used, the least recent first."""
        with self._changed:
            for key in keys:
                self._touched.pop(key, None)
                self._touched[key] = None
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything queued is copied and told; False on timeout."""

        def idle() -> bool:
            return not (self._queue or self._touched or self._busy)

        with self._changed:
            self._touch_at = 0.0
            self._changed.notify_all()
        return self._wait_until(idle, timeout_s)

    def _wait_until(self, ended: Callable[[], bool], timeout_s: float) -> bool:
        """Meanwhile no batch waits for its turn."""
        with self._changed:
            self._waited_for += 1
            try:
                return self._changed.wait_for(ended, timeout_s)
            finally:
                self._waited_for -= 1

    def close(self) -> None:
        """Drop what is queued and end the thread."""
        with self._changed:
            self._closing = True
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy, self._batch = False, []
                self._changed.notify_all()
                self._changed.wait_for(self._has_work)
                while not (self._queue or self._closing) and self._touch_at > time.monotonic():
                    self._changed.wait(self._touch_at - time.monotonic())
            if self._queue and not (self._waited_for or self._closing):
                self._resting.clear()
                self._resting.wait(TURN_S)
            with self._changed:
                if self._closing:
                    return
                count = len(self._queue)
                count = min(count, max(FEWEST_BLOCKS, min(count // 4, MOST_BLOCKS)))
                batch = self._batch = [self._queue.popleft() for _ in range(count)]
                touched: list[BlockKey] = []
                if self._touch_at <= time.monotonic():
                    touched, self._touched = list(self._touched), {}
                    self._touch_at = time.monotonic() + TOUCH_INTERVAL_S
                self._busy = True
            try:
                self._shards.touch(touched)
                if batch:
                    self._save_batch(batch)
            except Exception:
                logger.exception("saving %d blocks failed", len(batch))
                self._done([], self._drop(batch, "error"))

    def _has_work(self) -> bool:
        return bool(self._queue or self._touched or self._closing)

    def _save_batch(self, batch: list[SaveOrder]) -> None:
        started = time.perf_counter()
        targets: dict[tuple[str, int], tuple[ShardClient, list[SaveOrder]]] = {}
        dropped: list[SaveOrder] = []
        stored = self._shards.query([order.key for order in batch])
        chosen = {run: self._shards.choose(run) for run in {order.run_key for order in batch}}
        for order, known in zip(batch, stored, strict=True):
            if known:
                continue
            shard = chosen[order.run_key]
            if shard is None:
                dropped += self._drop([order], "no_shard")
            else:
                targets.setdefault((shard.shard_id, order.group), (shard, []))[1].append(order)
        for (shard_id, group), (shard, orders) in targets.items():
            try:
                dropped += self._save_to(shard, group, orders)
            except Exception as error:
                # Whatever the shard's failure: these blocks are not saved, the requests go on.
                logger.warning("saving to shard %s failed: %s", shard_id, error)
                dropped += self._drop(orders, "error")
        lost = {id(order) for order in dropped}
        self._done([order for order in batch if id(order) not in lost], dropped)
        note_span("save", started, blocks=len(batch), dropped=len(dropped))
        self._metrics.observe(
            "litecache_io_seconds", time.perf_counter() - started, direction="save", tier="ram"
        )

    def _save_to(self, shard: ShardClient, group: int, new: list[SaveOrder]) -> list[SaveOrder]:
        """Save orders of one group to one shard; returns the dropped ones."""
        pool = self._pools[group]
        block_bytes = pool.group.tier_bytes
        dropped: list[SaveOrder] = []
        while new:
            slots = self._reserve(shard, block_bytes, len(new))
            if not slots:
                dropped += self._drop(new, "no_slot")
                break
            blocks = np.array([order.block for order in new[: len(slots)]], dtype=np.int64)
            try:
                views = self._codec.copier.slots(
                    shard.arena, [slot.slot for slot in slots], block_bytes
                )
                self._codec.save(pool, blocks, views)
            except Exception:
                # no copy writes to them any more, and nobody else would ever give them back
                self._codec.synchronize()
                shard.release(slots)
                raise
            self._codec.synchronize()
            names = {salt: self._namespace_of(salt) for salt in {order.salt for order in new}}
            items = [
                CommitItem(*slot, key, parent, names[salt], expires_s, retention)
                for (_, _, key, parent, _, salt, expires_s, retention), slot in zip(
                    new, slots, strict=False
                )
            ]
            for order, status in zip(new, shard.commit(items), strict=False):
                if status is CommitStatus.STALE:
                    dropped += self._drop([order], "stale")
            copied = len(slots) * block_bytes
            self._metrics.inc("litecache_copied_bytes", copied, direction="save", tier="ram")
            new = new[len(slots) :]
        return dropped

    def _reserve(self, shard: ShardClient, block_bytes: int, count: int) -> list[SlotRef]:
        """Slots of a shard, as soon as it has any; one that let a save wait in vain is stuck.

        All shards wait for this thread: a stuck one is asked once a batch until it gives slots.
        """
        deadline = time.monotonic() + SLOT_WAIT_S
        while True:
            slots = shard.reserve(block_bytes, count)
            if slots:
                self._stuck.discard(shard.shard_id)
                return slots
            if shard.lost or shard.shard_id in self._stuck:
                return []
            if time.monotonic() >= deadline:
                self._stuck.add(shard.shard_id)
                return []
            with self._changed:
                if self._changed.wait_for(lambda: self._closing, 0.01):
                    raise StorageError("the saver is closing")

    def _drop(self, orders: list[SaveOrder], reason: str) -> list[SaveOrder]:
        if orders:
            self._metrics.inc("litecache_drops", len(orders), reason=reason)
        return orders
