"""One shard: blocks in shared memory and on disk, for any number of client processes.

The methods are the slot protocol (`protocol.py`), thread-safe, batched; all return at once except
`flush`, `fetch`, `wait`, `clear` and `close`. State and I/O live in `ShardParts`, under one lock
that nobody holds during I/O; here stands what each method promises and who keeps the promise.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from ..errors import ConfigError
from ..hashing import BlockKey
from ..metrics import Metrics
from .block_io import OnWritten
from .disk.files import Files
from .disk.retired import Retired, retired_folders
from .fetching import Fetching
from .filling import Filling
from .key_dict import batches
from .leases import Client
from .opening import open_tiers
from .protocol import (
    Attachment,
    CommitItem,
    CommitStatus,
    Deltas,
    FlushReport,
    SlotRef,
    StageResult,
)
from .shard_options import validate_options
from .shard_parts import ShardParts
from .shard_stats import set_gauges, shard_stats
from .staging import Staging
from .upkeep import Upkeep
from .waiting import Waiting


class ShardStore:
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
        shards: how many shards share the folder above `directory`, named `shard-<i>`; those of
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
        self.metrics = metrics or Metrics()
        self.epoch = secrets.randbits(62)
        self.directory = directory
        old = retired_folders(directory, shards) if directory and shards else []
        self._retired = Retired(old, storage_bytes // 2)
        try:
            self._tiers = open_tiers(
                directory,
                storage_bytes=storage_bytes,
                ram_bytes=ram_bytes,
                epoch=self.epoch,
                eviction=eviction,
                admission=admission,
                ttl_s=ttl_s,
                quotas=quotas or {},
                metrics=self.metrics,
                files=files or Files(),
                direct=direct,
                use_memfd=use_memfd,
                retired_bytes=self._retired.nbytes(),
            )
        except BaseException:
            self._retired.close()
            raise
        self._arena = self._tiers.ram.arena
        self._parts = ShardParts(
            self._tiers,
            self.epoch,
            io_threads=io_threads,
            fsync=fsync,
            fsync_interval_s=fsync_interval_s,
            metrics=self.metrics,
            on_written=on_written,
        )
        self._lock = self._parts.lock
        self._clients = self._parts.clients
        self._staging = Staging(self._parts)
        self._filling = Filling(self._parts, accepts_writes=accepts_writes)
        self._waiting = Waiting(self._parts)
        self._fetching = Fetching(self._parts)
        self._upkeep = Upkeep(self._parts)
        self._retired.begin(self, self._tiers, self._lock)

    def attach(self, client_pid: int) -> Attachment:
        """Register a client process.

        Raises:
            StorageError: the process does not live on this machine, or the store is closed.
        """
        self._parts.check_open()
        return self._arena.attachment(self._clients.attach(client_pid))

    def detach(self, client_id: int) -> None:
        """End a client and all its leases; an unknown one is ignored."""
        self._clients.detach(client_id)

    def stage(
        self,
        client_id: int,
        keys: Sequence[BlockKey],
        released: Sequence[SlotRef] = (),
    ) -> list[StageResult]:
        """Lease blocks in RAM and begin to read those on disk, in the order given.

        Args:
            client_id: as `attach` gave it.
            keys: what is wanted.
            released: leases to end first, as by `release`.

        Returns:
            Per key READY or LOADING with a lease on the slot, BUSY (no slot is free now) or MISS.
            Completion of LOADING shows in the slot table.

        Raises:
            StorageError: unknown client.
            ConfigError: a key is not 16 bytes.
        """
        self._parts.check_open()
        self.release(client_id, released)
        with self._lock:
            client = self._clients.get(client_id)
        return self._staging.stage(client, keys)

    def cancel(self, client_id: int, keys: Sequence[BlockKey]) -> list[bool]:
        """Give up reads that have not begun.

        Returns:
            Per key True when this ended one lease of the client on a LOADING slot whose read had
            not begun; False when nothing changed (then a lease, if any, still wants `release`).
        """
        ended: list[bool] = []
        for batch in batches(keys):
            with self._lock:
                client = self._clients.get(client_id)
                ended += [self._staging.cancel(client, e) for e in self._tiers.find(batch)]
        return ended

    def release(self, client_id: int, slots: Sequence[SlotRef]) -> None:
        """End one lease per slot given; one that is not held is ignored."""
        for batch in batches(slots):
            with self._lock:
                self._end_leases(self._clients.get(client_id), batch)

    def _end_leases(self, client: Client, slots: Sequence[SlotRef]) -> None:
        self._parts.leases.end_many(client, slots)
        self._parts.changed.notify_all()

    def reserve(self, client_id: int, block_bytes: int, n: int) -> list[SlotRef]:
        """Lease up to `n` slots to fill; fewer or none when RAM is dirty or leased. Never waits.

        Raises:
            ConfigError: `block_bytes` is not a positive multiple of 4096, or `n` is negative.
        """
        return self._filling.reserve(client_id, block_bytes, n)

    def commit(self, client_id: int, items: Sequence[CommitItem]) -> list[CommitStatus]:
        """Publish filled slots; their leases end and their bytes must not change any more.

        Returns:
            Per item STORED; EXISTS (the key was there already, the slot went back); or STALE (the
            client does not hold that slot under that generation, nothing changed).
        """
        return self._filling.commit(client_id, items)

    def query(self, keys: Sequence[BlockKey], *, touch: bool = False) -> list[bool]:
        """Which keys the shard holds; no lease, recency changes only with `touch`."""
        found: list[bool] = []
        for batch in batches(keys):
            with self._lock:
                entries = self._tiers.find(batch)
                if touch:
                    self._tiers.touch([entry for entry in entries if entry >= 0])
            found += [entry >= 0 for entry in entries]
        return found

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Blocks were used elsewhere (a hit in a GPU's pool); missing keys are ignored.

        The last block of a chain stands for all before it that this shard holds: they cannot leave
        before it does. Under `lfu` and `s3fifo` only the blocks that are named count a use.
        """
        self.query(keys, touch=True)

    def durable(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which keys are on disk and covered by the fsync policy's promise."""
        disk, safe = self._tiers.disk, []
        if disk is None:
            return [False] * len(keys)
        for batch in batches(keys):
            with self._lock:
                safe += [e >= 0 and disk.is_durable(e) for e in self._tiers.find(batch)]
        return safe

    def awaits_disk(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which keys are in RAM and still on their way to disk."""
        awaited: list[bool] = []
        tiers, pending = self._tiers, self._parts.io.pending
        for batch in batches(keys):
            with self._lock:
                blocks = [tiers.block_of(e) if e >= 0 else None for e in tiers.find(batch)]
                awaited += [block is not None and bool(pending([block])) for block in blocks]
        return awaited

    def wait_for_change(self, timeout_s: float) -> None:
        """Sleep until a read or write ends, a lease is released, or the time is over."""
        self._waiting.for_change(timeout_s)

    def wait(self, slots: Sequence[SlotRef], timeout_s: float = 30.0) -> list[bool]:
        """Block until leased slots have stopped loading.

        Returns:
            Per slot whether it holds its block under that generation.
        """
        return self._waiting.for_reads(slots, timeout_s)

    def flush(self, timeout_s: float = 30.0) -> FlushReport:
        """Write and sync all that was committed before the call."""
        return self._waiting.for_writes(timeout_s)

    def fetch(self, keys: Sequence[BlockKey]) -> list[tuple[BlockKey, bytes | None]]:
        """Copies of blocks, for another node; those on disk are read without taking a RAM slot.

        One answer holds at most 64 MiB (or one block); what does not fit is None, as a miss.
        """
        return self._fetching.fetch(keys)

    def delete(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Drop blocks from every tier; which of them were there."""
        return self._upkeep.delete(keys)

    def clear(self, tier: str = "all", timeout_s: float = 60.0) -> None:
        """Empty a tier.

        Args:
            tier: `ram` (dirty blocks are written out first; leased ones stay), `disk` (blocks in
                RAM stay), or `all`.
            timeout_s: for writing out.
        """
        if tier not in ("ram", "disk", "all"):
            raise ConfigError("tier", tier, "ram, disk or all")
        if tier == "ram" and self._tiers.disk is not None:
            self.flush(timeout_s)
        self._upkeep.clear(tier)

    def pin(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Keep blocks from being evicted from disk until `unpin`, over restarts too."""
        return self._upkeep.set_pinned(keys, True)

    def unpin(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Let blocks be evicted again."""
        return self._upkeep.set_pinned(keys, False)

    def keys(self) -> list[BlockKey]:
        """All keys that the shard holds; those that come or go meanwhile may be in it or not."""
        keys: list[BlockKey] = []
        for part in self._tiers.index.entry_of.dicts:
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
        """Counts and bytes, msgpack-able; also sets the gauges."""
        with self._lock:
            clients = len(self._clients.all())
            result = shard_stats(self._tiers, self.epoch, clients, self.metrics)
        set_gauges(self.metrics, result)
        return result

    def check_integrity(self) -> None:
        """AssertionError unless index, tiers, queues and leases agree."""
        self._parts.check_integrity()

    def close(self, timeout_s: float = 30.0) -> None:
        """Write out what is dirty, write a new log, and give everything back."""
        if self._parts.closed:
            return
        self._retired.close()
        if self._tiers.disk is not None:
            self.flush(timeout_s)
        self.abandon(compact=True)

    def abandon(self, *, compact: bool = False) -> None:
        """Stop without writing out what is dirty."""
        self._retired.close()
        self._parts.close(compact=compact)

    def __enter__(self) -> ShardStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
