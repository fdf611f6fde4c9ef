"""Addresses of Unix sockets, and who is at the other end."""

from __future__ import annotations

import os
import socket
import struct

_CREDENTIALS = struct.Struct("3i")


def abstract(address: str) -> str:
    """The address in the name space that is not a file system and forgets what is closed."""
    return f"\0{address}"


def same_user(connection: socket.socket) -> bool:
    """Whether the other process runs as this user, or as root.

    Abstract addresses have no owner and no mode, so both sides ask the kernel.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(raw)
    return user in (os.getuid(), 0)
