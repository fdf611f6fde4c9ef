"""Copies blocks between a GPU pool and host memory, as bytes, off the compute stream.

On CUDA a copier owns a stream and registers the arena's segments as pinned memory when it first
touches them, so that copies run at the link's speed. On CPU the copies are plain memcpys.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from litecache.engine.kv_layout import KVGroup
from litecache.kernels.batch_copy import copy_batch
from litecache.storage.arena.view import ArenaView
from litecache.storage.protocol import PAGE_BYTES

logger = logging.getLogger(__name__)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Codec(Protocol):
    """Between a block's bytes in the pool and its bytes in RAM and on disk."""

    def tier_bytes(self, group: KVGroup) -> int:
        """Bytes of a block of a group in the lower tiers."""
        ...

    def save(self, copier: BlockCopier, pairs: Pairs) -> None:
        """Start to write blocks of one group's pool into slots: (pool, slot)."""
        ...

    def load(self, copier: BlockCopier, pairs: Pairs) -> None:
        """The inverse: (slot, pool)."""
        ...


class SameBytes:
    """The codec of tiers that hold what the pool holds."""

    def tier_bytes(self, group: KVGroup) -> int:
        """As many."""
        return group.block_bytes

    def save(self, copier: BlockCopier, pairs: Pairs) -> None:
        """A plain copy."""
        copier.copy(pairs)

    def load(self, copier: BlockCopier, pairs: Pairs) -> None:
        """A plain copy."""
        copier.copy(pairs)


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
        """Start copies (source, target) between host and pool; all uint8 `[block_bytes]`."""
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

    def slots(self, arena: ArenaView, slots: Sequence[int], block_bytes: int) -> list[torch.Tensor]:
        """The slots' bytes as tensors, pinned where the device is CUDA."""
        views = []
        for slot in slots:
            if self._cuda:
                self._pinned.ensure(arena, slot * PAGE_BYTES)
            views.append(torch.from_numpy(arena.block(slot, block_bytes)))
        return views

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
