"""Who is served now, who waits, and who is told to come back: a bounded queue with fair shares.

As many sequences as the engines have rows run at once. Beyond that requests wait, by key, and the
key with the least that runs is served next; so a key that sends a thousand requests does not keep
another one's single request waiting behind them. The queue is bounded: when it is full, the newest
request of the key that waits with most goes, and be it the one that has just come.

Used on one event loop. `check_integrity` adds up what runs.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from litecache.serving.errors import ApiError


@dataclass(eq=False)
class _Waiting:
    tenant: str
    size: int
    turn: asyncio.Future[None] = field(default_factory=asyncio.Future)


class Admission:
    """Slots for sequences.

    Args:
        max_running: sequences at once; a request of more runs alone.
        max_waiting: requests that wait at once.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self._running: Counter[str] = Counter()
        # keys that wait, longest unserved first
        self._waiting: OrderedDict[str, deque[_Waiting]] = OrderedDict()
        self.rejected = 0

    @property
    def running(self) -> int:
        """Sequences that run."""
        return self._running.total()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._waiting.values()))

    async def enter(self, tenant: str, size: int) -> Callable[[], None]:
        """Take a place for `size` sequences of a key, after its turn has come.

        Returns:
            Leaves the place; once more does nothing.

        Raises:
            ApiError: 429, too many wait.
        """
        if self._waiting or not self._fits(size):
            await self._wait(_Waiting(tenant, size))
        else:
            self._running[tenant] += size
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                self._release(tenant, size)

        return leave

    def _release(self, tenant: str, size: int) -> None:
        self._running[tenant] -= size
        if not self._running[tenant]:
            del self._running[tenant]
        self._serve()

    def _fits(self, size: int) -> bool:
        running = self.running
        return running == 0 or running + size <= self.max_running

    async def _wait(self, request: _Waiting) -> None:
        self._waiting.setdefault(request.tenant, deque()).append(request)
        if self.waiting > self.max_waiting:
            longest = max(self._waiting, key=lambda tenant: len(self._waiting[tenant]))
            if len(self._waiting[longest]) == len(self._waiting[request.tenant]):
                longest = request.tenant
            unlucky = self._waiting[longest][-1]
            self._leave(unlucky)
            self.rejected += 1
            if not unlucky.turn.done():  # else it is going away by itself
                unlucky.turn.set_exception(self._full())
        try:
            await request.turn
        except asyncio.CancelledError:
            if request.turn.done() and not request.turn.cancelled():
                if request.turn.exception() is None:  # its turn came as it went
                    self._release(request.tenant, request.size)
            elif request in self._waiting.get(request.tenant, ()):
                self._leave(request)
                self._serve()
            raise

    def _leave(self, request: _Waiting) -> None:
        queue = self._waiting[request.tenant]
        queue.remove(request)
        if not queue:
            del self._waiting[request.tenant]

    def _serve(self) -> None:
        while self._waiting:
            tenant = min(self._waiting, key=lambda each: self._running[each])
            request = self._waiting[tenant][0]
            if request.turn.done():  # cancelled, and its task has not run since
                self._leave(request)
                continue
            if not self._fits(request.size):
                return
            self._leave(request)
            if tenant in self._waiting:
                self._waiting.move_to_end(tenant)
            self._running[tenant] += request.size
            request.turn.set_result(None)

    def _full(self) -> ApiError:
        # as long as the queue takes at a request a second and slot, roughly
        seconds = 1 + self.max_waiting // max(1, self.max_running)
        return ApiError(
            429,
            f"{self.max_waiting} requests wait already: try again later",
            code="rate_limit_exceeded",
            headers={"retry-after": str(min(seconds, 60))},
        )

    def check_integrity(self) -> None:
        """Nothing runs for nobody, and nobody waits while there is room."""
        assert all(count > 0 for count in self._running.values()), self._running
        assert all(self._waiting.values()), "an empty queue stayed"
        assert not self._waiting or self.running, "somebody waits for nothing"
