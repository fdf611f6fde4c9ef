"""What keeps failing: when to try it again, and how often to say so."""

from __future__ import annotations

import logging
import threading
import time

_LONGEST_PAUSE_S = 30.0
_LINE_EVERY_S = 10.0


class Backoff:
    """Holds a thing that failed back, twice as long each time.

    Args:
        first_s: pause after the first failure.
    """

    def __init__(self, first_s: float = 0.5) -> None:
        self._first_s = first_s
        self._pause_s = 0.0
        self._next = 0.0

    @property
    def failing(self) -> bool:
        """Whether the last attempt failed."""
        return self._pause_s > 0

    def due(self) -> bool:
        """Whether it may be tried now."""
        return time.monotonic() >= self._next

    def left_s(self) -> float:
        """Seconds until it may be tried."""
        return max(0.0, self._next - time.monotonic())

    def hurry(self) -> None:
        """The next attempt need not wait: nothing else is left to try."""
        self._next = 0.0

    def note(self, worked: bool) -> bool:
        """How an attempt ended; returns it."""
        longer_s = min(_LONGEST_PAUSE_S, 2 * self._pause_s or self._first_s)
        self._pause_s = 0.0 if worked else longer_s
        self._next = time.monotonic() + self._pause_s if self._pause_s else 0.0
        return worked


class LogByRate:
    """Logs one message of a kind at a time, and how many more there were.

    Args:
        logger, level: where to.
    """

    def __init__(self, logger: logging.Logger, level: int) -> None:
        self._logger, self._level = logger, level
        self._lock = threading.Lock()
        self._next = 0.0
        self._held_back = 0

    def __call__(self, message: str, *args: object) -> None:
        """Log, or count what is held back."""
        with self._lock:
            if time.monotonic() < self._next:
                self._held_back += 1
                return
            self._next = time.monotonic() + _LINE_EVERY_S
            more, self._held_back = self._held_back, 0
        rest = f" (and {more} more since the last such line)" if more else ""
        self._logger.log(self._level, message + "%s", *args, rest)
