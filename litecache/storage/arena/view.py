"""A shard's arena as any process sees it: slot bytes and the slot table, through one mapping.

Memory ordering of the slot table. An entry is 32 bytes, 8-byte aligned: word 0 is
`generation << 8 | state`, words 1 and 2 are the key, word 3 is the block's bytes. Only the shard
writes. It first stores word 0 with the new generation and a state that promises nothing
(RESERVED, LOADING, FREE), then the key, and word 0 again with the final state LAST, each store a
single aligned 8-byte move. On x86 stores become visible in program order; on weaker machines the
interpreter's lock, taken between the stores by every byte code evaluation switch and by the shard's
own mutex around each transition, is the barrier. A reader loads word 0, the key, then word 0 again
and retries while the two differ, so it never pairs a key with another generation. Block bytes are
ordered the same way: the I/O that fills a slot completes before READY is stored.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ...errors import StorageError
from ...hashing import BlockKey
from ..protocol import PAGE_BYTES, PROTOCOL_VERSION, Attachment, SlotRef, SlotState
from .mapping import SharedMapping

ENTRY_BYTES = 32
ENTRY_WORDS = ENTRY_BYTES // 8
_STATES = tuple(SlotState)
_FIRST_PAUSE_S = 0.0001
_LONGEST_PAUSE_S = 0.002


def pack_word(generation: int, state: int) -> int:
    """Word 0 of a slot table entry."""
    return generation << 8 | state


class SlotMemory:
    """Slots and their table in one mapping of the arena's file.

    Attributes:
        array: uint8 `[arena_bytes]`, all slots; `torch.from_numpy(array)` shares it.
        arena_bytes, segment_bytes: its length, and the unit in which memory is allocated.

    Raises:
        OSError: the kernel cannot map it.
    """

    def __init__(self, fd: int, arena_bytes: int, segment_bytes: int) -> None:
        self.arena_bytes = arena_bytes
        self.segment_bytes = segment_bytes
        self._mapping = SharedMapping(fd, mapping_bytes(arena_bytes), arena_bytes)
        self.array: npt.NDArray[np.uint8] = self._mapping.array[:arena_bytes]
        table = self._mapping.array[arena_bytes:][: arena_bytes // PAGE_BYTES * ENTRY_BYTES]
        self._words = table.data.cast("Q")
        self._table = table.view(np.uint64).reshape(-1, ENTRY_WORDS)

    def _ranges(self, first: int, last: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """`(start, length)` of segments `first` to `last`, and of their pages of the slot table."""
        start = first * self.segment_bytes
        end = min((last + 1) * self.segment_bytes, self.arena_bytes)
        low = start // PAGE_BYTES * ENTRY_BYTES // PAGE_BYTES
        high = -(-end // PAGE_BYTES * ENTRY_BYTES // PAGE_BYTES)
        table = self.arena_bytes + low * PAGE_BYTES, (high - low) * PAGE_BYTES
        return (start, end - start), table

    def entry(self, slot: int) -> tuple[SlotState, int, BlockKey]:
        """`(state, generation, key)` of a slot, consistent with each other."""
        at = slot * ENTRY_WORDS
        words = self._words
        while True:
            word = words[at]
            low, high = words[at + 1], words[at + 2]
            if words[at] == word:
                key = low.to_bytes(8, "little") + high.to_bytes(8, "little")
                return SlotState(word & 0xFF), word >> 8, key

    def close(self) -> None:
        """Unmap, or as soon as the last array or tensor made from it is gone."""
        self.array = np.empty(0, np.uint8)
        self._table = np.empty((0, ENTRY_WORDS), np.uint64)
        self._words.release()
        self._mapping.close()


def mapping_bytes(arena_bytes: int) -> int:
    """Bytes of an arena's file: its slots and their table, in whole pages."""
    return arena_bytes + -(-arena_bytes // PAGE_BYTES * ENTRY_BYTES // PAGE_BYTES) * PAGE_BYTES


def arena_name(epoch: int) -> str:
    """Name of a shard's memfd."""
    return f"litecache-{epoch:x}"


def _open_arena(attachment: Attachment) -> int:
    """Open the file that an attachment names, and no other.

    In another PID namespace, or after the shard has died, the process and descriptor may be
    anybody's: the link has to tell this epoch's memfd before it is opened at all.
    """
    path = attachment.arena_path or f"/proc/{attachment.arena_pid}/fd/{attachment.arena_fd}"
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        if attachment.arena_path is not None:
            flags |= os.O_NOFOLLOW
        else:
            link, expected = os.readlink(path), f"/memfd:{arena_name(attachment.epoch)} (deleted)"
            if link != expected:
                raise StorageError(
                    f"arena {path} is {link[:200]!r} and not {expected!r}: the shard has died, or "
                    "runs in another PID namespace"
                )
        fd = os.open(path, flags)
    except OSError as error:
        raise StorageError(f"arena {path} cannot be opened: {error}") from error
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) == (attachment.arena_device, attachment.arena_inode):
        least = mapping_bytes(attachment.arena_bytes)
        if status.st_size >= least:
            return fd
        fault = f"is shorter than {least} bytes"
    else:
        fault = "is another file than the shard's"
    os.close(fd)
    raise StorageError(f"arena {path} {fault}")


class ArenaView(SlotMemory):
    """A client's mapping of the arena named by an attachment.

    Raises:
        StorageError: the arena is gone, or speaks another protocol version.
    """

    def __init__(self, attachment: Attachment) -> None:
        if attachment.version != PROTOCOL_VERSION:
            raise StorageError(
                f"shard speaks slot protocol {attachment.version}, this client {PROTOCOL_VERSION}"
            )
        fd = _open_arena(attachment)
        try:
            super().__init__(fd, attachment.arena_bytes, attachment.segment_bytes)
        finally:
            os.close(fd)
        self.attachment = attachment
        self._mapped: set[int] = set()

    def block(self, slot: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """The slot's bytes, uint8 `[nbytes]`: writable, page-aligned, shared.

        Raises:
            StorageError: they lie outside the arena.
        """
        start = slot * PAGE_BYTES
        end = start + nbytes
        if slot < 0 or end > len(self.array):
            raise StorageError(f"slot={slot} with {nbytes} bytes lies outside the arena")
        first, last = start // self.segment_bytes, (end - 1) // self.segment_bytes
        if first not in self._mapped or last not in self._mapped:
            self.touch(range(first, last + 1))
        return self.array[start:end]

    def touch(self, segments: Iterable[int]) -> None:
        """Map segments in which leased slots lie, if that was not done.

        They exist, so this makes nothing: it spares a fault on each page, which a copy would
        otherwise pay once in every process.
        """
        for segment in segments:
            if segment not in self._mapped:
                for piece in self._ranges(segment, segment):
                    self._mapping.populate(*piece)
                self._mapped.add(segment)

    def buffer(self, slot: int, nbytes: int) -> memoryview:
        """`block` as a memoryview."""
        return self.block(slot, nbytes).data

    def holds(self, slot: int, generation: int) -> bool:
        """Whether the slot is READY under `generation`: one load, for the check after a copy."""
        return bool(self._words[slot * ENTRY_WORDS] == pack_word(generation, SlotState.READY))

    def state(self, slot: int, generation: int) -> SlotState:
        """State of the slot under `generation`; FREE when the slot has moved on."""
        word = self._words[slot * ENTRY_WORDS]
        return _STATES[word & 0xFF] if word >> 8 == generation else SlotState.FREE

    def states(
        self, slots: npt.NDArray[np.int64], generations: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint8]:
        """`state` of many slots, `[n]`."""
        words = self._table[slots, 0]
        return np.where(words >> np.uint64(8) == generations, words & np.uint64(0xFF), 0).astype(
            np.uint8
        )

    def confirm(
        self,
        slots: npt.NDArray[np.int64],
        generations: npt.NDArray[np.uint64],
        keys: npt.NDArray[np.uint64],
    ) -> npt.NDArray[np.bool_]:
        """Which slots hold these contents, for the check after a copy.

        Args:
            slots, generations: `[n]`, as leased.
            keys: the two little-endian halves of each slot's key, `[n, 2]`.
        """
        entries = self._table[slots]
        same = entries[:, 0] >> np.uint64(8) == generations
        same &= (entries[:, 1:3] == keys).all(axis=1)
        # the key was read under that generation if it stands there still
        same &= self._table[slots, 0] >> np.uint64(8) == generations
        told: npt.NDArray[np.bool_] = same
        return told

    def wait(
        self,
        slots: Sequence[SlotRef],
        timeout_s: float = 30.0,
        is_lost: Callable[[], bool] = lambda: False,
    ) -> list[bool]:
        """Sleep until leased slots have stopped loading; the shard is not asked.

        Args:
            slots: as `stage` answered.
            timeout_s: what is still loading then counts as failed.
            is_lost: tells that the shard is gone, so that nothing will change any more.

        Returns:
            Per slot whether it is READY under its generation.
        """
        deadline = time.monotonic() + timeout_s
        pause_s = _FIRST_PAUSE_S
        for slot, generation in slots:
            while self.state(slot, generation) is SlotState.LOADING:
                left = deadline - time.monotonic()
                if left <= 0 or is_lost():
                    break
                # progress shows in shared memory only; there is nothing to block on
                time.sleep(min(pause_s, left))
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        return [self.holds(slot, generation) for slot, generation in slots]
