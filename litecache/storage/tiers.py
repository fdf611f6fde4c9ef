"""What a shard knows: every block, where it lies, and every transition between RAM and disk.

A plain state machine: no threads, no files, no clocks of its own. All calls come under the store's
lock; `BlockIo` carries out the reads and writes that it queues. A key exists exactly while its
bytes are complete in RAM or on disk.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from ..hashing import BlockKey
from ..metrics import Metrics
from .admission import Admission
from .arena.arena import Arena
from .block_index import BlockIndex, Changes
from .disk.tier import DiskTier
from .io_queues import ReadRequest, WriteQueue
from .key_dict import BATCH_KEYS
from .protocol import PAGE_BYTES, SlotState
from .ram_tier import RamBlock, RamState, RamTier


class Tiers:
    """The blocks of one shard.

    Args:
        arena: the RAM tier's memory.
        eviction: policy of the RAM tier.
        admission: which commits are written to disk.
        ttl_s: blocks older than this are misses; None: never.
        metrics: where evictions and drops are counted.

    Attributes:
        index, ram, disk: see their classes; without a disk RAM is all there is.
        reads, writes: what `BlockIo` is to carry out.
        changes: which keys came and went.
        changed_on_disk: metadata of the disk tier changed by a read.
    """

    def __init__(
        self,
        arena: Arena,
        eviction: str,
        admission: Admission,
        ttl_s: float | None,
        metrics: Metrics,
    ) -> None:
        self.index = BlockIndex()
        self.ram = RamTier(arena, eviction, self._on_ram_evict, self.index)
        self.disk: DiskTier | None = None
        self._admission = admission
        self._ttl_s = ttl_s
        self._metrics = metrics
        self.writes = WriteQueue(self.index, self.ram)
        self.reads: deque[ReadRequest] = deque()
        self.changes = Changes(arena.epoch)
        self.changed_on_disk = False
        # used while others, committed before that, were on their way into the disk's queues
        self._early: dict[BlockKey, None] = {}

    def on_disk_evict(self, entry: int) -> None:
        """A disk copy was evicted; without one in RAM the key is gone."""
        self._metrics.inc("litecache_evictions", tier="disk")
        if not self.index.ram[entry]:
            self._forget(entry)

    def _on_ram_evict(self, block: RamBlock) -> None:
        self._metrics.inc("litecache_evictions", tier="ram")
        self.index.ram[block.entry] = 0
        if self.index.disk[block.entry]:
            self._metrics.inc("litecache_demotions")
        else:
            self._forget(block.entry)

    def _forget(self, entry: int) -> None:
        key = self.index.key_at(entry)
        self.index.remove(entry)
        self.changes.note(key, added=False)

    def find(self, keys: Sequence[BlockKey]) -> list[int]:
        """Entries of keys, -1 where missing; what has outlived its time is dropped."""
        found = self.index.find_many(keys)
        if self._ttl_s is not None:
            self._expire(found)
            found = self.index.find_many(keys)
        return found

    def _expire(self, entries: Sequence[int]) -> None:
        now = int(time.time())
        for entry in set(entries):
            if entry >= 0 and 0 < self.index.expires_s[entry] <= now:
                self._metrics.inc("litecache_evictions", tier="expired")
                self.drop(entry)

    def block_of(self, entry: int) -> RamBlock | None:
        """The block's slot in RAM, if any."""
        handle = self.index.ram[entry]
        return self.ram.at(handle - 1) if handle else None

    def use(self, entries: Sequence[int]) -> None:
        """Count a hit each, refresh recency, and let admission think again."""
        self.index.note_hits(entries, int(time.time()))
        if self.disk is not None:
            on_disk = self.index.disk
            for entry in entries:
                if not on_disk[entry]:
                    self.consider_again(entry)
        self.touch(entries)

    def touch(self, entries: Sequence[int]) -> None:
        """Blocks were used, and with them all that they follow."""
        index = self.index
        keys, parents, ram = index.keys, index.parents, index.ram
        followed = {parents[entry] for entry in entries}
        for entry in entries:
            # the queues keep what comes before a block for as long as the block itself
            ends = keys[entry] not in followed
            if ram[entry]:
                self.ram.queues.use(ram[entry] - 1, ends=ends)
            if self.disk is not None:
                self.disk.queues.use(entry, ends=ends)
                if ends and not self.writes.idle:
                    self._early.pop(keys[entry], None)
                    if len(self._early) < BATCH_KEYS:
                        self._early[keys[entry]] = None

    def consider_again(self, entry: int) -> None:
        """A block that is only in RAM was seen again: perhaps it is worth the disk now."""
        block = self.block_of(entry)
        if self.disk is None or block is None or block.state is not RamState.CLEAN:
            return
        if (
            not self.disk.lost
            and not self.index.disk[entry]
            and self._admission.again(self.index.key_at(entry))
        ):
            self.ram.redirty(block)
            self.writes.push(block)

    def lose_disk(self, reason: str) -> None:
        """The disk tier's files are gone: it is taken out, RAM goes on alone."""
        assert self.disk is not None
        self.disk.lost = reason
        entries = self.disk.on_disk().tolist()
        self._metrics.inc("litecache_drops", len(entries), reason="folder_lost")
        for entry in entries:
            self.drop_disk_copy(entry)

    def publish(self, block: RamBlock, key: BlockKey, parent: BlockKey, namespace: str) -> int:
        """A reserved slot holds a block that the shard does not have; its entry."""
        index = self.index
        entry = index.insert(key, parent)
        now = int(time.time())
        index.ram[entry] = block.handle + 1
        index.pages[entry] = block.nbytes // PAGE_BYTES
        index.created_s[entry] = index.used_s[entry] = now
        if self._ttl_s is not None:
            index.expires_s[entry] = max(1, int(now + self._ttl_s))
        self.changes.note(key, added=True)
        if self.disk is not None:
            index.namespace[entry] = self.disk.name_number(namespace)
        if self.disk is not None and self._admission.first(key):
            self.ram.fill(block, key, entry, RamState.DIRTY)
            self.writes.push(block)
        else:
            self.ram.fill(block, key, entry, RamState.CLEAN)
        return entry

    def begin_loads(self, entries: Sequence[int], blocks: Sequence[RamBlock]) -> None:
        """Free slots of one size will receive entries from disk."""
        assert self.disk is not None
        index, numbers = self.index, np.array(entries, np.int64)
        self.ram.begin_loads(blocks, [index.keys[entry] for entry in entries], entries)
        for entry, block in zip(entries, blocks, strict=True):
            index.ram[entry] = block.handle + 1
        self.disk.space.begin_reads((index.column("disk")[numbers] - np.uint32(1)).tolist())

    def cancel_load(self, block: RamBlock) -> None:
        """A read that has not begun will not happen."""
        self._end_disk_use(block)
        self.index.ram[block.entry] = 0
        self.ram.kill(block)

    def _end_disk_use(self, block: RamBlock) -> None:
        assert self.disk is not None
        self.disk.space.end_reads([self.index.disk[block.entry] - 1])

    def finish_loads(self, request: ReadRequest, reasons: Sequence[str | None]) -> None:
        """A read ended.

        Args:
            request: what it was.
            reasons: per block None, or why the bytes are not the block's.
        """
        assert self.disk is not None
        self.disk.space.end_reads(request.slots)
        whole: list[int] = []
        for i, (block, reason) in enumerate(zip(request.blocks, reasons, strict=True)):
            block.started = False
            if block.dead:
                self.ram.reap(block)
            elif reason is None:
                whole.append(i)
            else:
                self._metrics.inc("litecache_misses", tier="disk", reason=reason)
                # its use of the disk slot has ended: no longer LOADING, so that drop() knows
                block.state = RamState.RESERVED
                self.drop(block.entry, SlotState.FAILED)
        if whole:
            blocks = [request.blocks[i] for i in whole]
            self.ram.finish_loads(blocks)
            self._metrics.inc("litecache_promotions", len(blocks))
            self.changed_on_disk |= self.disk.trust([block.entry for block in blocks])

    def finish_write(
        self, blocks: Sequence[RamBlock], slots: Sequence[int], checksums: Sequence[int]
    ) -> None:
        """Blocks that were written whole: those still wanted are placed, in chain order."""
        assert self.disk is not None
        kept: list[tuple[int, int, int]] = []
        for block, slot, checksum in zip(blocks, slots, checksums, strict=True):
            block.started = False
            if block.dead:
                self.disk.space.free(slot)
                self.ram.reap(block)
            else:
                kept.append((block.entry, slot, checksum))
        if kept:
            self.disk.place(*zip(*kept, strict=True))
        for block in blocks:
            if not block.dead and block.state is RamState.WRITING:
                self.ram.settle(block)
        self.writes.done(blocks)
        if self.writes.idle:
            for key in self._early:
                self.disk.queues.use(self.index.find(key), ends=True)
            self._early.clear()

    def fail_write(self, block: RamBlock, reason: str, *, keep: bool = False) -> None:
        """A block that could not be written is dropped, and counted; or `keep` it in RAM."""
        self._metrics.inc("litecache_drops", reason=reason)
        self.writes.done([block])
        block.started = False
        if block.dead:
            self.ram.reap(block)
        elif keep:
            self.ram.settle(block)
        else:
            self.drop(block.entry)

    def drop(self, entry: int, state: SlotState = SlotState.FREE) -> None:
        """Remove a block from every tier; leased slots return when they are released."""
        block = self.block_of(entry)
        if block is not None:
            if block.state is RamState.LOADING and not block.started:
                self._end_disk_use(block)
            self.ram.kill(block, state)
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
        if block is None or block.state is not RamState.CLEAN or block.leases:
            return
        self.ram.kill(block)
        self.index.ram[entry] = 0
        if not self.index.disk[entry]:
            self._forget(entry)

    def check_integrity(self, writing_slots: set[int]) -> None:
        """AssertionError unless index, RAM and disk agree."""
        self.index.check_integrity()
        self.ram.check_integrity()
        if self.disk is not None:
            self.disk.check_integrity(writing_slots)
        for entry in self.index.entries().tolist():
            block = self.block_of(entry)
            assert block is not None or self.index.disk[entry], "a key without bytes"
            if block is None:
                continue
            assert block.entry == entry, "index and slot disagree"
            assert not block.dead, "a dead slot is indexed"
            assert block.key == self.index.key_at(entry), "a slot holds another key"
            if block.state is RamState.LOADING:
                assert self.index.disk[entry], "loading what is not on disk"
        for block in self.ram.by_slot.values():
            if block.entry >= 0:
                assert self.index.ram[block.entry] == block.handle + 1, "a slot is not indexed"
        self.writes.check_integrity()
