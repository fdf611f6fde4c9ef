"""The doors of actors: sockets in a folder of this user alone (see `peers`) that answer calls.

`SocketServer` is for an actor that works in threads: one per connection, which is served in order.
`AsyncSocketServer` is for one on an asyncio loop: calls that may take long, side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from ..errors import LiteCacheError, StorageError
from ..threads import let_go_in_child, start_job, start_service
from .frames import (
    FRAME_TIMEOUT_S,
    MAX_FRAME_BYTES,
    NO_ANSWER,
    RECEIVE_BYTES,
    Intake,
    Outcome,
    handler_of,
    pack_error,
    pack_frame,
)
from .peers import forget, listen, same_user

logger = logging.getLogger(__name__)

_PAUSE_S = 0.1
_CLOSE_TIMEOUT_S = 5.0
# A client that does not take its answers for so long is given up.
_SEND_TIMEOUT = struct.pack("ll", int(FRAME_TIMEOUT_S), 0)
# Calls of one connection to a loop that may be under way; further ones are read when one has ended.
_CALLS = 1024

Handler = Callable[[bytes], "bytes | None"]
AsyncHandler = Callable[[bytes], Awaitable[bytes]]


def _failed(number: int, code: int, error: Exception) -> bytes:
    # a defect, or an answer too long to be sent, must cost one call, not the connection: the
    # client would think the actor gone, or wait
    if not isinstance(error, LiteCacheError):
        logger.error("call %d failed", code, exc_info=error)
    return pack_frame(number, Outcome.ERROR, pack_error(error))


class SocketServer:
    """Answers calls until it is closed.

    Args:
        name: of the socket; must be new among this user's.
        methods: number to what answers the call; raises LiteCacheError, must be thread-safe.

    Attributes:
        address: for `SocketChannel`.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(self, name: str, methods: Mapping[int, Handler]) -> None:
        self._methods, self._intake = methods, Intake()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._closed = False
        self._listener, self.address = listen(name)
        try:
            self._accepting = start_service(self._accept, "accept")
            let_go_in_child(self)
        except RuntimeError as error:
            self._listener.close()
            forget(self.address)
            raise OSError(str(error)) from error

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                # out of descriptors, or a client that gave up: the next one is served again
                logger.warning("a connection cannot be taken: %s", error)
                time.sleep(_PAUSE_S)
                continue
            end = partial(self._end, connection)
            try:
                start_job(partial(self._serve, connection), "connection", end)
            except RuntimeError as error:
                end(error)  # no room for a thread: this client calls the actor

    def _serve(self, connection: socket.socket) -> None:
        try:
            if not same_user(connection):
                raise PermissionError("it is another user's")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
            with self._lock:
                if self._closed:
                    raise ConnectionAbortedError("the server is closed")
                self._connections.add(connection)
            with self._intake.connection() as frames:
                while data := connection.recv(RECEIVE_BYTES):
                    for number, code, message in frames.take(data):
                        answer = self._answer(number, code, message)
                        if number != NO_ANSWER:
                            connection.sendall(answer)
                    connection.settimeout(frames.left_s())
        except (OSError, StorageError) as error:
            self._end(connection, error)
        else:
            self._end(connection)

    def _end(self, connection: socket.socket, error: BaseException | None = None) -> None:
        if error is not None:
            level = logging.INFO if isinstance(error, OSError) else logging.WARNING
            logger.log(level, "a client's connection is given up: %s", error)
        with self._lock:
            self._connections.discard(connection)
        connection.close()

    def _answer(self, number: int, code: int, message: bytes) -> bytes:
        try:
            done = handler_of(self._methods, code)(message) or b""
            return pack_frame(number, Outcome.DONE, done)
        except Exception as error:
            return _failed(number, code, error)

    def let_go(self) -> None:
        """In a forked child nobody answers: it must not keep the address when its parent ends."""
        for each in (self._listener, *self._connections):
            each.close()

    def close(self) -> None:
        """End all connections; calls that run finish, their answers are lost."""
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        forget(self.address)
        for each in (self._listener, *connections):
            # wakes the thread that waits in it; that one closes a connection
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._accepting.join(_CLOSE_TIMEOUT_S)
        self._listener.close()


class AsyncSocketServer:
    """Answers calls until its loop ends; every call is a task of its own.

    Args:
        name, methods: see `SocketServer`.

    Attributes:
        address: for `SocketChannel`, once `start` has returned.
    """

    def __init__(self, name: str, methods: Mapping[int, AsyncHandler]) -> None:
        self._name, self.address = name, ""
        self._methods, self._intake = methods, Intake()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        """Listen, on the running loop.

        Raises:
            OSError: the address cannot be had.
        """
        listener, self.address = listen(self._name)
        self._server = await asyncio.start_unix_server(self._serve, sock=listener)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        under_way = asyncio.Semaphore(_CALLS)
        try:
            if not same_user(writer.get_extra_info("socket")):
                return
            with self._intake.connection() as frames:
                while data := await asyncio.wait_for(reader.read(RECEIVE_BYTES), frames.left_s()):
                    for number, code, message in frames.take(data):
                        await under_way.acquire()
                        task = asyncio.create_task(self._answer(writer, number, code, message))
                        self._tasks.add(task)
                        task.add_done_callback(self._tasks.discard)
                        task.add_done_callback(lambda _: under_way.release())
        except (OSError, StorageError, asyncio.TimeoutError) as error:
            what = str(error) or "a frame never became whole"
            logger.info("a client's connection ended: %s", what)
        finally:
            writer.close()

    async def _answer(
        self, writer: asyncio.StreamWriter, number: int, code: int, message: bytes
    ) -> None:
        try:
            done = await handler_of(self._methods, code)(message)
            answer = pack_frame(number, Outcome.DONE, done)
        except Exception as error:
            answer = _failed(number, code, error)
        if number == NO_ANSWER or writer.is_closing():
            return
        if writer.transport.get_write_buffer_size() > MAX_FRAME_BYTES:
            logger.warning("a client that does not take its answers is given up")
            writer.transport.abort()  # type: ignore[no-untyped-call, attr-defined, unused-ignore]
            return
        writer.write(answer)

    def close(self) -> None:
        """Take no new connections."""
        if self._server is not None:
            forget(self.address)
            self._server.close()
