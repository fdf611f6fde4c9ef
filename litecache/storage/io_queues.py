"""What `BlockIo` is to read and to write: requests of neighbours, and a queue of dirty blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..hashing import BlockKey
from .block_index import BlockIndex
from .disk.slab import MAX_REQUEST_BYTES
from .protocol import PAGE_BYTES
from .ram_tier import RamBlock, RamState, RamTier

MIN_REQUEST_BYTES = 4 << 20


@dataclass(frozen=True)
class ReadRequest:
    """Blocks of one size in neighbouring disk slots, ascending.

    Attributes:
        blocks: their RAM slots.
        keys: of the blocks.
        slots: of the disk.
        checksums: that the bytes must have.
    """

    blocks: list[RamBlock]
    keys: list[BlockKey]
    slots: list[int]
    checksums: list[int]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return len(self.blocks) * self.blocks[0].nbytes if self.blocks else 0

    def without_dead(self) -> ReadRequest:
        """What is still wanted of it."""
        alive = [i for i, block in enumerate(self.blocks) if not block.dead]
        if len(alive) == len(self.blocks):
            return self
        return ReadRequest(
            [self.blocks[i] for i in alive],
            [self.keys[i] for i in alive],
            [self.slots[i] for i in alive],
            [self.checksums[i] for i in alive],
        )


def request_bytes(total: int, threads: int) -> int:
    """Bytes of one request so that `threads` of them share `total`, 4 to 16 MiB."""
    return min(max(total // max(1, threads), MIN_REQUEST_BYTES), MAX_REQUEST_BYTES)


def plan_reads(index: BlockIndex, blocks: Sequence[RamBlock], threads: int) -> list[ReadRequest]:
    """Requests for blocks of one size, in about the order given.

    Args:
        index: of the shard.
        blocks: LOADING, in the order in which they are wanted.
        threads: that will read.
    """
    nbytes = blocks[0].nbytes
    at_most = max(1, request_bytes(nbytes * len(blocks), threads) // nbytes)
    entries = np.array([block.entry for block in blocks], np.int64)
    slots = index.column("disk")[entries].astype(np.int64) - 1
    checksums = index.column("checksum")[entries].tolist()
    order = np.argsort(slots, kind="stable")
    gaps = (np.flatnonzero(np.diff(slots[order]) != nbytes // PAGE_BYTES) + 1).tolist()
    places, positions = slots.tolist(), order.tolist()
    parts = [
        positions[start : min(start + at_most, end)]
        for first, end in zip([0, *gaps], [*gaps, len(positions)], strict=True)
        for start in range(first, end, at_most)
    ]
    return [
        ReadRequest(
            [blocks[i] for i in part],
            [blocks[i].key or b"" for i in part],
            [places[i] for i in part],
            [checksums[i] for i in part],
        )
        for part in sorted(parts, key=min)
    ]


class WriteBatch(NamedTuple):
    """Dirty blocks of one size that one request will write."""

    blocks: list[RamBlock]
    pages: int
    namespace: int


class WriteQueue:
    """Committed blocks on their way to disk, in the order of their commits.

    Holds each DIRTY block once; blocks that died meanwhile leave when they are met.

    Args:
        index: the shard's blocks.
        ram: their slots.

    Attributes:
        nbytes: of all blocks in it.
    """

    def __init__(self, index: BlockIndex, ram: RamTier) -> None:
        self._index = index
        self._ram = ram
        self._blocks: deque[RamBlock] = deque()
        self._under_way: set[RamBlock] = set()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def push(self, block: RamBlock) -> None:
        """A block has become DIRTY."""
        self._blocks.append(block)
        self.nbytes += block.nbytes

    def _pop(self) -> RamBlock:
        block = self._blocks.popleft()
        self.nbytes -= block.nbytes
        return block

    def take(self, at_most_bytes: int) -> WriteBatch | None:
        """The next blocks of one size and namespace, oldest first; they become WRITING."""
        blocks: list[RamBlock] = []
        total = 0
        while self._blocks:
            block = self._blocks[0]
            if block.dead:
                self._pop()
                continue
            namespace = self._index.namespace[block.entry]
            if blocks and (
                block.nbytes != blocks[0].nbytes
                or namespace != self._index.namespace[blocks[0].entry]
                or total + block.nbytes > at_most_bytes
            ):
                break
            self._pop()
            block.state, block.started = RamState.WRITING, True
            blocks.append(block)
            total += block.nbytes
        if not blocks:
            return None
        self._under_way.update(blocks)
        return WriteBatch(
            blocks, blocks[0].nbytes // PAGE_BYTES, self._index.namespace[blocks[0].entry]
        )

    def done(self, blocks: Iterable[RamBlock]) -> None:
        """Blocks that were taken have been written, or have failed."""
        self._under_way.difference_update(blocks)

    def unfinished(self) -> list[RamBlock]:
        """All that is queued or being written."""
        return [*self._under_way, *(block for block in self._blocks if not block.dead)]

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way to disk."""
        return not self._blocks and not self._under_way

    def put_back(self, blocks: Sequence[RamBlock]) -> None:
        """Blocks that found no disk slot come first again."""
        self.done(blocks)
        for block in reversed(blocks):
            block.started = False
            if self._ram.reap(block):
                continue
            block.state = RamState.DIRTY
            self._blocks.appendleft(block)
            self.nbytes += block.nbytes

    def check_integrity(self) -> None:
        """AssertionError unless it holds what is DIRTY, and counts it."""
        queued = [block for block in self._blocks if not block.dead]
        assert all(block.state is RamState.DIRTY for block in queued), "a clean block is queued"
        slots = self._ram.by_slot.values()
        dirty = [b for b in slots if b.state is RamState.DIRTY and not b.dead]
        assert {id(b) for b in queued} == {id(b) for b in dirty}, "the write queue is off"
        assert self.nbytes == sum(b.nbytes for b in self._blocks), "dirty bytes are off"
