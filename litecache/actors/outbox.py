"""What a `GpuCache` still has to tell its clients: sequence numbers, acknowledgements, heartbeat.

Deltas wait here until the client's next poll acknowledges them, so nothing is lost or told twice.
Until a reply takes them, those of one request grow together: a reply has one delta a request,
however many steps it covers, since to write it holds up the engine's thread.
The record of a client has an epoch of its own; when the client falls silent the record is dropped
and its requests are aborted, and a client that comes back sees another epoch and submits again.
All methods run on one asyncio event loop; the engine's thread enters by `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import TYPE_CHECKING

from litecache.types import PollReply, TokenDelta

if TYPE_CHECKING:
    from litecache.engine.engine import Engine

HEARTBEAT_TIMEOUT_S = 9.0
MAX_UNACKNOWLEDGED_TOKENS = 8192
MAX_REPLY_LOGITS_BYTES = 32 << 20
"""Logits in one reply; what is left comes with the next."""


@dataclass
class _Client:
    """One client's undelivered deltas.

    Attributes:
        epoch: tells this record from any earlier or later one of the same client.
        first_seq: sequence number of `deltas[0]`.
        deltas: taken by a reply, not acknowledged yet.
        untold: by request, what comes with the next reply.
        urgent: some of that should not wait.
        live: ids of requests that have not finished.
        num_tokens: tokens in `deltas` and `untold`.
        waiter: of the poll that is held open, if any.
        gap_s: it asks for this time since `replied_at`, unless something is urgent.
    """

    epoch: str
    last_seen: float
    first_seq: int = 1
    deltas: deque[TokenDelta] = field(default_factory=deque)
    untold: dict[str, list[TokenDelta]] = field(default_factory=dict)
    urgent: bool = False
    live: set[str] = field(default_factory=set)
    num_tokens: int = 0
    paused: bool = False
    waiter: asyncio.Future[bool] | None = None
    replied_at: float = 0.0
    gap_s: float = 0.0

    def wake(self, current: bool = True) -> None:
        """End the wait of the poll that is held open; `current`: it may take the deltas."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(current)

    def take(self, delta: TokenDelta) -> None:
        """Keep a delta for the next reply."""
        self.untold.setdefault(delta.request_id, []).append(delta)
        self.num_tokens += len(delta.token_ids)
        self.urgent = self.urgent or _is_urgent(delta)

    def reply(self) -> PollReply:
        """All that has not been acknowledged, as far as it fits into a message."""
        self.deltas += map(_joined, self.untold.values())
        self.untold.clear()
        self.urgent = False
        told: list[TokenDelta] = []
        nbytes = 0
        for delta in self.deltas:
            nbytes += len(delta.logits or b"")
            if told and nbytes > MAX_REPLY_LOGITS_BYTES:
                break
            told.append(delta)
        return PollReply(self.first_seq, tuple(told), self.epoch)


class Outbox:
    """Deltas of all clients of one actor life.

    Args:
        epoch: of the actor's life.
        engine: told to abort a client that fell silent, and to pause the requests of one that is
            too far behind until it has caught up.
        heartbeat_timeout_s: silence after which a client with live requests is given up.
        max_unacknowledged_tokens: per client, before its requests pause.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        epoch: str,
        engine: Engine,
        *,
        heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
        max_unacknowledged_tokens: int = MAX_UNACKNOWLEDGED_TOKENS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._epoch, self._engine = epoch, engine
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._max_unacknowledged_tokens = max_unacknowledged_tokens
        self._clock = clock
        self._clients: dict[str, _Client] = {}
        self._records = count(1)
        self._timer: asyncio.TimerHandle | None = None

    def register(self, client_id: str, request_ids: Iterable[str]) -> tuple[str, set[str]]:
        """Expect output for these requests; counts as a sign of life.

        Returns:
            The epoch of the client's record, and those ids that it had not known before.
        """
        client = self._seen(client_id)
        new = set(request_ids) - client.live
        client.live |= new
        return client.epoch, new

    def forget(self, client_id: str, request_ids: Iterable[str]) -> None:
        """Expect nothing more for these requests (their submission was refused)."""
        client = self._clients.get(client_id)
        if client is not None:
            client.live -= set(request_ids)

    def push(self, items: Iterable[tuple[str, TokenDelta]]) -> None:
        """Take the deltas of one step; those of unknown clients or finished requests are void."""
        for client_id, delta in items:
            client = self._clients.get(client_id)
            if client is None or delta.request_id not in client.live:
                continue
            first = not client.untold
            client.take(delta)
            if delta.finish_reason is not None:
                client.live.discard(delta.request_id)
            self._wake_in_time(client, first)
            if client.paused and delta.request_id in client.live:
                self._engine.pause([delta.request_id])  # submitted after the others had paused
            elif client.num_tokens >= self._max_unacknowledged_tokens:
                client.paused = True
                self._engine.pause(sorted(client.live))

    async def poll(
        self, client_id: str, epoch: str, ack: int, hold_s: float, gap_s: float = 0.0
    ) -> PollReply:
        """All deltas after `ack`, as soon as there is one, or none after `hold_s` seconds.

        Args:
            client_id: who asks; also a sign of life.
            epoch: the epoch of the client's last reply; `ack` counts in it.
            ack: the last sequence number that the client has.
            hold_s: how long to wait when there is nothing to tell.
            gap_s: least time since the last reply, to tell several tokens at once; a request's
                first and last tokens do not wait for it, nor those of guided ones.
        """
        client = self._seen(client_id)
        client.wake(current=False)  # an older poll of this client that still waits gives way
        if epoch == client.epoch:
            self._acknowledge(client, ack)
        wait_s = hold_s
        if client.deltas or client.untold:
            due_s = client.replied_at + gap_s - self._clock()
            urgent = client.urgent or any(map(_is_urgent, client.deltas))
            wait_s = 0.0 if urgent else min(hold_s, due_s)
        current = True
        if wait_s > 0:
            # A bare future and timer: `wait_for` would put a task between a token and its reply.
            loop = asyncio.get_running_loop()
            client.gap_s = gap_s
            client.waiter = waiter = loop.create_future()
            timer = loop.call_later(wait_s, client.wake)
            current = await waiter
            timer.cancel()
        if not current:
            return PollReply(client.first_seq, (), client.epoch)
        client.replied_at = self._clock()
        return client.reply()

    def wake_all(self) -> None:
        """End the waits of all polls that are held open: there will be no more news."""
        for client in self._clients.values():
            client.wake()

    @property
    def live_requests(self) -> int:
        """Requests that have not finished; any thread may ask."""
        # a copy made in one step of the interpreter: the loop changes the dict meanwhile
        return sum(len(client.live) for client in list(self._clients.values()))

    def stats(self) -> dict[str, int]:
        """Clients known, and tokens that wait for them."""
        return {
            "clients": len(self._clients),
            "unacknowledged_tokens": sum(c.num_tokens for c in self._clients.values()),
        }

    def _seen(self, client_id: str) -> _Client:
        client = self._clients.get(client_id)
        if client is None:
            client = _Client(f"{self._epoch}.{next(self._records)}", self._clock())
            self._clients[client_id] = client
        client.last_seen = self._clock()
        self._arm_timer()
        return client

    def _wake_in_time(self, client: _Client, first: bool) -> None:
        if client.waiter is None or client.waiter.done():
            return
        wait_s = client.replied_at + client.gap_s - self._clock()
        if wait_s <= 0 or client.urgent:
            client.wake()
        elif first:  # the timer of the first delta serves those that follow
            asyncio.get_running_loop().call_later(wait_s, client.wake)

    def _acknowledge(self, client: _Client, ack: int) -> None:
        while client.deltas and client.first_seq <= ack:
            client.num_tokens -= len(client.deltas.popleft().token_ids)
            client.first_seq += 1
        if client.paused and client.num_tokens <= self._max_unacknowledged_tokens // 2:
            client.paused = False
            self._engine.resume(sorted(client.live))

    def _arm_timer(self) -> None:
        # One timer for all, set for the client that would expire first: an actor without clients
        # never wakes up.
        if self._timer is not None or not self._clients:
            return
        first = min(client.last_seen for client in self._clients.values())
        delay_s = max(0.0, first + self._heartbeat_timeout_s - self._clock())
        self._timer = asyncio.get_running_loop().call_later(delay_s + 0.01, self._expire)

    def _expire(self) -> None:
        self._timer = None
        deadline = self._clock() - self._heartbeat_timeout_s
        silent = [name for name, client in self._clients.items() if client.last_seen <= deadline]
        for client_id in silent:
            client = self._clients.pop(client_id)
            client.wake()
            if client.live:
                self._engine.abort_client(client_id)
        self._arm_timer()


def _joined(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """What several steps made of a request, as one delta: how it began, and how it ended."""
    first, last = deltas[0], deltas[-1]
    if first is last:
        return first
    return last._replace(
        token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
        reused_tokens=first.reused_tokens,
        found_tokens=first.found_tokens,
        ttft_s=first.ttft_s,
    )


def _is_urgent(delta: TokenDelta) -> bool:
    """A request's first token, or its last, or one that it waits with for its driver."""
    ended = delta.finish_reason is not None
    return ended or delta.ttft_s is not None or delta.awaits_guidance
