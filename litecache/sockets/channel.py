"""A client's end of a socket: calls by number, answers in any thread.

No thread of its own: whoever waits for an answer receives for all, until its own has come, and
sends what the socket did not take at once; it is woken for that. So sending waits for no answer.
A process forked from the client's has no part in the connection: two would take each other's
answers.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import socket
import threading
import time

from ..errors import GroupUnavailableError, RequestTimeout, StorageError
from ..threads import let_go_in_child
from .frames import NO_ANSWER, RECEIVE_BYTES, Outcome, pack_frame, take_frames, unpack_error
from .peers import same_user

_TELL_S = 0.1


class SocketChannel:
    """One connection, for any number of threads.

    Args:
        address: of a `SocketServer` or `AsyncSocketServer`.

    Raises:
        OSError: nobody listens there, or a process of another user.
    """

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(address)
            if not same_user(self._socket):
                raise PermissionError(errno.EACCES, "another user listens there")
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._unsent = bytearray()
        self._received = bytearray()
        self._answers: dict[int, tuple[int, bytes]] = {}
        self._unwanted: set[int] = set()
        self._receiving = False
        # wakes who receives, when there is more to send
        self._wake = io.FileIO(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), "r+")
        self._number = NO_ANSWER
        self._ended = False
        let_go_in_child(self)

    def let_go(self) -> None:
        """In a forked child the connection, which is the parent's, has ended."""
        self._lock = threading.Lock()  # a thread of the parent may have held the other one
        self._arrived = threading.Condition(self._lock)
        self._receiving, self._ended = False, True
        self._socket.close()
        self._wake.close()

    def call(self, method: int, message: bytes) -> int:
        """Send a request; the number by which `answer` knows it.

        Raises:
            GroupUnavailableError: the other side is gone.
            StorageError: the message is too long.
        """
        with self._lock:
            self._number = self._number % 0xFFFF_FFFF + 1
            self._send(pack_frame(self._number, method, message))
            return self._number

    def tell(self, method: int, message: bytes) -> None:
        """Send a request that has no answer; silent when the other side is gone."""
        with self._lock, contextlib.suppress(GroupUnavailableError):
            self._send(pack_frame(NO_ANSWER, method, message))
            if not self._unsent or self._receiving:
                return
            self._receiving = True
        # nobody waits for an answer, and so nobody would send the rest
        self._receive(time.monotonic() + _TELL_S, until_sent=True)

    def _send(self, frame: bytes) -> None:
        if self._ended:
            raise GroupUnavailableError("the other side has closed the socket")
        self._unsent += frame
        self._flush()
        if self._unsent and self._receiving:
            os.eventfd_write(self._wake.fileno(), 1)

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError as error:
            self._end()
            raise GroupUnavailableError(f"the socket is broken: {error}") from error

    def answer(self, number: int, timeout_s: float | None, what: str = "a call") -> bytes:
        """Wait for the answer of a call; each can be taken once.

        Raises:
            RequestTimeout: it has not come; it can be waited for again.
            LiteCacheError: what the other side raised, of the same class.
            GroupUnavailableError: it is gone.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                while number not in self._answers and self._receiving:
                    left = _left(deadline)
                    if left == 0 or not self._arrived.wait(left):
                        raise _late(what, timeout_s)
                if number in self._answers:
                    outcome, message = self._answers.pop(number)
                    break
                if self._ended:
                    raise GroupUnavailableError(f"{what}: the other side has closed the socket")
                self._receiving = True
            if not self._receive(deadline):
                raise _late(what, timeout_s)
        if outcome != Outcome.DONE:
            raise unpack_error(message, what)
        return message

    def forget(self, number: int) -> None:
        """Nobody will ask for this answer."""
        with self._lock:
            if self._answers.pop(number, None) is None:
                self._unwanted.add(number)

    def _receive(self, deadline: float | None, until_sent: bool = False) -> bool:
        """Wait for bytes and sort the answers in them; False: none came, or all is sent."""
        data: bytes | None = None
        try:
            data = self._wait_for_bytes(deadline, until_sent)
        finally:
            with self._lock:
                self._receiving = False
                if data:
                    self._received += data
                    try:
                        for number, outcome, message in take_frames(self._received):
                            if number in self._unwanted:
                                self._unwanted.remove(number)
                            else:
                                self._answers[number] = (outcome, message)
                    except StorageError:
                        self._end()
                elif data is not None:
                    self._end()
                self._arrived.notify_all()
        return data is not None

    def _wait_for_bytes(self, deadline: float | None, until_sent: bool) -> bytes | None:
        """What has come; empty at the end of the connection, None when nothing came in time."""
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        while True:
            events = select.POLLIN | (select.POLLOUT if self._unsent else 0)
            left = _left(deadline)
            poller.register(self._socket, events)
            ready = dict(poller.poll(None if left is None else left * 1000))
            if not ready:
                return None
            if self._wake.fileno() in ready:
                os.eventfd_read(self._wake.fileno())
            with self._lock, contextlib.suppress(GroupUnavailableError):
                self._flush()
                if until_sent and not self._unsent:
                    return None
            try:
                return self._socket.recv(RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                return b""

    @property
    def hung_up(self) -> bool:
        """Whether the other end is closed, without waiting."""
        if self._ended:
            return True
        poller = select.poll()
        poller.register(self._socket, select.POLLRDHUP)
        return bool(poller.poll(0))

    def _end(self) -> None:
        self._ended = True
        self._arrived.notify_all()

    def close(self) -> None:
        """End the connection; those who wait for answers are told that the other side is gone."""
        with self._lock:
            self._end()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._arrived.wait_for(lambda: not self._receiving)
            self._socket.close()
            self._wake.close()


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _late(what: str, timeout_s: float | None) -> RequestTimeout:
    return RequestTimeout(f"{what} took longer than {timeout_s:g} s")
