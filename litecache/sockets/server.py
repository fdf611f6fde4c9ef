"""The door of an actor that works in threads: one per connection, which is served in order.

The socket is a file in a folder of this user alone; see `peers`.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping

from ..errors import LiteCacheError, StorageError
from ..threads import start_job, start_service
from .frames import (
    FRAME_TIMEOUT_S,
    NO_ANSWER,
    RECEIVE_BYTES,
    IncomingFrames,
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

Handler = Callable[[bytes], "bytes | None"]


class SocketServer:
    """Answers calls until it is closed.

    Args:
        name: of the socket; must be new among this user's.
        methods: number to what answers the call; raises LiteCacheError, must be thread-safe.
        intake: what its connections may hold.

    Attributes:
        address: for `SocketChannel`.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(
        self, name: str, methods: Mapping[int, Handler], intake: Intake | None = None
    ) -> None:
        self._methods = {int(method): handler for method, handler in methods.items()}
        self._intake = intake or Intake()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._closed = False
        self._listener, self.address = listen(name)
        try:
            self._accepting = start_service(self._accept, "accept")
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
            try:
                self._admit(connection)
            except (OSError, RuntimeError, StorageError) as error:
                # no room for a thread, or too many connections: this client calls the actor
                logger.warning("a connection is not taken: %s", error)
                connection.close()

    def _admit(self, connection: socket.socket) -> None:
        if not same_user(connection):
            raise PermissionError("it is another user's")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
        frames = self._intake.open()
        try:
            with self._lock:
                if self._closed:
                    raise ConnectionAbortedError("the server is closed")
                # under the lock, so that `close` finds every connection that is served
                serve: Callable[[], None] = lambda: self._serve(connection, frames)  # noqa: E731
                start_job(serve, "connection", lambda _: self._end(connection, frames))
                self._connections.add(connection)
        except BaseException:
            frames.close()
            raise

    def _serve(self, connection: socket.socket, frames: IncomingFrames) -> None:
        try:
            while data := connection.recv(RECEIVE_BYTES):
                for number, code, message in frames.take(data):
                    outcome, answer = self._answer(code, message)
                    if number != NO_ANSWER:
                        connection.sendall(pack_frame(number, outcome, answer))
                connection.settimeout(frames.left_s())
        except StorageError as error:
            logger.warning("a client's connection is given up: %s", error)
        except OSError as error:
            logger.info("a client's connection ended: %s", error)
        self._end(connection, frames)

    def _end(self, connection: socket.socket, frames: IncomingFrames) -> None:
        with self._lock:
            self._connections.discard(connection)
        frames.close()
        connection.close()

    def _answer(self, code: int, message: bytes) -> tuple[Outcome, bytes]:
        try:
            return Outcome.DONE, handler_of(self._methods, code)(message) or b""
        except Exception as error:
            # a defect must cost one call, not the connection: the client would think the actor gone
            if not isinstance(error, LiteCacheError):
                logger.exception("call %d failed", code)
            return Outcome.ERROR, pack_error(error)

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
