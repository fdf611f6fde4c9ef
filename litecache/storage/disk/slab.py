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

import xxhash

from ...hashing import BlockKey
from ..key_dict import split_keys
from ..protocol import PAGE_BYTES
from ..retry import LogByRate
from .files import IOV_MAX, Files
from .records import Records

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 16 << 20

_say_read, _say_damage = (LogByRate(logger, logging.WARNING) for _ in range(2))

Call = Callable[[int, Sequence[memoryview], int], int]


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


def merge(transfers: Sequence[Transfer]) -> list[list[int]]:
    """Positions in `transfers` grouped into runs of neighbouring slots, ascending in each run."""
    order = sorted(range(len(transfers)), key=lambda i: transfers[i].slot)
    runs: list[list[int]] = []
    end = -1
    for i in order:
        slot, memory = transfers[i]
        if slot != end or len(runs[-1]) >= IOV_MAX:
            runs.append([])
        runs[-1].append(i)
        end = slot + len(memory) // PAGE_BYTES
    return runs


class Slab:
    """A file of slots.

    Args:
        files: the file system.
        name: of the file, made when missing.
    """

    def __init__(self, files: Files, name: str = "slab", *, direct: bool = True) -> None:
        self._files = files
        self._name = name
        self._fd = files.open(name, create=True, direct=direct)
        self.direct = files.is_direct(self._fd)

    def in_place(self) -> bool:
        """Whether the file still has its name."""
        return self._files.is_at(self._fd, self._name)

    def size(self) -> int:
        """Length of the file in bytes."""
        return self._files.size(self._fd)

    def grow(self, offset: int, length: int) -> None:
        """Reserve disk space for segments.

        Raises:
            OSError: ENOSPC, EDQUOT, EIO.
        """
        self._files.allocate(self._fd, offset, length)

    def punch(self, offset: int, length: int) -> None:
        """Give the disk space of a range back.

        Raises:
            OSError: the file system cannot.
        """
        self._files.punch(self._fd, offset, length)

    def truncate(self, length: int) -> None:
        """Give the end of the file back."""
        self._files.truncate(self._fd, length)

    def read(self, transfers: Sequence[Transfer]) -> list[OSError | None]:
        """Read blocks; per block None or why it failed."""
        return self._run(self._files.read, transfers)

    def write(self, transfers: Sequence[Transfer]) -> list[OSError | None]:
        """Write blocks; per block None or why it failed."""
        return self._run(self._files.write, transfers)

    def _run(self, call: Call, transfers: Sequence[Transfer]) -> list[OSError | None]:
        errors: list[OSError | None] = [None] * len(transfers)
        for run in merge(transfers):
            error = self._request(call, [transfers[i] for i in run])
            if error is None:
                continue
            for i in run:
                # one bad sector must cost one block, not the 16 MiB around it
                errors[i] = self._request(call, [transfers[i]]) if len(run) > 1 else error
        return errors

    def _request(self, call: Call, run: Sequence[Transfer]) -> OSError | None:
        offset = run[0].slot * PAGE_BYTES
        buffers = [transfer.memory for transfer in run]
        length = sum(map(len, buffers))
        try:
            moved = call(self._fd, buffers, offset)
        except OSError as error:
            return error
        if moved != length:
            return OSError(5, f"only {moved} of {length} bytes at offset {offset} of the slab")
        if not self.direct:
            self._files.drop_cache(self._fd, offset, length)
        return None

    def sync(self) -> None:
        """Force what was written to the device.

        Raises:
            OSError: EIO, ENOSPC.
        """
        self._files.sync(self._fd)

    def close(self) -> None:
        """Close the file."""
        self._files.close(self._fd)


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


def stored(records: Records) -> list[Stored]:
    """What the log says of blocks."""
    keys, sizes = split_keys(records["key"].tobytes()), records["pages"].tolist()
    nbytes = [pages * PAGE_BYTES for pages in sizes]
    return list(map(Stored, keys, records["slot"].tolist(), nbytes, records["checksum"].tolist()))


def requests(blocks: Iterable[Stored]) -> Iterator[list[Stored]]:
    """Blocks in the order given, cut into pieces of at most `MAX_REQUEST_BYTES`, or one block."""
    piece: list[Stored] = []
    held = 0
    for block in blocks:
        if piece and held + block.nbytes > MAX_REQUEST_BYTES:
            yield piece
            piece, held = [], 0
        piece.append(block)
        held += block.nbytes
    if piece:
        yield piece


@contextmanager
def read_blocks(
    slab: Slab, blocks: Sequence[Stored]
) -> Iterator[list[tuple[memoryview, str | None]]]:
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
