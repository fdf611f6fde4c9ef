"""The slab: one file of disk slots, read and written with O_DIRECT from and to arena slots.

Neighbouring slots go in one vectored request. Nothing here is locked: callers own the slots that
they name. Where O_DIRECT is refused the I/O is buffered and its pages are dropped afterwards, so
the page cache does not grow.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np
import xxhash

from ...hashing import BlockKey
from ..key_dict import split_keys
from ..protocol import PAGE_BYTES
from ..retry import LogByRate
from .files import IOV_MAX, Files
from .log import Records

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 16 << 20

_say_read, _say_damage = (LogByRate(logger, logging.WARNING) for _ in range(2))

Call = Callable[[int, Sequence[memoryview], int], int]
Blocks = list[tuple[memoryview, str | None]]
"""Bytes of blocks, and what is wrong with each."""


class Transfer(NamedTuple):
    """One block's move between a disk slot and memory."""

    slot: int
    memory: memoryview


class Stored(NamedTuple):
    """One block on the slab: where it is, and what its bytes must give."""

    key: BlockKey
    slot: int
    nbytes: int
    checksum: int


class Slab:
    """A file of slots.

    Args:
        files: the file system.

    Attributes:
        fd: of the file, which is made when it is missing.
        direct: it bypasses the page cache.
    """

    def __init__(self, files: Files, *, direct: bool = True) -> None:
        self._files = files
        self.fd = files.open("slab", create=True, direct=direct)
        self.direct = files.is_direct(self.fd)

    def size(self) -> int:
        """Length of the file in bytes."""
        return self._files.size(self.fd)

    def truncate(self, length: int) -> None:
        """Give the end of the file back."""
        self._files.truncate(self.fd, length)

    def read(self, transfers: Sequence[Transfer]) -> list[OSError | None]:
        """Read blocks; per block None or why it failed."""
        return self._run(self._files.read, transfers)

    def write(self, transfers: Sequence[Transfer]) -> list[OSError | None]:
        """Write blocks; per block None or why it failed."""
        return self._run(self._files.write, transfers)

    def _run(self, call: Call, transfers: Sequence[Transfer]) -> list[OSError | None]:
        errors: list[OSError | None] = [None] * len(transfers)
        for run in _neighbours(transfers):
            error = self._request(call, [transfers[i] for i in run])
            if error is None:
                continue
            for i in run:
                # one bad sector must cost one block, not the 16 MiB around it
                errors[i] = self._request(call, [transfers[i]]) if len(run) > 1 else error
        return errors

    def _request(self, call: Call, run: Sequence[Transfer]) -> OSError | None:
        offset, buffers = run[0].slot * PAGE_BYTES, [transfer.memory for transfer in run]
        length = sum(map(len, buffers))
        try:
            moved = call(self.fd, buffers, offset)
        except OSError as error:
            return error
        if moved != length:
            return OSError(5, f"only {moved} of {length} bytes at offset {offset} of the slab")
        if not self.direct:
            self._files.drop_cache(self.fd, offset, length)
        return None

    def sync(self) -> None:
        """Force what was written to the device, or raise OSError."""
        self._files.sync(self.fd)

    def close(self) -> None:
        """Close the file."""
        fd, self.fd = self.fd, -1  # the number will soon be another file's
        self._files.close(fd)


def _neighbours(transfers: Sequence[Transfer]) -> list[list[int]]:
    """Positions in `transfers` grouped into runs of neighbouring slots, ascending in each run."""
    runs: list[list[int]] = []
    end = -1
    for i in sorted(range(len(transfers)), key=lambda i: transfers[i].slot):
        slot, memory = transfers[i]
        if slot != end or len(runs[-1]) >= IOV_MAX:
            runs.append([])
        runs[-1].append(i)
        end = slot + len(memory) // PAGE_BYTES
    return runs


def checksum(memory: memoryview, key: bytes) -> int:
    """xxh3_64 of a block's bytes, seeded with its key, so that it also binds the two together."""
    return int(xxhash.xxh3_64_intdigest(memory, seed=int.from_bytes(key[:8], "little")))


def fault(memory: memoryview, key: bytes, expected: int, error: OSError | None) -> str | None:
    """Why bytes read from disk are not the block's: `io_error`, `corrupt`, or None."""
    if error is not None:
        _say_read("block %s cannot be read: %s", key.hex(), error)
        return "io_error"
    if checksum(memory, key) != expected:
        _say_damage("block %s is damaged on disk: dropped", key.hex())
        return "corrupt"
    return None


def requests(blocks: Iterable[Stored]) -> Iterator[list[Stored]]:
    """Blocks in the order given, cut into pieces of at most `MAX_REQUEST_BYTES`, or one block."""
    piece: list[Stored] = []
    held = 0
    for block in blocks:
        held += block.nbytes
        if piece and held > MAX_REQUEST_BYTES:
            yield piece
            piece, held = [], block.nbytes
        piece.append(block)
    if piece:
        yield piece


@contextmanager
def read_blocks(slab: Slab, blocks: Sequence[Stored]) -> Iterator[Blocks]:
    """Bytes of blocks in memory that goes away afterwards, each with what is wrong with it."""
    total = sum(block.nbytes for block in blocks)
    with mmap.mmap(-1, total) as mapping, memoryview(mapping) as memory, ExitStack() as views:
        pieces, start = [], 0
        for block in blocks:
            pieces.append(views.enter_context(memory[start : start + block.nbytes]))
            start += block.nbytes
        errors = slab.read(list(map(Transfer, [block.slot for block in blocks], pieces)))
        yield [
            (piece, fault(piece, block.key, block.checksum, error))
            for block, piece, error in zip(blocks, pieces, errors, strict=True)
        ]


def read_records(slab: Slab, records: Records) -> Iterator[tuple[Records, Blocks]]:
    """Blocks in the order given, batch by batch: their records, bytes, and what is wrong with them.

    A forged record may claim any place: what lies outside the slab comes first, unread.
    """
    ends = (records["slot"].astype(np.int64) + records["pages"]) * PAGE_BYTES
    outside = ends > slab.size()
    yield records[outside], [(memoryview(b""), "outside the slab")] * int(outside.sum())
    records, at = records[~outside], 0
    nbytes = (records["pages"].astype(np.int64) * PAGE_BYTES).tolist()
    columns = records["slot"].tolist(), nbytes, records["checksum"].tolist()
    for batch in requests(map(Stored, split_keys(records["key"].tobytes()), *columns)):
        with read_blocks(slab, batch) as blocks:
            yield records[at : at + len(batch)], blocks
        at += len(batch)
