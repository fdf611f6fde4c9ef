"""A replica's `submit` and `poll`, as drivers make them.

Through the replica's socket where this process can reach it: a first token waits for a call there
and back, and through Ray that costs milliseconds. What goes wrong there goes wrong as in Ray: the
same errors, and the next calls are the actor's own until `connect` finds a socket again.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import Any

from litecache.actors.answers import ActorAnswer, Answer, SocketAnswer
from litecache.actors.calls import result
from litecache.actors.naming import CALL_TIMEOUT_S
from litecache.errors import GroupUnavailableError, LiteCacheError, RequestTimeout
from litecache.sockets.channel import SocketChannel

logger = logging.getLogger(__name__)

_RETRY_S = 1.0


class ReplicaMethod(IntEnum):
    """Numbers of a replica's methods on its socket."""

    SUBMIT = 1
    POLL = 2


def answering(method: Callable[..., Awaitable[Any]]) -> Callable[[bytes], Awaitable[bytes]]:
    """A coroutine method as a handler of `AsyncSocketServer`: pickled arguments in, result out.

    Pickle, as in Ray itself: both sides have checked that the other runs as the same user.
    """

    async def answer(message: bytes) -> bytes:
        try:
            value = await method(*pickle.loads(message))
        except LiteCacheError as error:
            value = error
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)

    return answer


class _Unpickled:
    """An answer of `answering`."""

    def __init__(self, answer: SocketAnswer) -> None:
        self._answer = answer

    def get(self, timeout_s: float | None, what: str) -> Any:
        """See `Answer`."""
        try:
            value = pickle.loads(self._answer.get(timeout_s, what))
        except RequestTimeout:
            self._answer.forget()
            raise
        if isinstance(value, LiteCacheError):
            raise value
        return value


class ReplicaCalls:
    """Calls of one replica, thread-safe but for `connect`.

    Args:
        handle: the `GpuCache` actor.
        name: of the replica, for messages.
    """

    def __init__(self, handle: Any, name: str) -> None:
        self._handle, self._name = handle, name
        self._channel: SocketChannel | None = None
        self._tried_at = 0.0

    def connect(self) -> None:
        """Look for the replica's socket, at most once a second, unless there is one in use."""
        if self._channel is not None or time.monotonic() < self._tried_at + _RETRY_S:
            return
        self._tried_at = time.monotonic()
        try:
            where = result(self._handle.where.remote(), CALL_TIMEOUT_S, f"{self._name}: where")
            self._channel = SocketChannel(where["address"]) if where["address"] else None
        except (LiteCacheError, OSError) as error:
            logger.info("%s is called through Ray: %s", self._name, error)

    def submit(self, *args: Any) -> Answer:
        """Begin `GpuCache.submit`."""
        return self._ask(ReplicaMethod.SUBMIT, args)

    def poll(self, *args: Any) -> Answer:
        """Begin `GpuCache.poll`."""
        return self._ask(ReplicaMethod.POLL, args)

    def _ask(self, method: ReplicaMethod, args: tuple[Any, ...]) -> Answer:
        channel = self._channel
        if channel is not None:
            try:
                number = channel.call(method, pickle.dumps(args, pickle.HIGHEST_PROTOCOL))
                return _Unpickled(SocketAnswer(channel, number))
            except GroupUnavailableError:
                self.disconnect()
        return ActorAnswer(getattr(self._handle, method.name.lower()).remote(*args))

    def disconnect(self) -> None:
        """The socket has failed: from now on through Ray, which knows what became of the actor."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
