"""The one way to call an actor with a packed message.

Through the actor's socket where this process can reach it, otherwise by the actor's method `call`:
the same messages, the same errors. What is rare or takes long (`flush`, `stats`, `stop`) stays with
methods of the actor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from litecache.actors.calls import result
from litecache.errors import RequestTimeout, StorageError
from litecache.sockets.channel import SocketChannel

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Answer(Generic[T]):
    """What has been sent and will be answered.

    Args:
        sent: the number of a socket's call, or what `.remote()` returned.
        channel: of the socket.
        decode: makes the result from what comes.
    """

    def __init__(
        self, sent: Any, channel: SocketChannel | None, decode: Callable[[Any], T]
    ) -> None:
        self._sent, self._channel, self._decode = sent, channel, decode

    def get(self, timeout_s: float | None, what: str, *, again: bool = False) -> T:
        """Wait for it; raises what the actor raised, and as `calls.result`.

        Args:
            timeout_s: None waits for as long as it takes.
            what: names the call in errors.
            again: an answer that is late will be asked for again.
        """
        if self._channel is None:
            return self._decode(result(self._sent, timeout_s, what))
        try:
            return self._decode(self._channel.answer(self._sent, timeout_s, what))
        except RequestTimeout:
            if not again:
                self._channel.forget(self._sent)
            raise


class Stub:
    """Sends messages to one actor.

    Args:
        handle: the actor; its method `call(code, message)` answers what its socket does.
        name: for logs.

    Attributes:
        channel: to the actor's socket, while there is one.
    """

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
