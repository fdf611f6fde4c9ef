"""The caller's KV tensor as rows of bytes, and the layout of a block made of its rows.

A block is `n` rows one after the other, zero-padded to 4096 bytes. Where the padding has 16 bytes
to spare, and so always in a block with fewer than `n` rows, the block ends in a trailer that tells
how many rows it holds: a reader that wants more rows than were written gets a miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError
from ..protocol import PAGE_BYTES

_TRAILER_MAGIC = b"LCROWS\x00\x01"
_TRAILER_BYTES = 16

Rows = npt.NDArray[np.uint8]


def tensor_rows(tensor: Any) -> Rows:
    """A 2-D contiguous CPU tensor (torch or numpy, any fixed-size dtype) as uint8 `[rows, bytes]`.

    The result shares the tensor's memory and keeps it alive.

    Raises:
        ConfigError: another number of dimensions, not contiguous, not in CPU memory, or empty.
    """
    shape = tuple(getattr(tensor, "shape", ()))
    if len(shape) != 2 or 0 in shape:
        raise ConfigError("kvcache", shape, "a 2-D tensor [pages, page size], not empty")
    if isinstance(tensor, np.ndarray):
        if not tensor.flags.c_contiguous or not tensor.flags.writeable:
            raise ConfigError("kvcache", "strides", "a contiguous, writable tensor")
        return tensor.view(np.uint8).reshape(shape[0], -1)
    if not hasattr(tensor, "is_contiguous"):
        raise ConfigError("kvcache", type(tensor).__name__, "a torch tensor or numpy array")
    import torch

    if tensor.device.type != "cpu":
        raise ConfigError("kvcache", str(tensor.device), "a tensor in CPU memory")
    if not tensor.is_contiguous():
        raise ConfigError("kvcache", "strides", "a contiguous tensor")
    rows: Rows = tensor.detach().view(torch.uint8).reshape(shape[0], -1).numpy()
    return rows


def page_numbers(indices: Any, rows: int, name: str = "page_indices") -> npt.NDArray[np.int64]:
    """Page indices from a list, array or tensor of integers of any stride, checked.

    Raises:
        ConfigError: not one-dimensional, not integers, or out of range.
    """
    # a torch tensor has __array__; numpy copies a strided one in element order
    array = np.asarray(indices)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(name, f"{array.dtype} {array.shape}", "a flat list of integers")
    pages = array.astype(np.int64)
    if pages.min() < 0 or pages.max() >= rows:
        bad = pages[(pages < 0) | (pages >= rows)][0]
        raise ConfigError(name, int(bad), f"0 to {rows - 1}")
    return pages


class BlockLayout:
    """How rows of a tensor make a block.

    Args:
        rows: uint8 `[pages, page_bytes]`.
        pages_per_block: rows in a full block.
    """

    def __init__(self, rows: Rows, pages_per_block: int) -> None:
        self.rows = rows
        self.page_bytes = int(rows.shape[1])
        self.pages_per_block = pages_per_block
        used = self.page_bytes * pages_per_block
        self.block_bytes = -(-used // PAGE_BYTES) * PAGE_BYTES
        if self.page_bytes < _TRAILER_BYTES and self.block_bytes - used < _TRAILER_BYTES:
            self.block_bytes += PAGE_BYTES
        self._always = self.block_bytes - used >= _TRAILER_BYTES

    def gather(self, pages: npt.NDArray[np.int64], memory: memoryview) -> None:
        """Copy rows into a block."""
        block = np.frombuffer(memory, np.uint8)
        used = len(pages) * self.page_bytes
        body = block[:used].reshape(len(pages), self.page_bytes)
        start = _run_start(pages)
        if start is None:
            np.take(self.rows, pages, axis=0, out=body)
        else:
            body[:] = self.rows[start : start + len(pages)]
        block[used:] = 0
        if self._always or len(pages) < self.pages_per_block:
            trailer = _TRAILER_MAGIC + len(pages).to_bytes(8, "little")
            block[-_TRAILER_BYTES:] = np.frombuffer(trailer, np.uint8)

    def held(self, memory: memoryview) -> int:
        """Rows that a block holds."""
        trailer = bytes(memory[-_TRAILER_BYTES:])
        if trailer[:8] == _TRAILER_MAGIC:
            return int.from_bytes(trailer[8:], "little")
        return 0 if self._always else self.pages_per_block

    def scatter(self, pages: npt.NDArray[np.int64], memory: memoryview) -> None:
        """Copy a block's first rows to the tensor."""
        used = len(pages) * self.page_bytes
        body = np.frombuffer(memory[:used], np.uint8).reshape(len(pages), self.page_bytes)
        start = _run_start(pages)
        if start is None:
            self.rows[pages] = body
        else:
            self.rows[start : start + len(pages)] = body


def _run_start(pages: npt.NDArray[np.int64]) -> int | None:
    if len(pages) and (np.diff(pages) == 1).all():
        return int(pages[0])
    return None


def split(pages: npt.NDArray[np.int64], per_block: int) -> Sequence[npt.NDArray[np.int64]]:
    """Pages of each block; the last may be shorter."""
    return [pages[i : i + per_block] for i in range(0, len(pages), per_block)]
