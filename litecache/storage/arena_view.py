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

import mmap
import os

import numpy as np
import numpy.typing as npt

from ..errors import StorageError
from ..hashing import BlockKey
from .protocol import PAGE_BYTES, PROTOCOL_VERSION, Attachment, SlotState

ENTRY_BYTES = 32
ENTRY_WORDS = ENTRY_BYTES // 8


def pack_word(generation: int, state: int) -> int:
    """Word 0 of a slot table entry."""
    return generation << 8 | state


class ArenaView:
    """Maps the arena named by an attachment.

    Attributes:
        array: uint8 `[arena_bytes]`, all slots; `torch.from_numpy(view.array)` shares it.
        segment_bytes: unit in which the shard allocates memory.

    Raises:
        StorageError: the arena is gone, or speaks another protocol version.
    """

    def __init__(self, attachment: Attachment) -> None:
        if attachment.version != PROTOCOL_VERSION:
            raise StorageError(
                f"shard speaks slot protocol {attachment.version}, this client {PROTOCOL_VERSION}"
            )
        path = attachment.arena_path or f"/proc/{attachment.arena_pid}/fd/{attachment.arena_fd}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"arena {path} cannot be opened: {error}") from error
        try:
            if os.fstat(fd).st_size < attachment.mapping_bytes:
                raise StorageError(f"arena {path} is shorter than {attachment.mapping_bytes} bytes")
            self._map = mmap.mmap(fd, attachment.mapping_bytes)
        finally:
            os.close(fd)
        self.attachment = attachment
        self.segment_bytes = attachment.segment_bytes
        self.array: npt.NDArray[np.uint8] = np.frombuffer(
            self._map, dtype=np.uint8, count=attachment.arena_bytes
        )
        table = memoryview(self._map)[attachment.slot_table_offset :]
        words = attachment.arena_bytes // PAGE_BYTES * ENTRY_WORDS
        self._words = table[: words * 8].cast("Q")
        self._bytes = memoryview(self._map)[: attachment.arena_bytes]

    def buffer(self, slot: int, nbytes: int) -> memoryview:
        """The slot's bytes: writable, page-aligned, shared."""
        start = slot * PAGE_BYTES
        if slot < 0 or start + nbytes > len(self._bytes):
            raise StorageError(f"slot={slot} with {nbytes} bytes lies outside the arena")
        return self._bytes[start : start + nbytes]

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

    def holds(self, slot: int, generation: int) -> bool:
        """Whether the slot is READY under `generation`: one load, for the check after a copy."""
        return bool(self._words[slot * ENTRY_WORDS] == pack_word(generation, SlotState.READY))

    def state(self, slot: int, generation: int) -> SlotState:
        """State of the slot under `generation`; FREE when the slot has moved on."""
        word = self._words[slot * ENTRY_WORDS]
        return SlotState(word & 0xFF) if word >> 8 == generation else SlotState.FREE

    def close(self) -> None:
        """Unmap, or as soon as the last array or tensor made from it is gone."""
        self._words.release()
        self._bytes.release()
        self.array = np.empty(0, np.uint8)
        # a tensor over the mapping may still live: the mapping then goes with it
        try:
            self._map.close()
        except BufferError:
            return
