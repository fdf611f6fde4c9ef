"""The door of an actor that works in threads: one per connection, which is served in order.

The address is abstract, so nothing is left behind by a kill, and only processes of the same user
are let in.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping

from ..errors import LiteCacheError, StorageError
from .frames import NO_ANSWER, Outcome, pack_frame, take_frames
from .peers import abstract, same_user

logger = logging.getLogger(__name__)

_RECEIVE_BYTES = 1 << 18
_PAUSE_S = 0.1
_CLOSE_TIMEOUT_S = 5.0

Handler = Callable[[bytes], "bytes | None"]


class SocketServer:
    """Answers calls until it is closed.

    Args:
        name: of the address; must be new on this machine.
        methods: number to what answers the call; raises LiteCacheError, must be thread-safe.

    Attributes:
        address: for `SocketChannel`.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(self, name: str, methods: Mapping[int, Handler]) -> None:
        self.address = f"litecache-{name}"
        self._methods = {int(method): handler for method, handler in methods.items()}
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._closed = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(abstract(self.address))
            self._listener.listen()
        except OSError:
            self._listener.close()
            raise
        self._accepting = self._spawn(self._accept, "accept")

    @staticmethod
    def _spawn(target: Callable[..., None], name: str, *args: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, name=f"litecache-{name}", daemon=True)
        thread.start()
        return thread

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
            with self._lock:
                if self._closed or not same_user(connection):
                    connection.close()
                    continue
                self._connections.add(connection)
            self._spawn(self._serve, "connection", connection)

    def _serve(self, connection: socket.socket) -> None:
        received = bytearray()
        try:
            while data := connection.recv(_RECEIVE_BYTES):
                received += data
                for number, code, message in take_frames(received):
                    outcome, answer = self._answer(code, message)
                    if number != NO_ANSWER:
                        connection.sendall(pack_frame(number, outcome, answer))
        except StorageError as error:
            logger.warning("a client's connection is given up: %s", error)
        except OSError as error:
            logger.info("a client's connection ended: %s", error)
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _answer(self, code: int, message: bytes) -> tuple[Outcome, bytes]:
        handler = self._methods.get(code)
        if handler is None:
            return Outcome.ERROR, f"there is no call {code}".encode()
        try:
            return Outcome.DONE, handler(message) or b""
        except LiteCacheError as error:
            return Outcome.ERROR, str(error).encode()
        except Exception as error:
            # a defect must cost one call, not the connection: the client would think the actor gone
            logger.exception("call %d failed", code)
            return Outcome.ERROR, f"{type(error).__name__}: {error}".encode()

    def close(self) -> None:
        """End all connections; calls that run finish, their answers are lost."""
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        for each in (self._listener, *connections):
            # wakes the thread that waits in it; that one closes a connection
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        # the address is not free before the thread has left its call
        self._accepting.join(_CLOSE_TIMEOUT_S)
