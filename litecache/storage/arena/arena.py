"""The shard's side of the arena: shared memory, its growth by segments, the slot table.

A memfd where there is one (no name, no mount limit, nothing to sweep after a kill; others open it
through `/proc/PID/fd`), a `/dev/shm` file otherwise. Pages exist only once a segment is grown:
`SharedMapping.make` answers ENOSPC where touching memory would end in SIGBUS. The store's lock
guards the slot table; `grow` runs outside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import struct

from ...errors import StorageError, StorageFullError
from ...hashing import BlockKey
from ...machine_memory import available_memory_bytes
from ..protocol import PAGE_BYTES, PROTOCOL_VERSION, Attachment, SlotState
from .view import ENTRY_WORDS, SlotMemory, arena_name, mapping_bytes, pack_word

logger = logging.getLogger(__name__)

_SHM = "/dev/shm"
_KEY = struct.Struct("<QQ")


def sweep_shm() -> None:
    """Remove the fallback files of processes that were killed; their clients keep the memory.

    A live owner holds a lock on its file, which also tells it apart in another PID namespace.
    """
    for name in os.listdir(_SHM):
        made = re.fullmatch(r"litecache-(\d+)-[0-9a-f]+", name)
        if made is None or os.path.exists(f"/proc/{made[1]}"):
            continue
        with contextlib.suppress(OSError):
            fd = os.open(f"{_SHM}/{name}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                if os.fstat(fd).st_uid == os.geteuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(f"{_SHM}/{name}")
                    logger.info("%s/%s was left by a killed process: removed", _SHM, name)
            finally:
                os.close(fd)


class Arena(SlotMemory):
    """Owns the shared memory of one shard.

    Args:
        arena_bytes: bytes of slots at most, a multiple of `segment_bytes`.
        segment_bytes: unit of growth.
        epoch: of the shard; part of the fallback file's name.
        use_memfd: False forces the `/dev/shm` file.

    Raises:
        StorageFullError: there is too little memory for `arena_bytes`.
    """

    def __init__(
        self, arena_bytes: int, segment_bytes: int, epoch: int, *, use_memfd: bool = True
    ) -> None:
        room = available_memory_bytes()
        if arena_bytes > room:
            raise StorageFullError(
                f"ram_bytes={arena_bytes} is invalid: {room} bytes of memory are available"
            )
        self.epoch = epoch
        self.path: str | None = None
        self._fd = self._create(arena_bytes, use_memfd and hasattr(os, "memfd_create"))
        try:
            os.ftruncate(self._fd, mapping_bytes(arena_bytes))
            super().__init__(self._fd, arena_bytes, segment_bytes)
        except BaseException:
            self._remove()
            raise

    def _create(self, arena_bytes: int, memfd: bool) -> int:
        if memfd:
            with contextlib.suppress(OSError):
                fd = os.memfd_create(arena_name(self.epoch), os.MFD_CLOEXEC)
                os.fchmod(fd, 0o600)
                return fd
        sweep_shm()
        stat = os.statvfs(_SHM)
        room = stat.f_bavail * stat.f_frsize
        if room < mapping_bytes(arena_bytes):
            raise StorageFullError(
                f"ram_bytes={arena_bytes} is invalid: {_SHM} has {room} bytes left"
            )
        self.path = f"{_SHM}/litecache-{os.getpid()}-{self.epoch:x}"
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return fd

    def attachment(self, client_id: int) -> Attachment:
        """What a client needs to map the arena."""
        status = os.fstat(self._fd)
        return Attachment(
            version=PROTOCOL_VERSION,
            client_id=client_id,
            epoch=self.epoch,
            arena_pid=os.getpid(),
            arena_fd=self._fd,
            arena_path=self.path,
            arena_bytes=self.arena_bytes,
            segment_bytes=self.segment_bytes,
            arena_device=status.st_dev,
            arena_inode=status.st_ino,
        )

    def grow(self, segments: range) -> None:
        """Make the memory of segments and of their slot table entries exist, faulted in.

        Raises:
            OSError: ENOSPC or ENOMEM; the segments do not exist.
        """
        slots, table = self._ranges(segments.start, segments.stop - 1)
        self._mapping.make(self._fd, *table)
        self._mapping.make(self._fd, *slots)

    def resident_bytes(self) -> int:
        """Bytes of shared memory that exist."""
        return os.fstat(self._fd).st_blocks * 512

    def buffer(self, slot: int, nbytes: int) -> memoryview:
        """A slot's bytes; StorageError once the arena is closed."""
        memory = self.array[slot * PAGE_BYTES : slot * PAGE_BYTES + nbytes]
        if len(memory) != nbytes:
            raise StorageError(f"slot={slot} with {nbytes} bytes: the arena is closed")
        return memory.data

    def set_entry(
        self, slot: int, generation: int, state: SlotState, key: BlockKey | None, nbytes: int
    ) -> None:
        """Give a slot to new contents: word 0 without a promise, the key, word 0 again."""
        words, at, word = self._words, slot * ENTRY_WORDS, generation << 8
        words[at] = word | SlotState.FREE
        words[at + 1], words[at + 2] = _KEY.unpack(key) if key else (0, 0)
        words[at + 3] = nbytes
        words[at] = word | state

    def set_state(self, slot: int, generation: int, state: SlotState) -> None:
        """Change the state under the same contents: one store."""
        self._words[slot * ENTRY_WORDS] = pack_word(generation, state)

    def close(self) -> None:
        """Give the memory back as soon as no client maps it."""
        super().close()
        self._remove()

    def _remove(self) -> None:
        os.close(self._fd)
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
