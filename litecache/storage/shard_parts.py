"""What a shard consists of: made together, working under one lock, closed together.

The classes that answer the slot protocol (`Staging`, `Filling`, `Waiting`, `Fetching`, `Upkeep`)
take what they need from here.
"""

from __future__ import annotations

import threading

from ..errors import StorageError
from ..metrics import Metrics
from .arena_growth import ArenaGrowth
from .block_io import BlockIo, OnWritten
from .keeper import Keeper
from .lease_book import LeaseBook
from .leases import Client, Clients
from .tiers import Tiers


class ShardParts:
    """The parts of one shard.

    Args:
        tiers: opened (`open_tiers`); closed with the rest.
        epoch, io_threads, fsync, fsync_interval_s, metrics, on_written: see `ShardStore`.

    Attributes:
        lock: guards all state; nobody holds it during I/O.
        changed: condition on it, notified when a read or write ended or a lease was released.
        growth, leases, clients, keeper, io: see their classes.
        closed: nothing begins any more, and nobody waits.
    """

    def __init__(
        self,
        tiers: Tiers,
        epoch: int,
        *,
        io_threads: int,
        fsync: str,
        fsync_interval_s: float,
        metrics: Metrics,
        on_written: OnWritten | None,
    ) -> None:
        self.tiers = tiers
        self.metrics = metrics
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.closed = False
        self.growth = ArenaGrowth(tiers.ram, self.lock)
        self.leases = LeaseBook(tiers.ram)
        self.clients = Clients(self.lock, epoch, self._client_gone)
        self.keeper = Keeper(
            tiers,
            self.lock,
            self.changed,
            threaded=io_threads > 0,
            fsync=fsync,
            interval_s=fsync_interval_s,
            metrics=metrics,
        )
        self.io = BlockIo(
            tiers,
            self.lock,
            self.changed,
            threads=io_threads,
            keeper=self.keeper,
            metrics=metrics,
            on_written=on_written,
        )

    def _client_gone(self, client: Client) -> None:
        self.leases.end_all(client)
        self.changed.notify_all()

    def check_open(self) -> None:
        """Raise StorageError once the store is closed."""
        if self.closed:
            raise StorageError("the shard store is closed")

    def close(self, *, compact: bool) -> None:
        """End all threads and give everything back; once.

        Args:
            compact: write a new log; what is dirty is not written out.
        """
        with self.lock:
            if self.closed:
                return
            self.closed = self.growth.closed = True
            self.changed.notify_all()
        self.io.close()
        self.keeper.close()
        self.clients.close()
        if self.tiers.disk is not None:
            clean = compact and self.keeper.compact()
            self.tiers.disk.close(clean=clean)
        self.tiers.ram.arena.close()

    def check_integrity(self) -> None:
        """AssertionError unless index, tiers, queues and leases agree."""
        with self.lock:
            self.tiers.check_integrity(self.io.writing_slots)
            self.leases.check_integrity(self.clients.all())
