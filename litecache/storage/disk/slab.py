"""The slab: one file of disk slots, read and written with O_DIRECT from and to arena slots.

Neighbouring slots go in one vectored request. Nothing here is locked: callers own the slots that
they name. Where O_DIRECT is refused the I/O is buffered and its pages are dropped afterwards, so
the page cache does not grow.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ..protocol import PAGE_BYTES
from .files import IOV_MAX, Files

Call = Callable[[int, Sequence[memoryview], int], int]


class Transfer(NamedTuple):
    """One block's move between a disk slot and memory."""

    slot: int
    memory: memoryview


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


@contextmanager
def scratch_memory(nbytes: int) -> Iterator[memoryview]:
    """Zeroed, page-aligned memory that goes away afterwards."""
    with mmap.mmap(-1, nbytes) as mapping:
        memory = memoryview(mapping)
        try:
            yield memory
        finally:
            memory.release()
