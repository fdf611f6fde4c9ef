"""Requests to the disk: which blocks of a batch one read covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..hashing import BlockKey
from .block_index import BlockIndex
from .key_table import Entries, KeyWords
from .protocol import PAGE_BYTES
from .ram_tier import RamBlock

MIN_REQUEST_BYTES = 4 << 20
MAX_REQUEST_BYTES = 16 << 20


@dataclass(frozen=True)
class ReadRequest:
    """Blocks of one size in neighbouring disk slots, ascending.

    Attributes:
        blocks: their RAM slots.
        keys, words: of the blocks; the words as uint64 `[n, 2]`.
        slots: of the disk.
        checksums: that the bytes must have.
    """

    blocks: list[RamBlock]
    keys: list[BlockKey]
    words: KeyWords
    slots: list[int]
    checksums: list[int]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(block.nbytes for block in self.blocks)

    def without_dead(self) -> ReadRequest:
        """What is still wanted of it."""
        alive = [i for i, block in enumerate(self.blocks) if not block.dead]
        if len(alive) == len(self.blocks):
            return self
        return ReadRequest(
            [self.blocks[i] for i in alive],
            [self.keys[i] for i in alive],
            self.words[alive],
            [self.slots[i] for i in alive],
            [self.checksums[i] for i in alive],
        )


def request_bytes(total: int, threads: int) -> int:
    """Bytes of one request so that `threads` of them share `total`, 4 to 16 MiB."""
    return min(max(total // max(1, threads), MIN_REQUEST_BYTES), MAX_REQUEST_BYTES)


def plan_reads(
    index: BlockIndex, blocks: Sequence[RamBlock], entries: Entries, threads: int
) -> list[ReadRequest]:
    """Requests for blocks of one size, in about the order given.

    Args:
        index: of the shard.
        blocks: LOADING, in the order in which they are wanted.
        entries: theirs, int64 `[n]`.
        threads: that will read.
    """
    nbytes = blocks[0].nbytes
    at_most = max(1, request_bytes(nbytes * len(blocks), threads) // nbytes)
    slots = index.column("disk")[entries].astype(np.int64) - 1
    checksums, words = index.column("checksum")[entries], index.words_at(entries)
    order = np.argsort(slots, kind="stable")
    gaps = np.flatnonzero(np.diff(slots[order]) != nbytes // PAGE_BYTES) + 1
    parts = [
        run[start : start + at_most]
        for run in np.split(order, gaps)
        for start in range(0, len(run), at_most)
    ]
    requests = []
    for part in sorted(parts, key=min):
        mine = [blocks[i] for i in part.tolist()]
        keys = [block.key or b"" for block in mine]
        requests.append(
            ReadRequest(mine, keys, words[part], slots[part].tolist(), checksums[part].tolist())
        )
    return requests
