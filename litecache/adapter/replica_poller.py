"""Requests of one driver on one replica: they go out, tokens come in.

A thread keeps one long poll in flight while any request is open, and sleeps otherwise. When a reply
carries another epoch than a request was submitted under (the actor restarted, or gave this driver
up while it was suspended), the request is submitted again with its tokens so far. Random numbers
depend on positions alone, so the caller sees the same tokens as without the failure.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from litecache.actors.calls import UNREACHABLE, ActorEndedError
from litecache.actors.naming import BATCH_GAP_S, CALL_TIMEOUT_S, POLL_HOLD_S, STREAM_GAP_S
from litecache.actors.stub import Answer, ReplicaStub
from litecache.adapter.pending import PendingRequest
from litecache.errors import GroupUnavailableError, LiteCacheError, RequestTimeout, told
from litecache.threads import start_service
from litecache.types import Guidance, PollReply, Request

logger = logging.getLogger(__name__)

# A restarted actor needs a process, torch and the model before it answers.
_GIVE_UP_S = 300.0
# One that Ray calls ended gets a moment, too: a moved actor is announced late.
_GIVE_UP_ENDED_S = 5.0
_RETRY_S = 0.1
# So often a silent replica without requests is asked whether it is there again.
_PROBE_S = 1.0
# A poll without news is held for so long where other replicas could go on with its requests: what
# hangs is noticed so much sooner, for two messages a second while nothing is generated.
_SHARED_POLL_HOLD_S = 0.5
# A request that has seen so many processes end, and no token in between, may be what ends them.
MOST_DEATHS = 3
_LOST = "lost"
# What guided requests wait for is sent together, so that they go on in one step; but none waits
# longer than this for those behind it.
_GUIDED_TOGETHER_S = 0.003


class ReplicaPoller:
    """Requests of one driver on one replica.

    `move` is called with this poller when the replica does not answer, at the first sign of it: who
    takes its requests with `give_up` goes on with them elsewhere.

    Attributes:
        name: of the replica, for messages.
        silent_since: when the replica stopped answering; None while it answers, as far as known.
        alone: no other replica could go on with its requests.
        ended: its actor is gone for good.
    """

    def __init__(
        self,
        handle: Any,
        client_id: str,
        name: str,
        move: Callable[[ReplicaPoller], None] | None = None,
    ) -> None:
        self.name, self._client_id, self._move = name, client_id, move
        self.alone, self.ended = True, False
        self.silent_since: float | None = None
        self._replica = ReplicaStub(handle, name)
        self._open: dict[str, PendingRequest] = {}
        self._condition = threading.Condition(threading.RLock())
        self._closed = False
        self._epoch, self._ack = "", 0
        # A poll that was sent along with a submission, and the ids that it submits.
        self._first_poll: tuple[Answer[PollReply], list[str]] | None = None
        self._polling = False
        self._guides = ThreadPoolExecutor(2, "guide")  # a slow form holds up no poll
        self._thread = start_service(self._run, "poll")

    @property
    def _hold_s(self) -> float:
        return POLL_HOLD_S if self.alone else _SHARED_POLL_HOLD_S

    @property
    def load(self) -> int:
        """Open requests."""
        return len(self._open)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of prompts that have no answer yet."""
        with self._condition:
            return sum(len(p.request.prompt) for p in self._open.values() if not p.tokens)

    def submit(self, pending: Sequence[PendingRequest]) -> None:
        """Start requests; their tokens arrive from now on.

        A driver that has nothing open sends the requests and the first poll as one call, and what
        the engine refuses then shows in the requests. The driver has checked them before.

        Raises:
            LiteCacheError: the engine refused them; none was started.
        """
        with self._condition:
            alone, self._polling = not self._polling, True
            ids = self._register(pending)
            if alone:
                try:
                    requests = [p.wire_request() for p in pending]
                    self._first_poll = self._send_poll(requests), ids
                except BaseException:
                    self._drop(ids)
                    raise
                finally:
                    self._condition.notify_all()
        if not alone:
            self._send(ids)

    def _register(self, pending: Sequence[PendingRequest]) -> list[str]:
        """From here on an abort finds them."""
        if self._closed:
            raise GroupUnavailableError("the adapter was closed")
        self._open |= {request.wire_id: request for request in pending}
        return [request.wire_id for request in pending]

    def _send(self, ids: Sequence[str]) -> None:
        """Submit those registered requests that nobody has aborted."""
        self._end_abandoned()
        with self._condition:
            requests = [self._open[w].wire_request() for w in ids if w in self._open]
        epoch = _LOST
        try:
            answer = self._replica.submit(self._client_id, requests)
            epoch = answer.get(CALL_TIMEOUT_S, f"{self.name}: submit")
        except UNREACHABLE as error:
            # Others go on with them, or the poll thread submits them again when the actor is back.
            logger.warning("%s", error)
            self._mark(ids, _LOST)
            self._not_answered()
        except LiteCacheError:
            self._drop(ids)
            raise
        self._mark(ids, epoch)

    def abort(self, request_id: str) -> None:
        """End a request; an unknown id is passed over.

        It is marked before anything is sent: a replica that restarts is not asked for it again,
        and it does not wait for one that is gone.
        """
        with self._condition:
            wire_ids = [w for w, p in self._open.items() if p.request_id == request_id]
            for wire_id in wire_ids:
                self._open[wire_id].abandoned = True
        self._stop_computing(wire_ids)
        if self.silent_since is not None:
            self._end_abandoned()

    def _end_abandoned(self) -> None:
        with self._condition:
            ended = self._drop([w for w, p in self._open.items() if p.abandoned])
        for pending in ended:
            pending.abort()

    def close(self) -> None:
        """Abort what is open and stop the thread."""
        with self._condition:
            wire_ids = list(self._open)
            left = self._drop(wire_ids)
            self._closed = True
            self._condition.notify_all()
        self._guides.shutdown(wait=False, cancel_futures=True)
        self._stop_computing(wire_ids)
        for pending in left:
            pending.fail(GroupUnavailableError("the adapter was closed"))
        if threading.current_thread() is not self._thread:
            self._replica.disconnect()  # ends a poll that a stopped replica would hold
            self._thread.join(CALL_TIMEOUT_S)

    def _stop_computing(self, wire_ids: Sequence[str]) -> None:
        if wire_ids:
            self._replica.abort(wire_ids)

    def give_up(self, others: Mapping[str, bool]) -> list[PendingRequest]:
        """Let go of the requests that another replica may go on with.

        Args:
            others: their names, and whether they answer as far as known. One that does not gets
                only what it has not been tried with yet.
        """
        answering = any(others.values())
        with self._condition:
            for pending in self._open.values():
                pending.tried.add(self.name)
            ids = [w for w, p in self._open.items() if answering or others.keys() - p.tried]
            return [pending for pending in self._drop(ids) if pending.next_attempt()]

    def _note_death(self, error: Exception) -> None:
        """The process has ended: what was open there is not tried for ever."""
        with self._condition:
            for pending in self._open.values():
                pending.deaths += 1
            given_up = [w for w, p in self._open.items() if p.deaths >= MOST_DEATHS]
        text = (
            f"{MOST_DEATHS} processes of replicas have ended while they had the request, without "
            f"a token in between, so it is not given to another one; the last: {error}"
        )
        self._fail(given_up, GroupUnavailableError(text))

    def _not_answered(self) -> float:
        """The replica does nothing: others go on, where there are any; how long it was silent."""
        now = time.monotonic()
        # another thread may hear from it meanwhile
        since = self.silent_since = self.silent_since or now
        self._end_abandoned()
        if self._move is not None:
            self._move(self)
        return now - since

    def _run(self) -> None:
        # Alone it is waited for a little longer: nobody else could go on.
        while True:
            late_s = self._hold_s + CALL_TIMEOUT_S + (POLL_HOLD_S if self.alone else 0.0)
            if not self._open and self.alone:
                self.silent_since = None  # what is not asked is not silent
            if self.silent_since is None:
                self._find_socket()
            with self._condition:
                self._polling = bool(self._open)
                # Others get the requests of a silent one: it is asked until it answers.
                wait_s = None if self.silent_since is None else _PROBE_S
                asked = self._condition.wait_for(lambda: self._closed or self._polling, wait_s)
                if self._closed:
                    break
                first, self._first_poll = self._first_poll, None
            if not asked:
                if self._replica.is_ready():
                    self.silent_since = None
                continue
            ids: list[str] = []
            try:
                answer, ids = first if first is not None else (self._send_poll(()), [])
                reply = answer.get(late_s, f"{self.name}: poll")
                self._mark(ids, reply.epoch or _LOST)
                self._take(reply)
                if reply.epoch:
                    self.silent_since = None
                else:
                    self._not_answered()  # it is loading its model, which may take minutes
            except UNREACHABLE as error:
                self._replica.disconnect()
                self._mark(ids, _LOST)
                logger.info("%s", error)
                ended = self.ended = isinstance(error, ActorEndedError)
                if self.silent_since is None and not (ended or isinstance(error, RequestTimeout)):
                    self._note_death(error)
                patience_s = _GIVE_UP_ENDED_S if ended else _GIVE_UP_S
                if self._not_answered() > patience_s:
                    text = f"{self.name} has not answered for {patience_s:g} s: {error}"
                    self._fail(list(self._open), GroupUnavailableError(text))
                    if self.alone:
                        self.silent_since = None
                time.sleep(_RETRY_S)
            except LiteCacheError as error:
                # With a submission: it was refused. Without: the model cannot be loaded again, or
                # Ray was shut down under the adapter.
                self._fail(ids or list(self._open), error)
            except SystemExit:
                # Of a `ray.get` under way when Ray is shut down; the next poll says what happened.
                time.sleep(_RETRY_S)
            except Exception as error:
                # Callers must not wait for ever, whatever it is.
                logger.exception("%s: polling failed", self.name)
                text = f"{self.name}: polling failed: {told(error)}"
                self._fail(list(self._open), GroupUnavailableError(text))
        self._replica.disconnect()

    def _find_socket(self) -> None:
        try:
            self._replica.find_socket()
        except UNREACHABLE as error:
            logger.info("%s", error)
            self._not_answered()
        except LiteCacheError:
            pass  # the poll will say it

    def _send_poll(self, requests: Sequence[Request]) -> Answer[PollReply]:
        with self._condition:
            streaming = any(pending.streaming for pending in self._open.values())
        gap_s = STREAM_GAP_S if streaming else BATCH_GAP_S
        return self._replica.poll(
            self._client_id, self._epoch, self._ack, self._hold_s, gap_s, requests=requests
        )

    def _take(self, reply: PollReply) -> None:
        if not reply.epoch:
            return  # the actor is loading its model
        if reply.epoch != self._epoch:
            self._epoch, self._ack = reply.epoch, 0
        # What was told before this reply's acknowledgement arrived is told again: skip it.
        fresh = reply.deltas[max(0, self._ack + 1 - reply.first_seq) :]
        self._ack = max(self._ack, reply.first_seq + len(reply.deltas) - 1)
        unwanted, asking = [], []
        for delta in fresh:
            pending = self._open.get(delta.request_id)
            if pending is not None:
                pending.feed(delta)
                if pending.done:
                    self._drop([delta.request_id])
            if delta.finish_reason is None and (
                pending is None or pending.done or pending.abandoned
            ):
                # A stop string is complete, which only the driver can see; or an abort had
                # overtaken the submission.
                unwanted.append(delta.request_id)
            elif pending is not None and delta.awaits_guidance:
                asking.append((delta.request_id, pending))
        if asking:
            with contextlib.suppress(RuntimeError):  # it was closed
                self._guides.submit(self._guide, asking)
        self._stop_computing(unwanted)
        self._resubmit(reply.epoch)

    def _guide(self, asking: Sequence[tuple[str, PendingRequest]]) -> None:
        """Say how guided requests go on that have drawn a token."""
        ready: list[Guidance] = []
        began = time.perf_counter()
        try:
            for wire_id, row in asking:
                guidance = row.guidance(wire_id)
                if row.done:
                    self._drop([wire_id])
                if guidance is not None:
                    ready.append(guidance)
                if time.perf_counter() > began + _GUIDED_TOGETHER_S:
                    self._send_guidance(ready)
                    ready, began = [], time.perf_counter()
            self._send_guidance(ready)
        except Exception as error:  # callers must not wait for ever, whatever it is
            logger.exception("%s: guiding failed", self.name)
            text = f"{self.name}: guiding failed: {told(error)}"
            self._fail([wire_id for wire_id, _ in asking], GroupUnavailableError(text))

    def _send_guidance(self, guidance: Sequence[Guidance]) -> None:
        if not guidance:
            return
        ids = [each.request_id for each in guidance]
        try:
            self._replica.guide(guidance).get(CALL_TIMEOUT_S, f"{self.name}: guide")
        except UNREACHABLE as error:
            # whether it has arrived or not: they are submitted again, with what they have
            logger.warning("%s", error)
            self._mark(ids, _LOST)
            self._not_answered()
        except LiteCacheError as error:
            self._fail(ids, error)

    def _resubmit(self, epoch: str) -> None:
        with self._condition:
            stale = [w for w, p in self._open.items() if p.epoch not in (None, epoch)]
            again = [request for request in self._drop(stale) if request.next_attempt()]
            ids = self._register(again)
        # Where only the answer was lost, the earlier attempt runs: nobody waits for it now.
        self._stop_computing(stale)
        if not ids:
            return
        what = "%s restarted: submitting %d request(s) again, with the tokens so far"
        logger.warning(what, self.name, len(ids))
        try:
            self._send(ids)
        except LiteCacheError as error:
            for request in again:
                request.fail(error)

    def _mark(self, wire_ids: Sequence[str], epoch: str) -> None:
        """Note under which epoch requests were submitted; `_LOST`: perhaps not at all."""
        with self._condition:
            for wire_id in self._open.keys() & wire_ids:
                self._open[wire_id].epoch = epoch

    def _drop(self, wire_ids: Sequence[str]) -> list[PendingRequest]:
        with self._condition:
            return [self._open.pop(wire_id) for wire_id in wire_ids if wire_id in self._open]

    def _fail(self, wire_ids: Sequence[str], error: Exception) -> None:
        for pending in self._drop(wire_ids):
            pending.fail(error)
