"""Messages to the engine's thread, from any other: it takes them between two steps, in order."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import TypeVar

from litecache.errors import RequestTimeout
from litecache.metrics import Metrics

logger = logging.getLogger(__name__)

T = TypeVar("T")
CALL_TIMEOUT_S = 30.0


class Inbox:
    """A queue of functions that one thread runs.

    Args:
        metrics: where to count.
        check_alive: raises what is to be said once that thread takes no more.
    """

    def __init__(self, metrics: Metrics, check_alive: Callable[[], None]) -> None:
        self._metrics, self._check_alive = metrics, check_alive
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def put(self, message: Callable[[], None]) -> None:
        """Have a message taken; what it raises ends the thread."""
        self._queue.put(message)

    def post(self, message: Callable[[], None]) -> None:
        """Have a caller's message taken: whatever it raises is its own."""

        def take() -> None:
            try:
                message()
            except Exception:
                self._metrics.inc("litecache_failed_messages")
                logger.exception("a message to the engine failed")

        self._queue.put(take)

    def call(self, function: Callable[[], T], timeout_s: float) -> T:
        """Have a function run and wait for it.

        Raises:
            RequestTimeout: it has not run in time.
            Exception: what it raised, or what `check_alive` raises.
        """
        self._check_alive()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._queue.put(run)
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            done, _ = futures.wait([future], min(max(left_s, 0.0), 1.0))
            if done:
                return future.result()
            self._check_alive()
            if left_s <= 0:
                raise RequestTimeout(f"the engine has not answered within {timeout_s:g} s")

    def take(self, wait_s: float = 0.0) -> bool:
        """Run all messages that are there, waiting so long for the first; False: there was none."""
        taken = False
        try:
            self._queue.get(timeout=wait_s)()
            taken = True
            while True:
                self._queue.get_nowait()()
        except queue.Empty:
            return taken
