"""A shard as a whole: opened, with its threads and clients, waited for, told of, closed.

All state lies in `Tiers`, under one lock that nobody holds during I/O; `BlockIo` and `Durability`
work in threads of their own. `ShardStore` adds what clients do with blocks.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, cast

from ..errors import StorageError, StorageFullError
from ..metrics import Metrics
from .admission import get_admission
from .arena.arena import Arena
from .block_io import BlockIo, OnWritten
from .disk.files import NO_SPACE, Files
from .disk.retired import Retired, retired_folders
from .disk.tier import DiskTier
from .durability import Durability
from .eviction import get_policy
from .leases import Leases
from .protocol import Attachment, FlushReport, SlotRef
from .ram_tier import LOADED, RamState
from .segments import pick_segment_bytes
from .shard_options import validate_options
from .tiers import Tiers

if TYPE_CHECKING:
    from typing_extensions import Self

    from .shard_store import ShardStore

logger = logging.getLogger(__name__)


class ShardBase:
    """Holds blocks of any size that is a multiple of 4096 bytes.

    Args:
        directory: absolute folder of the disk tier, or None for RAM alone (then nothing is ever
            durable and what RAM evicts is gone).
        storage_bytes: bound on all files together.
        ram_bytes: bound on the arena.
        fsync: `always` (each write batch is synced before it counts as durable; a power cut loses
            nothing that was reported), `interval` (the same guarantee, reported up to
            `fsync_interval_s` later) or `never` (durable means handed to the kernel: it survives
            kill -9, a power cut may lose it; synced by `flush` and `close` only).
        fsync_interval_s: see `fsync`.
        eviction: `lru`, `lfu`, `s3fifo` or a registered name.
        admission: `all`, `reused` or `none`: which blocks are written to disk.
        ttl_s: a block older than this is a miss.
        quotas: namespace, or digest of a salt (`namespaces.py`), to the disk bytes it may take.
        io_threads: threads that read and write; 0 does all I/O on the callers' threads.
        metrics: where to count; None makes an own set.
        shards: how many shards share the folder above `directory`, by their numbers; those of
            higher numbers are of an earlier setting and are taken in (`retired.py`). 0: not looked.
        accepts_writes: False refuses `reserve` (an empty answer), for old shards kept readable.
        files: the file system, for fault injection.
        direct: try O_DIRECT.
        use_memfd: False forces a `/dev/shm` file.
        on_written: told by an I/O thread which keys reached the disk (None), or why they did not
            and were dropped: `disk_full`, `io_error`, `no_room`.

    Raises:
        ConfigError: a field is invalid.
        StorageFullError: too little disk for `storage_bytes` or memory for `ram_bytes`.
        StorageLockedError: another live store holds the folder.
        StorageFormatError: the folder is of another format.
    """

    def __init__(
        self,
        directory: str | None,
        *,
        storage_bytes: int = 0,
        ram_bytes: int,
        fsync: str = "interval",
        fsync_interval_s: float = 1.0,
        eviction: str = "lru",
        admission: str = "all",
        ttl_s: float | None = None,
        quotas: dict[str, int] | None = None,
        io_threads: int = 4,
        metrics: Metrics | None = None,
        shards: int = 0,
        accepts_writes: bool = True,
        files: Files | None = None,
        direct: bool = True,
        use_memfd: bool = True,
        on_written: OnWritten | None = None,
    ) -> None:
        validate_options(directory, storage_bytes, ram_bytes, fsync, io_threads, ttl_s)
        get_policy(eviction)
        self.metrics = metrics or Metrics()
        self.epoch = secrets.randbits(62)
        self.directory = directory
        self._accepts_writes = accepts_writes
        admit = get_admission(admission)
        segment_bytes = pick_segment_bytes(ram_bytes)
        arena_bytes = ram_bytes // segment_bytes * segment_bytes
        with ExitStack() as undo:
            old = retired_folders(directory, shards) if directory and shards else []
            self._retired = Retired(old, storage_bytes // 2)
            undo.callback(self._retired.close)
            self._arena = Arena(arena_bytes, segment_bytes, self.epoch, use_memfd=use_memfd)
            undo.callback(self._arena.close)
            self._tiers = Tiers(self._arena, eviction, admit, ttl_s, self.metrics)
            try:
                if directory is not None:
                    self._tiers.disk = DiskTier(
                        files or Files(),
                        directory,
                        storage_bytes=storage_bytes,
                        index=self._tiers.index,
                        policy=eviction,
                        on_evict=self._tiers.on_disk_evict,
                        quotas=quotas or {},
                        direct=direct,
                        retired_bytes=self._retired.nbytes(),
                    )
            except OSError as error:
                kind = StorageFullError if error.errno in NO_SPACE else StorageError
                raise kind(f"the store in {directory} cannot be opened: {error}") from error
            undo.pop_all()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._growing = threading.Lock()
        self._closed = False
        self._leases = Leases(self._tiers.ram, self._changed, self.epoch)
        self._durability = Durability(
            self._tiers,
            self._lock,
            self._changed,
            threaded=io_threads > 0,
            fsync=fsync,
            interval_s=fsync_interval_s,
            metrics=self.metrics,
        )
        self._io = BlockIo(
            self._tiers,
            self._lock,
            self._changed,
            threads=io_threads,
            durability=self._durability,
            metrics=self.metrics,
            on_written=on_written,
        )
        self._retired.begin(cast("ShardStore", self), self._tiers, self._lock)

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError("the shard store is closed")

    def attach(self, client_pid: int) -> Attachment:
        """Register a client process.

        Raises:
            StorageError: the process does not live on this machine, or the store is closed.
        """
        self._check_open()
        return self._arena.attachment(self._leases.attach(client_pid))

    def detach(self, client_id: int) -> None:
        """End a client and all its leases; an unknown one is ignored."""
        self._leases.detach(client_id)

    def _grow_for(self, pages: int, n: int) -> None:
        """Let the arena grow until it has `n` slots or reaches its bound.

        One thread at a time, outside the lock: faulting memory in takes long.
        """
        ram, space = self._tiers.ram, self._tiers.ram.space
        with self._lock:
            if space.available(pages) >= n or space.growth(pages) is None:
                return
        with self._growing:
            while True:
                with self._lock:
                    segments = space.growth(pages)
                    if self._closed or space.available(pages) >= n or segments is None:
                        return
                try:
                    self._arena.grow(segments)
                except OSError as error:
                    logger.error("the arena cannot grow, to be tried again later: %s", error)
                    ram.growth.note(False)
                    return
                ram.growth.note(True)
                with self._lock:
                    space.grow(segments)

    def wait_for_change(self, timeout_s: float) -> None:
        """Sleep until a read or write ends, a lease is released, or the time is over."""
        with self._changed:
            if not self._closed:
                self._changed.wait(timeout_s)

    def wait(self, slots: Sequence[SlotRef], timeout_s: float = 30.0) -> list[bool]:
        """Block until leased slots have stopped loading.

        Returns:
            Per slot whether it holds its block under that generation.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            for slot, generation in slots:
                while (block := self._tiers.ram.by_slot.get(slot)) is not None:
                    loading = block.state is RamState.LOADING and not block.dead
                    left = deadline - time.monotonic()
                    closed = self._closed
                    if block.generation != generation or not loading or left <= 0 or closed:
                        break
                    self._changed.wait(left)
            return [self._holds(slot, generation) for slot, generation in slots]

    def _holds(self, slot: int, generation: int) -> bool:
        block = self._tiers.ram.by_slot.get(slot)
        return (
            block is not None
            and block.generation == generation
            and block.state in LOADED
            and not block.dead
        )

    def flush(self, timeout_s: float = 30.0) -> FlushReport:
        """Write and sync all that was committed before the call."""
        deadline = time.monotonic() + timeout_s
        self._io.drain()
        with self._changed:
            mine = pending = self._tiers.writes.unfinished()
            failed = self._failures()
            while pending and not self._closed:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
                pending = self._io.pending(pending)
            pending = self._io.pending(pending)
            failed = self._failures() - failed
        synced = self._durability.sync(force=True)
        written = len(mine) - len(pending) - failed
        complete = synced and not pending and not failed
        return FlushReport(max(0, written) if synced else 0, len(pending), failed, complete)

    def _failures(self) -> int:
        return self._io.failed_writes + self._durability.lost_writes

    def stats(self) -> dict[str, object]:
        """Counts and bytes, msgpack-able; also sets the gauges.

        `hits`, `promotions` (disk to RAM), `demotions` (the RAM copy left, the disk has the block)
        and `evictions` are read from `metrics`, so they are a shard's own where it has its own.
        """
        tiers, metrics = self._tiers, self.metrics
        ram, disk = tiers.ram, tiers.disk
        with self._lock:
            blocks = list(ram.by_slot.values())
            on_disk = int((tiers.index.column("disk") != 0).sum())
        # what follows may be a moment off: nobody has to wait while so many are counted
        states = Counter(block.state for block in blocks)
        result: dict[str, object] = {
            "epoch": self.epoch,
            "blocks": len(tiers.index),
            "ram_slots": {state.name.lower(): states[state] for state in RamState},
            "ram_bytes_used": sum(block.nbytes for block in blocks),
            "ram_bytes": ram.arena.arena_bytes,
            "clients": len(self._leases),
            "leases": sum(block.leases for block in blocks),
            "disk_blocks": 0,
            "slab_bytes": 0,
            "journal_bytes": 0,
            "queued_reads": sum(len(request.blocks) for request in tuple(tiers.reads)),
            "hits": _by_tier(metrics, "litecache_hits", "ram", "disk"),
            "promotions": int(metrics.value("litecache_promotions")),
            "demotions": int(metrics.value("litecache_demotions")),
            "drops": {k: int(v) for k, v in metrics.by_label("litecache_drops", "reason").items()},
            "evictions": _by_tier(metrics, "litecache_evictions", "ram", "disk", "expired"),
        }
        if disk is not None:
            result["disk_blocks"] = on_disk
            result["slab_bytes"] = disk.space.present * disk.space.segment_bytes
            result["journal_bytes"] = disk.log.bytes
            result["retired_bytes"] = disk.retired_bytes
            result["disk_lost"] = disk.lost or ""
            result["direct_io"] = disk.slab.direct
            result["damaged_records"] = disk.damaged_records
        for state in RamState:
            metrics.set("litecache_arena_slots", states[state], state=state.name.lower())
        metrics.set("litecache_slab_bytes", float(str(result["slab_bytes"])))
        return result

    def check_integrity(self) -> None:
        """AssertionError unless index, tiers, queues and leases agree."""
        with self._lock:
            self._tiers.check_integrity(self._io.writing_slots)
            self._leases.check_integrity()

    def close(self, timeout_s: float = 30.0) -> None:
        """Write out what is dirty, write a new log, and give everything back."""
        if self._closed:
            return
        self._retired.close()
        if self._tiers.disk is not None:
            self.flush(timeout_s)
        self.abandon(compact=True)

    def abandon(self, *, compact: bool = False) -> None:
        """Stop without writing out what is dirty; end all threads and give everything back."""
        self._retired.close()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._io.close()
        self._durability.close()
        self._leases.close()
        if self._tiers.disk is not None:
            clean = compact and self._durability.compact()
            self._tiers.disk.close(clean=clean)
        self._arena.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _by_tier(metrics: Metrics, name: str, *tiers: str) -> dict[str, int]:
    return {tier: int(metrics.value(name, tier=tier)) for tier in tiers}
