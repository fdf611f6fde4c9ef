"""The I/O of a shard: threads that read and write slots.

Reads go before writes: no write begins while a read waits, unless what is not written yet fills
half of the arena, and at least one thread is never used for writing. A `WriteBudget` bounds writes
over time. No lock is held during I/O. Idle threads sleep on a condition variable; nothing polls.
With `threads=0` all work is done by whoever caused it, on its own thread, which makes tests
deterministic.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..hashing import BlockKey
from ..spans import note_span
from ..threads import start_service
from .disk.files import NO_SPACE
from .disk.slab import MAX_REQUEST_BYTES, Stored, Transfer, checksum, fault
from .disk.tier import DiskTier
from .durability import Durability
from .ram_blocks import RamBlock, RamState, WriteBatch
from .retry import LogByRate
from .tiers import Tiers

logger = logging.getLogger(__name__)

_READS = _WRITES = 2
_READ_BYTES = 8 << 20
"""So many requests, or such small ones, keep a disk busy."""
_MIN_REQUEST_BYTES = 4 << 20

_say_write = LogByRate(logger, logging.WARNING)

OnWritten = Callable[[Sequence[tuple[BlockKey, str | None]]], None]


def request_bytes(total: int, threads: int) -> int:
    """Bytes of one request so that `threads` of them share `total`, 4 to 16 MiB."""
    return min(max(total // max(1, threads), _MIN_REQUEST_BYTES), MAX_REQUEST_BYTES)


class WriteBudget:
    """A token bucket: saved-up tokens are one second's worth, and the last write may overdraw it.

    Args:
        bytes_per_s: None: no bound.
    """

    def __init__(self, bytes_per_s: int | None) -> None:
        self._rate = bytes_per_s
        self._left: float = bytes_per_s or 0
        self._at = time.monotonic()

    def at_most(self, nbytes: int) -> int:
        """Of one request that may be as large as `nbytes`."""
        return nbytes if self._rate is None else min(nbytes, self._rate)

    def wait_s(self) -> float:
        """How long no write may begin; 0: now."""
        if self._rate is None:
            return 0.0
        now = time.monotonic()
        self._left = min(self._rate, self._left + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, -self._left / self._rate)

    def spend(self, nbytes: int) -> None:
        """A write begins; less than zero: some of it does not take place."""
        self._left -= nbytes


class BlockIo:
    """Carries out what `Tiers` queues.

    Args:
        tiers: of the store.
        disk: its disk tier.
        durability: told of every write.
        threads: number of I/O threads.
        write_bytes_per_s: what `take_writes` gives is written at this rate at most.
        on_written: told, without the lock, which keys reached the disk (None) or why not.

    Attributes:
        allocated: disk slots of writes that have not finished.
    """

    def __init__(
        self,
        tiers: Tiers,
        disk: DiskTier,
        durability: Durability,
        *,
        threads: int,
        write_bytes_per_s: int | None,
        on_written: OnWritten | None,
    ) -> None:
        self._tiers = tiers
        self._disk = disk
        self._durability = durability
        self._on_written = on_written
        self._lock = tiers.lock
        self._threads = threads
        self._writers = self._reading = self._reading_bytes = 0
        self._budget, self._hurried = WriteBudget(write_bytes_per_s), 0
        self._closing = False
        self.allocated: set[int] = set()
        self._resizing = threading.Lock()
        # the others prepare their batches meanwhile, as with reads
        self._writing = threading.BoundedSemaphore(_WRITES)
        self._running: list[threading.Thread] = []
        try:
            for number in range(threads):
                self._running.append(start_service(self._run, f"io-{number}"))
        except BaseException:
            self.close()
            raise

    def load(self, entries: Sequence[int], blocks: list[RamBlock]) -> None:
        """Fresh slots of one size will receive blocks from disk; the lock is held."""
        total = blocks[0].nbytes * len(blocks)
        self._tiers.begin_loads(entries, blocks, request_bytes(total, self._threads))
        self._tiers.work.notify_all()

    def drain(self) -> None:
        """Without threads, do all queued work now; the lock is not held."""
        if not self._threads:
            while self._step(wait=False):
                pass
            self._durability.catch_up()

    @contextmanager
    def hurry(self) -> Iterator[None]:
        """Somebody waits for all that is dirty: meanwhile writes keep to no budget."""
        with self._lock:
            self._hurried += 1
            self._tiers.work.notify_all()
        try:
            yield
        finally:
            with self._lock:
                self._hurried -= 1

    def _run(self) -> None:
        while self._step(wait=True):
            pass

    def _may_read(self) -> bool:
        # Requests in flight share the disk and so end together. Were all threads reading, then all
        # would check what they read at one time, and the disk would wait for them.
        few = self._reading < _READS or self._reading_bytes < _READ_BYTES
        return bool(self._tiers.reads) and few

    def _may_write(self) -> bool:
        tiers = self._tiers
        if not tiers.dirty or self._writers >= max(1, self._threads - 1):
            return False
        # dirty slots cannot be evicted: were they all, reads could get none either
        yields = tiers.reads and 2 * tiers.dirty_bytes <= tiers.arena.arena_bytes
        return bool(self._hurried) or not (yields or self._budget.wait_s())

    def _step(self, *, wait: bool) -> bool:
        """Do one piece of work; False when there is none, or no more is wanted."""
        tiers = self._tiers
        with self._lock:
            while not (reads := self._may_read()) and not self._may_write():
                if not wait or self._closing:
                    return False
                tiers.work.wait((self._budget.wait_s() if tiers.dirty else 0) or None)
            if reads:
                blocks, wanted = tiers.take_reads()
                nbytes = sum(block.nbytes for block in blocks)
                self._reading += 1
                self._reading_bytes += nbytes
            else:
                # no more of them write at once, and each request has its price
                most = request_bytes(tiers.dirty_bytes, min(_WRITES, self._threads - 1))
                batch = tiers.take_writes(self._budget.at_most(most))
                if batch is None:
                    return True
                if not self._hurried:
                    self._budget.spend(sum(block.nbytes for block in batch.blocks))
                self._writers += 1
            # who takes work wakes the next thread while there is more
            if self._may_read() or self._may_write():
                tiers.work.notify()
        if reads:
            self._read(blocks, wanted, nbytes)
            return True
        assert batch is not None
        try:
            self._write(batch)
        finally:
            with self._lock:
                self._writers -= 1
                if tiers.dirty:
                    tiers.work.notify()
                tiers.changed.notify_all()
        return True

    def _read(self, blocks: list[RamBlock], wanted: list[Stored], nbytes: int) -> None:
        tiers, begun = self._tiers, time.perf_counter()
        memories = [tiers.arena.buffer(block.slot, block.nbytes) for block in blocks]
        try:
            places = [stored.slot for stored in wanted]
            errors = self._disk.slab.read(list(map(Transfer, places, memories)))
        finally:
            with self._lock:
                self._reading -= 1
                self._reading_bytes -= nbytes
                if tiers.reads:
                    tiers.work.notify()
        reasons = [
            fault(memory, stored.key, stored.checksum, error)
            for memory, stored, error in zip(memories, wanted, errors, strict=True)
        ]
        self._account("read", nbytes, begun)
        with self._lock:
            if tiers.finish_loads(blocks, wanted, reasons):
                self._durability.note_change()
            tiers.changed.notify_all()
            if tiers.dirty and not tiers.reads:
                tiers.work.notify()

    def _account(self, direction: str, nbytes: int, begun: float) -> None:
        note_span(direction, begun, bytes=nbytes)
        metrics, elapsed = self._tiers.metrics, time.perf_counter() - begun
        metrics.inc("litecache_storage_bytes", nbytes, direction=direction, tier="disk")
        metrics.observe("litecache_io_seconds", elapsed, direction=direction, tier="disk")

    def _allocate(self, batch: WriteBatch) -> list[int]:
        """Disk slots for a batch; the slab grows and shrinks outside the store's lock."""
        disk, n = self._disk, len(batch.blocks)
        with self._lock:
            if disk.lost or disk.log_full():
                return []
            slots = self._more_slots(batch, n)
            if len(slots) == n:
                return slots
        with self._resizing:
            while True:
                with self._lock:
                    slots += self._more_slots(batch, n - len(slots))
                    if len(slots) == n:
                        return slots
                    segments = disk.space.growth(batch.pages)
                    surplus = [] if segments else disk.space.take_surplus(batch.pages)
                if segments:
                    grown = disk.grow(segments, batch.pages)
                    with self._lock:
                        if grown:
                            disk.space.grow(segments)
                        else:
                            # a full disk bounds the slab at what it has for a while
                            self._tiers.metrics.inc("litecache_drops", reason="disk_full_growth")
                elif surplus:
                    # as before overwriting: the slots' former owners leave the log first
                    gone = self._durability.flush_log() and disk.shrink(surplus)
                    with self._lock:
                        (disk.space.retire if gone else disk.space.keep)(surplus)
                else:
                    return slots

    def _more_slots(self, batch: WriteBatch, n: int) -> list[int]:
        slots = self._disk.allocate(batch.pages, n, batch.namespace)
        self.allocated.update(slots)
        return slots

    def _write(self, batch: WriteBatch) -> None:
        durability, buffer = self._durability, self._tiers.arena.buffer
        slots = self._allocate(batch)
        if len(slots) < len(batch.blocks):
            self._settle_homeless(batch.blocks[len(slots) :], bool(slots))
        if not slots:
            return
        blocks = batch.blocks[: len(slots)]
        memories = [buffer(block.slot, block.nbytes) for block in blocks]
        sums = list(map(checksum, memories, batch.keys))
        # the slots' former owners must be gone from the log before their bytes are
        if not durability.flush_log() and not durability.compact(if_due=True):
            error = durability.last_error or OSError(errno.EIO, "the log cannot be written")
            self._finish(batch, slots, sums, [error] * len(slots))
            return
        with self._writing:
            begun = time.perf_counter()
            errors = self._disk.slab.write(list(map(Transfer, slots, memories)))
        self._account("write", sum(map(len, memories)), begun)
        self._finish(batch, slots, sums, errors)
        durability.after_write()

    def _finish(
        self,
        batch: WriteBatch,
        slots: Sequence[int],
        sums: Sequence[int],
        errors: Sequence[OSError | None],
    ) -> None:
        tiers, disk = self._tiers, self._disk
        told: list[tuple[BlockKey, str | None]] = []
        whole: list[tuple[RamBlock, int, int]] = []
        with self._lock:
            self.allocated.difference_update(slots)
            if disk.lost:
                errors = [OSError(errno.ESTALE, disk.lost)] * len(slots)
            for i, error in enumerate(errors):
                block = batch.blocks[i]
                if error is not None:
                    _say_write("a block cannot be written: %s", error)
                    disk.space.free(slots[i])
                    reason = "disk_full" if error.errno in NO_SPACE else "io_error"
                    told += self._fail([block], reason)
                    continue
                whole.append((block, slots[i], sums[i]))
                if block.state is not RamState.DEAD:
                    told.append((batch.keys[i], None))
            tiers.finish_writes(whole)
            disk.quotas.end_writes(batch.namespace, batch.pages * len(slots))
            self._durability.note_change()
            tiers.changed.notify_all()
        self._tell(told)

    def _fail(self, blocks: Sequence[RamBlock], reason: str) -> list[tuple[BlockKey, str | None]]:
        reason = "folder_lost" if self._disk.lost else reason
        return [(key, reason) for key in self._tiers.fail_writes(blocks, reason)]

    def _tell(self, told: Sequence[tuple[BlockKey, str | None]]) -> None:
        if self._on_written is not None and told:
            self._on_written(told)

    def _settle_homeless(self, blocks: Sequence[RamBlock], progress: bool) -> None:
        """Blocks found no disk slot: let them wait for one, or give them up."""
        disk = self._disk
        with self._lock:
            self._budget.spend(-sum(block.nbytes for block in blocks))
            # slots that reads or other writes hold come back
            held = disk.space.readers or self._writers > 1
            if disk.log_full():
                held = self._durability.makes_room()
            if progress or (held and not disk.lost):
                self._tiers.put_back(blocks)
                if not progress:
                    self._tiers.changed.wait(0.05)
                return
            told = self._fail(blocks, "disk_full" if disk.growth.failing else "no_room")
            disk.growth.hurry()
        self._tell(told)

    def close(self) -> None:
        """End the threads; queued work is left undone."""
        with self._lock:
            self._closing = True
            self._tiers.reads.clear()
            self._tiers.work.notify_all()
        for thread in self._running:
            thread.join()
