"""What clients do with a shard's blocks: the slot protocol (`protocol.py`), batched, thread-safe.

All methods return at once except `flush`, `fetch`, `wait`, `clear` and `close`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence

from ..errors import ConfigError
from ..hashing import KEY_BYTES, BlockKey
from .block_index import LAST_S, clock_s
from .disk.slab import Stored, read_blocks, requests
from .key_dict import BATCH_KEYS, batches
from .leases import Client
from .namespaces import LONGEST_NAMESPACE
from .protocol import (
    ALL_KEYS,
    PAGE_BYTES,
    CommitItem,
    CommitStatus,
    Place,
    Retention,
    SlotRef,
    SlotState,
    StageResult,
    StageStatus,
)
from .ram_blocks import LOADED, UNWRITTEN, RamBlock, RamState
from .shard_base import ShardBase

MAX_FETCH_BYTES = 64 << 20
"""Of one answer of `fetch`; a block larger than this still goes, alone."""
_RETENTIONS = frozenset(Retention)
_COUNTERS: dict[StageStatus, tuple[str, dict[str, str]]] = {
    StageStatus.READY: ("litecache_hits", {"tier": "ram"}),
    StageStatus.LOADING: ("litecache_hits", {"tier": "disk"}),
    StageStatus.MISS: ("litecache_misses", {"tier": "shard", "reason": "absent"}),
    StageStatus.BUSY: ("litecache_misses", {"tier": "shard", "reason": "busy"}),
    StageStatus.ON_DISK: ("litecache_hits", {"tier": "disk"}),
}
_BUSY, _ON_DISK = StageResult(StageStatus.BUSY), StageResult(StageStatus.ON_DISK)


class ShardStore(ShardBase):
    """One shard, for any number of client processes; `ShardBase` tells its arguments."""

    def stage(
        self,
        client_id: int,
        keys: Sequence[BlockKey],
        released: Sequence[SlotRef] = (),
        reads: int = ALL_KEYS,
    ) -> list[StageResult]:
        """Lease blocks in RAM and begin to read those on disk, in the order given.

        Args:
            client_id: as `attach` gave it.
            keys: what is wanted.
            released: leases to end first, as by `release`.
            reads: of keys from the first; of those behind only what is in RAM is leased.

        Returns:
            Per key READY or LOADING with a lease on the slot, BUSY (no slot is free now), ON_DISK
            (behind `reads`) or MISS. Completion of LOADING shows in the slot table.

        Raises:
            StorageError: unknown client.
            ConfigError: a key is not 16 bytes.
        """
        self._check_open()
        if released:
            self.release(client_id, released)
        results: list[StageResult] = []
        for batch in batches(keys):
            results += self._stage(client_id, batch, reads - len(results))
        self._drain()
        return results

    def _stage(self, client_id: int, keys: Sequence[BlockKey], reads: int) -> list[StageResult]:
        results = self._stage_once(client_id, keys, reads)
        space, grown = self._tiers.space, -1
        statuses = [result[0] for result in results]
        while StageStatus.BUSY in statuses and space.grown != grown:
            # another client, or another block size, took the segment that was grown for these: ask
            # again for as long as the arena grows, now that growth and eviction see their need
            grown = space.grown
            busy = [i for i, result in enumerate(results) if result == _BUSY]
            again = self._stage_once(client_id, [keys[i] for i in busy], len(busy))
            for i, result in zip(busy, again, strict=True):
                results[i] = result
            statuses = [result[0] for result in results]
        for status in set(statuses):
            name, labels = _COUNTERS[status]
            self.metrics.inc(name, statuses.count(status), **labels)
        return results

    def _stage_once(
        self, client_id: int, keys: Sequence[BlockKey], reads: int
    ) -> list[StageResult]:
        tiers, space, grown = self._tiers, self._tiers.space, False
        while True:
            with self._lock:
                client, entries = self._leases.get(client_id), tiers.look_up(keys)
                ram, pages = tiers.index.ram, tiers.index.pages
                handles = [ram[entry] if entry >= 0 else 0 for entry in entries]
                absent: dict[int, list[int]] = {}
                if not all(handles):
                    for at, entry in enumerate(entries[: max(0, reads)]):
                        if entry >= 0 and not handles[at]:
                            absent.setdefault(pages[entry], []).append(at)
                needs = {size: len(places) for size, places in absent.items()}
                if grown or not any(space.wants_growth(size, n) for size, n in needs.items()):
                    return self._lease(client, entries, handles, absent)
            for size, n in needs.items():
                self._grow_for(size, n)
            grown = True

    def _lease(
        self,
        client: Client,
        entries: list[int],
        handles: list[int],
        absent: dict[int, list[int]],
    ) -> list[StageResult]:
        """Lease what is in RAM, and begin to load what is not: its places by block size."""
        tiers = self._tiers
        held = [tiers.blocks[handle] for handle in handles]
        results = [block.staged for block in held]
        if not all(handles):
            held = [block for block in held if block.handle]
            # where nothing is to be read it stays so
            results = [
                _ON_DISK if entry >= 0 and not handle else result
                for entry, handle, result in zip(entries, handles, results, strict=True)
            ]
        self._leases.give(client, held)
        for size, places in absent.items():
            self._begin_loads(client, size, places, entries, results)
        if len(held) < len(entries):
            entries = [
                entry
                for entry, result in zip(entries, results, strict=True)
                if result[1] >= 0 or result is _ON_DISK
            ]
        tiers.use(entries)
        if tiers.dirty:
            tiers.work.notify_all()
        return results

    def _begin_loads(
        self,
        client: Client,
        pages: int,
        places: list[int],
        entries: list[int],
        results: list[StageResult],
    ) -> None:
        assert self._io is not None
        distinct = list(dict.fromkeys(entries[at] for at in places))
        free = self._tiers.allocate(pages * PAGE_BYTES, len(distinct))
        # making room may have dropped nothing that is on disk, so all entries still stand
        blocks = dict(zip(distinct, free, strict=False))
        if blocks:
            self._io.load(list(blocks), free)
        for at in places:
            block = blocks.get(entries[at])
            results[at] = block.staged if block is not None else _BUSY
        self._leases.give(client, [blocks[e] for at in places if (e := entries[at]) in blocks])

    def _each(self, keys: Sequence[BlockKey], ask: Callable[[int], bool]) -> list[bool]:
        """An answer for each entry, or -1; asked under the lock."""
        self._check_open()
        answers: list[bool] = []
        for batch in batches(keys):
            with self._lock:
                answers += map(ask, self._tiers.look_up(batch))
        return answers

    def cancel(self, client_id: int, keys: Sequence[BlockKey]) -> list[bool]:
        """Give up reads that have not begun.

        Returns:
            Per key True when this ended one lease of the client on a LOADING slot whose read had
            not begun; False when nothing changed (then a lease, if any, still wants `release`).
        """

        def cancel(entry: int) -> bool:
            client, block = self._leases.get(client_id), self._tiers.block_of(entry)
            if block is None or block.state is not RamState.LOADING or block.busy:
                return False
            if self._leases.end(client, block.slot, block.generation) is None:
                return False
            if not block.leases:
                self._tiers.leave_ram(block)
            return True

        return self._each(keys, cancel)

    def release(self, client_id: int, slots: Sequence[SlotRef]) -> None:
        """End one lease per slot given; one that is not held is ignored."""
        for batch in batches(slots):
            with self._lock:
                self._leases.end_many(self._leases.get(client_id), batch)
                self._tiers.hold_to_quotas()

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
            valid = f"at most the {most:,} bytes of the arena"
            raise ConfigError("block_bytes", block_bytes, valid)
        if n < 0:
            raise ConfigError("n", n, "zero or more")
        n = min(n, most // block_bytes)
        self._check_open()
        pages = block_bytes // PAGE_BYTES
        with self._lock:
            grows = self._accepts_writes and self._tiers.space.wants_growth(pages, n)
        if grows:
            self._grow_for(pages, n)
        with self._lock:
            client = self._leases.get(client_id)
            if not self._accepts_writes or self._closed:
                return []
            if self._tiers.index.expiring:
                self._tiers.drop_expired(clock_s())
            blocks = self._tiers.allocate(block_bytes, n)
            self._leases.give(client, blocks)
            for block in blocks:
                self._arena.set_entry(
                    block.slot, block.generation, SlotState.RESERVED, None, block_bytes
                )
        if len(blocks) < n:
            self.metrics.inc("litecache_drops", n - len(blocks), reason="no_slot")
        return [SlotRef(block.slot, block.generation) for block in blocks]

    def commit(self, client_id: int, items: Sequence[CommitItem]) -> list[CommitStatus]:
        """Publish filled slots; their leases end and their bytes must not change any more.

        Returns:
            Per item STORED; EXISTS (the key was there already, the slot went back); or STALE (the
            client does not hold that slot under that generation, nothing changed).
        """
        for item in items:
            if len(item[2]) != KEY_BYTES or len(item[3]) != KEY_BYTES:
                raise ConfigError("key", item[2:4], f"{KEY_BYTES} bytes each for key and parent")
            if len(item[4]) > LONGEST_NAMESPACE:
                raise ConfigError("namespace", item[4], f"at most {LONGEST_NAMESPACE} characters")
            if not 0 <= item[5] <= LAST_S:
                raise ConfigError("expires_s", item[5], f"a Unix second up to {LAST_S}, or 0")
            if item[6] not in _RETENTIONS:
                raise ConfigError("retention", item[6], "NORMAL, LOW or HIGH")
        statuses: list[CommitStatus] = []
        for batch in batches(items):
            with self._lock:
                statuses += self._commit(self._leases.get(client_id), batch)
                if self._tiers.dirty:
                    self._tiers.work.notify()
                self._changed.notify_all()
        self._drain()
        return statuses

    def _commit(self, client: Client, items: Sequence[CommitItem]) -> list[CommitStatus]:
        statuses: list[CommitStatus] = []
        tiers = self._tiers
        there = dict(zip((keys := [i[2] for i in items]), tiers.look_up(keys), strict=True))
        # what is stored here and now is young anyway: its parents and old blocks were used
        used: list[int] = []
        for item in items:
            slot, generation, key, parent = item[:4]
            held = tiers.by_slot.get(slot)
            reserved = held is not None and held.state is RamState.RESERVED
            block = self._leases.end(client, slot, generation) if reserved else None
            if block is None:
                statuses.append(CommitStatus.STALE)
                continue
            known = there[key]
            if known >= 0:
                tiers.let_go(block)
                tiers.consider_again(known)
                used.append(known)
                statuses.append(CommitStatus.EXISTS)
                continue
            if parent not in there and (before := tiers.index.find(parent)) >= 0:
                used.append(before)
            there[key] = tiers.publish(block, item)
            statuses.append(CommitStatus.STORED)
        tiers.touch(used)
        tiers.hold_to_quotas()
        return statuses

    def take_in(
        self, blocks: Sequence[tuple[BlockKey, BlockKey, str, bytes]], timeout_s: float = 20.0
    ) -> list[bool]:
        """Store blocks whose bytes are at hand: (key, parent, namespace, bytes) each.

        Returns:
            Which of them the shard holds now; False where no slot was free in time.
        """
        client_id, deadline = self.attach(os.getpid()).client_id, time.monotonic() + timeout_s
        held: list[bool] = []
        try:
            for key, parent, namespace, data in blocks:
                slots = self.reserve(client_id, len(data), 1)
                while not slots and (left_s := deadline - time.monotonic()) > 0:
                    self.wait_for_change(min(left_s, 0.1))
                    slots = self.reserve(client_id, len(data), 1)
                for slot in slots:
                    self._arena.buffer(slot.slot, len(data))[:] = data
                items = [CommitItem(*slot, key, parent, namespace) for slot in slots]
                held.append(self.commit(client_id, items) not in ([], [CommitStatus.STALE]))
        finally:
            self.detach(client_id)
        return held

    def query(self, keys: Sequence[BlockKey], *, touch: bool = False) -> list[bool]:
        """Which keys the shard holds; no lease, recency changes only with `touch`."""
        self._check_open()
        found: list[bool] = []
        for batch in batches(keys):
            with self._lock:
                entries = self._tiers.look_up(batch)
                if touch:
                    self._tiers.use_elsewhere([entry for entry in entries if entry >= 0])
                    if self._tiers.dirty:
                        self._tiers.work.notify_all()
            found += [entry >= 0 for entry in entries] if -1 in entries else [True] * len(entries)
        return found

    def places(self, keys: Sequence[BlockKey]) -> bytes:
        """Where each block is, a `Place` a byte; that somebody asks is no use of it."""
        index, now = self._tiers.index, clock_s()

        def place(entry: int) -> int:
            if entry < 0 or 0 < index.expires_s[entry] <= now:
                return Place.NOWHERE
            return Place.RAM * bool(index.ram[entry]) | Place.DISK * bool(index.disk[entry])

        found = bytearray()
        for batch in batches(keys):
            with self._lock:
                found += bytes(map(place, index.get_many(batch)))
        return bytes(found)

    def has_follower(self, parent: BlockKey) -> bool:
        """Whether some block that is here follows this key, itself here or not."""
        parents = self._tiers.index.parents
        for start in range(0, len(parents), BATCH_KEYS):
            with self._lock:
                if parent in parents[start : start + BATCH_KEYS]:
                    return True
        return False

    def namespaces(self) -> dict[str, int]:
        """Blocks by their namespace's name, those of a moment that lasts as long as the count."""
        index, counts = self._tiers.index, Counter[int]()
        for start in range(0, index.high, BATCH_KEYS):
            with self._lock:
                counts.update(index.namespaces_from(start, BATCH_KEYS))
        with self._lock:
            names = list(self._tiers.names)
        return {names[number]: count for number, count in sorted(counts.items())}

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Blocks were used elsewhere (a hit in a GPU's pool); missing keys are ignored.

        The last block of a chain stands for all before it that this shard holds: they cannot leave
        before it does. Under `lfu` and `s3fifo` only the blocks that are named count a use.
        """
        self.query(keys, touch=True)
        self._drain()

    def durable(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which keys are on disk and covered by the fsync policy's promise."""
        disk = self._tiers.disk
        if disk is None:
            return [False] * len(keys)
        return self._each(keys, lambda entry: entry >= 0 and disk.is_durable(entry))

    def awaits_disk(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which keys are in RAM and still on their way to disk."""

        def awaits(entry: int) -> bool:
            block = self._tiers.block_of(entry)
            return block is not None and block.state in UNWRITTEN

        return self._each(keys, awaits)

    def fetch(self, keys: Sequence[BlockKey]) -> list[tuple[BlockKey, bytes | None]]:
        """Copies of blocks, for another node; those on disk are read without taking a RAM slot.

        One answer holds at most 64 MiB (or one block); what does not fit is None, as a miss.
        """
        self._check_open()
        found: dict[int, bytes | None] = {}
        in_ram, on_disk = self._hold(keys)
        for position, block in in_ram.items():
            found[position] = bytes(self._arena.buffer(block.slot, block.nbytes))
        with self._lock:
            self._check_open()
            for block in in_ram.values():
                if self._leases.end(self._leases.own, block.slot, block.generation) is not None:
                    self._tiers.let_go(block)
        positions = sorted(on_disk, key=lambda position: on_disk[position].slot)
        data = (d for b in requests(on_disk[p] for p in positions) for d in self._read(b))
        found.update(zip(positions, data, strict=True))
        return [(key, found.get(position)) for position, key in enumerate(keys)]

    def _hold(self, keys: Sequence[BlockKey]) -> tuple[dict[int, RamBlock], dict[int, Stored]]:
        """By position: what is in RAM, leased, and what is on disk, kept there, up to the bound."""
        tiers = self._tiers
        in_ram: dict[int, RamBlock] = {}
        on_disk: dict[int, Stored] = {}
        total = 0
        with self._lock:
            for position, entry in enumerate(tiers.look_up(keys)):
                if entry < 0:
                    continue
                nbytes = tiers.index.pages[entry] * PAGE_BYTES
                if total and total + nbytes > MAX_FETCH_BYTES:
                    self.metrics.inc("litecache_drops", reason="fetch_too_large")
                    continue
                block = tiers.block_of(entry)
                if block is not None and block.state in LOADED:
                    self._leases.give(self._leases.own, [block])
                    in_ram[position] = block
                elif tiers.disk is not None and tiers.index.disk[entry]:
                    on_disk[position] = tiers.stored(entry)
                    tiers.disk.space.begin_reads([on_disk[position].slot])
                else:
                    continue
                total += nbytes
        return in_ram, on_disk

    def _read(self, batch: Sequence[Stored]) -> list[bytes | None]:
        tiers, disk = self._tiers, self._tiers.disk
        assert disk is not None
        with read_blocks(disk.slab, batch) as found:
            reasons = [reason for _, reason in found]
            blocks = [bytes(piece) if reason is None else None for piece, reason in found]
        with self._lock:
            self._check_open()
            disk.space.end_reads([wanted.slot for wanted in batch])
            for wanted, reason in zip(batch, reasons, strict=True):
                if reason is None:
                    continue
                self.metrics.inc("litecache_misses", tier="disk", reason=reason)
                entry = tiers.index.find(wanted.key)
                if entry >= 0 and tiers.index.disk[entry] == wanted.slot + 1:
                    tiers.drop_disk_copy(entry)
                    self._durability.note_change()
        return blocks
