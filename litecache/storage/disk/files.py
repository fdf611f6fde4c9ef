"""Every system call on a store's files, in one place.

The store reaches the disk only through a `Files` object, so that tests can put a file system below
it that tears writes, fails, and loses power (`tests/storage/fault_files.py`). Files are opened
without following symlinks and must be regular: a store folder is data, not instructions.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence

from ...errors import StorageError, StorageFormatError

logger = logging.getLogger(__name__)

IOV_MAX = 1024
Call = Callable[[int, Sequence[memoryview], int], int]
_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
# Python's os has posix_fallocate, which cannot punch
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Files:
    """The files of one folder. Methods raise OSError; offsets and lengths are bytes.

    Attributes:
        folder: descriptor of the folder, set by whoever opened it.
    """

    folder = -1
    _access = os.O_RDWR

    # as they are: a descriptor, and an offset and a length in bytes or the file's new length
    close = staticmethod(os.close)
    allocate = staticmethod(os.posix_fallocate)  # ENOSPC here rather than in the middle of a write
    truncate = staticmethod(os.ftruncate)
    sync = staticmethod(os.fdatasync)

    def open(self, name: str, *, create: bool = False, direct: bool = False) -> int:
        """Open for reading and writing (`ReadOnlyFiles` for reading), 0600 when created.

        Args:
            name: of the file in the folder.
            create: make it when it is missing.
            direct: try O_DIRECT first; `is_direct` says whether it held.

        Raises:
            StorageFormatError, StorageError: see `open_private`.
        """
        flags = self._access | (os.O_CREAT if create else 0)
        owner = os.fstat(self.folder).st_uid
        try:
            more = os.O_DIRECT if direct else 0
            return open_private(self.folder, name, flags | more, owner)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
        logger.info("no O_DIRECT for %s: buffered I/O instead", name)
        return open_private(self.folder, name, flags, owner)

    @contextlib.contextmanager
    def opened(self, name: str, *, create: bool = False) -> Iterator[int]:
        """`open` a file for a while."""
        fd = self.open(name, create=create)
        try:
            yield fd
        finally:
            self.close(fd)

    def is_direct(self, fd: int) -> bool:
        """Whether the descriptor bypasses the page cache."""
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)

    def size(self, fd: int) -> int:
        """Length of the file."""
        return os.fstat(fd).st_size

    def exists(self, name: str) -> bool:
        """Whether anything has the name, a dangling symlink included."""
        return self._find(name) is not None

    def is_at(self, fd: int, name: str) -> bool:
        """Whether the open file still is the one of that name."""
        there = self._find(name)
        return there is not None and os.path.samestat(there, os.fstat(fd))

    def _find(self, name: str) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=self.folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill buffers from `offset`; fewer bytes than asked for only at the end of the file."""
        return self._transfer(os.preadv, fd, buffers, offset)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Write all buffers at `offset`."""
        return self._transfer(os.pwritev, fd, buffers, offset)

    @staticmethod
    def _transfer(call: Call, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        total = sum(map(len, buffers))
        done = call(fd, buffers, offset)
        while done < total:
            rest, skipped = [], 0
            for buffer in buffers:
                if skipped + len(buffer) > done:
                    rest.append(buffer[max(0, done - skipped) :])
                skipped += len(buffer)
            moved = call(fd, rest, offset + done)
            if moved == 0:
                break
            done += moved
        return done

    def drop_cache(self, fd: int, offset: int, length: int) -> None:
        """Tell the kernel that buffered pages of the range are not needed again."""
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Give the disk space of a range back; it reads as zeros, the file keeps its length."""
        if _LIBC.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def rename(self, source: str, target: str) -> None:
        """Replace `target` by `source` atomically."""
        os.rename(source, target, src_dir_fd=self.folder, dst_dir_fd=self.folder)

    def unlink(self, name: str) -> None:
        """Remove a file; a missing one is fine."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.folder)

    def boot_id(self) -> str:
        """Changes when the machine starts: then what was not synced may be lost."""
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()

    def sync_folder(self) -> None:
        """Force renames and new names in the folder to the device."""
        os.fsync(self.folder)

    def read_all(self, name: str, most_bytes: int) -> bytes:
        """A whole file; empty when there is none, cut off after what its format can hold.

        Raises:
            OSError: it cannot be read to its end: half a journal must not pass for a whole one.
        """
        if not self.exists(name):
            return b""
        with self.opened(name) as fd:
            raw = bytearray(min(self.size(fd), most_bytes))
            if raw and (got := self.read(fd, [memoryview(raw)], 0)) != len(raw):
                raise OSError(errno.EIO, f"only {got} of {len(raw)} bytes of {name} can be read")
        return bytes(raw)


class ReadOnlyFiles(Files):
    """Files that are looked at and not changed; their disk may be mounted for reading alone."""

    _access = os.O_RDONLY

    def open(self, name: str, *, create: bool = False, direct: bool = False) -> int:
        """Open for reading what is there."""
        return super().open(name, direct=direct)


def open_private(folder: int, name: str, flags: int, owner: int, path: str = "") -> int:
    """Open a regular file that nobody else may have written and that has no second name.

    Args:
        folder: descriptor of the folder.
        name: in the folder.
        flags: of `os.open`.
        owner: uid that the file must have.
        path: what errors call the file.

    Raises:
        StorageFormatError: there is something else than a regular file.
        StorageError: its owner, its mode or its number of names is wrong.
    """
    path = path or name
    try:
        fd = os.open(name, flags | _SAFELY, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise StorageFormatError(f"{path} is not a regular file") from error
        raise
    found = os.fstat(fd)
    mode = stat.S_IMODE(found.st_mode)
    checks = (
        (found.st_uid != owner, f"belongs to uid {found.st_uid}, not to uid {owner}"),
        (mode & 0o077, f"has mode {mode:04o}, others may use it (0600 is private)"),
        (found.st_nlink > 1, f"has {found.st_nlink} names (hard links), one is allowed"),
    )
    wrong = next((text for fails, text in checks if fails), None)
    if wrong is None and stat.S_ISREG(found.st_mode):
        return fd
    os.close(fd)
    if not stat.S_ISREG(found.st_mode):
        raise StorageFormatError(f"{path} is not a regular file")
    raise StorageError(f"{path} of the store is not private: it {wrong}")
