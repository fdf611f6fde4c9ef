"""Growth of the arena on demand, outside the store's lock: faulting memory in takes long."""

from __future__ import annotations

import logging
import threading

from .ram_tier import RamTier

logger = logging.getLogger(__name__)


class ArenaGrowth:
    """Grows the arena, one thread at a time.

    Args:
        ram: the slots.
        lock: the store's lock.
    """

    def __init__(self, ram: RamTier, lock: threading.Lock) -> None:
        self._ram = ram
        self._lock = lock
        self._growing = threading.Lock()
        self.closed = False

    def ensure(self, pages: int, n: int) -> None:
        """Let the arena grow, outside the lock, until it has `n` slots or reaches its bound."""
        space = self._ram.space
        with self._lock:
            if space.available(pages) >= n or space.growth(pages) is None:
                return
        with self._growing:
            while True:
                with self._lock:
                    segments = space.growth(pages)
                    if self.closed or space.available(pages) >= n or segments is None:
                        return
                try:
                    self._ram.arena.grow(segments)
                except OSError as error:
                    logger.error("the arena cannot grow, to be tried again later: %s", error)
                    self._ram.growth.note(False)
                    return
                self._ram.growth.note(True)
                with self._lock:
                    space.grow(segments)
