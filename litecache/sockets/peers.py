"""Where sockets are, and who is at the other end.

A socket is a file in a folder of this user alone (0700), so the kernel turns other users away
before they cost anything. Addresses are told by a call, so the folder may be any that is private
and whose paths a socket's address can hold.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_CREDENTIALS = struct.Struct("3i")
_ADDRESS_BYTES = 107
# between `bind` and the name that others know: what is older was left by a kill
_UNFINISHED_S = 60.0


def listen(name: str) -> tuple[socket.socket, str]:
    """A socket that listens, and its path; what killed processes have left there is removed.

    Args:
        name: of the file; must be new among this user's sockets.

    Raises:
        OSError: the name is taken, or there is no folder for it.
    """
    folder = _runtime_folder(len(name.encode()))
    _remove_stale(folder)
    path, unfinished = folder / f"{name}.sock", folder / f".{os.urandom(4).hex()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(unfinished))
        unfinished.chmod(0o600)  # in a folder of mode 0700: nobody else could be faster
        listener.listen()
        # the name appears with who listens, so a name without one is always stale; unlike
        # `rename`, `link` refuses a name that is taken
        os.link(unfinished, path)
    except OSError:
        listener.close()
        raise
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return listener, str(path)


def forget(path: str) -> None:
    """Remove a socket's file once nobody listens there."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def same_user(connection: socket.socket) -> bool:
    """Whether the other process runs as this user, or as root."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(raw)
    return user in (os.getuid(), 0)


def _runtime_folder(name_bytes: int) -> Path:
    """This user's folder: the first place that may be had, is private and has a short path."""
    problem: OSError = FileNotFoundError("no folder for sockets")
    for base in _bases():
        folder = base / f"litecache-{os.getuid()}"
        # the unfinished name is shorter than any whole one
        if len(os.fsencode(folder)) + name_bytes + len("/.sock") > _ADDRESS_BYTES:
            problem = OSError(f"{folder} is too long for the address of a socket")
            continue
        try:
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            found = folder.lstat()
        except OSError as error:
            problem = error
            continue
        private = found.st_uid == os.getuid() and not found.st_mode & 0o077
        if stat.S_ISDIR(found.st_mode) and private:
            return folder
        problem = PermissionError(f"{folder} is no folder of this user alone (mode 0700)")
    raise problem


def _bases() -> Iterator[Path]:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime):
        yield Path(runtime)
    yield from map(Path, dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")))


def _remove_stale(folder: Path) -> None:
    """Remove sockets on which nobody listens."""
    for path in folder.iterdir():
        try:
            found = path.lstat()
            young = time.time() - found.st_mtime < _UNFINISHED_S
            if not stat.S_ISSOCK(found.st_mode) or (path.name.startswith(".") and young):
                continue
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                probe.connect(str(path))
        except ConnectionRefusedError:
            forget(str(path))
        except OSError:
            continue  # gone meanwhile, or so busy that it cannot be asked: it lives
