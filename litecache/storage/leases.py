"""Clients of a shard and what they hold; the end of a client is proven by its pidfd.

A stalled client may still have a copy in flight, so no clock ever ends a lease: `detach`, or the
kernel's word that the process is gone. One thread sleeps in `poll` on the pidfds of all clients and
a pipe that wakes it when the set changes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable

from ..errors import StorageError
from ..threads import start_service

logger = logging.getLogger(__name__)


class Client:
    """One attached process.

    Attributes:
        pid, pidfd: the process and the proof of its end.
        leases: slot to [generation, count].
        gone: it has ended; no lease may be given to it any more.
    """

    __slots__ = ("client_id", "gone", "leases", "pid", "pidfd")

    def __init__(self, client_id: int, pid: int, pidfd: int) -> None:
        self.client_id = client_id
        self.pid = pid
        self.pidfd = pidfd
        self.gone = False
        self.leases: dict[int, list[int]] = {}


class Clients:
    """All attached clients and the thread that watches them.

    Args:
        lock: the store's lock; it guards the client map.
        first_id: client ids count from here, so that those of another epoch are unknown.
        on_gone: called with a client that ended or detached, under the lock.
    """

    def __init__(
        self,
        lock: threading.Lock,
        first_id: int,
        on_gone: Callable[[Client], None],
    ) -> None:
        self._lock = lock
        self._on_gone = on_gone
        self._next_id = first_id
        self._clients: dict[int, Client] = {}
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._closing = False
        self._thread: threading.Thread | None = None

    def attach(self, pid: int) -> int:
        """Register a process; its client id.

        Raises:
            StorageError: there is no such process on this machine.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise StorageError(f"client_pid={pid} is no live process here: {error}") from error
        with self._lock:
            self._next_id += 1
            client = Client(self._next_id, pid, pidfd)
            self._clients[client.client_id] = client
            if self._thread is None:
                self._thread = start_service(self._watch, "reaper")
        self._wake()
        return client.client_id

    def get(self, client_id: int) -> Client:
        """The client with an id; the lock is held.

        Raises:
            StorageError: it is not attached, or was to an earlier epoch.
        """
        client = self._clients.get(client_id)
        if client is None:
            raise StorageError(
                f"client_id={client_id} is not attached to this epoch of the shard: attach again"
            )
        return client

    def all(self) -> list[Client]:
        """All clients; the lock is held."""
        return list(self._clients.values())

    def detach(self, client_id: int) -> None:
        """End a client and its leases; an unknown id is ignored."""
        with self._lock:
            self._end(client_id)
        self._wake()

    def _end(self, client_id: int) -> None:
        client = self._clients.pop(client_id, None)
        if client is not None:
            client.gone = True
            self._on_gone(client)
            os.close(client.pidfd)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"w")

    def _watch(self) -> None:
        while True:
            poller = select.poll()
            poller.register(self._wake_read, select.POLLIN)
            with self._lock:
                if self._closing:
                    return
                watched = {client.pidfd: client.client_id for client in self._clients.values()}
            for pidfd in watched:
                poller.register(pidfd, select.POLLIN)
            for fd, event in poller.poll():
                if fd == self._wake_read:
                    os.read(self._wake_read, 4096)
                elif event & select.POLLIN:
                    self._process_ended(watched[fd], fd)

    def _process_ended(self, client_id: int, pidfd: int) -> None:
        with self._lock:
            client = self._clients.get(client_id)
            # the number may have been given to another client since the poll began
            if client is not None and client.pidfd == pidfd:
                logger.info("client %d (process %d) is gone", client_id, client.pid)
                self._end(client_id)

    def close(self) -> None:
        """End all clients and the thread."""
        with self._lock:
            self._closing = True
            for client_id in list(self._clients):
                self._end(client_id)
        self._wake()
        if self._thread is not None:
            self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)
