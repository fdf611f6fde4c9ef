"""A replica's `submit` and `poll`, as drivers make them.

Through the replica's socket where this process can reach it: a first token waits for a call there
and back, and through Ray that costs milliseconds. What goes wrong there goes wrong as in Ray: the
same errors, and the next calls are the actor's own until `connect` finds a socket again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from enum import IntEnum
from typing import Any

from ray.exceptions import RayError

from litecache.actors.answers import ActorAnswer, Answer, SocketAnswer
from litecache.actors.calls import result
from litecache.actors.cluster import RayConnection
from litecache.actors.messages import (
    pack_call,
    pack_reply,
    pack_value,
    unpack_call,
    unpack_reply,
    unpack_value,
)
from litecache.actors.naming import CALL_TIMEOUT_S
from litecache.errors import (
    ConfigError,
    GroupUnavailableError,
    LiteCacheError,
    RequestTimeout,
    StorageError,
)
from litecache.sockets.channel import SocketChannel
from litecache.types import Request

logger = logging.getLogger(__name__)

_RETRY_S = 1.0


class ReplicaMethod(IntEnum):
    """Numbers of a replica's methods on its socket."""

    SUBMIT = 1
    POLL = 2


_PACK: dict[ReplicaMethod, Callable[[Any], bytes]] = {
    ReplicaMethod.SUBMIT: pack_value,
    ReplicaMethod.POLL: pack_reply,
}
_UNPACK: dict[ReplicaMethod, Callable[[bytes], Any]] = {
    ReplicaMethod.SUBMIT: unpack_value,
    ReplicaMethod.POLL: unpack_reply,
}


def answering(
    method: ReplicaMethod, actor: Callable[..., Awaitable[Any]]
) -> Callable[[bytes], Awaitable[bytes]]:
    """A coroutine method of the actor as a handler of `AsyncSocketServer`."""

    async def answer(message: bytes) -> bytes:
        arguments, requests = unpack_call(message)
        try:
            call = actor(*arguments, requests)
        except TypeError:  # of binding the arguments: a coroutine method has run nothing yet
            what = f"{len(arguments)} arguments"
            raise ConfigError("message", what, f"those of {method.name.lower()}") from None
        return _PACK[method](await call)

    return answer


class _Unpacked:
    """An answer of `answering`."""

    def __init__(self, answer: SocketAnswer, method: ReplicaMethod) -> None:
        self._answer, self._method = answer, method

    def get(self, timeout_s: float | None, what: str) -> Any:
        """See `Answer`."""
        try:
            return _UNPACK[self._method](self._answer.get(timeout_s, what))
        except RequestTimeout:
            self._answer.forget()
            raise


class ReplicaCalls:
    """Calls of one replica, thread-safe but for `connect`.

    Args:
        handle: the `GpuCache` actor.
        name: of the replica, for messages.
    """

    def __init__(self, handle: Any, name: str) -> None:
        self._handle, self._name = handle, name
        self._connection = RayConnection.current()
        self._channel: SocketChannel | None = None
        self._tried_at = 0.0

    def connect(self) -> None:
        """Look for the replica's socket, at most once a second, unless there is one in use.

        Raises:
            GroupError: see `RayConnection.check`, here and in every call.
        """
        self._connection.check()
        if self._channel is not None or time.monotonic() < self._tried_at + _RETRY_S:
            return
        self._tried_at = time.monotonic()
        try:
            where = result(self._handle.where.remote(), CALL_TIMEOUT_S, f"{self._name}: where")
            self._channel = SocketChannel(where["address"]) if where["address"] else None
        except (LiteCacheError, RayError, OSError) as error:
            logger.info("%s is called through Ray: %s", self._name, error)

    def submit(self, client_id: str, requests: Sequence[Request]) -> Answer:
        """Begin `GpuCache.submit`."""
        return self._ask(ReplicaMethod.SUBMIT, (client_id,), requests)

    def poll(self, *arguments: Any) -> Answer:
        """Begin `GpuCache.poll`; the last argument is the requests."""
        return self._ask(ReplicaMethod.POLL, arguments[:-1], arguments[-1])

    def abort(self, wire_ids: Sequence[str]) -> None:
        """Begin `GpuCache.abort`; nobody waits for it."""
        try:
            self._connection.check()
            self._handle.abort.remote(wire_ids)
        except (LiteCacheError, RayError) as error:
            logger.info("%s was not told to abort requests: %s", self._name, error)

    def _ask(
        self, method: ReplicaMethod, arguments: tuple[Any, ...], requests: Sequence[Request]
    ) -> Answer:
        self._connection.check()
        channel = self._channel
        if channel is not None:
            try:
                number = channel.call(method, pack_call(*arguments, requests=requests))
                return _Unpacked(SocketAnswer(channel, number), method)
            except GroupUnavailableError:
                self.disconnect()
            except StorageError as error:
                logger.info("%s is called through Ray: %s", self._name, error)
        return ActorAnswer(getattr(self._handle, method.name.lower()).remote(*arguments, requests))

    def disconnect(self) -> None:
        """The socket has failed: from now on through Ray, which knows what became of the actor."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
