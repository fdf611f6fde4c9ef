"""Frames on a socket: a header and a message, and how much of them a server takes in.

A header holds the bytes of the message, the number of the call that it belongs to (0: nobody waits
for an answer), and what it is: the method of a request, the outcome of an answer.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import TypeVar

import msgpack

from ..errors import GroupError, LiteCacheError, StorageError, describe, restore

T = TypeVar("T")

NO_ANSWER = 0
RECEIVE_BYTES = 1 << 18
MAX_FRAME_BYTES = 64 << 20
MAX_CONNECTIONS = 512
# Over all connections of a server: what has come of frames that are not whole.
MAX_UNFINISHED_BYTES = 256 << 20
# A frame that takes longer to arrive is given up, with its connection.
FRAME_TIMEOUT_S = 30.0
_HEADER = struct.Struct("<III")


class Outcome(IntEnum):
    """What an answer is: a message, or an error."""

    DONE = 0
    ERROR = 1


def pack_frame(number: int, code: int, message: bytes) -> bytes:
    """A frame; StorageError: the message is longer than a frame may be."""
    if len(message) > MAX_FRAME_BYTES:
        raise StorageError(f"a message of {len(message)} bytes is longer than {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(message), number, code) + message


def pack_error(error: BaseException) -> bytes:
    """The message of an answer that is an error: its class, field, value, and what is valid."""
    packed: bytes = msgpack.packb(describe(error))
    return packed


def unpack_error(message: bytes, what: str) -> LiteCacheError:
    """Inverse of `pack_error`: the same class, where this process has it.

    `what` names the call; it stands before what was no LiteCacheError on the other side.
    """
    try:
        names, field, value, valid = msgpack.unpackb(message, use_list=False, max_ext_len=0)
    except Exception:  # what msgpack raises has no root
        return GroupError(f"{what} failed, and its error cannot be read")
    return restore(names, field if names else f"{what} failed: {field}", value, valid)


def handler_of(methods: Mapping[int, T], code: int) -> T:
    """What answers the calls of a number; StorageError where nothing does."""
    if code not in methods:
        raise StorageError(f"there is no call {code}")
    return methods[code]


def take_frames(buffer: bytearray) -> Iterator[tuple[int, int, bytes]]:
    """Remove the whole frames, as `(number, code, message)`, from the front of what has come.

    Raises:
        StorageError: what lies in the buffer is no frame; the connection is of no use any more.
    """
    while len(buffer) >= _HEADER.size:
        length, number, code = _HEADER.unpack_from(buffer)
        if length > MAX_FRAME_BYTES:
            raise StorageError(f"a frame of {length} bytes is longer than {MAX_FRAME_BYTES}")
        end = _HEADER.size + length
        if len(buffer) < end:
            return
        message = bytes(buffer[_HEADER.size : end])
        del buffer[:end]
        yield number, code, message


class Intake:
    """Bounds what all connections of a server hold; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connections_left, self._bytes_left = MAX_CONNECTIONS, MAX_UNFINISHED_BYTES

    @contextlib.contextmanager
    def connection(self) -> Iterator[IncomingFrames]:
        """What comes on one more connection; StorageError: there are too many."""
        with self._lock:
            if not self._connections_left:
                raise StorageError("there are too many connections")
            self._connections_left -= 1
        frames = IncomingFrames(self)
        try:
            yield frames
        finally:
            self.hold(-frames.held)
            with self._lock:
                self._connections_left += 1

    def hold(self, more_bytes: int) -> None:
        """Count bytes that are kept, or (negative) no longer; StorageError: they are too many."""
        with self._lock:
            if more_bytes > self._bytes_left:
                raise StorageError("frames that are not whole hold too many bytes")
            self._bytes_left -= more_bytes


class IncomingFrames:
    """What has come on one connection; `held` bytes of it are no whole frame yet."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._received = bytearray()
        self.held = 0
        self._began: float | None = None

    def take(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """The frames that are whole with `data`; as `take_frames`.

        Raises:
            StorageError: no frame, or more than may be held: the connection is of no use any more.
        """
        self._received += data
        yield from take_frames(self._received)
        if len(self._received) != self.held:
            self._intake.hold(len(self._received) - self.held)
            self.held = len(self._received)
            began = self._began or time.monotonic()
            self._began = began if self.held else None

    def left_s(self) -> float | None:
        """Seconds in which the frame that has begun must be whole; None where none has."""
        if self._began is None:
            return None
        return max(0.001, self._began + FRAME_TIMEOUT_S - time.monotonic())
