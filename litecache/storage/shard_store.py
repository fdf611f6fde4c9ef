"""What clients do with a shard's blocks: the slot protocol (`protocol.py`), batched, thread-safe.

All methods return at once except `flush`, `fetch`, `wait`, `clear` and `close`. At most
`BATCH_KEYS` keys are worked on under one hold of the lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from ..errors import ConfigError, StorageError
from ..hashing import KEY_BYTES, BlockKey
from .disk.slab import Stored, read_blocks, requests
from .key_dict import BATCH_KEYS, batches
from .leases import Client
from .namespaces import LONGEST_NAMESPACE
from .protocol import (
    PAGE_BYTES,
    CommitItem,
    CommitStatus,
    Deltas,
    SlotRef,
    StageResult,
    StageStatus,
)
from .ram_tier import LOADED, RamBlock, RamState
from .shard_base import ShardBase

MAX_FETCH_BYTES = 64 << 20
"""Of one answer of `fetch`; a block larger than this still goes, alone."""
_COUNTERS: tuple[tuple[StageStatus, str, dict[str, str]], ...] = (
    (StageStatus.READY, "litecache_hits", {"tier": "ram"}),
    (StageStatus.LOADING, "litecache_hits", {"tier": "disk"}),
    (StageStatus.MISS, "litecache_misses", {"tier": "shard", "reason": "absent"}),
    (StageStatus.BUSY, "litecache_misses", {"tier": "shard", "reason": "busy"}),
)
_MISS, _BUSY = StageResult(StageStatus.MISS), StageResult(StageStatus.BUSY)
_READY, _LOADING = StageStatus.READY, StageStatus.LOADING
# a NamedTuple's own constructor takes three times as long
_staged = partial(tuple.__new__, StageResult)
_OnDisk = tuple[int, Stored]


class ShardStore(ShardBase):
    """One shard, for any number of client processes; `ShardBase` tells its arguments."""

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
        self._check_open()
        self.release(client_id, released)
        results: list[StageResult] = []
        for batch in batches(keys):
            results += self._stage(client_id, batch)
        self._io.drain()
        return results

    def _stage(self, client_id: int, keys: Sequence[BlockKey]) -> list[StageResult]:
        results = self._stage_once(client_id, keys)
        busy = _busy(results)
        space, grown = self._tiers.ram.space, -1
        while busy and space.grown != grown:
            # another client, or another block size, took the segment that was grown for these: ask
            # again for as long as the arena grows, now that growth and eviction see their need
            grown = space.grown
            again = self._stage_once(client_id, [keys[i] for i in busy])
            for i, result in zip(busy, again, strict=True):
                results[i] = result
            busy = _busy(results)
        self._count(results)
        return results

    def _stage_once(self, client_id: int, keys: Sequence[BlockKey]) -> list[StageResult]:
        tiers = self._tiers
        with self._lock:
            client = self._leases.get(client_id)
            entries = tiers.find(keys)
            wanting = self._wanting(entries)
            if not wanting:
                return self._lease(client, entries)
        for pages, count in wanting.items():
            self._grow_for(pages, count)
        with self._lock:
            return self._lease(client, tiers.find(keys))

    def _wanting(self, entries: Iterable[int]) -> dict[int, int]:
        """Block sizes in pages for whose loads the arena should grow, with the slots they need."""
        index, space = self._tiers.index, self._tiers.ram.space
        needs: dict[int, int] = {}
        for entry in entries:
            if entry >= 0 and not index.ram[entry]:
                needs[index.pages[entry]] = needs.get(index.pages[entry], 0) + 1
        return {
            pages: count
            for pages, count in needs.items()
            if space.available(pages) < count and space.growth(pages) is not None
        }

    def _lease(self, client: Client, entries: list[int]) -> list[StageResult]:
        if client.gone:
            raise StorageError(f"client_id={client.client_id} has been detached")
        tiers, leases, staged = self._tiers, client.leases, _staged
        handles, blocks, loading = tiers.index.ram, tiers.ram.blocks, RamState.LOADING
        results = [_MISS] * len(entries)
        leased: list[int] = []
        loads: dict[int, list[int]] = {}
        for i, entry in enumerate(entries):
            if entry < 0:
                continue
            handle = handles[entry]
            if not handle:
                loads.setdefault(tiers.index.pages[entry], []).append(i)
                continue
            # as `Leases.give`, which is called once a block and not once for each of 64
            block = blocks[handle - 1]
            slot, generation = block.slot, block.generation
            held = leases.get(slot)
            if held is None:
                leases[slot] = [generation, 1]
            else:
                held[1] += 1
            block.leases += 1
            status = _LOADING if block.state is loading else _READY
            results[i] = staged((status, slot, generation))
            leased.append(entry)
        if loads:
            for pages, wanted in loads.items():
                self._begin_loads(client, pages, wanted, entries, results)
            leased = [e for e, result in zip(entries, results, strict=True) if result[1] >= 0]
        tiers.use(leased)
        if tiers.writes:
            self._io.kick()
        return results

    def _begin_loads(
        self,
        client: Client,
        pages: int,
        wanted: list[int],
        entries: list[int],
        results: list[StageResult],
    ) -> None:
        tiers = self._tiers
        distinct = list(dict.fromkeys(entries[i] for i in wanted))
        free = tiers.ram.allocate(pages * PAGE_BYTES, len(distinct))
        # making room may have dropped nothing that is on disk, so all entries still stand
        blocks = dict(zip(distinct, free, strict=False))
        if blocks:
            tiers.begin_loads(list(blocks), free)
            self._io.queue_reads(free)
            self._io.kick()
        for i in wanted:
            block = blocks.get(entries[i])
            if block is None:
                results[i] = _BUSY
                continue
            self._leases.give(client, block)
            results[i] = StageResult(StageStatus.LOADING, block.slot, block.generation)

    def _count(self, results: Sequence[StageResult]) -> None:
        statuses = [result[0] for result in results]
        for status, name, labels in _COUNTERS:
            count = statuses.count(status)
            if count:
                self.metrics.inc(name, count, **labels)

    def cancel(self, client_id: int, keys: Sequence[BlockKey]) -> list[bool]:
        """Give up reads that have not begun.

        Returns:
            Per key True when this ended one lease of the client on a LOADING slot whose read had
            not begun; False when nothing changed (then a lease, if any, still wants `release`).
        """
        ended: list[bool] = []
        for batch in batches(keys):
            with self._lock:
                client = self._leases.get(client_id)
                ended += [self._cancel(client, e) for e in self._tiers.find(batch)]
        return ended

    def _cancel(self, client: Client, entry: int) -> bool:
        block = self._tiers.block_of(entry) if entry >= 0 else None
        if block is None or block.state is not RamState.LOADING or block.started:
            return False
        if self._leases.end(client, block.slot, block.generation) is None:
            return False
        if not block.leases:
            self._tiers.cancel_load(block)
        return True

    def release(self, client_id: int, slots: Sequence[SlotRef]) -> None:
        """End one lease per slot given; one that is not held is ignored."""
        for batch in batches(slots):
            with self._lock:
                self._leases.end_many(self._leases.get(client_id), batch)

    def reserve(self, client_id: int, block_bytes: int, n: int) -> list[SlotRef]:
        """Lease up to `n` slots to fill; fewer or none when RAM is dirty or leased. Never waits.

        Raises:
            ConfigError: `block_bytes` is not a positive multiple of 4096, or `n` is negative.
        """
        if block_bytes <= 0 or block_bytes % PAGE_BYTES:
            raise ConfigError("block_bytes", block_bytes, f"a positive multiple of {PAGE_BYTES}")
        most = self._arena.arena_bytes
        if block_bytes > most:
            # before anything is evicted for it in vain
            raise ConfigError(
                "block_bytes", block_bytes, f"at most the {most:,} bytes of the arena"
            )
        if n < 0:
            raise ConfigError("n", n, "zero or more")
        n = min(n, most // block_bytes)
        self._check_open()
        if self._accepts_writes and n:
            self._grow_for(block_bytes // PAGE_BYTES, n)
        with self._lock:
            client = self._leases.get(client_id)
            if not self._accepts_writes or self._closed:
                return []
            blocks = self._tiers.ram.allocate(block_bytes, n)
            self._tiers.ram.show_reserved(blocks)
            for block in blocks:
                self._leases.give(client, block)
        if len(blocks) < n:
            self.metrics.inc("litecache_drops", n - len(blocks), reason="no_slot")
        return [SlotRef(block.slot, block.generation) for block in blocks]

    def commit(self, client_id: int, items: Sequence[CommitItem]) -> list[CommitStatus]:
        """Publish filled slots; their leases end and their bytes must not change any more.

        Returns:
            Per item STORED; EXISTS (the key was there already, the slot went back); or STALE (the
            client does not hold that slot under that generation, nothing changed).
        """
        _check(items)
        statuses: list[CommitStatus] = []
        for batch in batches(items):
            statuses += self._commit(client_id, batch)
        self._io.drain()
        return statuses

    def _commit(self, client_id: int, items: Sequence[CommitItem]) -> list[CommitStatus]:
        statuses: list[CommitStatus] = []
        tiers = self._tiers
        with self._lock:
            client = self._leases.get(client_id)
            there = dict(zip((keys := [i[2] for i in items]), tiers.find(keys), strict=True))
            # what is stored here and now is young anyway: its parents and old blocks were used
            used: list[int] = []
            for slot, generation, key, parent, namespace in items:
                held = tiers.ram.by_slot.get(slot)
                reserved = held is not None and held.state is RamState.RESERVED and not held.dead
                block = self._leases.end(client, slot, generation) if reserved else None
                if block is None:
                    statuses.append(CommitStatus.STALE)
                    continue
                known = there[key]
                if known >= 0:
                    self._leases.abandon(block)
                    tiers.consider_again(known)
                    used.append(known)
                    statuses.append(CommitStatus.EXISTS)
                    continue
                if parent not in there and (before := tiers.index.find(parent)) >= 0:
                    used.append(before)
                there[key] = tiers.publish(block, key, parent, namespace)
                statuses.append(CommitStatus.STORED)
            tiers.touch(used)
            if tiers.writes:
                self._io.kick()
            self._changed.notify_all()
        return statuses

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
        tiers, pending = self._tiers, self._io.pending
        for batch in batches(keys):
            with self._lock:
                blocks = [tiers.block_of(e) if e >= 0 else None for e in tiers.find(batch)]
                awaited += [block is not None and bool(pending([block])) for block in blocks]
        return awaited

    def fetch(self, keys: Sequence[BlockKey]) -> list[tuple[BlockKey, bytes | None]]:
        """Copies of blocks, for another node; those on disk are read without taking a RAM slot.

        One answer holds at most 64 MiB (or one block); what does not fit is None, as a miss.
        """
        found: list[bytes | None] = [None] * len(keys)
        in_ram, on_disk = self._hold(keys)
        for position, block in in_ram:
            found[position] = bytes(self._arena.buffer(block.slot, block.nbytes))
        with self._lock:
            for _, block in in_ram:
                if self._leases.end(self._leases.own, block.slot, block.generation) is not None:
                    self._leases.abandon(block)
        on_disk.sort(key=lambda wanted: wanted[1].slot)
        positions = iter([position for position, _ in on_disk])
        for batch in requests(block for _, block in on_disk):
            for data in self._read(batch):
                found[next(positions)] = data
        return list(zip(keys, found, strict=True))

    def _hold(self, keys: Sequence[BlockKey]) -> tuple[list[tuple[int, RamBlock]], list[_OnDisk]]:
        """Lease what is in RAM and keep what is on disk where it is, up to the bound."""
        tiers = self._tiers
        in_ram: list[tuple[int, RamBlock]] = []
        on_disk: list[_OnDisk] = []
        total = 0
        with self._lock:
            for position, entry in enumerate(tiers.find(keys)):
                if entry < 0:
                    continue
                nbytes = tiers.index.pages[entry] * PAGE_BYTES
                if total and total + nbytes > MAX_FETCH_BYTES:
                    self.metrics.inc("litecache_drops", reason="fetch_too_large")
                    continue
                block = tiers.block_of(entry)
                if block is not None and block.state in LOADED:
                    self._leases.give(self._leases.own, block)
                    in_ram.append((position, block))
                elif tiers.disk is not None and tiers.index.disk[entry]:
                    slot = tiers.index.disk[entry] - 1
                    tiers.disk.space.begin_reads([slot])
                    checksum = tiers.index.checksum[entry]
                    on_disk.append((position, Stored(keys[position], slot, nbytes, checksum)))
                else:
                    continue
                total += nbytes
        return in_ram, on_disk

    def _read(self, batch: Sequence[Stored]) -> list[bytes | None]:
        disk = self._tiers.disk
        assert disk is not None
        with read_blocks(disk.slab, batch) as found:
            reasons = [reason for _, reason in found]
            blocks = [bytes(piece) if reason is None else None for piece, reason in found]
        with self._lock:
            disk.space.end_reads([wanted.slot for wanted in batch])
            for wanted, reason in zip(batch, reasons, strict=True):
                if reason is None:
                    continue
                self.metrics.inc("litecache_misses", tier="disk", reason=reason)
                entry = self._tiers.index.find(wanted.key)
                if entry >= 0 and self._tiers.index.disk[entry] == wanted.slot + 1:
                    self._tiers.drop_disk_copy(entry)
                    self._durability.note_change()
        return blocks

    def delete(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Drop blocks from every tier, over kill -9 too; which of them were there."""
        dropped: list[bool] = []
        for batch in batches(keys):
            with self._changed:
                for key in batch:
                    entry = self._tiers.index.find(key)
                    if entry >= 0:
                        self._tiers.drop(entry)
                    dropped.append(entry >= 0)
                self._durability.note_change()
                self._changed.notify_all()
        self._durability.flush_log()
        return dropped

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
        tiers = self._tiers
        index = tiers.index
        for start in range(0, index.high, BATCH_KEYS):
            with self._changed:
                for entry in range(start, min(start + BATCH_KEYS, index.high)):
                    if not index.keys[entry]:
                        continue
                    if tier == "all":
                        tiers.drop(entry)
                    elif tier == "ram":
                        tiers.drop_ram_copy(entry)
                    elif index.disk[entry]:
                        tiers.drop_disk_copy(entry)
                self._durability.note_change()
                self._changed.notify_all()
        self._durability.flush_log()

    def pin(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Keep blocks from being evicted from disk until `unpin`, over restarts too."""
        return self._set_pinned(keys, True)

    def unpin(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Let blocks be evicted again."""
        return self._set_pinned(keys, False)

    def _set_pinned(self, keys: Sequence[BlockKey], pinned: bool) -> list[bool]:
        tiers, found = self._tiers, []
        for batch in batches(keys):
            with self._changed:
                entries = tiers.find(batch)
                for entry in entries:
                    if entry >= 0 and tiers.disk is not None:
                        tiers.disk.set_pinned(entry, pinned)
                self._durability.note_change()
            found += [entry >= 0 for entry in entries]
        self._durability.flush_log()
        return found

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


def _busy(results: Sequence[StageResult]) -> list[int]:
    return [i for i, result in enumerate(results) if result == _BUSY] if _BUSY in results else []


def _check(items: Sequence[CommitItem]) -> None:
    for item in items:
        if len(item[2]) != KEY_BYTES or len(item[3]) != KEY_BYTES:
            raise ConfigError("key", item[2:4], f"{KEY_BYTES} bytes each for key and parent")
        if len(item[4]) > LONGEST_NAMESPACE:
            raise ConfigError("namespace", item[4], f"at most {LONGEST_NAMESPACE} characters")
