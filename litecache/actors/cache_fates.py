"""What `RayEngine` keeps per shard actor: its attachment, and the blocks whose end is still open.

A shard that dies is started again by Ray and attached anew here. The end of a write is asked for,
a batch of keys per call, by a thread that sleeps while nothing is open.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from litecache.actors.cache_shard import ABSENT, PENDING, STORED
from litecache.actors.calls import ActorEndedError, result
from litecache.actors.shard_client import RayShardClient
from litecache.errors import LiteCacheError
from litecache.hashing import BlockKey
from litecache.metrics import Metrics
from litecache.threads import start_service

logger = logging.getLogger(__name__)

# throughput matters here, not latency: a slow answer is better than a block given up
CALL_TIMEOUT_S = 30.0
POLL_S = (0.002, 0.05)
LOST = "shard_lost"
_REATTACH_S = 0.5


class AttachedShard:
    """One actor and this process's client of its present life."""

    def __init__(self, handle: Any, name: str, metrics: Metrics) -> None:
        self.handle = handle
        self._name = name
        self._metrics = metrics
        self._lock = threading.Lock()
        self._retry_at = 0.0
        self._client: RayShardClient | None = None

    def client(self) -> RayShardClient | None:
        """Attached to the shard as it lives now; None while it does not answer."""
        with self._lock:
            # a lost client is dropped, not closed: other threads may still copy from its mapping
            if self._client is not None and not self._client.lost:
                return self._client
            if time.monotonic() < self._retry_at:
                return None
            try:
                self._client = RayShardClient(
                    self.handle, self._name, timeout_s=CALL_TIMEOUT_S, metrics=self._metrics
                )
            except LiteCacheError as error:
                logger.info("%s is not there: %s", self._name, error)
                self._client = None
                self._retry_at = time.monotonic() + _REATTACH_S
            return self._client

    def close(self) -> None:
        """Detach."""
        if self._client is not None:
            self._client.close()


class Fates:
    """Asks shards what became of committed blocks, from a thread that sleeps when none are open."""

    def __init__(
        self,
        shards: Sequence[AttachedShard],
        tell: Callable[[Sequence[tuple[BlockKey, str | None]]], None],
    ) -> None:
        self._shards = shards
        self._tell = tell
        self._work = threading.Condition()
        self._open: dict[BlockKey, int | None] = {}
        self._absent: set[BlockKey] = set()
        self._closing = False
        self._thread = start_service(self._run, "block-outcomes")

    def watch(self, key: BlockKey) -> bool:
        """Announce a block that is about to be committed; False when it is watched already."""
        with self._work:
            if key in self._open:
                return False
            self._open[key] = None
            return True

    def ask_for(self, keys: Sequence[BlockKey], shard: int) -> None:
        """Blocks that are watched have been committed: tell what becomes of them."""
        with self._work:
            self._open.update(dict.fromkeys(keys, shard))
            self._work.notify()

    def forget(self, key: BlockKey) -> None:
        """A block was not committed after all."""
        with self._work:
            self._open.pop(key, None)

    def watches(self, key: BlockKey) -> bool:
        """Whether a block is on its way."""
        with self._work:
            return key in self._open

    def close(self) -> None:
        """End the thread; what is open stays untold."""
        with self._work:
            self._closing = True
            self._work.notify()
        self._thread.join()

    def _run(self) -> None:
        delay = POLL_S[0]
        while True:
            with self._work:
                while not self._closing and not (by_shard := self._questions()):
                    self._work.wait()
                if self._closing:
                    return
            told = [each for shard, keys in by_shard.items() for each in self._ask(shard, keys)]
            with self._work:
                for key, _ in told:
                    self._open.pop(key, None)
            if told:
                self._tell(told)
            delay = POLL_S[0] if told else min(2 * delay, POLL_S[1])
            with self._work:
                if not self._closing:
                    self._work.wait(delay)

    def _questions(self) -> dict[int, list[BlockKey]]:
        by_shard: dict[int, list[BlockKey]] = {}
        for key, shard in self._open.items():
            if shard is not None:
                by_shard.setdefault(shard, []).append(key)
        return by_shard

    def _ask(self, shard: int, keys: list[BlockKey]) -> list[tuple[BlockKey, str | None]]:
        try:
            call = self._shards[shard].handle.fates.remote(keys)
            fates: list[str] = result(call, CALL_TIMEOUT_S, "asking what became of blocks")
        except ActorEndedError:
            return [(key, LOST) for key in keys]
        except LiteCacheError as error:
            logger.info("shard %d does not say what became of blocks: %s", shard, error)
            return []
        told: list[tuple[BlockKey, str | None]] = []
        for key, fate in zip(keys, fates, strict=True):
            if fate == ABSENT and key not in self._absent:
                # perhaps its outcome is just about to be noted: ask once more
                self._absent.add(key)
                continue
            self._absent.discard(key)
            if fate != PENDING:
                told.append((key, None if fate == STORED else LOST if fate == ABSENT else fate))
        return told
