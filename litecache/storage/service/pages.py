"""The caller's KV tensor as rows of bytes, and the layout of a block made of its rows.

A block is `n` rows one after the other, zero-padded to 4096 bytes. Where the padding has 16 bytes
to spare, and so always in a block with fewer than `n` rows, the block ends in a trailer that tells
how many rows it holds: a reader that wants more rows than were written gets a miss.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError, outline
from ..protocol import PAGE_BYTES

_TRAILER_MAGIC = b"LCROWS\x00\x01"
_TRAILER_BYTES = 16

_MAX_BLOCK_VARIABLE = "LIGHTMEM_MAX_BLOCK_SIZE_MB"
_MAX_PAGES = 64

Rows = npt.NDArray[np.uint8]


def tensor_rows(tensor: Any) -> Rows:
    """A 2-D contiguous CPU tensor (torch or numpy, any fixed-size dtype) as uint8 `[rows, bytes]`.

    The result shares the tensor's memory and keeps it alive.

    Raises:
        ConfigError: another number of dimensions, not contiguous, not in CPU memory, or empty.
    """
    valid = "a 2-D contiguous, writable tensor in CPU memory, torch or numpy, not empty"
    kind, torch = type(tensor), sys.modules.get("torch")
    is_array = issubclass(kind, np.ndarray)
    if not is_array and (torch is None or not issubclass(kind, torch.Tensor)):
        raise ConfigError("kvcache", outline(tensor), valid)
    shape = tuple(tensor.shape)
    if len(shape) != 2 or 0 in shape:
        raise ConfigError("kvcache.shape", shape, f"[pages, page size]: {valid}")
    rows: Rows
    if is_array:
        fits = tensor.flags.c_contiguous and tensor.flags.writeable
        if fits and tensor.dtype.itemsize and not tensor.dtype.hasobject:
            rows = np.asarray(tensor).view(np.uint8).reshape(shape[0], -1)
            return rows
        raise ConfigError("kvcache", outline(tensor), valid)
    assert torch is not None
    if tensor.device.type != "cpu":
        raise ConfigError("kvcache.device", tensor.device, valid)
    try:
        # torch dies of a view of a quantized one
        plain = tensor.layout is torch.strided and not tensor.is_quantized
        if plain and tensor.is_contiguous():
            rows = tensor.detach().view(torch.uint8).reshape(shape[0], -1).numpy()
            return rows
    except (RuntimeError, TypeError) as error:  # a view of something else
        raise ConfigError("kvcache", outline(tensor), valid) from error
    raise ConfigError("kvcache", outline(tensor), valid)


def integers(name: str, values: Any) -> npt.NDArray[Any]:
    """A flat array from a list, array or tensor of integers of any stride.

    Raises:
        ConfigError: not one-dimensional, not integers, or too many.
    """
    valid = "a flat list of at most 2**24 integers"
    try:
        # a torch tensor has __array__; numpy copies a strided one in element order
        array = np.asarray(values) if len(values) <= 1 << 24 else None
    except Exception as error:  # whatever was passed is no list of numbers
        raise ConfigError(name, outline(values), valid) from error
    if array is not None and array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.int64)
    if array is None or array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(name, outline(values if array is None else array), valid)
    return array


def page_numbers(indices: Any, rows: int) -> npt.NDArray[np.int64]:
    """Page indices of a tensor of `rows`.

    Raises:
        ConfigError: no flat list of integers, or out of range.
    """
    pages = integers("page_indices", indices).astype(np.int64)
    bad = pages[(pages < 0) | (pages >= rows)]
    if bad.size:
        raise ConfigError("page_indices", int(bad[0]), f"0 to {rows - 1}")
    return pages


def pages_per_block(page_bytes: int) -> int:
    """Pages in a block: as many as fit `LIGHTMEM_MAX_BLOCK_SIZE_MB` (64 MiB), from 1 to 64.

    Raises:
        ConfigError: the variable is no positive number.
    """
    text = os.environ.get(_MAX_BLOCK_VARIABLE, "64")
    try:
        limit = int(text)
    except ValueError:
        limit = 0
    if limit <= 0:
        raise ConfigError(_MAX_BLOCK_VARIABLE, text, "a positive whole number of MiB")
    return max(1, min(_MAX_PAGES, limit * 2**20 // page_bytes))


def split(items: npt.NDArray[Any], per_block: int) -> list[npt.NDArray[Any]]:
    """What belongs to each block; the last may have less."""
    return [items[at : at + per_block] for at in range(0, len(items), per_block)]


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
        np.take(self.rows, pages, axis=0, out=body, mode="clip")  # other modes copy twice
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
        body = np.frombuffer(memory[: len(pages) * self.page_bytes], np.uint8)
        self.rows[pages] = body.reshape(len(pages), self.page_bytes)
