"""Tells the coordinator what a shard holds, and that the shard is alive.

A thread that sleeps until keys change or the next heartbeat is due. Messages carry the shard's
epoch and a sequence number; when the coordinator does not know what came before (it restarted, a
message was lost) everything is sent again. Without a coordinator nothing else stops.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

from litecache.actors.naming import REPORT_INTERVAL_S
from litecache.errors import LiteCacheError
from litecache.hashing import BlockKey
from litecache.storage.key_dict import BATCH_KEYS
from litecache.storage.protocol import Deltas
from litecache.threads import start_service

logger = logging.getLogger(__name__)

# Changes are collected for this long: one message per burst of commits.
_COLLECT_S = 0.05
_KEYS_PER_MESSAGE = BATCH_KEYS


class KeySource(Protocol):
    """The part of a `ShardStore` that is reported."""

    def drain_deltas(self) -> Deltas:
        """Changes since the last call."""
        ...

    def keys(self) -> list[BlockKey]:
        """All keys."""
        ...


class LocationSink(Protocol):
    """The part of the coordinator that is told."""

    def report_shard(
        self,
        shard_id: str,
        node_id: str,
        epoch: int,
        seq: int,
        added: Sequence[BlockKey],
        removed: Sequence[BlockKey],
    ) -> bool:
        """Apply deltas; False asks for a resync."""
        ...

    def begin_resync(self, shard_id: str, node_id: str, epoch: int, seq: int) -> bool:
        """Forget the shard's keys; False = not wanted."""
        ...

    def add_keys(self, shard_id: str, epoch: int, keys: Sequence[BlockKey], last: bool) -> bool:
        """A part of all keys; False = overtaken."""
        ...


class LocationReporter:
    """Reports one shard from a thread of its own.

    Args:
        store: what to report.
        sink: whom to tell.
        shard_id, node_id: who and where the shard is.
        interval_s: heartbeat.
    """

    def __init__(
        self,
        store: KeySource,
        sink: LocationSink,
        shard_id: str,
        node_id: str,
        interval_s: float = REPORT_INTERVAL_S,
    ) -> None:
        self._store, self._sink = store, sink
        self._shard_id, self._node_id = shard_id, node_id
        self._interval_s = interval_s
        self._unsent: Deltas | None = None
        self._changed = threading.Event()
        self._stopped = threading.Event()
        self._thread = start_service(self._run, "location-report")

    def notify(self) -> None:
        """Keys may have changed: report soon."""
        self._changed.set()

    def close(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        self._changed.set()
        self._thread.join()

    def report(self) -> None:
        """Send what changed, or everything where the coordinator asks for it.

        Raises:
            LiteCacheError: the coordinator does not answer; the next report repairs it.
        """
        while self._report_some():
            pass

    def _report_some(self) -> bool:
        """Send one message of changes, or everything; whether there are more."""
        # A message whose answer was lost is sent again: a resync of a large shard is dear.
        deltas = self._unsent = self._unsent or self._store.drain_deltas()
        who = (self._shard_id, self._node_id, deltas.epoch)
        if not deltas.resync and self._sink.report_shard(
            *who, deltas.seq, deltas.added, deltas.removed
        ):
            self._unsent = None
            return deltas.more
        # Keys that change from here on are in the next deltas, too; applying them twice is right.
        keys = self._store.keys()
        if not self._sink.begin_resync(*who, deltas.seq):
            logger.warning(
                "%s: the coordinator follows no more shards; other nodes cannot use its blocks",
                self._shard_id,
            )
            self._unsent = None
            return False
        for start in range(0, max(1, len(keys)), _KEYS_PER_MESSAGE):
            part = keys[start : start + _KEYS_PER_MESSAGE]
            last = start + _KEYS_PER_MESSAGE >= len(keys)
            if not self._sink.add_keys(self._shard_id, deltas.epoch, part, last):
                return False
        self._unsent = None
        return deltas.more

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.report()
            except LiteCacheError as error:
                logger.info("%s: not reported: %s", self._shard_id, error)
            if self._changed.wait(self._interval_s):
                self._stopped.wait(_COLLECT_S)
                self._changed.clear()
