"""What a file keeps of the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np


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
