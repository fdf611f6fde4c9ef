"""The door of an actor that lives on an asyncio loop: calls that may take long, side by side."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from ..errors import LiteCacheError, StorageError
from .frames import (
    MAX_FRAME_BYTES,
    NO_ANSWER,
    RECEIVE_BYTES,
    Intake,
    Outcome,
    handler_of,
    pack_error,
    pack_frame,
)
from .peers import forget, listen, same_user

logger = logging.getLogger(__name__)

# Calls of one connection that may be under way; further ones are read when one has ended.
_CALLS = 1024

Handler = Callable[[bytes], Awaitable[bytes]]


class AsyncSocketServer:
    """Answers calls until its loop ends; every call is a task of its own.

    Args:
        name: of the socket; must be new among this user's.
        methods: number to what answers the call.
        intake: what its connections may hold.

    Attributes:
        address: for `SocketChannel`, once `start` has returned.
    """

    def __init__(
        self, name: str, methods: Mapping[int, Handler], intake: Intake | None = None
    ) -> None:
        self._name, self.address = name, ""
        self._intake = intake or Intake()
        self._methods = {int(method): handler for method, handler in methods.items()}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        """Listen, on the running loop.

        Raises:
            OSError: the address cannot be had.
        """
        listener, self.address = listen(self._name)
        self._server = await asyncio.start_unix_server(self._serve, sock=listener)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = None
        under_way = asyncio.Semaphore(_CALLS)
        try:
            if not same_user(writer.get_extra_info("socket")):
                return
            frames = self._intake.open()
            while data := await asyncio.wait_for(reader.read(RECEIVE_BYTES), frames.left_s()):
                for number, code, message in frames.take(data):
                    await under_way.acquire()
                    task = asyncio.create_task(self._answer(writer, number, code, message))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                    task.add_done_callback(lambda _: under_way.release())
        except (OSError, StorageError, asyncio.TimeoutError) as error:
            logger.info(
                "a client's connection ended: %s", str(error) or "a frame never became whole"
            )
        finally:
            if frames is not None:
                frames.close()
            writer.close()

    async def _answer(
        self, writer: asyncio.StreamWriter, number: int, code: int, message: bytes
    ) -> None:
        try:
            outcome, answer = Outcome.DONE, await handler_of(self._methods, code)(message)
        except Exception as error:
            if not isinstance(error, LiteCacheError):
                logger.exception("call %d failed", code)
            outcome, answer = Outcome.ERROR, pack_error(error)
        if number == NO_ANSWER or writer.is_closing():
            return
        if writer.transport.get_write_buffer_size() > MAX_FRAME_BYTES:
            logger.warning("a client that does not take its answers is given up")
            writer.transport.abort()  # type: ignore[no-untyped-call, attr-defined, unused-ignore]
            return
        writer.write(pack_frame(number, outcome, answer))

    def close(self) -> None:
        """Take no new connections."""
        if self._server is not None:
            forget(self.address)
            self._server.close()
