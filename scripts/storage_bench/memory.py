"""Memory for the contestants, and what a file keeps of the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np
import numpy.typing as npt

HUGE_PAGE_BYTES = 2 << 20
Bytes = npt.NDArray[np.uint8]


def private(nbytes: int, fill: int | None = None) -> Bytes:
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
    array: Bytes = room[start : start + nbytes]
    array[:] = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8) if fill is None else fill
    return array


def cached_bytes(path: str) -> int:
    """Bytes of a file that lie in the page cache."""
    size = os.path.getsize(path)
    if not size:
        return 0
    fd = os.open(path, os.O_RDWR)
    try:
        mapping = mmap.mmap(fd, size)
    finally:
        os.close(fd)
    residence = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    start = ctypes.c_char.from_buffer(mapping)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mincore(ctypes.byref(start), ctypes.c_size_t(size), residence)
    del start
    mapping.close()
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {path}")
    return int((np.frombuffer(residence, np.uint8) & 1).sum()) * mmap.PAGESIZE
