"""Calls to one life of a shard's actor, each with a deadline; a call that fails is a miss.

A call that is late may still take effect on the shard: until its result is known nothing more is
asked, and what it turns out to have given is returned. When the actor's process is gone the calls
stay silent, and `on_lost` is called once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError

from litecache.actors.calls import result
from litecache.errors import GroupUnavailableError, LiteCacheError, RequestTimeout
from litecache.metrics import Metrics

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ShardCalls:
    """Sends calls and settles those that are late.

    Args:
        handle: the actor.
        shard_id: names the shard.
        timeout_s: deadline of a call, from the moment its answer is waited for.
        metrics: counts failed calls as misses with a reason.
        on_lost: called once, from any thread, when the actor's process is gone.
    """

    def __init__(
        self,
        handle: Any,
        shard_id: str,
        timeout_s: float,
        metrics: Metrics,
        on_lost: Callable[[], None],
    ) -> None:
        self._handle, self._shard_id, self.timeout_s = handle, shard_id, timeout_s
        self._metrics = metrics
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._unsettled = 0
        self.lost = False

    def tell(self, method: str, *args: Any) -> None:
        """A call whose answer nobody waits for; silent when the shard is gone."""
        if not self.lost:
            getattr(self._handle, method).remote(*args)

    def begin(
        self,
        method: str,
        args: tuple[Any, ...],
        *,
        decode: Callable[[Any], T],
        failed: T,
        undo: Callable[[T], None] | None = None,
    ) -> Call[T]:
        """Send a call.

        Args:
            method, args: of the actor.
            decode: what makes the result from the answer.
            failed: the result when the call cannot be made, fails or is late.
            undo: returns what an answer gave that nobody takes any more.
        """
        if self.lost or self._unsettled:
            self._count("shard_unavailable")
            return Call(self, method, None, decode, failed, undo)
        ref = getattr(self._handle, method).remote(*args)
        return Call(self, method, ref, decode, failed, undo)

    def wait(self, call: Call[T], deadline_s: float | None = None) -> T:
        """The result of a call; see `Call.result`."""
        if call.ref is None:
            return call.failed
        # while an earlier call is late, only an answer that is there already counts
        patience_s = 0.0 if self._unsettled else deadline_s or self.timeout_s
        try:
            answer = result(call.ref, patience_s, f"{self._shard_id}: {call.method}")
            return call.decode(answer)
        except RequestTimeout as error:
            logger.warning("%s; its blocks count as misses until it answers", error)
            self._count("shard_timeout")
            self.settle_later(call)
        except GroupUnavailableError as error:
            logger.warning("%s", error)
            self._count("shard_lost")
            self._lose()
        except LiteCacheError as error:
            logger.warning("%s", error)
            self._count("shard_error")
        return call.failed

    def settle_later(self, call: Call[T]) -> None:
        """Nobody waits for this call any more: undo it once it is answered."""
        with self._lock:
            self._unsettled += 1
        threading.Thread(
            target=self._settle, args=(call,), name="late-shard-call", daemon=True
        ).start()

    def _settle(self, call: Call[T]) -> None:
        try:
            answer = call.decode(ray.get(call.ref))
        except RayError as error:
            if not isinstance(_local_cause(error), LiteCacheError):
                self._lose()
        except LiteCacheError as error:
            logger.warning("%s: %s: %s", self._shard_id, call.method, error)
        else:
            if call.undo is not None:
                call.undo(answer)
        with self._lock:
            self._unsettled -= 1

    def _lose(self) -> None:
        with self._lock:
            first, self.lost = not self.lost, True
        if first:
            self._on_lost()

    def _count(self, reason: str) -> None:
        self._metrics.inc("litecache_misses", tier="shard", reason=reason)


class Call(Generic[T]):
    """One call under way; its result is taken once, or it is abandoned."""

    def __init__(
        self,
        calls: ShardCalls,
        method: str,
        ref: Any,
        decode: Callable[[Any], T],
        failed: T,
        undo: Callable[[T], None] | None,
    ) -> None:
        self._calls = calls
        self.method, self.ref = method, ref
        self.decode, self.failed, self.undo = decode, failed, undo

    def result(self, deadline_s: float | None = None) -> T:
        """Wait for the answer; `failed` when there is none in time.

        Args:
            deadline_s: seconds to wait; None is the calls' own.
        """
        return self._calls.wait(self, deadline_s)

    def abandon(self) -> None:
        """The answer is not wanted any more: what it gives is returned when it comes."""
        if self.ref is not None:
            self._calls.settle_later(self)


def _local_cause(error: RayError) -> BaseException | None:
    """What the actor itself raised; None when Ray could not run the call."""
    cause: BaseException | None = getattr(error, "cause", None)
    return cause
