"""Tells the coordinator what a shard holds, and that the shard is alive.

A thread that sleeps until keys change or the next heartbeat is due. Messages carry the shard's
epoch and a sequence number; when the coordinator does not know what came before (it restarted, a
message was lost) everything is sent again. Without a coordinator nothing else stops.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from litecache.actors.location_map import LocationReport
from litecache.actors.naming import REPORT_INTERVAL_S
from litecache.errors import LiteCacheError
from litecache.storage.key_dict import BATCH_KEYS
from litecache.storage.protocol import Deltas
from litecache.storage.shard_store import ShardStore
from litecache.threads import start_service

logger = logging.getLogger(__name__)

# Changes are collected for this long: one message per burst of commits.
_COLLECT_S = 0.05
_KEYS_PER_MESSAGE = BATCH_KEYS


class LocationReporter:
    """Reports one shard from a thread of its own.

    Args:
        store: what to report.
        send: tells the coordinator; see `LocationMap.report`.
        shard_id, node_id: who and where the shard is.
        interval_s: heartbeat.
    """

    def __init__(
        self,
        store: ShardStore,
        send: Callable[[LocationReport], bool],
        shard_id: str,
        node_id: str,
        interval_s: float = REPORT_INTERVAL_S,
    ) -> None:
        self._store, self._send = store, send
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
        report = LocationReport(self._shard_id, self._node_id, *deltas[:4])
        if not deltas.resync and self._send(report):
            self._unsent = None
            return deltas.more
        # Keys that change from here on are in the next deltas, too; applying them twice is right.
        keys = self._store.keys()
        for part, start in enumerate(range(0, max(1, len(keys)), _KEYS_PER_MESSAGE)):
            some = keys[start : start + _KEYS_PER_MESSAGE]
            last = start + _KEYS_PER_MESSAGE >= len(keys)
            if self._send(report._replace(added=some, removed=(), part=part, last=last)):
                continue
            if part == 0:
                logger.warning(
                    "%s: the coordinator follows no more shards; other nodes cannot use its blocks",
                    self._shard_id,
                )
                self._unsent = None
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
