"""Shards of this node, kept attached.

Attaches to all at the start; when one is lost it is attached again as soon as it is back. A
shard that never comes costs misses, nothing else.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from litecache.errors import LiteCacheError
from litecache.storage.client import ShardClient
from litecache.threads import start_service

logger = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.2
_LAST_RETRY_S = 5.0


class Connect(Protocol):
    """Attaches to the shard of a name; calls `on_lost` when it is gone."""

    def __call__(self, name: str, on_lost: Callable[[], None]) -> ShardClient:
        """The attached client; raises LiteCacheError when the shard does not answer."""
        ...


class AttachedShards:
    """Clients by name, re-attached by a thread that sleeps while all are there.

    Args:
        names: the shards of the node.
        connect: attaches one.
    """

    def __init__(self, names: Sequence[str], connect: Connect) -> None:
        self._names = list(names)
        self._connect = connect
        self._clients: dict[str, ShardClient] = {}
        self._changed: Callable[[list[ShardClient]], None] | None = None
        self._condition = threading.Condition()
        self._closed = False
        for name in self._names:
            self._attach(name)
        self._thread: threading.Thread | None = None

    def clients(self) -> list[ShardClient]:
        """The shards that are attached now."""
        with self._condition:
            return [self._clients[name] for name in self._names if name in self._clients]

    def client(self, name: str) -> ShardClient | None:
        """One shard, if it is attached now. A lost client is dropped, not closed: other threads
        may still copy from its mapping.
        """
        client = self._clients.get(name)
        return None if client is None or client.lost else client

    def watch(self, changed: Callable[[list[ShardClient]], None] | None = None) -> None:
        """From now on attach again what is lost, and call `changed` with the clients then."""
        self._changed = changed
        self._thread = start_service(self._watch, "shard-watch")

    def close(self) -> None:
        """Stop watching; the clients stay as they are."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _attach(self, name: str) -> bool:
        try:
            client = self._connect(name, lambda: self._lost(name))
        except LiteCacheError as error:
            logger.info("%s is not attached: %s", name, error)
            return False
        with self._condition:
            self._clients[name] = client
        return True

    def _lost(self, name: str) -> None:
        with self._condition:
            self._clients.pop(name, None)
            self._condition.notify_all()

    def _missing(self) -> list[str]:
        return [name for name in self._names if name not in self._clients]

    def _watch(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or bool(self._missing()))
                if self._closed:
                    return
                missing = self._missing()
            came_back = [name for name in missing if self._attach(name)]
            if came_back and self._changed is not None:
                logger.info("attached again: %s", ", ".join(came_back))
                self._changed(self.clients())
            retry_s = _FIRST_RETRY_S if came_back else min(2 * retry_s, _LAST_RETRY_S)
            with self._condition:
                self._condition.wait_for(lambda: self._closed, retry_s)
