"""Clients of a shard and the leases that they hold; the end of a client is proven by its pidfd.

A stalled client may still have a copy in flight, so no clock ever ends a lease: `detach`, or the
kernel's word that the process is gone. One thread sleeps on the pidfds of all clients.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import StorageError
from ..threads import start_service
from .ram_blocks import RamBlock, RamState
from .tiers import Tiers

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Client:
    """One attached process.

    Attributes:
        pid, pidfd: the process and the proof of its end.
        leases: slot to how many. A leased slot keeps its generation.
    """

    pid: int
    pidfd: int
    leases: dict[int, int] = field(default_factory=dict)


class Leases:
    """All attached clients, who of them holds which slot how often, and the thread that watches.

    A block's own count is the sum over all clients. `give`, `get` and what ends leases are called
    under the store's lock.

    Args:
        tiers: the slots.
        first_id: client ids count from here, so that those of another epoch are unknown.

    Attributes:
        own: the store itself, while it copies a block.
    """

    def __init__(self, tiers: Tiers, first_id: int) -> None:
        self._tiers = tiers
        self.own = Client(0, -1)
        self._next_id = first_id
        self._clients: dict[int, Client] = {}
        self._watched = select.epoll()
        self._wake = os.eventfd(0)
        self._watched.register(self._wake, select.EPOLLIN)
        self._closing = False
        self._thread: threading.Thread | None = None

    def attach(self, pid: int) -> int:
        """Register a process; its client id.

        Raises:
            StorageError: there is no such process on this machine, or the store is closed.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise StorageError(f"client_pid={pid} is no live process here: {error}") from error
        with self._tiers.lock:
            if self._closing:
                os.close(pidfd)
                raise StorageError("the shard store is closed")
            try:
                if self._thread is None:
                    self._thread = start_service(self._watch, "reaper")
                self._watched.register(pidfd, select.EPOLLIN)
            except BaseException:
                os.close(pidfd)
                raise
            self._next_id += 1
            self._clients[self._next_id] = Client(pid, pidfd)
            return self._next_id

    def get(self, client_id: int) -> Client:
        """The client with an id.

        Raises:
            StorageError: it is not attached any more, or was to an earlier epoch.
        """
        client = self._clients.get(client_id)
        if client is None:
            raise StorageError(
                f"client_id={client_id} has been detached, or is not attached to this epoch of the "
                "shard: attach again"
            )
        return client

    def __len__(self) -> int:
        return len(self._clients)

    def give(self, client: Client, blocks: Iterable[RamBlock]) -> None:
        """One more lease on each."""
        leases = client.leases
        for block in blocks:
            slot = block.slot
            leases[slot] = leases.get(slot, 0) + 1
            block.leases += 1

    def end(self, client: Client, slot: int, generation: int) -> RamBlock | None:
        """One lease less; the block, or None when the client holds no such lease."""
        count, block = client.leases.get(slot), self._tiers.by_slot.get(slot)
        if count is None or block is None or block.generation != generation:
            return None
        if count > 1:
            client.leases[slot] = count - 1
        else:
            del client.leases[slot]
        block.leases -= 1
        return block

    def end_many(self, client: Client, slots: Iterable[tuple[int, int]]) -> None:
        """One lease less on each slot; those that the client does not hold are ignored."""
        unwanted = (RamState.DEAD, RamState.RESERVED)
        for slot, generation in slots:
            block = self.end(client, slot, generation)
            # most blocks just stay where they are
            if block is not None and block.state in unwanted:
                self._tiers.let_go(block)
        self._tiers.changed.notify_all()

    def detach(self, client_id: int) -> None:
        """End a client and its leases; an unknown id is ignored."""
        with self._tiers.lock:
            self._end(client_id)

    def _end(self, client_id: int) -> None:
        client = self._clients.pop(client_id, None)
        if client is None:
            return
        for slot, count in client.leases.items():
            block = self._tiers.by_slot[slot]
            block.leases -= count
            self._tiers.let_go(block)
        self._tiers.changed.notify_all()
        # not by closing it alone: a forked process may hold a copy
        self._watched.unregister(client.pidfd)
        os.close(client.pidfd)

    def _watch(self) -> None:
        while True:
            self._watched.poll()
            with self._tiers.lock:
                if self._closing:
                    return
                # asked again: by now the number may belong to another client
                ended = {fd for fd, _ in self._watched.poll(0)}
                for client_id, client in list(self._clients.items()):
                    if client.pidfd in ended:
                        logger.info("client %d (process %d) is gone", client_id, client.pid)
                        self._end(client_id)

    def let_go(self) -> None:
        """In a forked child: the pidfds are watched for the parent, by what both have in common."""
        self._clients.clear()

    def close(self) -> None:
        """End all clients and the thread."""
        with self._tiers.lock:
            self._closing = True
            for client_id in list(self._clients):
                self._end(client_id)
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join()
        self._watched.close()
        os.close(self._wake)

    def check_integrity(self) -> None:
        """AssertionError unless clients and slots agree."""
        leases: Counter[int] = Counter()
        for client in (*self._clients.values(), self.own):
            leases.update(client.leases)
        assert leases.keys() <= self._tiers.by_slot.keys(), "a lease outlived its slot"
        for slot, block in self._tiers.by_slot.items():
            assert block.leases == leases[slot], f"leases of slot {slot} differ"
            assert block.state is not RamState.RESERVED or block.leases, "a reserved slot leaked"
