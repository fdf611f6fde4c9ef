"""The door of an actor that lives on an asyncio loop: calls that may take long, side by side."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from ..errors import StorageError
from .frames import NO_ANSWER, Outcome, pack_frame, take_frames
from .peers import abstract, same_user

logger = logging.getLogger(__name__)

_RECEIVE_BYTES = 1 << 18

Handler = Callable[[bytes], Awaitable[bytes]]


class AsyncSocketServer:
    """Answers calls until its loop ends; every call is a task of its own.

    Args:
        name: of the address; must be new on this machine.
        methods: number to what answers the call.

    Attributes:
        address: for `SocketChannel`, once `start` has returned.
    """

    def __init__(self, name: str, methods: Mapping[int, Handler]) -> None:
        self.address = f"litecache-{name}"
        self._methods = {int(method): handler for method, handler in methods.items()}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        """Listen, on the running loop.

        Raises:
            OSError: the address cannot be had.
        """
        self._server = await asyncio.start_unix_server(self._serve, path=abstract(self.address))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = bytearray()
        try:
            if not same_user(writer.get_extra_info("socket")):
                return
            while data := await reader.read(_RECEIVE_BYTES):
                received += data
                for number, code, message in take_frames(received):
                    task = asyncio.create_task(self._answer(writer, number, code, message))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        except (OSError, StorageError) as error:
            logger.info("a client's connection ended: %s", error)
        finally:
            writer.close()

    async def _answer(
        self, writer: asyncio.StreamWriter, number: int, code: int, message: bytes
    ) -> None:
        handler = self._methods.get(code)
        outcome, answer = Outcome.ERROR, f"there is no call {code}".encode()
        if handler is not None:
            try:
                outcome, answer = Outcome.DONE, await handler(message)
            except Exception as error:
                logger.exception("call %d failed", code)
                answer = f"{type(error).__name__}: {error}".encode()
        if number != NO_ANSWER and not writer.is_closing():
            writer.write(pack_frame(number, outcome, answer))

    def close(self) -> None:
        """Take no new connections."""
        if self._server is not None:
            self._server.close()
