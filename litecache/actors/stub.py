"""The one way to call an actor with a packed message.

Through the actor's socket where this process can reach it, otherwise by the actor's method `call`:
the same messages, the same errors. What is rare or takes long (`flush`, `stats`, `stop`) stays with
methods of the actor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ray.exceptions import RayError

from litecache.actors.calls import result
from litecache.actors.cluster import RayConnection
from litecache.actors.messages import (
    ReplicaMethod,
    pack_call,
    pack_guidance,
    unpack_reply,
    unpack_value,
)
from litecache.actors.naming import CALL_TIMEOUT_S
from litecache.errors import (
    GroupUnavailableError,
    LiteCacheError,
    RequestTimeout,
    StorageError,
    first_line,
)
from litecache.sockets.channel import SocketChannel
from litecache.types import Guidance, PollReply, Request

logger = logging.getLogger(__name__)

T = TypeVar("T")
_RETRY_S = 1.0


@dataclass(eq=False)
class Answer(Generic[T]):
    """What has been sent and will be answered: a socket's call, or what `.remote()` returned."""

    sent: Any
    channel: SocketChannel | None
    decode: Callable[[Any], T]

    def get(self, timeout_s: float | None, what: str, *, again: bool = False) -> T:
        """Wait as `calls.result` does; `again`: an answer that is late will be asked for again."""
        if self.channel is None:
            return self.decode(result(self.sent, timeout_s, what))
        try:
            return self.decode(self.channel.answer(self.sent, timeout_s, what))
        except RequestTimeout:
            if not again:
                self.channel.forget(self.sent)
            raise


class Stub:
    """Sends messages to one actor: by `channel`, while there is one, or by its method `call`."""

    def __init__(self, handle: Any, name: str) -> None:
        self._handle, self._name = handle, name
        self.channel: SocketChannel | None = None

    def connect(self, address: str | None) -> None:
        """Use the socket with this address, if there is one and this process can reach it."""
        if address:
            try:
                self.channel = SocketChannel(address)
            except OSError as error:
                logger.info("%s is called through Ray: %s", self._name, error)

    def ask(self, code: int, message: bytes, decode: Callable[[Any], T]) -> Answer[T]:
        """Send a message that is answered.

        Raises:
            GroupUnavailableError: the other end of the socket is closed.
        """
        channel = self.channel
        if channel is not None:
            try:
                return Answer(channel.call(code, message), channel, decode)
            except StorageError as error:
                logger.info("%s is called through Ray: %s", self._name, error)
        return Answer(self._handle.call.remote(int(code), message), None, decode)

    def tell(self, code: int, message: bytes) -> None:
        """Send a message whose answer nobody waits for; silent when the other side is gone."""
        if self.channel is not None:
            self.channel.tell(code, message)
        else:
            self._handle.call.remote(int(code), message)

    def disconnect(self) -> None:
        """Close the socket: from now on through Ray."""
        channel, self.channel = self.channel, None
        if channel is not None:
            channel.close()


class ReplicaStub(Stub):
    """Calls of one replica, as drivers make them; thread-safe but for `find_socket`.

    A first token waits for a call there and back, so drivers of the same machine use the socket.
    When that breaks the next calls go through Ray, until `find_socket` has found another one.
    Every method but `abort` raises GroupError when the handle is of no use here any more; see
    `RayConnection.check`.
    """

    def __init__(self, handle: Any, name: str) -> None:
        super().__init__(handle, name)
        self._connection = RayConnection.current()
        self._tried_at = 0.0
        self._out_of_reach = False
        self._asked: Any = None

    def is_ready(self) -> bool:
        """Whether the replica answers in time, and has loaded its model."""
        # a replica that hangs is not asked a second time before it has answered the first
        self._asked = self._asked or self._handle.where.remote()
        try:
            ready = bool(result(self._asked, CALL_TIMEOUT_S, f"{self._name}: where")["ready"])
        except RequestTimeout:
            return False
        except (LiteCacheError, RayError) as error:
            logger.info("%s is still gone: %s", self._name, error)
            ready = False
        self._asked = None
        return ready

    def find_socket(self) -> None:
        """Look for the replica's socket, at most once a second, unless there is one in use.

        One that this process cannot reach, on another node for one, is not looked for again before
        the replica's process is another one.

        Raises:
            GroupUnavailableError, RequestTimeout: the replica does not answer.
        """
        self._connection.check()
        if self._out_of_reach or self.channel is not None:
            return
        if time.monotonic() < self._tried_at + _RETRY_S:
            return
        self._tried_at = time.monotonic()
        try:
            where = result(self._handle.where.remote(), CALL_TIMEOUT_S, f"{self._name}: where")
        except RayError as error:
            raise GroupUnavailableError(f"{self._name}: {first_line(error)}") from error
        self.connect(where["address"])
        self._out_of_reach = self.channel is None

    def disconnect(self) -> None:
        """As of `Stub`; the replica's next process may be within reach."""
        super().disconnect()
        self._out_of_reach = False

    def submit(self, client_id: str, requests: Sequence[Request]) -> Answer[str]:
        """Begin `GpuCache.submit`."""
        message = pack_call(client_id, requests=requests)
        return self._ask_either_way(ReplicaMethod.SUBMIT, message, unpack_value)

    def poll(self, *arguments: Any, requests: Sequence[Request]) -> Answer[PollReply]:
        """Begin `GpuCache.poll`."""
        message = pack_call(*arguments, requests=requests)
        return self._ask_either_way(ReplicaMethod.POLL, message, unpack_reply)

    def guide(self, guidance: Sequence[Guidance]) -> Answer[None]:
        """Begin `GpuCache.guide`."""
        message = pack_guidance(guidance)
        return self._ask_either_way(ReplicaMethod.GUIDE, message, unpack_value)

    def abort(self, wire_ids: Sequence[str]) -> None:
        """Begin `GpuCache.abort`; nobody waits for it."""
        try:
            self._connection.check()
            self._handle.abort.remote(wire_ids)
        except (LiteCacheError, RayError) as error:
            logger.info("%s was not told to abort requests: %s", self._name, error)

    def _ask_either_way(
        self, method: ReplicaMethod, message: bytes, decode: Callable[[bytes], Any]
    ) -> Answer[Any]:
        self._connection.check()
        try:
            return self.ask(method, message, decode)
        except GroupUnavailableError:
            # Ray knows what became of the actor
            self.disconnect()
            return self.ask(method, message, decode)
