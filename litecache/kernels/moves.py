"""Moves blocks between a GPU pool and pinned host slots: the copy engine or a kernel, by size.

The copy engine reaches the link's rate with blocks of a megabyte and leaves the multiprocessors
alone; each call costs some microseconds, so many small blocks go faster through one kernel that
addresses the pinned memory itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from litecache.errors import KernelError

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

        rows = torch.tensor([list(src), list(dst)]).pin_memory().to(device, non_blocking=True)
        copy_rows(source, target, rows[0], rows[1])
        return
    for begin, end in _runs(src, dst):
        count = end - begin
        target[dst[begin] : dst[begin] + count].copy_(
            source[src[begin] : src[begin] + count], non_blocking=True
        )


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
