"""Requests to the disk: which blocks of a batch one read covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..hashing import BlockKey
from .block_index import BlockIndex
from .protocol import PAGE_BYTES
from .ram_tier import RamBlock

MIN_REQUEST_BYTES = 4 << 20
MAX_REQUEST_BYTES = 16 << 20


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
