"""Frames on a socket: a header and a message.

A header holds the bytes of the message, the number of the call that it belongs to (0: nobody waits
for an answer), and what it is: the method of a request, the outcome of an answer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum

from ..errors import StorageError

NO_ANSWER = 0
_HEADER = struct.Struct("<III")
_MAX_BYTES = 64 << 20


class Outcome(IntEnum):
    """What an answer is: a message, or the text of an error."""

    DONE = 0
    ERROR = 1


def pack_frame(number: int, code: int, message: bytes) -> bytes:
    """A frame.

    Raises:
        StorageError: the message is longer than a frame may be.
    """
    if len(message) > _MAX_BYTES:
        raise StorageError(f"a message of {len(message)} bytes is longer than {_MAX_BYTES}")
    return _HEADER.pack(len(message), number, code) + message


def take_frames(buffer: bytearray) -> Iterator[tuple[int, int, bytes]]:
    """Remove the whole frames from the front of what has been received.

    Yields:
        `(number, code, message)`.

    Raises:
        StorageError: what lies in the buffer is no frame; the connection is of no use any more.
    """
    while len(buffer) >= _HEADER.size:
        length, number, code = _HEADER.unpack_from(buffer)
        if length > _MAX_BYTES:
            raise StorageError(f"a frame of {length} bytes is longer than {_MAX_BYTES}")
        end = _HEADER.size + length
        if len(buffer) < end:
            return
        message = bytes(buffer[_HEADER.size : end])
        del buffer[:end]
        yield number, code, message
