"""The limit: bare O_DIRECT `preadv` and `pwritev` of a preallocated file."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import xxhash

from storage_bench.memory import private

MIB = 1 << 20


class RawDisk:
    """A file read and written in turns, by the threads and requests that are fastest here.

    Its memory is private and in huge pages: the best that a single process can have.

    Args:
        path: the file, made here.
        nbytes: its size, a multiple of `turn_bytes`.
        turn_bytes: bytes of one turn.
    """

    def __init__(self, path: str, nbytes: int, turn_bytes: int) -> None:
        self.nbytes, self.turn_bytes = nbytes, turn_bytes
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, nbytes)
        self._memory = private(turn_bytes).data
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._at = 0
        for start in range(0, nbytes, turn_bytes):
            os.pwritev(self._fd, [self._memory], start)
        os.fdatasync(self._fd)

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
