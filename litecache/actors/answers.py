"""What will come of a call, whichever way it was made."""

from __future__ import annotations

from typing import Any, Protocol

from litecache.actors.calls import result
from litecache.sockets.channel import SocketChannel


class Answer(Protocol):
    """What has been sent and will be answered."""

    def get(self, timeout_s: float | None, what: str) -> Any:
        """Wait for it; raises LiteCacheError, see `calls.result`."""
        ...


class ActorAnswer:
    """Of a call of the actor."""

    def __init__(self, ref: Any) -> None:
        self._ref = ref

    def get(self, timeout_s: float | None, what: str) -> Any:
        """See `Answer`."""
        return result(self._ref, timeout_s, what)


class SocketAnswer:
    """Of a call through the socket."""

    def __init__(self, channel: SocketChannel, number: int) -> None:
        self._channel = channel
        self._number = number

    def get(self, timeout_s: float | None, what: str) -> bytes:
        """See `Answer`."""
        return self._channel.answer(self._number, timeout_s, what)

    def forget(self) -> None:
        """Nobody will ask again."""
        self._channel.forget(self._number)
