"""The `StorageShard` actor: one disk's slab and one arena of RAM, for all processes of a node.

A thin threaded shell over `ShardStore`. Processes of the same machine make short calls through a
socket (`SocketServer`), which takes a tenth of an actor call's time. Calls of the actor run in two
thread pools, short ones and bulk ones (`fetch`, `flush`, `clear`). It imports neither torch nor
transformers and never touches a GPU. Batches come and go as the packed messages of
`storage/wire.py`.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from litecache.actors.coordinator import CoordinatorClient
from litecache.actors.locations import LocationReporter
from litecache.actors.metrics_export import MetricsExporter
from litecache.actors.naming import shard_name
from litecache.errors import LiteCacheError, StorageFullError, StorageLockedError
from litecache.hashing import BlockKey
from litecache.metrics import Metrics
from litecache.paths import hold_model
from litecache.sockets.frames import handler_of
from litecache.sockets.server import Handler, SocketServer
from litecache.storage import wire
from litecache.storage.protocol import Attachment, FlushReport, ShardMethod
from litecache.storage.retry import Backoff
from litecache.storage.shard_store import ShardStore
from litecache.threads import fault_counts

logger = logging.getLogger(__name__)

# After a kill the kernel needs a moment to take down the old process and its lock.
LOCK_PATIENCE_S = 3.0


class StorageShard:
    """Plain class behind the actor.

    Args:
        group: name of the group.
        index: of the shard on its node.
        options: arguments of `ShardStore`.
        lock_patience_s: how long to wait for a folder that another process has locked.
        model: path of the group's model: held, also while its replica restarts.
    """

    def __init__(
        self,
        group: str,
        index: int,
        options: dict[str, Any],
        lock_patience_s: float = LOCK_PATIENCE_S,
        model: str | None = None,
    ) -> None:
        context = ray.get_runtime_context()
        self._group = group
        self._model = hold_model(model)
        self._node_id = context.get_node_id()
        self._shard_id = f"{self._node_id[:8]}:{index}"
        self._name = shard_name(group, self._node_id, index)
        self._folder = options["directory"]
        self._metrics = Metrics()
        self._store: ShardStore | None = None
        self._failure: LiteCacheError | None = None
        self._options = options
        self._opening = threading.Lock()
        self._retry = Backoff(first_s=1.0)
        self._open(lock_patience_s)

    def _open(self, lock_patience_s: float) -> None:
        try:
            store = _open(self._options, self._metrics, lock_patience_s)
        except LiteCacheError as error:
            # Kept for `info`: an error raised here would reach the driver as text only.
            self._failure = error
            self._retry.note(False)
            return
        self._failure = None
        self._methods = packed_methods(store, lambda: self._reporter.notify())
        self._door = self._open_door(store.epoch)
        self._store = store
        self._reporter = self._make_reporter()
        self._exporter = MetricsExporter(self._metrics, {"group": self._group, "actor": self._name})
        gc.collect()
        gc.freeze()  # millions of keys would be looked through again and again

    def _make_reporter(self) -> LocationReporter:
        send = CoordinatorClient(self._group).report_shard
        return LocationReporter(self._open_store, send, self._shard_id, self._node_id)

    def _open_door(self, epoch: int) -> SocketServer | None:
        """Where clients of this machine are served without Ray; without it they use `call`."""
        try:
            return SocketServer(f"{epoch:x}", self._methods)
        except OSError as error:
            logger.warning("%s has no socket, its clients call the actor: %s", self._name, error)
            return None

    def __repr__(self) -> str:
        return f"StorageShard({self._group}, {self._shard_id}, {self._folder or 'RAM only'})"

    @property
    def _open_store(self) -> ShardStore:
        if isinstance(self._failure, StorageFullError):
            # a disk or a memory that was full may have room by now
            with self._opening:
                if self._failure is not None and self._retry.due():
                    self._open(0.0)
        if self._store is None:
            raise self._failure or LiteCacheError(f"{self._name} is closed")
        return self._store

    def info(self) -> dict[str, Any]:
        """Process, node and name; raises what kept the store from opening."""
        self._open_store.stats()
        return {
            "pid": os.getpid(),
            "node_id": self._node_id,
            "shard_id": self._shard_id,
            "name": self._name,
            "directory": self._folder,
        }

    def attach(self, client_pid: int) -> Attachment:
        """See `ShardStore.attach`; the client lives on the same node."""
        attachment = self._open_store.attach(client_pid)
        return attachment._replace(address=self._door.address if self._door is not None else None)

    def detach(self, client_id: int) -> None:
        """See `ShardStore.detach`."""
        self._open_store.detach(client_id)

    def call(self, code: int, message: bytes) -> bytes:
        """What the socket answers, for clients that cannot reach it."""
        self._open_store  # noqa: B018 - raises what keeps it from being open
        return handler_of(self._methods, code)(message) or b""

    @ray.method(concurrency_group="bulk")
    def flush(self, timeout_s: float) -> FlushReport:
        """See `ShardStore.flush`."""
        return self._open_store.flush(timeout_s)

    @ray.method(concurrency_group="bulk")
    def fetch(self, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Bytes of blocks for another node, in the order of the keys."""
        return [data for _, data in self._open_store.fetch(keys)]

    @ray.method(concurrency_group="bulk")
    def set_pinned(self, keys: Sequence[BlockKey], pinned: bool) -> list[bool]:
        """See `ShardStore.pin` and `unpin`."""
        store = self._open_store
        return store.pin(keys) if pinned else store.unpin(keys)

    @ray.method(concurrency_group="bulk")
    def clear(self, tier: str) -> None:
        """See `ShardStore.clear`."""
        self._open_store.clear(tier)
        self._reporter.notify()

    @ray.method(concurrency_group="bulk")
    def keys(self) -> bytes:
        """All keys, sorted and joined, for checks."""
        return b"".join(sorted(self._open_store.keys()))

    def stats(self) -> dict[str, Any]:
        """The store's figures and counters."""
        return {
            **self.info(),
            "store": self._open_store.stats(),
            "metrics": self._metrics.snapshot(),
            "thread_faults": fault_counts(),
        }

    @ray.method(concurrency_group="bulk")
    def stop(self, timeout_s: float) -> FlushReport:
        """Flush and close; the actor is of no use afterwards."""
        store = self._open_store
        report = store.flush(timeout_s)
        if self._door is not None:
            self._door.close()
        self._reporter.close()
        self._exporter.close()
        self._store = None
        store.close()
        return report


def packed_methods(store: ShardStore, changed: Callable[[], None]) -> dict[int, Handler]:
    """The short methods of a store as handlers of packed messages.

    Args:
        store: does what is asked; each message carries the id of its client.
        changed: called when keys have been added.
    """

    def stage(message: bytes) -> bytes:
        return wire.pack_staged(store.stage(*wire.unpack_stage(message)))

    def cancel(message: bytes) -> bytes:
        return wire.pack_flags(store.cancel(*wire.unpack_keys(message)))

    def release(message: bytes) -> None:
        store.release(*wire.unpack_slots(message))

    def reserve(message: bytes) -> bytes:
        return wire.pack_slots(store.reserve(*wire.unpack_reserve(message)))

    def commit(message: bytes) -> bytes:
        statuses = store.commit(*wire.unpack_commits(message))
        changed()
        return wire.pack_statuses(statuses)

    def query(message: bytes) -> bytes:
        return wire.pack_flags(store.query(wire.unpack_keys(message)[1]))

    def touch(message: bytes) -> None:
        store.touch(wire.unpack_keys(message)[1])

    def durable(message: bytes) -> bytes:
        return wire.pack_flags(store.durable(wire.unpack_keys(message)[1]))

    return {
        ShardMethod.STAGE: stage,
        ShardMethod.CANCEL: cancel,
        ShardMethod.RELEASE: release,
        ShardMethod.RESERVE: reserve,
        ShardMethod.COMMIT: commit,
        ShardMethod.QUERY: query,
        ShardMethod.TOUCH: touch,
        ShardMethod.DURABLE: durable,
    }


def _open(options: dict[str, Any], metrics: Metrics, lock_patience_s: float) -> ShardStore:
    deadline = time.monotonic() + lock_patience_s
    while True:
        try:
            return ShardStore(**options, metrics=metrics)
        except StorageLockedError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)
