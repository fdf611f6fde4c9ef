"""What a disk can do at most: bare `preadv` and `pwritev` of a preallocated file, with O_DIRECT.

For those who measure a machine (`litecache doctor`, `litecache bench`, `scripts/bench_*.py`);
nothing that stores blocks uses it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import xxhash

from ..arena.mapping import HUGE_PAGE_BYTES

MIB = 1 << 20


def private(nbytes: int, fill: int | None = None) -> npt.NDArray[np.uint8]:
    """Private memory, uint8 `[nbytes]`, touched, at the start of a huge page.

    Aligned like an arena slot, whatever it is compared with: where the target lies a few bytes
    behind the source modulo 4096, as two plain numpy arrays and a slot do, some processors copy
    blocks of a few 100 KiB at a third of their speed.

    Args:
        nbytes: how much.
        fill: one value; None is random bytes.
    """
    room = np.empty(nbytes + HUGE_PAGE_BYTES, np.uint8)
    start = -room.ctypes.data % HUGE_PAGE_BYTES
    array: npt.NDArray[np.uint8] = room[start : start + nbytes]
    array[:] = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8) if fill is None else fill
    return array


class RawDisk:
    """A file read and written in turns, by the threads and requests that are fastest here.

    Its memory is private and in huge pages: the best that a single process can have. The file has
    no name once it is open, so that it goes with the process, however that ends.

    Args:
        path: the file, made here.
        nbytes: its size, a multiple of `turn_bytes`.
        turn_bytes: bytes of one turn.

    Raises:
        OSError: the file cannot be made, EINVAL where the file system refuses O_DIRECT.
    """

    def __init__(self, path: str, nbytes: int, turn_bytes: int) -> None:
        self.nbytes, self.turn_bytes = nbytes, turn_bytes
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT
        try:
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            if error.errno == errno.EINVAL:  # made all the same
                os.unlink(path)
            raise
        os.unlink(path)
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._at = 0
        try:
            os.posix_fallocate(self._fd, 0, nbytes)
            self._memory = private(turn_bytes).data
            for start in range(0, nbytes, turn_bytes):
                os.pwritev(self._fd, [self._memory], start)
            os.fdatasync(self._fd)
        except BaseException:
            self.close()
            raise

    def turn(self, kind: str, threads: int, request: int) -> float:
        """GB/s of one turn; each goes on where the last one ended.

        Args:
            kind: `read` or `write`; a write ends with fdatasync.
            threads: requests in flight.
            request: bytes of one.
        """
        base = self._at
        self._at = (self._at + self.turn_bytes) % self.nbytes
        call = os.preadv if kind == "read" else os.pwritev

        def one(offset: int) -> None:
            call(self._fd, [self._memory[offset : offset + request]], base + offset)

        begun = time.perf_counter()
        list(self._pool(threads).map(one, range(0, self.turn_bytes, request)))
        if kind == "write":
            os.fdatasync(self._fd)
        return self.turn_bytes / (time.perf_counter() - begun) / 1e9

    def checked_read(self) -> float:
        """GB/s of one turn that is read and checked, with nothing else around it.

        What a store that verifies each byte can reach at most here: two requests in flight, the
        checksums on two more threads. On a machine of few cores it lies well below the bare disk.
        """
        base, request = self._at, 8 * MIB
        self._at = (self._at + self.turn_bytes) % self.nbytes
        in_flight = threading.BoundedSemaphore(2)

        def one(offset: int) -> None:
            memory = self._memory[offset : offset + request]
            with in_flight:
                os.preadv(self._fd, [memory], base + offset)
            xxhash.xxh3_64_intdigest(memory)

        begun = time.perf_counter()
        list(self._pool(4).map(one, range(0, self.turn_bytes, request)))
        return self.turn_bytes / (time.perf_counter() - begun) / 1e9

    def _pool(self, threads: int) -> ThreadPoolExecutor:
        if threads not in self._pools:
            self._pools[threads] = ThreadPoolExecutor(threads)
        return self._pools[threads]

    def best(self, kind: str, quick: bool) -> tuple[int, int]:
        """Threads and request bytes that are fastest."""
        threads = (2, 4) if quick else (1, 2, 4, 8)
        requests = (16 * MIB,) if quick else (4 * MIB, 8 * MIB, 16 * MIB)
        rates = {
            (t, r): max(self.turn(kind, t, r) for _ in range(2)) for t in threads for r in requests
        }
        return max(rates, key=lambda pair: rates[pair])

    def close(self) -> None:
        """End the threads and close the file."""
        for pool in self._pools.values():
            pool.shutdown()
        os.close(self._fd)
