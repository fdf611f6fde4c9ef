"""The I/O of a shard: threads that read and write slots.

Reads go before writes, and at least one thread is never used for writing. No lock is held during
I/O. Idle threads sleep on a condition variable; nothing polls. With `threads=0` all work is done by
whoever caused it, on its own thread, which makes tests deterministic.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence

from ..metrics import Metrics
from ..threads import start_service
from .disk.files import NO_SPACE
from .disk.slab import Transfer, checksum, fault
from .durability import Durability
from .io_queues import ReadRequest, WriteBatch, plan_reads, request_bytes
from .ram_tier import RamBlock, RamState
from .retry import LogByRate
from .tiers import Tiers

logger = logging.getLogger(__name__)

_READS = _WRITES = 2
_READ_BYTES = 8 << 20
"""So many requests, or such small ones, keep a disk busy."""

_say_write = LogByRate(logger, logging.WARNING)

OnWritten = Callable[[Sequence[tuple[bytes, str | None]]], None]


class BlockIo:
    """Carries out what `Tiers` queues.

    Args:
        tiers: the state, guarded by `lock`.
        lock: the store's lock.
        changed: notified when a read or write ended.
        threads: number of I/O threads.
        durability: told of every write.
        metrics: where bytes and latencies are counted.
        on_written: told, without the lock, which keys reached the disk (None) or why not.
    """

    def __init__(
        self,
        tiers: Tiers,
        lock: threading.Lock,
        changed: threading.Condition,
        *,
        threads: int,
        durability: Durability,
        metrics: Metrics,
        on_written: OnWritten | None = None,
    ) -> None:
        self._tiers = tiers
        self._on_written = on_written
        self._lock = lock
        self._changed = changed
        self._work = threading.Condition(lock)
        self._durability = durability
        self._metrics = metrics
        self._threads = threads
        self._writers = 0
        self._reading = 0
        self._reading_bytes = 0
        self._closing = False
        self.writing_slots: set[int] = set()
        self.failed_writes = 0
        self._grow_lock = threading.Lock()
        # the others prepare their batches meanwhile, as with reads
        self._writing = threading.BoundedSemaphore(_WRITES)
        self._running: list[threading.Thread] = []
        if tiers.disk is not None and threads:
            self._start(self._run, "io", threads)

    def _start(self, target: Callable[[], None], name: str, count: int) -> None:
        for number in range(count):
            self._running.append(start_service(target, f"{name}-{number}"))

    def queue_reads(self, blocks: Sequence[RamBlock]) -> None:
        """Queue reads of blocks of one size in the order given; the lock is held."""
        self._tiers.reads.extend(plan_reads(self._tiers.index, blocks, self._threads))

    def kick(self) -> None:
        """There is work; the lock is held."""
        self._work.notify_all()

    def drain(self) -> None:
        """Without threads, do all queued work now; the lock is not held."""
        if not self._threads and self._tiers.disk is not None:
            while self._step(wait=False):
                pass
            self._durability.catch_up()

    def _run(self) -> None:
        while self._step(wait=True):
            pass

    def _may_read(self) -> bool:
        # Requests in flight share the disk and so end together. Were all threads reading, then all
        # would check what they read at one time, and the disk would wait for them.
        few = self._reading < _READS or self._reading_bytes < _READ_BYTES
        return bool(self._tiers.reads) and few

    def _may_write(self) -> bool:
        return bool(self._tiers.writes) and self._writers < max(1, self._threads - 1)

    def _step(self, *, wait: bool) -> bool:
        request: ReadRequest | None = None
        batch: WriteBatch | None = None
        tiers = self._tiers
        with self._lock:
            while not self._may_read() and not self._may_write():
                if not wait or self._closing:
                    return False
                self._work.wait()
            if self._may_read():
                request = tiers.reads.popleft().without_dead()
                self._reading += 1
                self._reading_bytes += request.nbytes
                for block in request.blocks:
                    block.started = True
            else:
                batch = tiers.writes.take(request_bytes(tiers.writes.nbytes, self._threads - 1))
                if batch is None:
                    return True
                self._writers += 1
        if request is not None:
            self._read(request)
            return True
        assert batch is not None
        try:
            return self._write(batch)
        finally:
            with self._lock:
                self._writers -= 1
                if tiers.writes:
                    self._work.notify()
                self._changed.notify_all()

    def _read(self, request: ReadRequest) -> None:
        tiers, disk = self._tiers, self._tiers.disk
        assert disk is not None
        begun = time.perf_counter()
        memories = [tiers.ram.arena.buffer(b.slot, b.nbytes) for b in request.blocks]
        try:
            errors = disk.slab.read(list(map(Transfer, request.slots, memories)))
        finally:
            with self._lock:
                self._reading -= 1
                self._reading_bytes -= request.nbytes
                if tiers.reads:
                    self._work.notify()
        reasons = list(map(fault, memories, request.keys, request.checksums, errors))
        self._account("read", request.nbytes, begun)
        with self._lock:
            tiers.finish_loads(request, reasons)
            if tiers.changed_on_disk:
                tiers.changed_on_disk = False
                self._durability.note_change()
            self._changed.notify_all()
            if tiers.writes and not tiers.reads:
                self._work.notify()

    def _account(self, direction: str, nbytes: int, begun: float) -> None:
        self._metrics.inc("litecache_storage_bytes", nbytes, direction=direction, tier="disk")
        elapsed = time.perf_counter() - begun
        self._metrics.observe("litecache_io_seconds", elapsed, direction=direction)

    def _allocate(self, batch: WriteBatch) -> list[int]:
        """Disk slots for a batch; the slab grows and shrinks outside the store's lock."""
        disk = self._tiers.disk
        assert disk is not None
        n = len(batch.blocks)
        with self._lock:
            if disk.lost or disk.log_full():
                return []
            slots = disk.allocate(batch.pages, n, batch.namespace)
            self.writing_slots.update(slots)
            if len(slots) == n:
                return slots
        with self._grow_lock:
            while True:
                with self._lock:
                    more = disk.allocate(batch.pages, n - len(slots), batch.namespace)
                    self.writing_slots.update(more)
                    slots += more
                    if len(slots) == n:
                        return slots
                    segments = disk.space.growth(batch.pages)
                    surplus = [] if segments else disk.space.take_surplus(batch.pages)
                if segments:
                    self._grow(segments)
                elif surplus:
                    self._shrink(surplus)
                else:
                    return slots

    def _grow(self, segments: range) -> None:
        disk = self._tiers.disk
        assert disk is not None
        grown = disk.grow(segments)
        with self._lock:
            if grown:
                disk.space.grow(segments)
            else:
                # a full disk bounds the slab at what it has for a while; slots are recycled
                self._metrics.inc("litecache_drops", reason="disk_full_growth")

    def _shrink(self, segments: list[int]) -> None:
        disk = self._tiers.disk
        assert disk is not None
        # as before overwriting: the slots' former owners leave the log first
        gone = self._durability.flush_log() and disk.shrink(segments)
        with self._lock:
            if gone:
                disk.space.retire(segments)
            else:
                disk.space.keep(segments)

    def _write(self, batch: WriteBatch) -> bool:
        tiers, disk = self._tiers, self._tiers.disk
        assert disk is not None
        slots = self._allocate(batch)
        blocks, homeless = batch.blocks[: len(slots)], batch.blocks[len(slots) :]
        if homeless:
            self._settle_homeless(homeless, bool(slots))
        if not blocks:
            return True
        transfers = [
            Transfer(slot, tiers.ram.arena.buffer(block.slot, block.nbytes))
            for slot, block in zip(slots, blocks, strict=True)
        ]
        # a block deleted meanwhile has no key; its checksum does not matter any more
        sums = [
            checksum(transfer.memory, block.key or b"")
            for transfer, block in zip(transfers, blocks, strict=True)
        ]
        # the slots' former owners must be gone from the log before their bytes are
        if not self._durability.flush_log() and not self._durability.compact(if_due=True):
            error = self._durability.last_error or OSError(errno.EIO, "the log cannot be written")
            self._finish(batch, slots, sums, [error] * len(slots))
            return True
        with self._writing:
            begun = time.perf_counter()
            errors = disk.slab.write(transfers)
        self._account("write", sum(len(t.memory) for t in transfers), begun)
        self._finish(batch, slots, sums, errors)
        self._durability.after_write()
        return True

    def _finish(
        self,
        batch: WriteBatch,
        slots: list[int],
        sums: list[int],
        errors: list[OSError | None],
    ) -> None:
        tiers, disk = self._tiers, self._tiers.disk
        assert disk is not None
        blocks = batch.blocks[: len(slots)]
        good = [i for i, error in enumerate(errors) if error is None]
        told: list[tuple[bytes, str | None]] = []
        with self._lock:
            if disk.lost:
                errors, good = [OSError(errno.ESTALE, disk.lost)] * len(slots), []
            told += [(blocks[i].key or b"", None) for i in good]
            self.writing_slots.difference_update(slots)
            for i, error in enumerate(errors):
                if error is not None:
                    _say_write("a block cannot be written: %s", error)
                    disk.space.free(slots[i])
                    self.failed_writes += 1
                    reason = "disk_full" if error.errno in NO_SPACE else "io_error"
                    reason = "folder_lost" if disk.lost else reason
                    told.append((blocks[i].key or b"", reason))
                    tiers.fail_write(blocks[i], reason, keep=bool(disk.lost))
            tiers.finish_write(
                [blocks[i] for i in good], [slots[i] for i in good], [sums[i] for i in good]
            )
            disk.quotas.end_writes(batch.namespace, batch.pages * len(slots))
            self._durability.note_change()
            self._changed.notify_all()
        self._tell(told)

    def _tell(self, told: Sequence[tuple[bytes, str | None]]) -> None:
        if self._on_written is not None and told:
            self._on_written(told)

    def _settle_homeless(self, blocks: list[RamBlock], progress: bool) -> None:
        with self._lock:
            disk = self._tiers.disk
            assert disk is not None
            # slots that reads or other writes hold come back: wait for them, else give up
            held = disk.space.readers or self._writers > 1
            if progress or (held and not disk.lost and not disk.log_full()):
                self._tiers.writes.put_back(blocks)
                if not progress:
                    self._changed.wait(0.05)
                return
            reason = "disk_full" if disk.growth.failing else "no_room"
            disk.growth.hurry()
            told: list[tuple[bytes, str | None]] = []
            if disk.lost:
                reason = "folder_lost"
            for block in blocks:
                self.failed_writes += 1
                told.append((block.key or b"", reason))
                self._tiers.fail_write(block, reason, keep=bool(disk.lost))
        self._tell(told)

    def pending(self, blocks: Sequence[RamBlock]) -> list[RamBlock]:
        """Those still on their way to disk; the lock is held."""
        states = (RamState.DIRTY, RamState.WRITING)
        return [block for block in blocks if block.state in states and not block.dead]

    def close(self) -> None:
        """End the threads; queued work is left undone."""
        with self._lock:
            self._closing = True
            self._tiers.reads.clear()
            self._work.notify_all()
        for thread in self._running:
            thread.join()
