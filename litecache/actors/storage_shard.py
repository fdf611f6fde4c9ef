"""The `StorageShard` actor: one disk's slab and one arena of RAM, for all processes of a node.

A thin threaded shell over `ShardStore`. Processes of the same machine make short calls through a
socket (`SocketServer`), which takes a tenth of an actor call's time. Calls of the actor run in two
thread pools, short ones and bulk ones (`fetch`, `flush`, `clear`). It imports neither torch nor
transformers and never touches a GPU. Batches come and go as the packed messages of
`storage/wire.py`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from litecache.actors.calls import all_actor_names
from litecache.actors.coordinator import CoordinatorClient
from litecache.actors.locations import LocationReport, LocationReporter
from litecache.actors.metrics_export import MetricsExporter
from litecache.actors.naming import coordinator_name, role_of, shard_name
from litecache.errors import (
    GroupUnavailableError,
    LiteCacheError,
    StorageFullError,
    StorageLockedError,
    shorten,
)
from litecache.hashing import BlockKey
from litecache.metrics import Metrics
from litecache.paths import hold_model
from litecache.sockets.frames import handler_of
from litecache.sockets.server import Handler, SocketServer
from litecache.spans import Span, record_spans, recorded_spans
from litecache.storage import wire
from litecache.storage.key_dict import split_keys
from litecache.storage.protocol import Attachment, ShardMethod
from litecache.storage.retry import Backoff
from litecache.storage.shard_store import ShardStore
from litecache.threads import fault_counts

logger = logging.getLogger(__name__)

# After a kill the kernel needs a moment to take down the old process and its lock.
LOCK_PATIENCE_S = 3.0
_MOST_FOLDER = 80


class Coordinators:
    """The coordinators of all groups that use a shard; one whose group has gone is forgotten.

    Args:
        group: the one that the shard is named after.
    """

    def __init__(self, group: str) -> None:
        self._clients = {group: CoordinatorClient(group)}

    def add(self, group: str) -> bool:
        """From now on tell this group's, too; whether it is a new one."""
        if group in self._clients:
            return False
        self._clients = {**self._clients, group: CoordinatorClient(group)}
        return True

    def report_shard(self, report: LocationReport) -> bool:
        """See `LocationMap.report`: all of them have taken it, as far as they answer.

        One that does not answer asks for everything when it is back: what it missed is a gap.

        Raises:
            LiteCacheError: none of them answers.
        """
        taken: list[bool] = []
        failed: LiteCacheError | None = None
        for group, client in self._clients.items():
            try:
                taken.append(client.report_shard(report))
            except GroupUnavailableError as error:
                failed = error
                if len(self._clients) > 1 and coordinator_name(group) not in all_actor_names():
                    self._clients = {g: c for g, c in self._clients.items() if g != group}
            except LiteCacheError as error:
                failed = error
        if failed is not None and not taken:
            raise failed
        return all(taken)


def _of_store(name: str, *, changes: bool = False) -> Any:
    """The store's method of this name as a bulk one of the actor; `changes`: of what it holds."""

    @ray.method(concurrency_group="bulk")
    @functools.wraps(getattr(ShardStore, name))
    def call(self: StorageShard, *args: Any) -> Any:
        answer = getattr(self._open_store, name)(*args)
        if changes:
            self._notify()
        return answer

    return call


class StorageShard:
    """Plain class behind the actor.

    Args:
        group: name of the group.
        index: of the shard on its node.
        options: arguments of `ShardStore`.
        lock_patience_s: how long to wait for a folder that another process has locked.
        model: path of the group's model: held, also while its replica restarts.
    """

    has_coordinator = True

    flush = _of_store("flush")
    has_follower = _of_store("has_follower")
    take_in = _of_store("take_in", changes=True)
    delete_salt = _of_store("delete_salt", changes=True)
    clear = _of_store("clear", changes=True)

    def __init__(
        self,
        group: str,
        index: int,
        options: dict[str, Any],
        lock_patience_s: float = LOCK_PATIENCE_S,
        model: str | None = None,
    ) -> None:
        self._group, self._options = group, options
        self._models = [hold_model(model)]
        self._coordinators = Coordinators(group)
        self._node_id = ray.get_runtime_context().get_node_id()
        self._shard_id = f"{self._node_id[:8]}:{index}"
        self._name = shard_name(group, self._node_id, index)
        self._metrics = Metrics()
        self._store: ShardStore | None = None
        self._failure: LiteCacheError | None = None
        self._opening = threading.Lock()
        self._retry = Backoff(first_s=1.0)
        if "RAY_PROFILING" in os.environ:
            record_spans()
        self._open(lock_patience_s)

    def _open(self, lock_patience_s: float) -> None:
        try:
            store = _open(self._options, self._metrics, lock_patience_s)
        except LiteCacheError as error:
            # Kept for `info`: an error raised here would reach the driver as text only.
            self._failure = error
            self._retry.note(False)
            return
        with contextlib.ExitStack() as opened:
            opened.callback(store.close)
            self._serve(store, opened)
            self._closing = opened.pop_all()
        gc.collect()
        gc.freeze()  # millions of keys would be looked through again and again
        self._store, self._failure = store, None

    def _serve(self, store: ShardStore, opened: contextlib.ExitStack) -> None:
        tags = {"group": self._group, "actor": role_of(self._name)}
        opened.callback(MetricsExporter(self._metrics, tags, refresh=store.stats).close)
        self._notify: Callable[[], None] = lambda: None
        if self.has_coordinator:
            send = self._coordinators.report_shard
            reporter = LocationReporter(store, send, self._shard_id, self._node_id)
            opened.callback(reporter.close)
            self._notify = reporter.notify
        self._methods = packed_methods(store, self._notify)
        self._address: str | None = None
        try:
            door = SocketServer(f"{store.epoch:x}", self._methods)
            opened.callback(door.close)
            self._address = door.address
        except OSError as error:
            logger.warning("%s has no socket, its clients call the actor: %s", self._name, error)

    def __repr__(self) -> str:
        folder = "/".join(Path(self._options["directory"] or "none, RAM only").parts[-2:])
        return (
            f"StorageShard(group={self._group}, shard={self._shard_id}, "
            f"folder={shorten(folder, _MOST_FOLDER)}, node={self._node_id[:8]})"
        )

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
            "directory": self._options["directory"],
        }

    def settings(self) -> dict[str, Any]:
        """Arguments of its `ShardStore`, to compare groups that share it."""
        return self._options

    def serve(self, group: str, model: str | None) -> None:
        """A group of another model uses this shard, too: its coordinator is told what is here.

        Args:
            group: its name.
            model: path of its model: held as this shard's own.
        """
        if self._coordinators.add(group):
            self._models.append(hold_model(model))
            self._notify()

    def attach(self, client_pid: int) -> Attachment:
        """See `ShardStore.attach`; the client lives on the same node."""
        return self._open_store.attach(client_pid)._replace(address=self._address)

    def detach(self, client_id: int) -> None:
        """See `ShardStore.detach`."""
        self._open_store.detach(client_id)

    def call(self, code: int, message: bytes) -> bytes:
        """What the socket answers, for clients that cannot reach it."""
        self._open_store  # noqa: B018 - raises what keeps it from being open
        return handler_of(self._methods, code)(message) or b""

    def timeline(self) -> list[Span] | None:
        """The last spans of this process; None where none are recorded."""
        return recorded_spans()

    @ray.method(concurrency_group="bulk")
    def fetch(self, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Bytes of blocks for another node, in the order of the keys."""
        return [data for _, data in self._open_store.fetch(keys)]

    @ray.method(concurrency_group="bulk")
    def view_prefix(self, keys: bytes) -> tuple[bytes, dict[str, int]]:
        """See `ShardStore.places` and `namespaces`; keys as one byte string."""
        store = self._open_store
        return store.places(split_keys(keys)), store.namespaces()

    @ray.method(concurrency_group="bulk")
    def set_pinned(self, keys: Sequence[BlockKey], pinned: bool) -> list[bool]:
        """See `ShardStore.pin` and `unpin`."""
        store = self._open_store
        return store.pin(keys) if pinned else store.unpin(keys)

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
    def stop(self, timeout_s: float) -> dict[str, Any]:
        """Flush and close; the actor is of no use afterwards. Returns the `FlushReport` by name."""
        store = self._open_store
        report = store.flush(timeout_s)
        self._store = None
        self._closing.close()
        return report._asdict()


def _unpack_keys(message: bytes) -> tuple[list[BlockKey]]:
    return (wire.unpack_keys(message)[1],)


# How the short methods of a store are spoken: their arguments, and their answers.
_MESSAGES: dict[ShardMethod, tuple[Callable[[bytes], Any], Callable[[Any], bytes] | None]] = {
    ShardMethod.STAGE: (wire.unpack_stage, wire.pack_staged),
    ShardMethod.CANCEL: (wire.unpack_keys, wire.pack_flags),
    ShardMethod.RELEASE: (wire.unpack_slots, None),
    ShardMethod.RESERVE: (wire.unpack_reserve, wire.pack_slots),
    ShardMethod.COMMIT: (wire.unpack_commits, wire.pack_statuses),
    ShardMethod.QUERY: (_unpack_keys, wire.pack_flags),
    ShardMethod.TOUCH: (_unpack_keys, None),
    ShardMethod.DURABLE: (_unpack_keys, wire.pack_flags),
}


def packed_methods(store: ShardStore, changed: Callable[[], None]) -> dict[int, Handler]:
    """The short methods of a store as handlers of packed messages; `changed`: keys were added."""

    def handler(method: ShardMethod) -> Handler:
        unpack, pack = _MESSAGES[method]
        ask = getattr(store, method.name.lower())

        def handle(message: bytes) -> bytes | None:
            answer = ask(*unpack(message))
            if method is ShardMethod.COMMIT:
                changed()
            return pack(answer) if pack else None

        return handle

    return {method: handler(method) for method in _MESSAGES}


def _open(options: dict[str, Any], metrics: Metrics, lock_patience_s: float) -> ShardStore:
    deadline = time.monotonic() + lock_patience_s
    while True:
        try:
            return ShardStore(**options, metrics=metrics)
        except StorageLockedError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)
