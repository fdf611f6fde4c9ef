"""Between a block's bytes in the pool and its bytes in RAM and on disk.

Where they are the same a block is copied. Where the tiers hold eight bits it is converted on the
pool's device, so that the link, RAM and disk carry the codes: a piece of blocks is copied while the
one before it is converted, through two staging buffers in turn. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from litecache.engine.kv_layout import TRASH_BLOCK, KVGroup, KVPool, block_form
from litecache.engine.transfer.block_copier import (
    BlockCopier,
    HostBlocks,
    Lane,
    Mark,
    Numbers,
    Rows,
)
from litecache.kernels.quantise import BlockForm, convert_blocks

STAGING_BYTES = 128 << 20
"""Of blocks on the device between their two forms, for each thread that copies and KV group. Half
of it is a piece: launching one takes the host half a millisecond, copying 64 MiB the link 1.2."""


class Codec(Protocol):
    """One thread's way between a pool and the tiers; `copier` does its copies."""

    copier: BlockCopier

    def save(self, pool: KVPool, blocks: Numbers, slots: HostBlocks) -> None:
        """Start to write blocks of a pool into slots of `tier_bytes` each."""
        ...

    def load(self, pool: KVPool, blocks: Numbers, slots: HostBlocks) -> None:
        """The inverse."""
        ...

    def mark(self) -> Mark:
        """Behind all that was started so far."""
        ...

    def synchronize(self) -> None:
        """Wait until all that was started is done."""
        ...


class SameBytes:
    """The codec of tiers that hold what the pool holds."""

    def __init__(self, copier: BlockCopier) -> None:
        self.copier = copier

    def save(self, pool: KVPool, blocks: Numbers, slots: HostBlocks) -> None:
        """A plain copy."""
        self.copier.copy(Rows(pool.buffer, blocks), slots, save=True)

    def load(self, pool: KVPool, blocks: Numbers, slots: HostBlocks) -> None:
        """A plain copy."""
        self.copier.copy(Rows(pool.buffer, blocks), slots, save=False)

    def mark(self) -> Mark:
        """Behind all copies started so far."""
        return self.copier.copies.mark()

    def synchronize(self) -> None:
        """Wait until all copies started here are done."""
        self.copier.copies.synchronize()


class EightBits:
    """The codec of tiers that hold a wide pool's blocks as `KVGroup.stored` lays them out.

    Copies and conversions are two lanes. A piece's copy and its conversion wait for each other; a
    staging buffer is written again once what was in it has gone on. So while a piece is converted
    the next one is copied, over the ends of calls, too.

    Args:
        copier: whose copies lane is used.
    """

    def __init__(self, copier: BlockCopier) -> None:
        self.copier = copier
        self._conversions = Lane(copier.device)
        self._staging: dict[int, _Staging] = {}

    def save(self, pool: KVPool, blocks: Numbers, slots: HostBlocks) -> None:
        """Quantise, then copy."""
        wide, narrow = (block_form(group) for group in _forms(pool))
        copies, conversions = self.copier.copies, self._conversions
        staging, places = self._prepared(pool, blocks)
        for part, turn, buffer in staging.pieces(len(blocks)):
            conversions.after(staging.free[turn])
            with conversions.run():
                self._convert(pool.buffer, wide, buffer, narrow, places[part], staging.order)
            copies.after(conversions.mark())
            self.copier.copy(Rows(buffer, np.arange(len(buffer))), slots[part], save=True)
            staging.free[turn] = copies.mark()

    def load(self, pool: KVPool, blocks: Numbers, slots: HostBlocks) -> None:
        """Copy, then widen."""
        wide, narrow = (block_form(group) for group in _forms(pool))
        copies, conversions = self.copier.copies, self._conversions
        staging, places = self._prepared(pool, blocks)
        for part, turn, buffer in staging.pieces(len(blocks)):
            copies.after(staging.free[turn])
            self.copier.copy(Rows(buffer, np.arange(len(buffer))), slots[part], save=False)
            conversions.after(copies.mark())
            with conversions.run():
                self._convert(buffer, narrow, pool.buffer, wide, staging.order, places[part])
            staging.free[turn] = conversions.mark()

    def mark(self) -> Mark:
        """Behind all copies and conversions started so far."""
        self._conversions.after(self.copier.copies.mark())
        return self._conversions.mark()

    def synchronize(self) -> None:
        """Wait until all copies and conversions started here are done."""
        self.copier.copies.synchronize()
        self._conversions.synchronize()

    def try_out(self, pools: Sequence[KVPool]) -> None:
        """Convert a block of each pool there and back, so that no request compiles it."""
        for pool in pools:
            slots = [[torch.zeros(pool.group.tier_bytes, dtype=torch.uint8)]]
            trash = np.array([TRASH_BLOCK])
            self.save(pool, trash, slots)
            self.synchronize()
            self.load(pool, trash, slots)
        self.synchronize()

    def _prepared(self, pool: KVPool, blocks: Numbers) -> tuple[_Staging, torch.Tensor]:
        """The staging buffers of a pool, and its block numbers on the device."""
        group, device = pool.group, self.copier.device
        places = torch.from_numpy(blocks)
        with self._conversions.run():
            if device.type == "cuda":  # from memory that is not pinned the host would wait for it
                places = places.pin_memory().to(device, non_blocking=True)
            if group.index not in self._staging:
                made = self._staging[group.index] = _Staging(group.tier_bytes, device)
                made.free = [self._conversions.mark()] * 2
        return self._staging[group.index], places

    def _convert(
        self,
        source: torch.Tensor,
        source_form: BlockForm,
        target: torch.Tensor,
        target_form: BlockForm,
        src: torch.Tensor,
        dst: torch.Tensor,
    ) -> None:
        count = min(len(src), len(dst))  # one of them is the order of all a buffer may hold
        convert_blocks(source, source_form, target, target_form, src[:count], dst[:count])


class _Staging:
    """Two buffers for blocks of one size, used in turn.

    Attributes:
        order: their rows' numbers, int64.
        free: behind what was in each.
    """

    def __init__(self, block_bytes: int, device: torch.device) -> None:
        self._rows = max(1, STAGING_BYTES // 2 // block_bytes)
        # Zeros: what lies between the extents goes to disk, too.
        shape = (self._rows, block_bytes)
        zeros = (torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(2))
        # each an allocation of its own: a block's scales are found from the storage's beginning
        self._buffers = tuple(zeros)
        self.order = torch.arange(self._rows, device=device)
        self.free = [Mark(None), Mark(None)]
        self._turn = 0

    def pieces(self, count: int) -> Iterator[tuple[slice, int, torch.Tensor]]:
        """Slices of `count` blocks, and for each the number of a buffer and so many of its rows."""
        for first in range(0, count, self._rows):
            self._turn = 1 - self._turn
            end = min(first + self._rows, count)
            yield slice(first, end), self._turn, self._buffers[self._turn][: end - first]


def _forms(pool: KVPool) -> tuple[KVGroup, KVGroup]:
    assert pool.group.stored is not None
    return pool.group, pool.group.stored
