"""Moves blocks between a GPU pool and pinned host slots: the copy engine or a kernel, by size.

The copy engine reaches the link's rate with blocks of a megabyte and leaves the multiprocessors
alone; each call costs some microseconds, so many small blocks go faster through one kernel that
addresses the pinned memory itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from litecache.errors import KernelError
from litecache.kernels.batch_copy import copy_batch

DMA_BYTES = 1 << 20
"""Smallest block for the copy engine; measured on an H200 behind PCIe 5."""


def move_blocks(
    source: torch.Tensor, target: torch.Tensor, src: Sequence[int], dst: Sequence[int]
) -> None:
    """Copies blocks on the current stream, without waiting for them.

    Args:
        source: uint8 `[n, block_bytes]`, contiguous: a pool or pinned host memory.
        target: uint8 `[m, block_bytes]`, likewise.
        src: blocks of `source` to read.
        dst: blocks of `target` to write, distinct.

    Raises:
        KernelError: naming the argument that is wrong.
    """
    for name, side in (("source", source), ("target", target)):
        if side.ndim != 2 or side.dtype != torch.uint8 or not side.is_contiguous():
            raise KernelError(f"{name} must be contiguous uint8 [blocks, block_bytes]")
    if source.shape[1] != target.shape[1]:
        raise KernelError(f"target.shape={tuple(target.shape)}: blocks of {source.shape[1]} bytes")
    if len(src) != len(dst):
        raise KernelError(f"dst has {len(dst)} blocks, src {len(src)}")
    for name, blocks, side in (("src", src, source), ("dst", dst, target)):
        if blocks and not 0 <= min(blocks) <= max(blocks) < side.shape[0]:
            raise KernelError(f"{name} holds blocks outside 0..{side.shape[0] - 1}")
    device = source.device if source.is_cuda else target.device
    by_kernel = device.type == "cuda" and source.shape[1] < DMA_BYTES and len(src) > 1
    if by_kernel and all(side.is_cuda or side.is_pinned() for side in (source, target)):
        from litecache.kernels.triton_store import copy_rows

        rows = torch.from_numpy(np.array([src, dst], dtype=np.int64))
        rows = rows.to(device, non_blocking=True)
        copy_rows(source, target, rows[0], rows[1])
        return
    if device.type == "cuda" and copy_batch(
        _addresses(source, src), _addresses(target, dst), source.shape[1]
    ):
        return
    for begin, end in _runs(src, dst):
        count = end - begin
        target[dst[begin] : dst[begin] + count].copy_(
            source[src[begin] : src[begin] + count], non_blocking=True
        )


def _addresses(side: torch.Tensor, blocks: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Where blocks begin, `[n]`."""
    addresses: npt.NDArray[np.uint64] = np.array(blocks, dtype=np.uint64)
    addresses *= np.uint64(side.shape[1])
    addresses += np.uint64(side.data_ptr())
    return addresses


def _runs(src: Sequence[int], dst: Sequence[int]) -> list[tuple[int, int]]:
    """Cuts the list where blocks stop being neighbours on both sides."""
    runs: list[tuple[int, int]] = []
    begin = 0
    for index in range(1, len(src) + 1):
        together = (
            index < len(src)
            and src[index] == src[index - 1] + 1
            and dst[index] == dst[index - 1] + 1
        )
        if not together:
            runs.append((begin, index))
            begin = index
    return runs
