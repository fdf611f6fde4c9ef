"""Clients of a shard and the leases that they hold; the end of a client is proven by its pidfd.

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
from collections.abc import Iterable

from ..errors import StorageError
from ..threads import start_service
from .ram_tier import RamBlock, RamState, RamTier

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


class Leases:
    """All attached clients, who of them holds which slot how often, and the thread that watches.

    A block's own count is the sum over all clients. `give`, `get` and what ends leases are called
    under the store's lock.

    Args:
        ram: the slots.
        changed: condition on the store's lock, notified when leases ended.
        first_id: client ids count from here, so that those of another epoch are unknown.

    Attributes:
        own: the store itself, while it copies a block.
    """

    def __init__(self, ram: RamTier, changed: threading.Condition, first_id: int) -> None:
        self._ram = ram
        self._lock = self._changed = changed
        self.own = Client(0, 0, -1)
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

    def __len__(self) -> int:
        return len(self._clients)

    def give(self, client: Client, block: RamBlock) -> None:
        """One more lease."""
        held = client.leases.get(block.slot)
        if held is None:
            client.leases[block.slot] = [block.generation, 1]
        else:
            held[1] += 1
        block.leases += 1

    def end_many(self, client: Client, slots: Iterable[tuple[int, int]]) -> None:
        """One lease less on each slot; those that the client does not hold are ignored."""
        for slot, generation in slots:
            block = self.end(client, slot, generation)
            # most blocks just stay where they are
            if block is not None and (block.dead or block.state is RamState.RESERVED):
                self.abandon(block)
        self._changed.notify_all()

    def end(self, client: Client, slot: int, generation: int) -> RamBlock | None:
        """One lease less; the block, or None when the client holds no such lease."""
        held = client.leases.get(slot)
        if held is None or held[0] != generation:
            return None
        held[1] -= 1
        if not held[1]:
            del client.leases[slot]
        block = self._ram.by_slot[slot]
        block.leases -= 1
        return block

    def abandon(self, block: RamBlock) -> None:
        """After a lease ended: a slot that was never committed, or is dead, goes back."""
        if block.state is RamState.RESERVED and not block.dead and not block.leases:
            block.dead = True
        self._ram.reap(block)

    def _end_all(self, client: Client) -> None:
        for slot, (_, count) in list(client.leases.items()):
            block = self._ram.by_slot[slot]
            block.leases -= count
            self.abandon(block)
        client.leases.clear()

    def detach(self, client_id: int) -> None:
        """End a client and its leases; an unknown id is ignored."""
        with self._lock:
            self._end(client_id)
        self._wake()

    def _end(self, client_id: int) -> None:
        client = self._clients.pop(client_id, None)
        if client is not None:
            client.gone = True
            self._end_all(client)
            self._changed.notify_all()
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

    def check_integrity(self) -> None:
        """AssertionError unless clients and slots agree."""
        leases: dict[int, int] = {}
        for client in (*self._clients.values(), self.own):
            for slot, (generation, count) in client.leases.items():
                block = self._ram.by_slot[slot]
                assert block.generation == generation, "a lease outlived its slot"
                leases[slot] = leases.get(slot, 0) + count
        for slot, block in self._ram.by_slot.items():
            assert block.leases == leases.get(slot, 0), f"leases of slot {slot} differ"
            reserved = block.state is RamState.RESERVED
            assert not reserved or block.leases, "a reserved slot leaked"
