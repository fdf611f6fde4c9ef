"""A shard's folder: who may reach it, its lock, its superblock.

Files: `lock`, `superblock`, `slab`, `log`, all 0600 in a 0700 folder of the user's own. What is
above it belongs to the user or to root, and no other may rename what is in it; the way down is
walked by descriptors, so that nobody can swap a part of it. The folder itself is locked (flock),
and a `lock` file beside it where a file system cannot lock folders: both end with the process,
however that dies, and also keep two stores of one process apart. The superblock states the format
and the segment size, nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import logging
import os
import pwd
import stat
import struct
from collections.abc import Iterator

import xxhash

from ...errors import (
    ConfigError,
    LiteCacheError,
    StorageFormatError,
    StorageFullError,
    StorageLockedError,
)
from .files import Files, open_private

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_READABLE = (1, 2)
_MAGIC = b"LCSLAB\r\n"
_SUPERBLOCK = struct.Struct("<8sIIQ")
SUPERBLOCK_BYTES = 4096
FILE_NAMES = ("superblock", "slab", "log", "log.new", "snapshot", "journal")


def disk_room_bytes(path: str) -> int:
    """Bytes free on the file system of a folder."""
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


def open_folder(path: str, *, make: bool = False, any_owner: bool = False) -> tuple[int, list[str]]:
    """Walk down to a shard's folder; its descriptor, and the folders that were made.

    Args:
        path: absolute.
        make: make what is missing, 0700.
        any_owner: the folder may be another user's (root reads everybody's).

    Raises:
        ConfigError: `path` is no folder, or somebody else than the user and root may change what is
            on the way there or in it.
        FileNotFoundError: a folder is missing and `make` is not set.
    """

    def refuse(valid: str) -> ConfigError:
        return ConfigError("storage_dir", path, valid)

    if not os.path.isabs(path) or "\0" in path:
        raise refuse("an absolute path")
    path = os.path.normpath(path)
    made: list[str] = []
    fd, at, links = _open_root(), "/", 0
    names = [name for name in path.split("/") if name][::-1]
    # what a symlink names must be there; only behind its end is anything made
    after_link = len(names) + 1
    try:
        while names:
            name = names.pop()
            below, own = os.path.join(at, name), len(names) < after_link
            try:
                child = _child(fd, name, below, made if make and own else None)
            except FileNotFoundError:
                if own:
                    raise
                raise refuse(f"without a symlink to the missing {below} on the way") from None
            except NotADirectoryError:
                raise refuse(
                    f"a folder, or a path where none exists yet ({at} is a file)"
                ) from None
            found = os.fstat(child)
            if not stat.S_ISLNK(found.st_mode):
                os.close(fd)
                fd, at = child, below
                if names and stat.S_ISDIR(found.st_mode):
                    _check_way(found, at, path)
                continue
            links += 1
            target = os.readlink("", dir_fd=child)
            os.close(child)
            if not names:
                raise refuse("a folder itself, no symlink to one")
            if found.st_uid not in (os.geteuid(), 0) or links > 40:
                raise refuse(f"without the symlink {below} of uid {found.st_uid} on the way")
            after_link = min(after_link, len(names))
            names += [part for part in target.split("/") if part not in ("", ".")][::-1]
            if target.startswith("/"):
                os.close(fd)
                fd, at = _open_root(), "/"
        found = os.fstat(fd)
        if not stat.S_ISDIR(found.st_mode):
            raise refuse("a folder, or a path where none exists yet")
        if found.st_uid != os.geteuid() and not any_owner:
            raise refuse(f"a folder of your own, not of uid {found.st_uid}")
        if found.st_mode & 0o022:
            mode = stat.S_IMODE(found.st_mode)
            raise refuse(f"private (mode 0700); others may write: {mode:04o}")
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd), made
    except BaseException:
        _remove_folders(made)
        raise
    finally:
        os.close(fd)


def _open_root() -> int:
    return os.open("/", os.O_PATH | os.O_DIRECTORY)


def check_folder(storage_dir: str) -> str:
    """The deepest folder that exists on the way to the shards of a `storage_dir`.

    Raises:
        ConfigError: see `open_folder`.
    """
    try:
        fd, _ = open_folder(f"{storage_dir}/shard-0")
    except FileNotFoundError as missing:
        return os.path.dirname(str(missing.filename))
    os.close(fd)
    return storage_dir


def _child(fd: int, name: str, below: str, made: list[str] | None) -> int:
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=fd)
    except FileNotFoundError:
        if made is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such folder", below) from None
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=fd)
        made.append(below)
    return os.open(name, flags, dir_fd=fd)


def _check_way(found: os.stat_result, at: str, path: str) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        valid = f"in folders of your own or root's: {at} belongs to uid {found.st_uid}"
        raise ConfigError("storage_dir", path, valid)
    if not found.st_mode & stat.S_ISVTX and _others_write(found):
        mode = stat.S_IMODE(found.st_mode)
        valid = f"in folders that no other user may write to: {at} has mode {mode:04o}"
        raise ConfigError("storage_dir", path, valid)


def _others_write(found: os.stat_result) -> bool:
    """Whether somebody beside the user and root may write there."""
    if found.st_mode & stat.S_IWOTH:
        return True
    if not found.st_mode & stat.S_IWGRP or not found.st_gid:
        return False
    # distributions give each user a group of their own and let it write
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
        group = grp.getgrgid(found.st_gid)
        members = {*group.gr_mem, *(p.pw_name for p in pwd.getpwall() if p.pw_gid == group.gr_gid)}
    except KeyError:
        # a group without a name, as containers are given one, has no members but who was given it
        return found.st_gid not in (os.getegid(), *os.getgroups())
    return group.gr_name != user or not members <= {user, "root"}


def _remove_folders(made: list[str]) -> None:
    for folder in reversed(made):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


class Folder:
    """Opens a shard's folder exclusively, making it when it is missing.

    Args:
        files: the file system; it names files in this folder from here on.
        path: absolute path of the folder.
        storage_bytes: what a new shard may come to take; refused when the disk has too little. An
            old one opens whatever the room.
        segment_bytes: for a new store; an old one keeps its own (`segment_bytes` says which).

    Attributes:
        clean: the last owner closed it with everything synced.
        version: of the format; `upgrade` makes the present one of an older one.
        intact: what the last owner wrote is all there: it closed cleanly, or the machine has run
            on since. Otherwise a power cut may have kept a write and lost its record.

    Raises:
        ConfigError: the path is not absolute, no folder, or others may change it.
        StorageFullError: the disk has too little room for `storage_bytes`.
        StorageLockedError: another live store holds the folder.
        StorageFormatError: the folder holds another format.
        StorageError: a file of it is not private.
    """

    def __init__(self, files: Files, path: str, storage_bytes: int, segment_bytes: int) -> None:
        self.path = path
        self.intact = True
        self._files = files
        self._lock_fd = -1
        self._fd, self._made = open_folder(path, make=True)
        files.folder = self._fd
        try:
            self._lock()
            os.fchmod(self._fd, 0o700)
            if files.exists("superblock"):
                self.version, self.segment_bytes = read_superblock(files, path)
            else:
                self._check_new(storage_bytes)
                self.write_superblock(segment_bytes)
                self.version, self.segment_bytes = FORMAT_VERSION, segment_bytes
        except BaseException:
            self.discard()
            raise

    def _lock(self) -> None:
        try:
            self._take(self._fd)
        except OSError as error:
            logger.info("%s cannot be locked itself: %s", self.path, error)
        self._take_lock_file()
        before = os.pread(self._lock_fd, 128, 0).decode(errors="replace").split()
        boot = self._files.boot_id()
        fresh = not self._files.exists("superblock")
        self.clean = before[1:] == ["clean"]
        self.intact = fresh or self.clean or before[1:] == [boot]
        self.note(boot)

    def room_bytes(self) -> int:
        """Bytes free on its disk."""
        return disk_room_bytes(self.path)

    def _check_new(self, storage_bytes: int) -> None:
        room = self.room_bytes() + disk_used_bytes(self.path)
        if storage_bytes > room:
            raise StorageFullError(
                f"storage_bytes={storage_bytes} is invalid: the disk of {self.path} has {room} "
                "bytes"
            )
        if others := [name for name in FILE_NAMES[1:] if self._files.exists(name)]:
            raise StorageFormatError(f"{self.path} has {', '.join(others)} but no superblock")

    def _take_lock_file(self) -> None:
        flags, path = os.O_RDWR | os.O_CREAT, f"{self.path}/lock"
        fd = open_private(self._fd, "lock", flags, os.geteuid(), path)
        try:
            self._take(fd)
        except BaseException:
            os.close(fd)
            raise
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
        self._lock_fd = fd

    def _take(self, fd: int) -> None:
        try:
            _take(fd, self._fd, self.path)
        except StorageLockedError:
            # whoever holds it owns the files: discard() must leave them alone
            self._made = []
            raise

    def trouble(self) -> str | None:
        """What has become of the folder under a live store; None: it is in its place.

        A `lock` that was removed is made anew while nobody else has taken one.
        """
        try:
            if not os.path.samestat(os.stat(self.path), os.fstat(self._fd)):
                return "another folder has taken its place"
            if not self._files.exists("superblock"):
                return "its superblock was removed"
        except (FileNotFoundError, NotADirectoryError):
            return "it was removed"
        except OSError as error:
            return f"it cannot be reached: {error}"
        try:
            lock = os.stat("lock", dir_fd=self._fd, follow_symlinks=False)
            if os.path.samestat(lock, os.fstat(self._lock_fd)):
                return None
        except FileNotFoundError:
            logger.warning("%s/lock was removed under a live store: made anew", self.path)
        try:
            self._take_lock_file()
            self.note(self._files.boot_id())
        except (LiteCacheError, OSError) as error:
            return f"its lock was taken: {error}"
        return None

    def note(self, state: str) -> None:
        """Say in `lock` how far the files can be trusted: `clean`, or this start of the machine."""
        # one sector, synced: an old "clean" must not come back after a power cut
        try:
            os.pwrite(self._lock_fd, f"{os.getpid()} {state}".ljust(127).encode() + b"\n", 0)
        except OSError:
            # full, perhaps: no state at all is the one that promises nothing
            os.ftruncate(self._lock_fd, 0)
        os.fdatasync(self._lock_fd)

    def write_superblock(self, segment_bytes: int) -> None:
        """Make this a folder of the present format, durably."""
        head = _SUPERBLOCK.pack(_MAGIC, FORMAT_VERSION, 0, segment_bytes)
        raw = head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
        files = self._files
        with files.opened("superblock.new", create=True) as fd:
            files.write(fd, [memoryview(raw.ljust(SUPERBLOCK_BYTES, b"\0"))], 0)
            files.sync(fd)
            files.rename("superblock.new", "superblock")
            files.sync_folder()

    def close(self) -> None:
        """Give the lock up; the files stay."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = self._files.folder = -1

    def discard(self) -> None:
        """Undo the opening: what was made for it goes away, then the lock."""
        if self._made:
            for name in ("superblock.new", *FILE_NAMES, "lock"):
                self._files.unlink(name)
            _remove_folders(self._made)
        self.close()


_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _take(fd: int, folder: int, path: str) -> None:
    """Lock the folder or its `lock`; StorageLockedError names the process that holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = "unknown"
        with contextlib.suppress(OSError), open(os.open("lock", _LOOK, dir_fd=folder), "rb") as f:
            holder = f.read(32).decode(errors="replace").partition(" ")[0] or holder
        raise StorageLockedError(f"{path} is in use by another store (process {holder})") from None


@contextlib.contextmanager
def held_folder(files: Files, path: str) -> Iterator[None]:
    """Keep stores out of a folder, and change nothing in it: not even what `lock` says of its end.

    Args:
        files: names files in this folder meanwhile.
        path: of the folder.

    Raises:
        ConfigError, OSError: see `open_folder`.
        StorageLockedError: a live store holds it.
    """
    files.folder, _ = open_folder(path)
    held = [files.folder]
    try:
        with contextlib.suppress(FileNotFoundError):
            held.append(os.open("lock", _LOOK, dir_fd=files.folder))
        for fd in held:
            with contextlib.suppress(OSError):  # some file systems lock no folders
                _take(fd, files.folder, path)
        yield
    finally:
        for fd in held:
            os.close(fd)


def read_superblock(files: Files, path: str) -> tuple[int, int]:
    """Format version and segment size of the store in a folder.

    Raises:
        StorageFormatError: not a superblock, a damaged one, or one of another version.
    """
    path += "/superblock"
    raw = files.read_all("superblock", SUPERBLOCK_BYTES)
    size = _SUPERBLOCK.size
    if len(raw) < size + 8 or not raw.startswith(_MAGIC):
        raise StorageFormatError(f"{path} is not a LiteCache superblock")
    if xxhash.xxh3_64_intdigest(raw[:size]) != int.from_bytes(raw[size : size + 8], "little"):
        raise StorageFormatError(f"{path} is damaged: its checksum does not match")
    _, version, _, segment_bytes = _SUPERBLOCK.unpack_from(raw)
    if version not in _READABLE:
        known = " and ".join(map(str, _READABLE))
        raise StorageFormatError(f"{path} has format {version}, this version reads {known}")
    if segment_bytes % 4096 or not 4096 <= segment_bytes <= 1 << 40:
        raise StorageFormatError(f"{path} states segments of {segment_bytes} bytes")
    return int(version), int(segment_bytes)
