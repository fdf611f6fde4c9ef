"""Calls to one life of a shard, each with a deadline; a call that fails is a miss.

Short calls go through the shard's socket where there is one, the others, and all without it, are
calls of its actor. A call that is late may still take effect on the shard: until its result is
known nothing more is asked, and what it turns out to have given is returned. When the actor's
process is gone the calls stay silent, and `on_lost` is called once.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from litecache.actors.answers import ActorAnswer, Answer, SocketAnswer
from litecache.errors import GroupUnavailableError, LiteCacheError, RequestTimeout
from litecache.metrics import Metrics
from litecache.sockets.channel import SocketChannel
from litecache.storage.protocol import ShardMethod
from litecache.threads import start_job

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

    Attributes:
        channel: to the shard's socket, once there is one.
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
        self._late: deque[Call[Any]] = deque()
        self._settling = False
        self._lost = False
        self.channel: SocketChannel | None = None

    @property
    def lost(self) -> bool:
        """The shard's process is gone, or these calls are closed."""
        if not self._lost and self.channel is not None and self.channel.hung_up:
            logger.warning("%s has closed its socket", self._shard_id)
            self._lose()
        return self._lost

    def tell(self, method: ShardMethod, message: bytes) -> None:
        """A call whose answer nobody waits for; silent when the shard is gone."""
        if self._lost:
            return
        if self.channel is not None:
            self.channel.tell(method, message)
        else:
            getattr(self._handle, method.name.lower()).remote(message)

    def ask(
        self,
        method: ShardMethod,
        message: bytes,
        *,
        decode: Callable[[Any], T],
        failed: T,
        undo: Callable[[T], None] | None = None,
    ) -> Call[T]:
        """Send a short call.

        Args:
            method, message: what is asked.
            decode: what makes the result from the answer.
            failed: the result when the call cannot be made, fails or is late.
            undo: returns what an answer gave that nobody takes any more.
        """
        name = method.name.lower()
        if self.channel is None:
            return self.ask_actor(name, (message,), decode=decode, failed=failed, undo=undo)
        answer: Answer | None = None
        if self._may_ask():
            try:
                answer = SocketAnswer(self.channel, self.channel.call(method, message))
            except GroupUnavailableError as error:
                self._note_lost(error)
        return Call(self, name, answer, decode, failed, undo)

    def ask_actor(
        self,
        method: str,
        args: tuple[Any, ...],
        *,
        decode: Callable[[Any], T],
        failed: T,
        undo: Callable[[T], None] | None = None,
    ) -> Call[T]:
        """`ask` by a call of the actor, for what takes long."""
        answer: Answer | None = None
        if self._may_ask():
            answer = ActorAnswer(getattr(self._handle, method).remote(*args))
        return Call(self, method, answer, decode, failed, undo)

    def _may_ask(self) -> bool:
        if self._lost or self._late:
            self._count("shard_unavailable")
            self._start_settling()
            return False
        return True

    def wait(self, call: Call[T], deadline_s: float | None = None) -> T:
        """The result of a call; see `Call.result`."""
        if call.answer is None:
            return call.failed
        # while an earlier call is late, only an answer that is there already counts
        patience_s = 0.0 if self._late else deadline_s or self.timeout_s
        try:
            return call.decode(call.answer.get(patience_s, self._name(call)))
        except RequestTimeout as error:
            logger.warning("%s; its blocks count as misses until it answers", error)
            self._count("shard_timeout")
            self.settle_later(call)
        except GroupUnavailableError as error:
            self._note_lost(error)
        except LiteCacheError as error:
            logger.warning("%s", error)
            self._count("shard_error")
        return call.failed

    def _name(self, call: Call[T]) -> str:
        return f"{self._shard_id}: {call.method}"

    def settle_later(self, call: Call[T]) -> None:
        """Nobody waits for this call any more: undo it once it is answered."""
        with self._lock:
            self._late.append(call)
        self._start_settling()

    def _start_settling(self) -> None:
        with self._lock:
            if self._settling or not self._late:
                return
            try:
                start_job(self._settle_all, "late-shard-calls", lambda _: self._lose())
                self._settling = True
            except RuntimeError as error:
                # no room for a thread: the next call tries again
                logger.warning("%s: late calls wait: %s", self._shard_id, error)

    def _settle_all(self) -> None:
        while True:
            with self._lock:
                if not self._late:
                    self._settling = False
                    return
                call = self._late[0]
            self._settle(call)
            with self._lock:
                self._late.popleft()

    def _settle(self, call: Call[Any]) -> None:
        assert call.answer is not None
        try:
            answer = call.decode(call.answer.get(None, self._name(call)))
        except GroupUnavailableError:
            self._lose()
        except LiteCacheError as error:
            logger.warning("%s", error)
        else:
            if call.undo is not None:
                call.undo(answer)

    def _note_lost(self, error: GroupUnavailableError) -> None:
        logger.warning("%s", error)
        self._count("shard_lost")
        self._lose()

    def _lose(self) -> None:
        with self._lock:
            first, self._lost = not self._lost, True
        if first:
            self._on_lost()

    def close(self) -> None:
        """Send nothing more."""
        self._lost = True
        if self.channel is not None:
            self.channel.close()

    def _count(self, reason: str) -> None:
        self._metrics.inc("litecache_misses", tier="shard", reason=reason)


class Call(Generic[T]):
    """One call under way; its result is taken once, or it is abandoned."""

    def __init__(
        self,
        calls: ShardCalls,
        method: str,
        answer: Answer | None,
        decode: Callable[[Any], T],
        failed: T,
        undo: Callable[[T], None] | None,
    ) -> None:
        self._calls = calls
        self.method, self.answer = method, answer
        self.decode, self.failed, self.undo = decode, failed, undo

    @property
    def sent(self) -> bool:
        """Whether the shard was asked at all."""
        return self.answer is not None

    def result(self, deadline_s: float | None = None) -> T:
        """Wait for the answer; `failed` when there is none in time.

        Args:
            deadline_s: seconds to wait; None is the calls' own.
        """
        return self._calls.wait(self, deadline_s)

    def abandon(self) -> None:
        """The answer is not wanted any more: what it gives is returned when it comes."""
        if self.sent:
            self._calls.settle_later(self)
