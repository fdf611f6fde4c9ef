"""Copies blocks between a GPU pool and host memory, as bytes, off the compute stream.

On CUDA a copier owns a stream and registers the arena's segments as pinned memory when it first
touches them, so that copies run at the link's speed. On CPU the copies are plain memcpys.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from litecache.engine.kv_layout import TRASH_BLOCK, KVGroup, KVPool, block_form
from litecache.kernels.batch_copy import copy_batch
from litecache.kernels.quantise import convert_blocks
from litecache.storage.arena.view import ArenaView
from litecache.storage.protocol import PAGE_BYTES

logger = logging.getLogger(__name__)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
Slot = Sequence[torch.Tensor]
"""A slot's bytes, uint8, in one piece or cut where two of the arena's segments meet.

Segments are pinned one by one, and CUDA refuses a copy that leaves a range pinned in one piece.
"""
STAGING_BYTES = 32 << 20
"""Of blocks on the device between their two forms, a copier."""


class Codec(Protocol):
    """Between a block's bytes in the pool and its bytes in RAM and on disk."""

    def save(
        self, copier: BlockCopier, pool: KVPool, blocks: Sequence[int], slots: Sequence[Slot]
    ) -> None:
        """Start to write blocks of a pool into slots of `tier_bytes` each."""
        ...

    def load(
        self, copier: BlockCopier, pool: KVPool, blocks: Sequence[int], slots: Sequence[Slot]
    ) -> None:
        """The inverse."""
        ...


class SameBytes:
    """The codec of tiers that hold what the pool holds."""

    def save(
        self, copier: BlockCopier, pool: KVPool, blocks: Sequence[int], slots: Sequence[Slot]
    ) -> None:
        """A plain copy."""
        copier.copy(_beside([pool.buffer[block] for block in blocks], slots))

    def load(
        self, copier: BlockCopier, pool: KVPool, blocks: Sequence[int], slots: Sequence[Slot]
    ) -> None:
        """A plain copy."""
        pairs = _beside([pool.buffer[block] for block in blocks], slots)
        copier.copy([(slot, row) for row, slot in pairs])


class EightBits:
    """The codec of tiers that hold a wide pool's blocks as `KVGroup.stored` lays them out.

    Blocks are converted on the pool's device, so that the link, RAM and disk carry the codes. The
    staging blocks in between belong to the copier's stream: its order is what keeps them apart.

    Args:
        copier: with it the conversions of `pools` are tried, so that no request compiles them.
        pools: one per KV group.
    """

    def __init__(self, copier: BlockCopier, pools: Sequence[KVPool]) -> None:
        for pool in pools:
            slots = [[torch.zeros(pool.group.tier_bytes, dtype=torch.uint8)]]
            self.save(copier, pool, [TRASH_BLOCK], slots)
            self.load(copier, pool, [TRASH_BLOCK], slots)
        copier.synchronize()

    def save(
        self, copier: BlockCopier, pool: KVPool, blocks: Sequence[int], slots: Sequence[Slot]
    ) -> None:
        """Quantise, then copy."""
        wide, narrow = (block_form(group) for group in _forms(pool))
        with copier.on_stream():
            for part, staging, order, places in _parts(pool, blocks):
                convert_blocks(pool.buffer, wide, staging, narrow, places, order)
                copier.copy(_beside(list(staging), slots[part]))

    def load(
        self, copier: BlockCopier, pool: KVPool, blocks: Sequence[int], slots: Sequence[Slot]
    ) -> None:
        """Copy, then widen."""
        wide, narrow = (block_form(group) for group in _forms(pool))
        with copier.on_stream():
            for part, staging, order, places in _parts(pool, blocks):
                pairs = _beside(list(staging), slots[part])
                copier.copy([(slot, row) for row, slot in pairs])
                convert_blocks(staging, narrow, pool.buffer, wide, order, places)


def _parts(
    pool: KVPool, blocks: Sequence[int]
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Slices of the blocks, and for each: staging, its rows and the pool's, on the device."""
    device, tier_bytes = pool.buffer.device, pool.group.tier_bytes
    step = max(1, STAGING_BYTES // tier_bytes)
    for first in range(0, len(blocks), step):
        part = slice(first, first + step)
        places = torch.tensor(blocks[part], dtype=torch.int64, device=device)
        order = torch.arange(len(places), device=device)
        # Zeros: what lies between the extents goes to disk, too.
        shape = (len(places), tier_bytes)
        yield part, torch.zeros(shape, dtype=torch.uint8, device=device), order, places


def _beside(rows: Sequence[torch.Tensor], slots: Sequence[Slot]) -> Pairs:
    """Blocks on the device with their slots, piece by piece."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for row, slot in zip(rows, slots, strict=True):
        # nearly all lie in one segment: to cut costs as much as to launch their copy
        parts: Sequence[torch.Tensor] = (row,)
        if len(slot) > 1:
            parts = row.tensor_split(list(itertools.accumulate(map(len, slot[:-1]))))
        pairs += zip(parts, slot, strict=True)
    return pairs


def _forms(pool: KVPool) -> tuple[KVGroup, KVGroup]:
    assert pool.group.stored is not None
    return pool.group, pool.group.stored


class PinnedArenas:
    """Registers arena segments with CUDA, once per process and segment."""

    def __init__(self) -> None:
        # Re-entrant: the finalizer may run while this very thread holds the lock.
        self._lock = threading.RLock()
        self._registered: dict[int, dict[int, int]] = {}

    def ensure(self, arena: ArenaView, offset: int) -> bool:
        """Pin the segment that holds byte `offset`; False when the driver refuses."""
        segment = offset // arena.segment_bytes
        with self._lock:
            known = self._registered.get(id(arena))
            if known is None:
                known = self._registered[id(arena)] = {}
                # The arena of a shard that died goes with the last lease on it.
                weakref.finalize(arena, self._forget, id(arena)).atexit = False
            if segment not in known:
                start = segment * arena.segment_bytes
                size = min(arena.segment_bytes, len(arena.array) - start)
                address = arena.array.ctypes.data + start
                # An int: the binding's enum is true even for success.
                error = int(_cudart().cudaHostRegister(address, size, 0))
                if error:
                    logger.warning("segment %d of the arena cannot be pinned: %s", segment, error)
                known[segment] = 0 if error else address
            return known[segment] != 0

    def close(self) -> None:
        """Unpin everything, before the arenas are unmapped."""
        for arena_id in list(self._registered):
            self._forget(arena_id)

    def _forget(self, arena_id: int) -> None:
        with self._lock:
            for address in self._registered.pop(arena_id, {}).values():
                if address:
                    _cudart().cudaHostUnregister(address)


class BlockCopier:
    """Moves blocks of one pool; one instance per thread that copies.

    Args:
        device: of the pools.
        event_of: the event behind a step that has not ended; a copy waits for the last step that
            uses its block, which may have been handed out while that still runs.
        pinned: shared registry of pinned segments.
    """

    def __init__(
        self,
        device: torch.device,
        event_of: Callable[[int], torch.cuda.Event | None],
        pinned: PinnedArenas,
    ) -> None:
        self._cuda = device.type == "cuda"
        self._event_of = event_of
        self._pinned = pinned
        self._stream: torch.cuda.Stream | None = None
        if self._cuda:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def after(self, step: int) -> None:
        """Order the following copies behind a step."""
        event = self._event_of(step)
        if self._stream is not None and event is not None:
            self._stream.wait_event(event)

    def copy(self, pairs: Pairs) -> None:
        """Start copies (source, target) between host and pool; uint8, each pair of one length."""
        if self._stream is None:
            for source, target in pairs:
                # numpy's is one memcpy on this thread; torch's would wake a second team of OpenMP
                # threads, which spin beside the one that computes.
                np.copyto(target.numpy(), source.numpy())
            return
        with torch.cuda.stream(self._stream):
            if self._copy_at_once(pairs):
                return
            for source, target in pairs:
                target.copy_(source, non_blocking=True)

    def _copy_at_once(self, pairs: Pairs) -> bool:
        if len({source.numel() for source, _ in pairs}) != 1:
            return False
        if not all(side.is_cuda or side.is_pinned() for pair in pairs for side in pair):
            return False
        sources, targets = (
            np.array([pair[side].data_ptr() for pair in pairs], dtype=np.uint64) for side in (0, 1)
        )
        return copy_batch(sources, targets, pairs[0][0].numel())

    def slots(self, arena: ArenaView, slots: Sequence[int], block_bytes: int) -> list[Slot]:
        """The slots' bytes, pinned where the device is CUDA."""
        views: list[Slot] = []
        for slot in slots:
            block, start = torch.from_numpy(arena.block(slot, block_bytes)), slot * PAGE_BYTES
            meeting = arena.segment_bytes - start % arena.segment_bytes
            cuts = list(range(meeting, block_bytes, arena.segment_bytes))
            if self._cuda:
                for offset in (0, *cuts):
                    self._pinned.ensure(arena, start + offset)
            views.append(block.tensor_split(cuts) if cuts else (block,))
        return views

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Have what is launched inside the `with` run in the order of the copies."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> Callable[[], bool]:
        """Asks whether all copies started so far are done."""
        if self._stream is None:
            return _done
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event.query

    def synchronize(self) -> None:
        """Wait until all copies started here are done."""
        if self._stream is not None:
            self._stream.synchronize()


def _done() -> bool:
    return True
