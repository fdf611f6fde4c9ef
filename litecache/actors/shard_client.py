"""A shard of the same node, as the engine's transfer threads use it through Ray.

Control goes by actor calls with a deadline, bytes by the shared arena. A call that fails is a
miss, never an error. A call that is late may still take effect on the shard: until its result is
known the client answers "miss" without asking, and leases that it turns out to have given are
returned. A client belongs to one life of the shard: when that ends it stays silent, `on_lost` is
called once, and whoever watches makes a new client with the new arena.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from litecache.actors.calls import result
from litecache.actors.naming import CALL_TIMEOUT_S
from litecache.errors import GroupUnavailableError, LiteCacheError, RequestTimeout
from litecache.hashing import BlockKey
from litecache.metrics import Metrics
from litecache.storage.arena_view import ArenaView
from litecache.storage.protocol import (
    CommitItem,
    CommitStatus,
    FlushReport,
    SlotRef,
    StageResult,
    StageStatus,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
_ATTACH_TIMEOUT_S = 30.0
_MISS = StageResult(StageStatus.MISS)


class RayShardClient:
    """`ShardClient` over a `StorageShard` actor.

    Args:
        handle: the actor.
        shard_id: names the shard.
        timeout_s: deadline of every call.
        metrics: counts failed calls as misses with a reason.
        on_lost: called once, from any thread, when the actor's process is gone.

    Raises:
        LiteCacheError: the shard does not answer, or refuses.
    """

    def __init__(
        self,
        handle: Any,
        shard_id: str,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        metrics: Metrics | None = None,
        on_lost: Callable[[RayShardClient], None] | None = None,
    ) -> None:
        self._handle, self._shard_id, self._timeout_s = handle, shard_id, timeout_s
        self._metrics = metrics or Metrics()
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._unsettled = 0
        self._lost = False
        attachment = result(
            handle.attach.remote(os.getpid()), _ATTACH_TIMEOUT_S, f"{shard_id}: attach"
        )
        self._client_id = attachment.client_id
        self._arena = ArenaView(attachment)

    @property
    def shard_id(self) -> str:
        """Names the shard."""
        return self._shard_id

    @property
    def arena(self) -> ArenaView:
        """The slots of the shard's present life."""
        return self._arena

    @property
    def lost(self) -> bool:
        """The shard's process is gone."""
        return self._lost

    def stage(self, keys: Sequence[BlockKey]) -> list[StageResult]:
        """See `ShardStore.stage`."""

        def undo(late: list[StageResult]) -> None:
            self.release([SlotRef(r.slot, r.generation) for r in late if r.slot >= 0])

        return self._call("stage", (list(keys),), [_MISS] * len(keys), undo)

    def cancel(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `ShardStore.cancel`."""
        return self._call("cancel", (list(keys),), [False] * len(keys))

    def release(self, slots: Sequence[SlotRef]) -> None:
        """See `ShardStore.release`; does not wait for the answer."""
        if slots and not self._lost:
            self._handle.release.remote(self._client_id, list(slots))

    def reserve(self, block_bytes: int, n: int) -> list[SlotRef]:
        """See `ShardStore.reserve`."""
        return self._call("reserve", (block_bytes, n), [], self.release)

    def commit(self, items: Sequence[CommitItem]) -> list[CommitStatus]:
        """See `ShardStore.commit`; when the answer is late the blocks count as not stored."""
        return self._call("commit", (list(items),), [CommitStatus.STALE] * len(items))

    def query(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `ShardStore.query`."""
        return self._call("query", (list(keys),), [False] * len(keys), own=False)

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """See `ShardStore.touch`; does not wait for the answer."""
        if keys and not self._lost:
            self._handle.touch.remote(list(keys))

    def durable(self, keys: Sequence[BlockKey]) -> list[bool]:
        """See `ShardStore.durable`."""
        return self._call("durable", (list(keys),), [False] * len(keys), own=False)

    def flush(self, timeout_s: float) -> FlushReport:
        """See `ShardStore.flush`."""
        failed = FlushReport(0, 0, 0, False)
        deadline_s = timeout_s + self._timeout_s
        return self._call("flush", (timeout_s,), failed, own=False, deadline_s=deadline_s)

    def close(self) -> None:
        """Detach, which ends all leases, and unmap the arena."""
        if not self._lost:
            self._handle.detach.remote(self._client_id)
        self._lost = True
        self._arena.close()

    def _call(
        self,
        method: str,
        args: tuple[Any, ...],
        failed: T,
        undo: Callable[[T], None] | None = None,
        *,
        own: bool = True,
        deadline_s: float | None = None,
    ) -> T:
        """One call; `failed` when it cannot be made, fails or is late.

        Args:
            undo: returns the leases of an answer that comes after the deadline.
            own: the call goes in the name of this client.
        """
        if self._lost or self._unsettled:
            self._count("shard_unavailable")
            return failed
        head = (self._client_id,) if own else ()
        ref = getattr(self._handle, method).remote(*head, *args)
        try:
            answer: T = result(ref, deadline_s or self._timeout_s, f"{self._shard_id}: {method}")
            return answer
        except RequestTimeout as error:
            logger.warning("%s; its blocks count as misses until it answers", error)
            self._count("shard_timeout")
            with self._lock:
                self._unsettled += 1
            threading.Thread(
                target=self._settle, args=(ref, undo), name="late-shard-call", daemon=True
            ).start()
        except GroupUnavailableError as error:
            logger.warning("%s", error)
            self._count("shard_lost")
            self._lose()
        except LiteCacheError as error:
            logger.warning("%s", error)
            self._count("shard_error")
        return failed

    def _settle(self, ref: Any, undo: Callable[[T], None] | None) -> None:
        try:
            answer = ray.get(ref)
        except RayError as error:
            if not isinstance(local_cause(error), LiteCacheError):
                self._lose()
        else:
            if undo is not None:
                undo(answer)
        with self._lock:
            self._unsettled -= 1

    def _lose(self) -> None:
        with self._lock:
            first, self._lost = not self._lost, True
        if first and self._on_lost is not None:
            self._on_lost(self)

    def _count(self, reason: str) -> None:
        self._metrics.inc("litecache_misses", tier="shard", reason=reason)


def local_cause(error: RayError) -> BaseException | None:
    """What the actor itself raised; None when Ray could not run the call."""
    cause: BaseException | None = getattr(error, "cause", None)
    return cause
