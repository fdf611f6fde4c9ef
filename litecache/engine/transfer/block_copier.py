"""Copies blocks between a device and host memory, as bytes, off the compute stream.

On CUDA a copier owns a stream and registers the arena's segments as pinned memory when it first
touches them, so that copies run at the link's speed. On CPU the copies are plain memcpys. Whether
pool and tiers hold the same bytes is `codec.py`'s affair.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from litecache.kernels.batch_copy import copy_batch
from litecache.storage.arena.view import ArenaView
from litecache.storage.protocol import PAGE_BYTES

logger = logging.getLogger(__name__)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Slot = Sequence[torch.Tensor]
"""A slot's bytes, uint8, in one piece or cut where two of the arena's segments meet.

Segments are pinned one by one, and CUDA refuses a copy that leaves a range pinned in one piece.
"""


class ArenaSlots:
    """Slots of one arena, the bytes of a block in each.

    Told by numbers and not by a view a slot: a view costs the host more than the copy it is for.

    Args:
        arena: where they lie.
        slots: their numbers, `[n]`.
        nbytes: of every block.
        pinned: CUDA knows the memory.

    Attributes:
        starts: of each slot, bytes into the arena, int64 `[n]`.
        cut: bool `[n]`, which slots lie in several segments.
    """

    def __init__(
        self, arena: ArenaView, slots: Sequence[int] | Numbers, nbytes: int, *, pinned: bool = False
    ) -> None:
        self.arena, self.nbytes, self.pinned = arena, nbytes, pinned
        self.slots = np.asarray(slots, dtype=np.int64)
        self.starts = self.slots * PAGE_BYTES
        self.cut = self.starts // arena.segment_bytes != self._ends // arena.segment_bytes

    @property
    def _ends(self) -> Numbers:
        return self.starts + self.nbytes - 1

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, part: slice | Mask) -> ArenaSlots:
        return ArenaSlots(self.arena, self.slots[part], self.nbytes, pinned=self.pinned)

    @property
    def segments(self) -> list[int]:
        """Of the arena, those that the slots touch."""
        firsts, lasts = (
            np.unique(at // self.arena.segment_bytes) for at in (self.starts, self._ends)
        )
        touched = set(firsts.tolist()) | set(lasts.tolist())
        if self.nbytes > self.arena.segment_bytes:  # whole segments in between
            for start in self.starts[self.cut].tolist():
                end = start + self.nbytes - 1
                touched.update(
                    range(start // self.arena.segment_bytes, end // self.arena.segment_bytes + 1)
                )
        return sorted(touched)

    def addresses(self) -> npt.NDArray[np.uint64]:
        """Of each slot's first byte in this process, `[n]`."""
        return (self.starts + self.arena.array.ctypes.data).astype(np.uint64)

    def pieces(self) -> list[Slot]:
        """Views of the slots' bytes, cut where segments meet."""
        views: list[Slot] = []
        for slot, start in zip(self.slots.tolist(), self.starts.tolist(), strict=True):
            block = torch.from_numpy(self.arena.block(slot, self.nbytes))
            meeting = self.arena.segment_bytes - start % self.arena.segment_bytes
            cuts = list(range(meeting, self.nbytes, self.arena.segment_bytes))
            views.append(block.tensor_split(cuts) if cuts else (block,))
        return views


HostBlocks = ArenaSlots | Sequence[Slot]
"""Blocks in host memory: slots of an arena, or bytes that came in a message."""


@dataclass(frozen=True)
class Rows:
    """Blocks on the device: rows `index`, int64 `[n]`, of a buffer, uint8 `[blocks, nbytes]`."""

    buffer: torch.Tensor
    index: Numbers

    def __getitem__(self, part: slice | Mask) -> Rows:
        return Rows(self.buffer, self.index[part])

    def addresses(self) -> npt.NDArray[np.uint64]:
        """Of each row's first byte, `[n]`."""
        stride = self.buffer.stride(0) * self.buffer.element_size()
        return (self.buffer.data_ptr() + self.index * stride).astype(np.uint64)


@dataclass(frozen=True)
class Mark:
    """A place in the order of a copier's copies; on a CPU they are done as soon as they began."""

    event: torch.cuda.Event | None

    def passed(self) -> bool:
        """Everything in front of it is done."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until it is passed."""
        if self.event is not None:
            self.event.synchronize()


class Lane:
    """Work on a device that runs in its own order: a stream; on a CPU it is done as it begins.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self) -> contextlib.AbstractContextManager[Any]:
        """What is launched inside the `with` is of this lane."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def mark(self) -> Mark:
        """Behind all that was launched so far."""
        if self.stream is None:
            return Mark(None)
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return Mark(event)

    def after(self, mark: Mark) -> None:
        """What is launched from here on begins behind a mark of another lane."""
        if self.stream is not None and mark.event is not None:
            self.stream.wait_event(mark.event)

    def synchronize(self) -> None:
        """Wait until all of it is done."""
        if self.stream is not None:
            self.stream.synchronize()


class PinnedArenas:
    """Registers arena segments with CUDA, once per process and segment."""

    def __init__(self) -> None:
        # Re-entrant: the finalizer may run while this very thread holds the lock.
        self._lock = threading.RLock()
        self._registered: dict[int, dict[int, int]] = {}

    def ensure(self, arena: ArenaView, segment: int) -> bool:
        """Pin a segment; False when the driver refuses."""
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

    Attributes:
        device: of the pools.
        copies: the lane of the copies.
    """

    def __init__(
        self,
        device: torch.device,
        event_of: Callable[[int], torch.cuda.Event | None],
        pinned: PinnedArenas,
    ) -> None:
        self.device = device
        self.copies = Lane(device)
        self._cuda = device.type == "cuda"
        self._event_of = event_of
        self._pinned = pinned

    def in_order(self, steps: Numbers) -> Iterator[Numbers]:
        """Places of blocks by when they may be copied to; in between copies wait for a step.

        Args:
            steps: int64 `[n]`, the last step that uses each block.
        """
        first = 0
        order = np.argsort(steps, kind="stable")
        known = reversed(np.unique(steps).tolist())
        under_way = list(itertools.takewhile(lambda step: self._event_of(step) is not None, known))
        for step in reversed(under_way):
            begins = int(np.searchsorted(steps[order], step))
            if begins > first:
                yield order[first:begins]
            self.copies.after(Mark(self._event_of(step)))
            first = begins
        if first < len(order):
            yield order[first:]

    def copy(self, rows: Rows, slots: HostBlocks, *, save: bool) -> None:
        """Start to copy blocks of the device to host memory, or with `save=False` from there."""
        if self.copies.stream is None:
            return _copy_on_host(rows, slots, save=save)
        with self.copies.run():
            if isinstance(slots, ArenaSlots):
                if slots.pinned and not slots.cut.any():  # as a rule
                    if _copy_at_once(rows, slots, save=save):
                        return
                elif slots.pinned and _copy_at_once(rows[~slots.cut], slots[~slots.cut], save=save):
                    rows, slots = rows[slots.cut], slots[slots.cut]
                slots = slots.pieces()
            for row, pieces in zip(rows.index.tolist(), slots, strict=True):
                block = rows.buffer[row]
                for start, piece in zip(_starts(pieces), pieces, strict=True):
                    part = block[start : start + len(piece)]
                    source, target = (part, piece) if save else (piece, part)
                    target.copy_(source, non_blocking=True)

    def slots(
        self, arena: ArenaView, slots: Sequence[int] | Numbers, block_bytes: int
    ) -> ArenaSlots:
        """Slots to copy from or to, pinned where the device is CUDA."""
        made = ArenaSlots(arena, slots, block_bytes)
        segments = made.segments
        arena.touch(segments)
        if self._cuda:
            refused = [one for one in segments if not self._pinned.ensure(arena, one)]
            made.pinned = not refused
        return made


def _starts(pieces: Slot) -> Iterator[int]:
    return itertools.accumulate((len(piece) for piece in pieces[:-1]), initial=0)


def _copy_at_once(rows: Rows, slots: ArenaSlots, *, save: bool) -> bool:
    places = (rows.addresses(), slots.addresses())
    return not len(slots) or copy_batch(*(places if save else places[::-1]), slots.nbytes)


def _copy_on_host(rows: Rows, slots: HostBlocks, *, save: bool) -> None:
    # numpy's copy is one memcpy on this thread; torch's would wake a second team of OpenMP
    # threads, which spin beside the one that computes.
    pool = rows.buffer.numpy()
    if not isinstance(slots, ArenaSlots):
        for row, pieces in zip(rows.index.tolist(), slots, strict=True):
            for start, piece in zip(_starts(pieces), pieces, strict=True):
                part, other = pool[row, start : start + len(piece)], piece.numpy()
                np.copyto(*((other, part) if save else (part, other)))
        return
    memory, nbytes = slots.arena.array, slots.nbytes
    for row, start in zip(rows.index.tolist(), slots.starts.tolist(), strict=True):
        part, other = pool[row], memory[start : start + nbytes]
        np.copyto(*((other, part) if save else (part, other)))
