"""The driver's one connection to a replica: submits requests and polls for their tokens.

A thread keeps one long poll in flight while any request is open, and sleeps otherwise. When a
reply carries another epoch than a request was submitted under (the actor restarted, or gave this
driver up while it was suspended), the request is submitted again with its tokens so far. Random
numbers depend on positions alone, so the caller sees the same tokens as without the failure.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from litecache.actors.calls import UNREACHABLE, ActorEndedError, result
from litecache.actors.naming import CALL_TIMEOUT_S, POLL_HOLD_S
from litecache.adapter.pending import PendingRequest
from litecache.errors import GroupUnavailableError, LiteCacheError
from litecache.types import PollReply

logger = logging.getLogger(__name__)

# A restarted actor needs a process, torch and the model before it answers.
GIVE_UP_S = 300.0
# One that Ray calls ended gets a moment, too: a moved actor is announced late.
_GIVE_UP_ENDED_S = 5.0
_RETRY_S = 0.1
_LOST = "lost"


class ReplicaPoller:
    """Requests of one driver on one replica.

    Args:
        handle: the `GpuCache` actor.
        client_id: names this driver.
        name: of the replica, for messages.
        give_up_s: how long an actor may be unreachable before its requests fail.
    """

    def __init__(
        self, handle: Any, client_id: str, name: str, *, give_up_s: float = GIVE_UP_S
    ) -> None:
        self._handle, self._client_id, self._name = handle, client_id, name
        self._give_up_s = give_up_s
        self._open: dict[str, PendingRequest] = {}
        self._submitted: dict[str, str | None] = {}
        self._condition = threading.Condition()
        self._closed = False
        self._epoch, self._ack = "", 0
        self._thread = threading.Thread(target=self._run, name="litecache-poll", daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Open requests."""
        return len(self._open)

    def submit(self, pending: Sequence[PendingRequest]) -> None:
        """Start requests; their tokens arrive from now on.

        Raises:
            LiteCacheError: the engine refused them; none was started.
        """
        ids = [p.wire_id for p in pending]
        # Sent before the poll thread wakes up, and without waiting: the first poll then travels
        # together with the submission instead of a round trip later.
        ref = self._handle.submit.remote(self._client_id, [p.wire_request() for p in pending])
        with self._condition:
            for wire_id, request in zip(ids, pending, strict=True):
                self._open[wire_id] = request
                self._submitted[wire_id] = None
            self._condition.notify_all()
        epoch = _LOST
        try:
            epoch = result(ref, CALL_TIMEOUT_S, f"{self._name}: submit")
        except UNREACHABLE as error:
            # The poll thread submits them again when the actor is back.
            logger.warning("%s", error)
        except LiteCacheError:
            with self._condition:
                for wire_id in ids:
                    self._open.pop(wire_id, None)
                    self._submitted.pop(wire_id, None)
            raise
        with self._condition:
            for wire_id in ids:
                if wire_id in self._submitted:
                    self._submitted[wire_id] = epoch

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests; unknown ids are passed over."""
        with self._condition:
            wire_ids = [w for w, p in self._open.items() if p.request_id in request_ids]
        if wire_ids:
            self._handle.abort.remote(wire_ids)

    def close(self) -> None:
        """Abort what is open and stop the thread."""
        with self._condition:
            open_ids, left = list(self._open), list(self._open.values())
            self._closed = True
            self._open.clear()
            self._condition.notify_all()
        if open_ids:
            self._handle.abort.remote(open_ids)
        for pending in left:
            pending.fail(GroupUnavailableError("the adapter was closed"))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        failing_since: float | None = None
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or bool(self._open))
                if self._closed:
                    return
            try:
                self._take(self._poll())
                failing_since = None
            except UNREACHABLE as error:
                now = time.monotonic()
                failing_since = failing_since or now
                logger.info("%s", error)
                ended = isinstance(error, ActorEndedError)
                patience_s = min(self._give_up_s, _GIVE_UP_ENDED_S if ended else self._give_up_s)
                if now - failing_since > patience_s:
                    self._fail_all(
                        GroupUnavailableError(
                            f"{self._name} has not answered for {patience_s:g} s: {error}"
                        )
                    )
                    failing_since = None
                time.sleep(_RETRY_S)
            except LiteCacheError as error:
                # The actor answers, with an error: its model cannot be loaded again.
                self._fail_all(error)

    def _poll(self) -> PollReply:
        ref = self._handle.poll.remote(self._client_id, self._epoch, self._ack, POLL_HOLD_S)
        reply: PollReply = result(ref, 2 * POLL_HOLD_S + CALL_TIMEOUT_S, f"{self._name}: poll")
        return reply

    def _take(self, reply: PollReply) -> None:
        if not reply.epoch:
            return  # the actor is loading its model
        if reply.epoch != self._epoch:
            self._epoch, self._ack = reply.epoch, 0
        # What was told before this reply's acknowledgement arrived is told again: skip it.
        fresh = reply.deltas[max(0, self._ack + 1 - reply.first_seq) :]
        self._ack = max(self._ack, reply.first_seq + len(reply.deltas) - 1)
        for delta in fresh:
            pending = self._open.get(delta.request_id)
            if pending is None:
                continue
            pending.feed(delta)
            if pending.done:
                self._drop(delta.request_id)
        self._resubmit(reply.epoch)

    def _resubmit(self, epoch: str) -> None:
        with self._condition:
            stale = [
                wire_id
                for wire_id, submitted in self._submitted.items()
                if submitted is not None and submitted != epoch
            ]
            requests = [self._open.pop(wire_id) for wire_id in stale if wire_id in self._open]
            for wire_id in stale:
                del self._submitted[wire_id]
        again = [request for request in requests if request.next_attempt()]
        if not again:
            return
        logger.warning(
            "%s restarted: submitting %d request(s) again, with the tokens so far",
            self._name,
            len(again),
        )
        try:
            self.submit(again)
        except LiteCacheError as error:
            for request in again:
                request.fail(error)

    def _drop(self, wire_id: str) -> None:
        with self._condition:
            self._open.pop(wire_id, None)
            self._submitted.pop(wire_id, None)

    def _fail_all(self, error: Exception) -> None:
        with self._condition:
            left = list(self._open.values())
            self._open.clear()
            self._submitted.clear()
        for pending in left:
            pending.fail(error)
