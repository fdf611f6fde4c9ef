"""The RAM tier: which block lies in which arena slot, in which state, under how many leases.

States: RESERVED (a client fills it) -> DIRTY (committed, not on disk yet) -> WRITING -> CLEAN; or
LOADING (being read from disk) -> CLEAN. Only CLEAN slots without leases may be evicted. A block
that is deleted while it is leased or under I/O is `dead`: it has no key any more, and its slot
returns when the last holder lets go. Everything here runs under the store's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum

from ..hashing import BlockKey
from .arena.arena import Arena
from .block_index import BlockIndex
from .eviction.queues import Queues, allocate
from .protocol import PAGE_BYTES, SlotState
from .retry import Backoff
from .segments import SegmentSpace


class RamState(IntEnum):
    """What a slot is doing."""

    RESERVED = 0
    LOADING = 1
    DIRTY = 2
    WRITING = 3
    CLEAN = 4


LOADED = (RamState.DIRTY, RamState.WRITING, RamState.CLEAN)
_IO_STATES = (RamState.LOADING, RamState.WRITING)


class RamBlock:
    """One slot in use.

    Attributes:
        slot, nbytes, generation: where, how big, and under which number it was given out.
        handle: small integer for the eviction queues.
        key, entry: of the block in it; -1 and None while RESERVED or dead.
        leases: of all clients together.
        started: a read has begun, so it can't be cancelled any more.
        dead: dropped; to be freed when leases and I/O are gone.
    """

    __slots__ = (
        "dead",
        "entry",
        "generation",
        "handle",
        "key",
        "leases",
        "nbytes",
        "slot",
        "started",
        "state",
    )

    def __init__(self, slot: int, nbytes: int, generation: int, handle: int) -> None:
        self.slot = slot
        self.nbytes = nbytes
        self.generation = generation
        self.handle = handle
        self.key: BlockKey | None = None
        self.entry = -1
        self.leases = 0
        self.state = RamState.RESERVED
        self.started = False
        self.dead = False


class RamTier:
    """Slots of the arena.

    Args:
        arena: the memory.
        policy: name of the eviction policy.
        on_evict: called with a block whose clean copy is given up.
        index: the shard's blocks.

    Attributes:
        blocks, by_slot: slots in use, by handle and by where they lie.
        growth: when the arena may grow again after there was no memory.
    """

    def __init__(
        self,
        arena: Arena,
        policy: str,
        on_evict: Callable[[RamBlock], None],
        index: BlockIndex,
    ) -> None:
        self.arena = arena
        self._on_evict = on_evict
        self._index = index
        self.space = SegmentSpace(arena.segment_bytes, self._may_grow)
        self.growth = Backoff()
        self.queues = Queues(policy, self)
        self.by_slot: dict[int, RamBlock] = {}
        self.blocks: dict[int, RamBlock] = {}
        self._free_handles: list[int] = []
        self._handles = 0
        self._generation = 0

    def _may_grow(self, new_segments: int, new_slots: int) -> bool:
        if not new_segments:
            return True
        if not self.growth.due():
            return False
        return (self.space.grown + new_segments) * self.arena.segment_bytes <= (
            self.arena.arena_bytes
        )

    def at(self, handle: int) -> RamBlock:
        """The block with a handle."""
        return self.blocks[handle]

    def key_at(self, handle: int) -> BlockKey:
        """Key of the block with a handle."""
        return self.at(handle).key or b""

    def parent_of(self, handle: int) -> BlockKey:
        """Key of the block before the one with a handle."""
        return self._index.parents[self.at(handle).entry]

    def find(self, key: BlockKey) -> int:
        """Handle of a key's block, or -1."""
        entry = self._index.find(key)
        return self._index.ram[entry] - 1 if entry >= 0 else -1

    def allocate(self, nbytes: int, n: int) -> list[RamBlock]:
        """Up to `n` slots, RESERVED, evicting clean ones; fewer when the rest is dirty or leased,
        or when the arena may still grow.
        """
        slots = allocate(
            self.queues,
            self.space,
            nbytes // PAGE_BYTES,
            n,
            slot_of=lambda handle: self.at(handle).slot,
            allowed=self._may_evict,
            give_up=self._give_up,
        )
        return [self._adopt(slot, nbytes) for slot in slots]

    def show_reserved(self, blocks: Sequence[RamBlock]) -> None:
        """Tell the slot table of blocks that a client will fill."""
        for block in blocks:
            self.arena.set_entry(
                block.slot, block.generation, SlotState.RESERVED, None, block.nbytes
            )

    def _may_evict(self, handle: int) -> bool:
        return not self.at(handle).leases

    def _give_up(self, handle: int) -> None:
        block = self.at(handle)
        self._on_evict(block)
        self._free(block)

    def _adopt(self, slot: int, nbytes: int) -> RamBlock:
        self._generation += 1
        if self._free_handles:
            handle = self._free_handles.pop()
        else:
            handle = self._handles
            self._handles += 1
        block = RamBlock(slot, nbytes, self._generation, handle)
        self.blocks[handle] = block
        self.by_slot[slot] = block
        self.space.bind(slot, handle)
        return block

    def begin_loads(
        self, blocks: Sequence[RamBlock], keys: Sequence[BlockKey], entries: Sequence[int]
    ) -> None:
        """Slots of one size will receive blocks from disk.

        Args:
            blocks: fresh from `allocate`.
            keys, entries: of what they receive.
        """
        for block, key, entry in zip(blocks, keys, entries, strict=True):
            block.key, block.entry, block.state = key, entry, RamState.LOADING
            self.arena.set_entry(block.slot, block.generation, SlotState.LOADING, key, block.nbytes)

    def finish_loads(self, blocks: Sequence[RamBlock]) -> None:
        """Blocks of one size, none of them dead, have arrived whole: CLEAN from now on."""
        set_state = self.arena.set_state
        for block in blocks:
            set_state(block.slot, block.generation, SlotState.READY)
            block.state = RamState.CLEAN
        pages = blocks[0].nbytes // PAGE_BYTES
        for block in blocks:
            self.queues.insert(block.handle, pages, 0)

    def fill(self, block: RamBlock, key: BlockKey, entry: int, state: RamState) -> None:
        """A client's bytes are complete."""
        block.key, block.entry, block.state = key, entry, state
        self.arena.set_entry(block.slot, block.generation, SlotState.READY, key, block.nbytes)
        if state is RamState.CLEAN:
            self.settle(block)

    def settle(self, block: RamBlock) -> None:
        """The block is CLEAN from now on: readable, evictable when nobody leases it."""
        block.state = RamState.CLEAN
        self.queues.insert(block.handle, block.nbytes // PAGE_BYTES, 0)

    def redirty(self, block: RamBlock) -> None:
        """A clean block is to be written after all."""
        self.queues.remove(block.handle)
        block.state = RamState.DIRTY

    def kill(self, block: RamBlock, state: SlotState = SlotState.FREE) -> None:
        """The block's contents are void; the slot returns once nobody holds it.

        Args:
            block: the block.
            state: what clients that still lease the slot see.
        """
        if block.handle in self.queues:
            self.queues.remove(block.handle)
        block.dead, block.key, block.entry = True, None, -1
        self.arena.set_state(block.slot, block.generation, state)
        self.reap(block)

    def reap(self, block: RamBlock) -> bool:
        """Free a dead block that nobody holds any more."""
        busy = block.leases or (block.state in _IO_STATES and block.started)
        if not block.dead or busy:
            return False
        self._free(block)
        return True

    def _free(self, block: RamBlock) -> None:
        # the next owner has another generation, so a late reader of this entry sees a miss
        self.arena.set_state(block.slot, block.generation, SlotState.FREE)
        del self.by_slot[block.slot]
        del self.blocks[block.handle]
        self._free_handles.append(block.handle)
        self.space.free(block.slot)

    def count(self, *states: RamState) -> int:
        """Slots in any of these states."""
        return sum(block.state in states for block in self.by_slot.values())

    def check_integrity(self) -> None:
        """AssertionError unless slots, queues, slot table and space agree."""
        used = {slot: block.nbytes // PAGE_BYTES for slot, block in self.by_slot.items()}
        self.space.check_integrity(used, set())
        queued = set(self.queues)
        for slot, block in self.by_slot.items():
            assert self.blocks[block.handle] is block, "a handle is off"
            assert self.space.owner(slot) == block.handle, "a slot's owner is off"
            clean = block.state is RamState.CLEAN and not block.dead
            assert (block.handle in queued) == clean, f"slot {slot} is queued wrongly"
            assert block.leases >= 0, "negative leases"
            assert not (block.dead and not block.leases and not block.started), "a dead slot stayed"
            _, generation, _ = self.arena.entry(slot)
            assert generation == block.generation, "the slot table has another generation"
        self.queues.check_integrity()
        assert len(queued) <= len(self.by_slot), "a freed block is still queued"
