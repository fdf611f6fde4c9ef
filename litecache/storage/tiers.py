"""What a shard knows: every block, where it lies, and every step of its life in RAM and on disk.

The states of a slot are told in `ram_blocks.py`. No threads, no files: all calls come under `lock`,
`BlockIo` carries out the reads and writes that are queued here. A key exists exactly while its
bytes are complete in RAM or on disk.
"""

from __future__ import annotations

import bisect
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..hashing import BlockKey
from ..metrics import GAP_BOUNDS_S, Metrics
from .admission import Admission
from .arena.arena import Arena
from .block_index import BlockIndex, Changes, clock_s
from .disk.log import MAX_NAMES
from .disk.slab import Stored
from .disk.tier import DiskTier
from .eviction.queues import Queues, allocate
from .key_dict import BATCH_KEYS
from .namespaces import Quotas
from .protocol import PAGE_BYTES, CommitItem, SlotState, StageResult, StageStatus
from .ram_blocks import MISS, UNWRITTEN, RamBlock, RamState, WriteBatch
from .retry import Backoff
from .segments import SegmentSpace


class Tiers:
    """The blocks of one shard, in RAM and on disk.

    Args:
        arena: the RAM tier's memory.
        eviction: policy of the RAM tier.
        admission: which commits are written to disk.
        ttl_s: blocks older than this are misses; None: never.
        metrics: where the shard counts.
        ram_quotas: namespace, or digest of a salt, to the bytes that it may take of the RAM tier.

    Attributes:
        lock: guards all of this; `changed` tells that a lease, a read or a write ended, `work` that
            there is something to read or write.
        index, disk: see their classes; without a disk RAM is all there is.
        by_slot, blocks: slots in use, by where they lie and by handle; handle 0 is no slot's.
        space, queues, quotas: of the RAM tier.
        growth: when the arena may grow again after there was no memory.
        reads: LOADING blocks of one size in neighbouring disk slots, a request each.
        dirty, dirty_bytes: DIRTY blocks in the order of their commits; those that died meanwhile
            leave when they are met.
        failed_writes: blocks that were dropped because the disk failed.
        changes: which keys came and went.
    """

    def __init__(
        self,
        arena: Arena,
        eviction: str,
        admission: Admission,
        ttl_s: float | None,
        metrics: Metrics,
        ram_quotas: Mapping[str, int] | None = None,
    ) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.work = threading.Condition(self.lock)
        self.arena = arena
        self.metrics = metrics
        self._admission = admission
        self._ttl_s = ttl_s
        self.index = BlockIndex()
        self.disk: DiskTier | None = None
        self.space = SegmentSpace(arena.segment_bytes, self._may_grow)
        self.growth = Backoff()
        self.queues = Queues(eviction, self)
        self.quotas = Quotas(ram_quotas or {}, self.queues)
        # (namespace, pages) of blocks that came in under a quota
        self._under_quota: set[tuple[int, int]] = set()
        self.by_slot: dict[int, RamBlock] = {}
        self.blocks = {0: RamBlock(-1, 0, 0, 0)}
        self._free_handles: list[int] = []
        self._generation = 0
        self.reads: deque[list[RamBlock]] = deque()
        self.dirty: deque[RamBlock] = deque()
        self.dirty_bytes = 0
        self._writing: set[RamBlock] = set()
        self.failed_writes = 0
        self.changes = Changes(arena.epoch)
        self._names: dict[str, int] = {"": 0}
        # used while others, committed before that, were on their way into the disk's queues
        self._early: dict[BlockKey, None] = {}

    def key_at(self, handle: int) -> BlockKey:
        """Key of the block with a handle."""
        return self.index.keys[self.blocks[handle].entry]

    def parent_of(self, handle: int) -> BlockKey:
        """Key of the block before the one with a handle."""
        return self.index.parents[self.blocks[handle].entry]

    def find(self, key: BlockKey) -> int:
        """Handle of a key's block, or 0."""
        entry = self.index.find(key)
        return self.index.ram[entry] if entry >= 0 else 0

    def look_up(self, keys: Sequence[BlockKey]) -> list[int]:
        """Entries of keys, -1 where missing; what has outlived its time is dropped."""
        found = self.index.get_many(keys)
        if not self.index.expiring:
            return found
        now = clock_s()
        self._drop_expired({entry for entry in found if entry >= 0}, now)
        self.drop_expired(now)
        return self.index.get_many(keys)

    def drop_expired(self, now: int) -> None:
        """Before anything else has to leave: a part of what has outlived its time goes."""
        self._drop_expired(self.index.next_expired(now), now)

    def _drop_expired(self, entries: Iterable[int], now: int) -> None:
        for entry in entries:
            if 0 < self.index.expires_s[entry] <= now:
                self.metrics.inc("litecache_evictions", tier="expired")
                self.drop(entry)

    def block_of(self, entry: int) -> RamBlock | None:
        """The block's slot in RAM, if any."""
        handle = self.index.ram[entry] if entry >= 0 else 0
        return self.blocks[handle] if handle else None

    def stored(self, entry: int) -> Stored:
        """Where the disk has a block."""
        index = self.index
        nbytes = index.pages[entry] * PAGE_BYTES
        return Stored(index.keys[entry], index.disk[entry] - 1, nbytes, index.checksum[entry])

    def use(self, entries: Sequence[int]) -> None:
        """Count a hit each, refresh recency, and let admission think again."""
        if not entries:
            return
        now = clock_s()
        self._count_gaps(entries, now)
        self.index.note_hits(entries, now)
        if self.disk is not None:
            on_disk, count_all = self.index.disk, self._admission.sketch is not None
            for entry in entries:
                if count_all or not on_disk[entry]:
                    self.consider_again(entry)
        self.touch(entries)

    def _count_gaps(self, entries: Sequence[int], now: int) -> None:
        # A prefix was mostly used at one time; of old blocks each may have had its own.
        used = list(map(self.index.used_s.__getitem__, entries))
        alike = used.count(used[0]) == len(used)
        times: dict[int, int] = {}
        sums: dict[int, int] = {}
        for then, count in [(used[0], len(used))] if alike else Counter(used).items():
            gap_s = max(0, now - then)
            place = bisect.bisect_left(GAP_BOUNDS_S, gap_s)
            times[place] = times.get(place, 0) + count
            sums[place] = sums.get(place, 0) + gap_s * count
        for place, count in times.items():
            mean_s = sums[place] / count
            self.metrics.observe("litecache_block_use_gap_seconds", mean_s, count)

    def touch(self, entries: Sequence[int]) -> None:
        """Blocks were used, and with them all that they follow."""
        disk, keys, ram = self.disk, self.index.keys, self.index.ram
        # the queues keep what comes before a block for as long as the block itself
        followed = set(map(self.index.parents.__getitem__, entries))
        if not self.queues.counts_uses:
            # of the others nothing would change
            entries = [entry for entry in entries if keys[entry] not in followed]
        for entry in entries:
            ends = keys[entry] not in followed
            if ram[entry]:
                self.queues.use(ram[entry], ends=ends)
            if disk is not None:
                disk.queues.use(entry, ends=ends)
                if ends and (self.dirty or self._writing):
                    self._early.pop(keys[entry], None)
                    if len(self._early) < BATCH_KEYS:
                        self._early[keys[entry]] = None

    def use_elsewhere(self, entries: Sequence[int]) -> None:
        """Blocks were used, and with them all that they follow, of which nobody tells by itself."""
        self.touch(entries)
        if self._admission.sketch is not None:
            for entry in entries:
                self.consider_again(entry, chain=True)

    def consider_again(self, entry: int, *, chain: bool = False) -> None:
        """A block was seen again: perhaps it is worth the disk now.

        Args:
            entry: of the block.
            chain: so are those that it follows, as far as they are in RAM alone.
        """
        index, disk = self.index, self.disk
        if disk is None or not self._admission.again(index.keys[entry]) or disk.lost:
            return
        wanted: list[RamBlock] = []
        while len(wanted) < (BATCH_KEYS if chain else 1):
            block = self.block_of(entry)
            if block is None or block.state is not RamState.CLEAN or index.disk[entry]:
                break
            self.queues.remove(block.handle)
            block.state = RamState.DIRTY  # a chain may bite its own tail
            wanted.append(block)
            entry = index.find(index.parents[entry])
        for block in reversed(wanted):
            self._queue_write(block)

    def _may_grow(self, new_segments: int, new_slots: int) -> bool:
        if not new_segments:
            return True
        bytes_then = (self.space.grown + new_segments) * self.arena.segment_bytes
        return self.growth.due() and bytes_then <= self.arena.arena_bytes

    def allocate(self, nbytes: int, n: int) -> list[RamBlock]:
        """Up to `n` slots, RESERVED, evicting clean ones; fewer when the rest is dirty or leased,
        or when the arena may still grow.
        """
        slots = allocate(
            self.queues,
            self.space,
            nbytes // PAGE_BYTES,
            n,
            slot_of=lambda handle: self.blocks[handle].slot,
            allowed=self._may_evict,
            give_up=self._evict,
        )
        blocks = []
        for slot in slots:
            self._generation += 1
            # those from 1 on are in use or free
            handle = self._free_handles.pop() if self._free_handles else len(self.blocks)
            block = RamBlock(slot, nbytes, self._generation, handle)
            self.blocks[handle] = self.by_slot[slot] = block
            self.space.bind(slot, handle)
            blocks.append(block)
        return blocks

    def _may_evict(self, handle: int) -> bool:
        return not self.blocks[handle].leases

    def _evict(self, handle: int) -> None:
        block = self.blocks[handle]
        entry = block.entry
        self.metrics.inc("litecache_evictions", tier="ram")
        if self.index.disk[entry]:
            self.metrics.inc("litecache_demotions")
        self.index.ram[entry] = 0
        self._free(block)
        self._forget_if_gone(entry)

    def _settle(self, block: RamBlock) -> None:
        block.state = RamState.CLEAN
        retention, namespace = self.index.retention[block.entry], self.index.namespace[block.entry]
        pages = block.nbytes // PAGE_BYTES
        self.queues.insert(block.handle, pages, namespace, retention)
        if self.quotas.holds(namespace):
            self._under_quota.add((namespace, pages))

    def hold_to_quotas(self) -> None:
        """Namespaces that hold more RAM than they may give up their oldest blocks, but for those
        that are leased; these go once that is over."""
        for namespace, pages in tuple(self._under_quota):
            while self.quotas.exceeded(namespace):
                victim = self.queues.evict(pages, self._may_evict, namespace)
                if victim is None:
                    break
                self._evict(victim)
            else:
                self._under_quota.remove((namespace, pages))

    def leave_ram(self, block: RamBlock, state: SlotState = SlotState.FREE) -> None:
        """A slot's contents are void, and no copy of its block any more; a read is cancelled.

        Args:
            block: the slot; it goes back once no lease and no I/O holds it.
            state: what clients that still lease it see.
        """
        if block.state is RamState.LOADING and not block.busy:
            assert self.disk is not None
            self.disk.space.end_reads([self.index.disk[block.entry] - 1])
        if block.handle in self.queues:
            self.queues.remove(block.handle)
        self.index.ram[block.entry] = 0
        block.state, block.entry, block.staged = RamState.DEAD, -1, MISS
        self.arena.set_state(block.slot, block.generation, state)
        self._reap(block)

    def let_go(self, block: RamBlock) -> None:
        """A lease ended: a slot that was never committed, or is dead, goes back."""
        if block.state is RamState.RESERVED and not block.leases:
            block.state = RamState.DEAD
        self._reap(block)

    def _reap(self, block: RamBlock) -> None:
        if block.state is RamState.DEAD and not block.leases and not block.busy:
            self._free(block)

    def _free(self, block: RamBlock) -> None:
        # the next owner has another generation, so a late reader of this entry sees a miss
        self.arena.set_state(block.slot, block.generation, SlotState.FREE)
        del self.by_slot[block.slot], self.blocks[block.handle]
        self._free_handles.append(block.handle)
        self.space.free(block.slot)

    def publish(self, block: RamBlock, item: CommitItem) -> int:
        """A reserved slot holds a block that the shard does not have; its entry."""
        index, now, key = self.index, clock_s(), item.key
        block.entry = entry = index.insert(key, item.parent)
        index.ram[entry] = block.handle
        index.pages[entry] = block.nbytes // PAGE_BYTES
        block.answer(StageStatus.READY)
        index.created_s[entry] = index.used_s[entry] = now
        ends = [item.expires_s] if item.expires_s else []
        if self._ttl_s is not None:
            ends.append(max(1, int(now + self._ttl_s)))
        index.expire(entry, min(ends, default=0))
        index.retention[entry] = item.retention
        self.changes.note(key, added=True)
        self.arena.set_entry(block.slot, block.generation, SlotState.READY, key, block.nbytes)
        index.namespace[entry] = self._name_number(item.namespace)
        if self.disk is not None and self._admission.first(key):
            self._queue_write(block)
        else:
            self._settle(block)
        return entry

    def _name_number(self, name: str) -> int:
        if self.disk is not None:
            number = self.disk.name_number(name)
        else:
            if len(self._names) < MAX_NAMES:
                self._names.setdefault(name, len(self._names))
            number = self._names.get(name, 0)
        if number:
            self.quotas.note_name(number, name)
        return number

    def note_names(self) -> None:
        """Namespaces that were read back from disk have their quotas in RAM, too."""
        for number, name in enumerate(self.names):
            self.quotas.note_name(number, name)

    @property
    def names(self) -> list[str]:
        """Namespaces by number."""
        return list(self._names) if self.disk is None else self.disk.log.names

    def begin_loads(self, entries: Sequence[int], blocks: list[RamBlock], at_most: int) -> None:
        """Queue reads from disk, about in the order given.

        Args:
            entries: what is wanted.
            blocks: slots of one size, fresh from `allocate`.
            at_most: bytes of one request.
        """
        assert self.disk is not None
        index, nbytes = self.index, blocks[0].nbytes
        for block, entry in zip(blocks, entries, strict=True):
            block.entry, block.state = entry, RamState.LOADING
            block.answer(StageStatus.LOADING)
            index.ram[entry] = block.handle
            key = index.keys[entry]
            self.arena.set_entry(block.slot, block.generation, SlotState.LOADING, key, nbytes)
        slots = index.column("disk")[np.array(entries, np.int64)].astype(np.int64) - 1
        self.disk.space.begin_reads(slots.tolist())
        order = np.argsort(slots, kind="stable")
        gaps = (np.flatnonzero(np.diff(slots[order]) != nbytes // PAGE_BYTES) + 1).tolist()
        positions, count = order.tolist(), max(1, at_most // nbytes)
        parts = [
            positions[start : min(start + count, end)]
            for first, end in zip([0, *gaps], [*gaps, len(positions)], strict=True)
            for start in range(first, end, count)
        ]
        for part in sorted(parts, key=min):
            self.reads.append([blocks[i] for i in part])

    def take_reads(self) -> tuple[list[RamBlock], list[Stored]]:
        """What is still wanted of the next request; from now on it can't be cancelled."""
        blocks = [block for block in self.reads.popleft() if block.state is RamState.LOADING]
        for block in blocks:
            block.busy = True
        return blocks, [self.stored(block.entry) for block in blocks]

    def finish_loads(
        self, blocks: list[RamBlock], read: Sequence[Stored], reasons: Sequence[str | None]
    ) -> bool:
        """A read ended; whether metadata changed by it.

        Args:
            blocks, read: as `take_reads` gave them.
            reasons: per block None, or why the bytes are not the block's.
        """
        assert self.disk is not None
        self.disk.space.end_reads([stored.slot for stored in read])
        whole: list[RamBlock] = []
        for block, reason in zip(blocks, reasons, strict=True):
            if reason is not None and block.state is RamState.LOADING:
                self.metrics.inc("litecache_misses", tier="disk", reason=reason)
                self.drop(block.entry, SlotState.FAILED)
            block.busy = False
            if block.state is RamState.LOADING:
                block.answer(StageStatus.READY)
                whole.append(block)
            else:
                self._reap(block)
        for block in whole:
            self.arena.set_state(block.slot, block.generation, SlotState.READY)
        for block in whole:
            self._settle(block)
        if whole:
            self.metrics.inc("litecache_promotions", len(whole))
        self.hold_to_quotas()
        return self.disk.trust([block.entry for block in whole])

    def _queue_write(self, block: RamBlock, *, first: bool = False) -> None:
        block.state = RamState.DIRTY
        (self.dirty.appendleft if first else self.dirty.append)(block)
        self.dirty_bytes += block.nbytes

    def take_writes(self, at_most: int) -> WriteBatch | None:
        """The next blocks of one size and quota, oldest first; they become WRITING."""
        assert self.disk is not None
        index, limited = self.index, self.disk.queues.quota_pages
        blocks: list[RamBlock] = []
        kind = (0, 0)
        while self.dirty:
            block = self.dirty[0]
            if block.state is RamState.DIRTY:
                namespace = index.namespace[block.entry]
                mine = (block.nbytes, namespace if namespace in limited else -1)
                if blocks and (mine != kind or (len(blocks) + 1) * block.nbytes > at_most):
                    break
                kind = mine
                block.state, block.busy = RamState.WRITING, True
                blocks.append(block)
            self.dirty.popleft()
            self.dirty_bytes -= block.nbytes
        self._writing.update(blocks)
        keys = [index.keys[block.entry] for block in blocks]
        return WriteBatch(blocks, keys, kind[0] // PAGE_BYTES, kind[1]) if blocks else None

    def unwritten(self) -> list[RamBlock]:
        """All that is on its way to disk."""
        return [block for block in (*self._writing, *self.dirty) if block.state in UNWRITTEN]

    def _end_writes(self, blocks: Iterable[RamBlock]) -> list[RamBlock]:
        """Blocks that were taken are not written any more; those that are still wanted."""
        self._writing.difference_update(blocks)
        wanted = []
        for block in blocks:
            block.busy = False
            if block.state is RamState.WRITING:
                wanted.append(block)
            else:
                self._reap(block)
        return wanted

    def put_back(self, blocks: Sequence[RamBlock]) -> None:
        """Blocks that found no disk slot come first again."""
        for block in reversed(self._end_writes(blocks)):
            self._queue_write(block, first=True)

    def finish_writes(self, written: Sequence[tuple[RamBlock, int, int]]) -> None:
        """Blocks, head of a chain first, that are whole in a disk slot with a checksum."""
        disk = self.disk
        assert disk is not None
        wanted = self._end_writes([block for block, _, _ in written])
        places: list[tuple[int, int, int]] = []
        for block, slot, checksum in written:
            if block.state is RamState.DEAD:
                disk.space.free(slot)
            else:
                places.append((block.entry, slot, checksum))
        if places:
            disk.place(*zip(*places, strict=True))
        for block in wanted:
            self._settle(block)
        if not self.dirty and not self._writing:
            for key in self._early:
                disk.queues.use(self.index.find(key), ends=True)
            self._early.clear()
        self.hold_to_quotas()

    def fail_writes(self, blocks: Sequence[RamBlock], reason: str) -> list[BlockKey]:
        """Blocks that could not be written are dropped and counted; the keys of those still wanted.

        With the disk tier lost they stay in RAM.
        """
        assert self.disk is not None
        self.failed_writes += len(blocks)
        self.metrics.inc("litecache_drops", len(blocks), reason=reason)
        wanted = self._end_writes(blocks)
        keys = [self.index.keys[block.entry] for block in wanted]
        for block in wanted:
            if self.disk.lost:
                self._settle(block)
            else:
                self.drop(block.entry)
        self.hold_to_quotas()
        return keys

    def _forget(self, entry: int) -> None:
        self.changes.note(self.index.keys[entry], added=False)
        self.index.remove(entry)

    def _forget_if_gone(self, entry: int) -> None:
        if not self.index.ram[entry] and not self.index.disk[entry]:
            self._forget(entry)

    def on_disk_evict(self, entry: int) -> None:
        """A disk copy was evicted; without one in RAM the key is gone."""
        self.metrics.inc("litecache_evictions", tier="disk")
        self._forget_if_gone(entry)

    def drop(self, entry: int, state: SlotState = SlotState.FREE) -> None:
        """Remove a block from every tier; clients that lease its slot see `state` there."""
        block = self.block_of(entry)
        if block is not None:
            self.leave_ram(block, state)
        if self.index.disk[entry]:
            assert self.disk is not None
            self.disk.remove(entry)
        self._forget(entry)

    def drop_disk_copy(self, entry: int) -> None:
        """Remove a block from disk only; without a copy in RAM it is gone."""
        assert self.disk is not None
        block = self.block_of(entry)
        if block is None or block.state is RamState.LOADING:
            self.drop(entry)
        else:
            self.disk.remove(entry)

    def drop_ram_copy(self, entry: int) -> None:
        """Remove a clean, unleased block from RAM only."""
        block = self.block_of(entry)
        if block is not None and block.state is RamState.CLEAN and not block.leases:
            self.leave_ram(block)
            self._forget_if_gone(entry)

    def lose_disk(self, reason: str) -> None:
        """The disk tier's files are gone: it is taken out, RAM goes on alone."""
        assert self.disk is not None
        self.disk.lost = reason
        entries = self.disk.on_disk().tolist()
        self.metrics.inc("litecache_drops", len(entries), reason="folder_lost")
        for entry in entries:
            self.drop_disk_copy(entry)

    def check_integrity(self, allocated: set[int]) -> None:
        """AssertionError unless index, slots, queues, slot table, space and disk agree.

        Args:
            allocated: disk slots of writes that have not finished.
        """
        self.index.check_integrity()
        self.queues.check_integrity()
        if self.disk is not None:
            self.disk.check_integrity(allocated)
        for entry in self.index.entries().tolist():
            block = self.block_of(entry)
            assert block is not None or self.index.disk[entry], "a key without bytes"
            assert block is None or block.entry == entry, "index and slot disagree"
            loading = block is not None and block.state is RamState.LOADING
            assert not loading or self.index.disk[entry], "loading what is not on disk"
        pages = {slot: block.nbytes // PAGE_BYTES for slot, block in self.by_slot.items()}
        self.space.check_integrity(pages, set())
        queued = set(self.queues)
        for slot, block in self.by_slot.items():
            assert self.blocks[block.handle] is block, "a handle is off"
            assert self.space.owner(slot) == block.handle, "a slot's owner is off"
            assert self.arena.entry(slot)[1] == block.generation, "the slot table is off"
            assert block.leases >= 0, "negative leases"
            clean, dead = block.state is RamState.CLEAN, block.state is RamState.DEAD
            assert (block.handle in queued) == clean, f"slot {slot} is queued wrongly"
            assert not dead or block.leases or block.busy, "a dead slot stayed"
            named = not dead and block.state is not RamState.RESERVED
            assert (block.entry >= 0) == named, "a slot holds a block wrongly"
            assert not named or self.index.ram[block.entry] == block.handle, "not indexed"
            loading = block.state is RamState.LOADING
            status = StageStatus.LOADING if loading else StageStatus.READY
            told = StageResult(status, slot, block.generation) if named else MISS
            assert block.staged == told, "stage would be told otherwise"
        assert len(queued) == len(self.queues) <= len(self.by_slot), "a freed block is queued"
        dirty = [block for block in self.by_slot.values() if block.state is RamState.DIRTY]
        waiting = [block for block in self.dirty if block.state is RamState.DIRTY]
        assert len(waiting) == len(set(waiting)), "a block is to be written twice"
        assert set(waiting) == set(dirty), "the write queue is off"
        assert self.dirty_bytes == sum(block.nbytes for block in self.dirty), "bytes are off"
