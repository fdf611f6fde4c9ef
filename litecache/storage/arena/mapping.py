"""Shared memory mapped at an address where the kernel can use huge pages.

Python's `mmap` cannot align a mapping, and one that starts in the middle of 2 MiB is mapped by
4 KiB pages however large the pages behind it are. The shard and each of its clients map the arena
through this class. Huge pages are worth it: made seven times faster than small ones, mapped by a
process in no time, pinned for O_DIRECT and for the GPU in one piece. They are advice all the same:
where the kernel refuses, everything works with small pages.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

HUGE_PAGE_BYTES = 2 << 20

_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
_MADV_REMOVE = 9
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap: Any = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_munmap: Callable[[int, int], int] = _libc.munmap
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class SharedMapping:
    """A file descriptor's memory, shared and writable.

    Args:
        fd: memfd or file; may be closed afterwards.
        nbytes: to map from its start.
        huge_bytes: leading bytes that may lie in huge pages.

    Attributes:
        array: uint8 `[nbytes]`; the memory stays mapped as long as this or a view of it lives.

    Raises:
        OSError: the kernel cannot map it.
    """

    def __init__(self, fd: int, nbytes: int, huge_bytes: int = 0) -> None:
        self._address = _map_aligned(fd, nbytes)
        pages = (ctypes.c_uint8 * nbytes).from_address(self._address)
        # at exit the process goes with its mappings; threads may still touch them until then
        weakref.finalize(pages, _munmap, self._address, nbytes).atexit = False
        self.array: npt.NDArray[np.uint8] = np.frombuffer(memoryview(pages), np.uint8)
        if huge_bytes:
            self._advise(0, huge_bytes, _MADV_HUGEPAGE)

    def _advise(self, start: int, nbytes: int, advice: int) -> bool:
        return not _libc.madvise(self._address + start, nbytes, advice)

    def populate(self, start: int, nbytes: int) -> bool:
        """Map memory before its first touch; False where the kernel does not know how to."""
        return self._advise(start, nbytes, _MADV_POPULATE_WRITE)

    def make(self, fd: int, start: int, nbytes: int) -> None:
        """Make memory exist, in huge pages where the kernel has them.

        What guarantees it is `posix_fallocate`: too little memory is an error here and never a
        SIGBUS later.

        Raises:
            OSError: ENOSPC or ENOMEM; nothing has changed.
        """
        try:
            self._make_huge(fd, start, nbytes)
            os.posix_fallocate(fd, start, nbytes)
        except OSError:
            self._advise(start, nbytes, _MADV_REMOVE)
            raise
        self.populate(start, nbytes)

    def close(self) -> None:
        """Unmap, or as soon as the last array, view or tensor made from `array` is gone."""
        self.array = np.empty(0, np.uint8)

    def _make_huge(self, fd: int, start: int, nbytes: int) -> None:
        first = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        end = (start + nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if first >= end:
            return
        # One small page in each huge one, because the kernel collapses nothing out of nothing.
        # This works whatever `shmem_enabled` says ("deny" excepted), at the price of clearing the
        # memory once. Kernels before 6.1 make huge pages on the first touch, if that is "advise".
        for at in range(first, end, HUGE_PAGE_BYTES):
            os.posix_fallocate(fd, at, mmap.PAGESIZE)
        if not self._advise(first, end - first, _MADV_COLLAPSE) and (
            ctypes.get_errno() == errno.EINVAL
        ):
            self._advise(first, end - first, _MADV_REMOVE)
            self.populate(first, end - first)


def _map_aligned(fd: int, nbytes: int) -> int:
    """Map `fd` at a multiple of `HUGE_PAGE_BYTES`, inside a reservation that is cut to size."""
    length = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    reserved = length + HUGE_PAGE_BYTES
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    base = _checked(_mmap(None, reserved, 0, flags, -1, 0))
    start = -(-base // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    access = mmap.PROT_READ | mmap.PROT_WRITE
    try:
        _checked(_mmap(start, length, access, mmap.MAP_SHARED | _MAP_FIXED, fd, 0))
    except OSError:
        _munmap(base, reserved)
        raise
    if start > base:
        _munmap(base, start - base)
    _munmap(start + length, base + reserved - start - length)
    return start


def _checked(address: int | None) -> int:
    if address is None or address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map shared memory: {os.strerror(number)}")
    return address
