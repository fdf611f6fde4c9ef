"""A shard's folder: its lock, its superblock, its permissions.

Files: `lock`, `superblock`, `slab`, `snapshot`, `journal`, all 0600 in a 0700 folder. The lock is
an flock on an open file: it ends with the process, however that dies, and also keeps two stores of
one process apart. The superblock states the format and the segment size, nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct

import xxhash

from ..errors import ConfigError, StorageFormatError, StorageFullError, StorageLockedError
from .files import Files

FORMAT_VERSION = 1
_MAGIC = b"LCSLAB\r\n"
_SUPERBLOCK = struct.Struct("<8sIIQ")
SUPERBLOCK_BYTES = 4096
FILE_NAMES = ("superblock", "slab", "snapshot", "journal")


def disk_room_bytes(path: str) -> int:
    """Bytes free on the file system that `path` is or will be on."""
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize


def disk_used_bytes(folder: str) -> int:
    """Bytes that the files of a folder take on the disk."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


class Folder:
    """Opens a shard's folder exclusively, making it when it is missing.

    Args:
        files: the file system.
        path: absolute path of the folder.
        storage_bytes: what the shard may come to take; refused when the disk has too little.
        segment_bytes: for a new store; an old one keeps its own (`segment_bytes` says which).

    Attributes:
        intact: what the last owner wrote is all there: it closed cleanly, or the machine has run
            on since. Otherwise a power cut may have kept a write and lost its record.

    Raises:
        ConfigError: the path is not absolute, or not a folder.
        StorageFullError: the disk has too little room for `storage_bytes`.
        StorageLockedError: another live store holds the folder.
        StorageFormatError: the folder holds another format.
    """

    def __init__(self, files: Files, path: str, storage_bytes: int, segment_bytes: int) -> None:
        if not os.path.isabs(path):
            raise ConfigError("storage_dir", path, "an absolute path")
        if os.path.lexists(path) and not os.path.isdir(path):
            raise ConfigError("storage_dir", path, "a folder, or a path where none exists yet")
        room = disk_room_bytes(path) + disk_used_bytes(path)
        if storage_bytes > room:
            raise StorageFullError(
                f"storage_bytes={storage_bytes} is invalid: the disk of {path} has {room} bytes"
            )
        self.path = path
        self.intact = True
        self._files = files
        self._made = self._make()
        self._lock_fd = -1
        try:
            self._lock()
            self.segment_bytes = self._open_superblock(segment_bytes)
        except BaseException:
            self.discard()
            raise

    def _make(self) -> list[str]:
        made: list[str] = []
        path = self.path
        while not os.path.isdir(path):
            if os.path.lexists(path):
                valid = f"a path of folders alone, but {path} is none"
                raise ConfigError("storage_dir", self.path, valid)
            made.append(path)
            path = os.path.dirname(path)
        try:
            for folder in reversed(made):
                os.mkdir(folder, 0o700)
        except FileExistsError:
            return self._make()
        return made

    def file(self, name: str) -> str:
        """Path of one of the folder's files."""
        return f"{self.path}/{name}"

    def _lock(self) -> None:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            self._lock_fd = os.open(self.file("lock"), flags, 0o600)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise StorageFormatError(f"{self.file('lock')} is not a regular file") from error
            raise
        if not stat.S_ISREG(os.fstat(self._lock_fd).st_mode):
            raise StorageFormatError(f"{self.file('lock')} is not a regular file")
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock_fd, 32, 0).decode(errors="replace").partition(" ")[0]
            # whoever holds it owns the files: discard() must leave them alone
            self._made = []
            raise StorageLockedError(
                f"{self.path} is in use by another store (process {holder or 'unknown'})"
            ) from None
        before = os.pread(self._lock_fd, 128, 0).decode(errors="replace").split()
        boot = self._files.boot_id()
        fresh = not self._files.exists(self.file("superblock"))
        self.intact = fresh or before[1:] in (["clean"], [boot])
        self._note(boot)

    def _note(self, state: str) -> None:
        # one sector, synced: an old "clean" must not come back after a power cut
        os.pwrite(self._lock_fd, f"{os.getpid()} {state}".ljust(127).encode() + b"\n", 0)
        os.fdatasync(self._lock_fd)

    def note_clean(self) -> None:
        """Everything is synced and nothing will be written any more."""
        self._note("clean")

    def _open_superblock(self, segment_bytes: int) -> int:
        path = self.file("superblock")
        if not self._files.exists(path):
            others = [n for n in FILE_NAMES[1:] if self._files.exists(self.file(n))]
            if others:
                raise StorageFormatError(f"{self.path} has {', '.join(others)} but no superblock")
            self._write_superblock(segment_bytes)
            return segment_bytes
        return parse_superblock(self._files.read_all(path)[:SUPERBLOCK_BYTES], path)

    def _write_superblock(self, segment_bytes: int) -> None:
        head = _SUPERBLOCK.pack(_MAGIC, FORMAT_VERSION, 0, segment_bytes)
        raw = (head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head))).ljust(
            SUPERBLOCK_BYTES, b"\0"
        )
        path = self.file("superblock")
        fd = self._files.open(path + ".new", create=True)
        try:
            self._files.write(fd, [memoryview(raw)], 0)
            self._files.sync(fd)
            self._files.rename(path + ".new", path)
            self._files.sync_folder(self.path)
        finally:
            self._files.close(fd)

    def close(self) -> None:
        """Give the lock up; the files stay."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def discard(self) -> None:
        """Undo the opening: what was made for it goes away, then the lock."""
        if self._made:
            for name in ("superblock.new", *FILE_NAMES, "lock"):
                self._files.unlink(self.file(name))
            for folder in self._made:
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        self.close()


def parse_superblock(raw: bytes, path: str) -> int:
    """Segment size of a store.

    Raises:
        StorageFormatError: not a superblock, a damaged one, or one of another version.
    """
    size = _SUPERBLOCK.size
    if len(raw) < size + 8 or not raw.startswith(_MAGIC):
        raise StorageFormatError(f"{path} is not a LiteCache superblock")
    if xxhash.xxh3_64_intdigest(raw[:size]) != int.from_bytes(raw[size : size + 8], "little"):
        raise StorageFormatError(f"{path} is damaged: its checksum does not match")
    _, version, _, segment_bytes = _SUPERBLOCK.unpack_from(raw)
    if version != FORMAT_VERSION:
        raise StorageFormatError(
            f"{path} has format {version}, this version reads {FORMAT_VERSION}"
        )
    if segment_bytes % 4096 or not 4096 <= segment_bytes <= 1 << 40:
        raise StorageFormatError(f"{path} states segments of {segment_bytes} bytes")
    return int(segment_bytes)
