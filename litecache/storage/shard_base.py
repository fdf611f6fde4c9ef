"""A shard as a whole: opened, with its threads and clients, waited for, emptied, told of, closed.

All state lies in `Tiers`, under one lock that nobody holds during I/O, and for at most `BATCH_KEYS`
keys at a time; `BlockIo` and `Durability` work in threads of their own. `ShardStore` adds what
clients do with blocks.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from ..errors import ConfigError, StorageError, StorageFullError
from ..hashing import BlockKey
from ..metrics import Metrics
from ..threads import let_go_in_child
from .admission import Admission
from .arena.arena import Arena
from .block_io import BlockIo, OnWritten
from .disk.files import NO_SPACE, Files
from .disk.retired import Retired, retired_folders
from .disk.tier import DiskTier
from .durability import Durability
from .eviction import get_policy
from .key_dict import batches
from .leases import Leases
from .namespaces import may_hold
from .protocol import PAGE_BYTES, Attachment, Deltas, FlushReport, SlotRef
from .ram_blocks import LOADED, UNWRITTEN, RamBlock, RamState
from .segments import pick_segment_bytes
from .shard_options import plain_options
from .tiers import Tiers

if TYPE_CHECKING:
    from typing_extensions import Self

    from .shard_store import ShardStore

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")


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
        admission: `all`, `reused`, `frequent` or `none`: which blocks are written to disk.
        ttl_s: a block older than this is a miss.
        write_bytes_per_s: blocks are written to disk at this rate at most, in bursts of at most a
            second's worth; `flush`, `clear` and `close` write what is left at once. None: no bound.
        quotas: namespace, or digest of a salt (`namespaces.py`), to the disk bytes it may take.
        ram_quotas: the same for bytes of RAM; what clients lease is never taken from them.
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
        write_bytes_per_s: int | None = None,
        quotas: dict[str, int] | None = None,
        ram_quotas: dict[str, int] | None = None,
        io_threads: int = 4,
        metrics: Metrics | None = None,
        shards: int = 0,
        accepts_writes: bool = True,
        files: Files | None = None,
        direct: bool = True,
        use_memfd: bool = True,
        on_written: OnWritten | None = None,
    ) -> None:
        directory, storage_bytes, ram_bytes = plain_options(
            directory, storage_bytes, ram_bytes, fsync, fsync_interval_s, ttl_s, write_bytes_per_s,
            io_threads, {"quotas": quotas, "ram_quotas": ram_quotas},
        )  # fmt: skip
        get_policy(eviction)
        admit = Admission(admission)
        self.metrics = metrics or Metrics()
        self.epoch = secrets.randbits(62)
        self.directory = directory
        self._accepts_writes = accepts_writes
        self._growing, self._ending = threading.Lock(), threading.Lock()
        self._closed = False
        self._io: BlockIo | None = None
        segment_bytes = pick_segment_bytes(ram_bytes)
        arena_bytes = ram_bytes // segment_bytes * segment_bytes
        with ExitStack() as undo, _named_errors(directory):
            old = retired_folders(directory, shards) if directory and shards else []
            self._retired = Retired(old, storage_bytes // 2)
            undo.callback(self._retired.close)
            self._arena = Arena(arena_bytes, segment_bytes, self.epoch, use_memfd=use_memfd)
            undo.callback(self._arena.close)
            self._tiers = tiers = Tiers(
                self._arena, eviction, admit, ttl_s, self.metrics, ram_quotas
            )
            if directory is not None:
                tiers.disk = DiskTier(
                    files or Files(),
                    directory,
                    storage_bytes=storage_bytes,
                    index=tiers.index,
                    policy=eviction,
                    on_evict=tiers.on_disk_evict,
                    quotas=quotas or {},
                    direct=direct,
                    retired_bytes=self._retired.nbytes(),
                )
                undo.callback(tiers.disk.discard)
            tiers.note_names()
            self._lock, self._changed = tiers.lock, tiers.changed
            self._leases = Leases(tiers, self.epoch)
            undo.callback(self._leases.close)
            if (disk := tiers.disk) is not None:
                self._durability = Durability(
                    tiers, disk, threaded=io_threads > 0, fsync=fsync, interval_s=fsync_interval_s
                )
                undo.callback(self._durability.close)
                self._io = BlockIo(
                    tiers,
                    disk,
                    self._durability,
                    threads=io_threads,
                    write_bytes_per_s=write_bytes_per_s,
                    on_written=on_written,
                )
                undo.callback(self._io.close)
            self._retired.begin(cast("ShardStore", self), tiers, self._lock)
            let_go_in_child(self)
            undo.pop_all()

    def let_go(self) -> None:
        """In a forked child the store, which is its parent's, is closed."""
        # a thread of the parent may have held it
        self._lock._at_fork_reinit()  # type: ignore[attr-defined]
        self._closed = True
        self._leases.let_go()
        self._retired.let_go()
        if (disk := self._tiers.disk) is not None:
            # with these descriptors the child would hold the parent's lock
            disk.folder.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError("the shard store is closed, or of the process that this forked from")

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

    def _drain(self) -> None:
        if self._io is not None:
            self._io.drain()

    def _grow_for(self, pages: int, n: int) -> None:
        """Let the arena grow until it has `n` slots or reaches its bound.

        One thread at a time, outside the lock: faulting memory in takes long.
        """
        space, growth = self._tiers.space, self._tiers.growth
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
                    growth.note(False)
                    return
                growth.note(True)
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

        def has(ref: SlotRef, *states: RamState) -> bool:
            block = self._tiers.by_slot.get(ref[0])
            return block is not None and block.generation == ref[1] and block.state in states

        def settled(ref: SlotRef) -> bool:
            return self._closed or not has(ref, RamState.LOADING)

        deadline = time.monotonic() + timeout_s
        with self._changed:
            for ref in slots:
                self._changed.wait_for(partial(settled, ref), deadline - time.monotonic())
            return [has(ref, *LOADED) for ref in slots]

    def flush(self, timeout_s: float = 30.0) -> FlushReport:
        """Write and sync all that was committed before the call."""
        self._check_open()
        if self._io is None:
            return FlushReport(0, 0, 0, True)
        tiers = self._tiers
        pending: list[RamBlock] = []

        def done() -> bool:
            nonlocal pending
            pending = [block for block in pending if block.state in UNWRITTEN]
            return self._closed or not pending

        with self._io.hurry():
            self._io.drain()
            with self._changed:
                mine = pending = tiers.unwritten()
                failed = tiers.failed_writes
                self._changed.wait_for(done, timeout_s)
                failed = tiers.failed_writes - failed
        synced = self._durability.sync(force=True)
        written = max(0, len(mine) - len(pending) - failed) if synced else 0
        complete = synced and not pending and not failed
        return FlushReport(written, len(pending), failed, complete)

    def _change(
        self, items: Sequence[_Item], change: Callable[[Sequence[_Item]], Iterable[bool]]
    ) -> list[bool]:
        """Let `change` work on pieces under the lock; its answers, once they are logged."""
        self._check_open()
        answers: list[bool] = []
        for batch in batches(items):
            with self._lock:
                self._check_open()
                answers += change(batch)
                if self._io is not None:
                    self._durability.note_change()
                self._changed.notify_all()
        if self._io is not None:
            self._durability.flush_log()
        return answers

    def delete(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Drop blocks from every tier, over kill -9 too; which of them were there."""

        def delete(batch: Sequence[BlockKey]) -> Iterator[bool]:
            for key in batch:
                entry = self._tiers.index.find(key)
                if entry >= 0:
                    self._tiers.drop(entry)
                yield entry >= 0

        return self._change(keys, delete)

    def delete_salt(
        self, digest: str, roots: Sequence[BlockKey] = (), timeout_s: float = 20.0
    ) -> int:
        """Drop all blocks of a cache salt, of every model, from every tier; over kill -9 too.

        Found by namespace, and by parent links from `roots`, because earlier versions stored blocks
        of most salts under their model's name alone.

        Args:
            digest: of the salt (`namespaces.salt_digest`).
            roots: the salt's root keys of a model.
            timeout_s: how long blocks of a retired shard may take to move in.

        Returns:
            How many there were.

        Raises:
            StorageError: blocks of a retired shard are still moving in; nothing was dropped.
        """
        if not self._retired.wait(timeout_s):
            raise StorageError("shards of an earlier storage_shards still move in: try it later")
        tiers, index = self._tiers, self._tiers.index
        chained = set(roots)
        dropped, step = 0, 1

        def drop(entries: Sequence[int]) -> Iterator[bool]:
            for entry in entries:
                key = index.keys[entry]
                named = index.namespace[entry] in numbers
                mine = bool(key) and (named or index.parents[entry] in chained)
                if mine:
                    chained.add(key)
                    tiers.drop(entry)
                yield mine

        while True:
            with self._lock:
                numbers = {n for n, name in enumerate(tiers.names) if may_hold(name, digest)}
            found = sum(self._change(range(index.high)[::step], drop))
            dropped += found
            if not found:
                return dropped
            step = -step  # a chain may lie head first, or tail first

    def clear(self, tier: str = "all", timeout_s: float = 60.0) -> None:
        """Empty a tier.

        Args:
            tier: `ram` (dirty blocks are written out first; leased ones stay), `disk` (blocks in
                RAM stay), or `all`.
            timeout_s: for writing out.
        """
        tiers = self._tiers
        index = tiers.index
        drops = {"all": tiers.drop, "ram": tiers.drop_ram_copy, "disk": tiers.drop_disk_copy}
        if tier not in drops:
            raise ConfigError("tier", tier, "ram, disk or all")
        if tier == "ram":
            self.flush(timeout_s)

        def clear(entries: Sequence[int]) -> Iterator[bool]:
            for entry in entries:
                there = bool(index.disk[entry] if tier == "disk" else index.keys[entry])
                if there:
                    drops[tier](entry)
                yield there

        self._change(range(index.high), clear)

    def pin(self, keys: Sequence[BlockKey], *, pinned: bool = True) -> list[bool]:
        """Keep blocks from being evicted from disk until `unpin`, over restarts too."""
        tiers = self._tiers

        def pin(batch: Sequence[BlockKey]) -> Iterator[bool]:
            for entry in tiers.look_up(batch):
                if entry >= 0 and tiers.disk is not None:
                    tiers.disk.set_pinned(entry, pinned)
                yield entry >= 0

        return self._change(keys, pin)

    def unpin(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Let blocks be evicted again."""
        return self.pin(keys, pinned=False)

    def keys(self) -> list[BlockKey]:
        """All keys that the shard holds; those that come or go meanwhile may be in it or not."""
        keys: list[BlockKey] = []
        for part in self._tiers.index.dicts:
            with self._lock:
                keys += part
        return keys

    def drain_deltas(self) -> Deltas:
        """What was added and removed since the last call."""
        with self._lock:
            return self._tiers.changes.drain()

    def __len__(self) -> int:
        return len(self._tiers.index)

    def stats(self) -> dict[str, object]:
        """Counts and bytes, msgpack-able; also sets the gauges.

        `hits`, `promotions` (disk to RAM), `demotions` (the RAM copy left, the disk has the block)
        and `evictions` are read from `metrics`, so they are a shard's own where it has its own.
        """
        tiers, metrics = self._tiers, self.metrics
        disk = tiers.disk
        with self._lock:
            blocks = list(tiers.by_slot.values())
            on_disk = int((tiers.index.column("disk") != 0).sum())
            disk_pages = disk.queues.total_pages() if disk is not None else 0
        # what follows may be a moment off: nobody has to wait while so many are counted
        states = Counter(block.state for block in blocks)
        result: dict[str, object] = {
            "epoch": self.epoch,
            "blocks": len(tiers.index),
            "ram_slots": {state.name.lower(): states[state] for state in RamState},
            "ram_bytes_used": sum(block.nbytes for block in blocks),
            "ram_bytes": self._arena.arena_bytes,
            "clients": len(self._leases),
            "leases": sum(block.leases for block in blocks),
            "disk_blocks": 0,
            "slab_bytes": 0,
            "disk_bytes_used": 0,
            "storage_bytes": 0,
            "journal_bytes": 0,
            "queued_reads": sum(map(len, tuple(tiers.reads))),
            "hits": _by_tier(metrics, "litecache_hits", "ram", "disk"),
            "promotions": int(metrics.value("litecache_promotions")),
            "demotions": int(metrics.value("litecache_demotions")),
            "drops": {k: int(v) for k, v in metrics.by_label("litecache_drops", "reason").items()},
            "evictions": _by_tier(metrics, "litecache_evictions", "ram", "disk", "expired"),
        }
        if disk is not None:
            result |= {
                "disk_blocks": on_disk,
                "slab_bytes": disk.space.present * disk.space.segment_bytes,
                "disk_bytes_used": disk_pages * PAGE_BYTES,
                "storage_bytes": disk.limit,
                "journal_bytes": disk.log.bytes,
                "retired_bytes": disk.retired_bytes,
                "disk_lost": disk.lost or "",
                "direct_io": disk.slab.direct,
                "damaged_records": disk.damaged_records,
            }
        for state in RamState:
            metrics.set("litecache_arena_slots", states[state], state=state.name.lower())
        in_ram = sum(states[state] for state in (RamState.DIRTY, RamState.WRITING, RamState.CLEAN))
        metrics.set("litecache_stored_blocks", in_ram, tier="ram")
        metrics.set("litecache_stored_blocks", on_disk, tier="disk")
        metrics.set("litecache_slab_bytes", float(str(result["slab_bytes"])))
        return result

    def check_integrity(self) -> None:
        """AssertionError unless index, tiers, queues and leases agree."""
        with self._lock:
            self._tiers.check_integrity(self._io.allocated if self._io is not None else set())
            self._leases.check_integrity()

    def close(self, timeout_s: float = 30.0) -> None:
        """Write out what is dirty, write a new log, and give everything back."""
        with suppress(StorageError):  # somebody else has closed it meanwhile
            self._check_open()
            self._retired.close()
            self.flush(timeout_s)
        self.abandon(compact=True)

    def abandon(self, *, compact: bool = False) -> None:
        """Stop without writing out what is dirty; end all threads and give everything back."""
        with self._ending:  # who comes second finds it closed when this returns
            if self._closed:
                return
            self._retired.close()
            with self._lock:
                self._closed = True
                self._changed.notify_all()
            if self._io is not None:
                self._io.close()
                self._durability.close()
            self._leases.close()
            if (disk := self._tiers.disk) is not None:
                disk.close(clean=compact and self._durability.compact())
            self._arena.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextmanager
def _named_errors(directory: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = StorageFullError if error.errno in NO_SPACE else StorageError
        raise kind(f"the store in {directory or 'RAM'} cannot be opened: {error}") from error


def _by_tier(metrics: Metrics, name: str, *tiers: str) -> dict[str, int]:
    return {tier: int(metrics.value(name, tier=tier)) for tier in tiers}
