"""The replicas of a group as one driver sees them: requests go out, tokens come in.

Each replica has one poller: a thread keeps one long poll in flight while any request is open, and
sleeps otherwise. When a reply carries another epoch than a request was submitted under (the actor
restarted, or gave this driver up while it was suspended), the request is submitted again with its
tokens so far. Random numbers depend on positions alone, so the caller sees the same tokens as
without the failure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ray.exceptions import RayError

from litecache.actors.calls import UNREACHABLE, ActorEndedError, gather, ready_among, result
from litecache.actors.group import Group
from litecache.actors.messages import pack_call
from litecache.actors.naming import (
    BATCH_GAP_S,
    CALL_TIMEOUT_S,
    OFFER_PATIENCE_S,
    POLL_HOLD_S,
    STREAM_GAP_S,
    replica_name,
)
from litecache.actors.router import Placement, ReplicaLoad, RoutedPrompt, Router
from litecache.actors.stub import Answer, ReplicaStub
from litecache.adapter.pending import PendingRequest
from litecache.errors import (
    GroupMismatchError,
    GroupUnavailableError,
    LiteCacheError,
    RequestTimeout,
    told,
)
from litecache.hashing import BlockKey, chain_keys
from litecache.threads import start_service
from litecache.types import PollReply, Request, SamplingParams

logger = logging.getLogger(__name__)

# A restarted actor needs a process, torch and the model before it answers.
_GIVE_UP_S = 300.0
# One that Ray calls ended gets a moment, too: a moved actor is announced late.
_GIVE_UP_ENDED_S = 5.0
_RETRY_S = 0.1
# So often a silent replica without requests is asked whether it is there again.
_PROBE_S = 1.0
# So often it is looked whether the coordinator knows what was saved for another node.
_LOCATE_S = 0.03
# A poll without news is held for so long where other replicas could go on with its requests: what
# hangs is noticed so much sooner, for two messages a second while nothing is generated.
_SHARED_POLL_HOLD_S = 0.5
# So often a driver that makes calls asks who is in its group; an answer that does not come is given
# up after a while.
_MEMBERS_S, _ASKED_AGAIN_S = 2.0, 30.0
# A request that has seen so many processes end, and no token in between, may be what ends them.
MOST_DEATHS = 3
_LOST = "lost"


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
        self.silent_since = self.silent_since or now
        self._end_abandoned()
        if self._move is not None:
            self._move(self)
        return now - self.silent_since

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
        unwanted = []
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
        self._stop_computing(unwanted)
        self._resubmit(reply.epoch)

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


class ReplicaSet:
    """Pollers of all replicas, which come and go.

    Attributes:
        by_index: one per replica, by its number. Never changed in place: other threads read it.
    """

    def __init__(self, group: Group, client_id: str) -> None:
        self._group = group
        # While a request moves no poller has it, so an abort waits.
        self._moving = threading.RLock()
        # What this driver knows by itself, for when the coordinator does not answer.
        self._local = Router(group.info.block_size)
        self._local_lock = threading.Lock()
        self._client_id = client_id
        # What the coordinator was asked about the group's members, and when.
        self._looking = threading.Lock()
        self._asked: Any = None
        self._asked_s = time.monotonic()
        self.by_index: dict[int, ReplicaPoller] = {}
        self._set(self._poll(group.replicas_by_index))

    @property
    def pollers(self) -> list[ReplicaPoller]:
        """Those of all replicas, in order of their numbers."""
        return list(self.by_index.values())

    def _poll(self, replicas: Mapping[int, Any]) -> dict[int, ReplicaPoller]:
        """Pollers of new replicas."""
        group, client = self._group.spec.group, self._client_id
        return {
            index: ReplicaPoller(handle, client, replica_name(group, index), move=self._move)
            for index, handle in replicas.items()
        }

    def _set(self, pollers: Mapping[int, ReplicaPoller]) -> None:
        for poller in pollers.values():
            poller.alone = len(pollers) == 1
        self.by_index = dict(sorted(pollers.items()))

    def _look_for_members(self) -> None:
        """Take in what the coordinator says of the group's members, which it is asked now and then.

        Nobody waits for the answer: a call that comes later finds it. Calls come from many threads;
        one of them looks.
        """
        if not self._looking.acquire(blocking=False):
            return
        try:
            members = self._news_of_members()
            if members is not None:
                self._take_in(members)
        finally:
            self._looking.release()

    def _news_of_members(self) -> Collection[int] | None:
        now = time.monotonic()
        if self._asked is None:
            if now >= self._asked_s + _MEMBERS_S:
                self._asked_s = now
                with contextlib.suppress(LiteCacheError, RayError):
                    self._asked = self._group.coordinator.begin("members")
            return None
        if not ready_among([self._asked], 0.0):
            if now > self._asked_s + _ASKED_AGAIN_S:
                self._asked = None
            return None
        asked, self._asked = self._asked, None
        with contextlib.suppress(LiteCacheError):
            told: Collection[int] = result(asked, CALL_TIMEOUT_S, "asking for members")
            return told
        return None

    def _take_in(self, members: Collection[int]) -> None:
        """Poll replicas that are new, let go of those that are no more."""
        name_of = functools.partial(replica_name, self._group.spec.group)
        unknown = {i for i in members if i not in self.by_index}
        absent = {i for i, p in self.by_index.items() if i not in members or p.ended}
        if not members or not unknown | absent:
            return
        with self._moving:
            left = {i: self.by_index[i] for i in absent & self.by_index.keys()}
            self._group.refresh({name_of(i) for i, poller in left.items() if poller.ended})
            there = self._group.replicas_by_index
            # one that hangs, restarts or is to go is still there, and may have requests
            left = {i: p for i, p in left.items() if i not in there or p.ended}
            kept = {i: p for i, p in self.by_index.items() if i not in left}
            new = {i: there[i] for i in (*unknown, *left) if i in there and i not in kept}
            self._set({**kept, **self._poll(new)})
            for poller in left.values():
                self._move(poller)
        for poller in left.values():
            logger.info("%s has left the group", poller.name)
            poller.close()

    def submit(self, rows: list[PendingRequest], index: int | None = None) -> None:
        """Start requests, all or none, each where it is done soonest, or all on one replica."""
        requests = [row.request for row in rows]
        places = self.route(requests) if index is None else [index] * len(rows)
        pollers = self.by_index
        by_replica: dict[int, list[PendingRequest]] = {}
        for row, place in zip(rows, places, strict=True):
            if place not in pollers:  # it has left the group since
                place = min(pollers, key=lambda one: pollers[one].load)
            by_replica.setdefault(place, []).append(row)
        try:
            for place, group in by_replica.items():
                pollers[place].submit(group)
        except BaseException:
            for row in rows:
                self.abort(row.request_id)
            raise

    def abort(self, request_id: str) -> None:
        """End a request; an unknown one is passed over, and so are all in a forked process."""
        if os.getpid() != self._group.connection.pid:
            return
        with self._moving:
            for poller in self.pollers:
                poller.abort(request_id)

    def _move(self, silent: ReplicaPoller) -> None:
        """Go on elsewhere with the requests of a replica that does not answer."""
        with self._moving:
            if silent.alone and silent.load:
                self._look_for_members()  # the group may have grown since
            others = [poller for poller in self.pollers if poller is not silent]
            by_target: dict[ReplicaPoller, list[PendingRequest]] = {}
            for row in silent.give_up({p.name: p.silent_since is None for p in others}):
                able = [p for p in others if p.silent_since is None]
                able = able or [p for p in others if p.name not in row.tried] or others
                target = min(able, key=lambda p: p.load + len(by_target.get(p, ())))
                by_target.setdefault(target, []).append(row)
            for target, rows in by_target.items():
                what = "%s does not answer: %s goes on with %d request(s)"
                logger.warning(what, silent.name, target.name, len(rows))
                try:
                    target.submit(rows)
                except LiteCacheError as error:
                    for row in rows:
                        row.fail(error)

    def route(self, requests: Sequence[Request]) -> list[int]:
        """A replica for each of several requests, by one question to the coordinator.

        What it leaves open, or all without it, goes where this driver itself has least to wait for;
        none goes to a replica that does not answer, as long as another one does.

        Raises:
            GroupMismatchError: the coordinator is of another version.
        """
        self._look_for_members()
        pollers = self.by_index
        count = len(pollers)
        if count == 1:
            return [*pollers] * len(requests)
        now = time.monotonic()
        since = {index: poller.silent_since for index, poller in pollers.items()}
        silent = {index: now - at for index, at in since.items() if at is not None}
        prompts = self._prompts(requests)
        placed: list[Placement | None] = [None] * len(prompts)
        try:
            placed = self._group.coordinator.route(prompts, silent)
        except GroupMismatchError:
            raise
        except LiteCacheError as error:
            logger.info("routed without the coordinator: %s", error)
        usable = set(pollers) - (silent.keys() if len(silent) < count else set())
        if any(each is not None and each.replica not in pollers for each in placed):
            self._asked_s = 0.0  # there is one that this driver does not know yet
        left = [i for i, each in enumerate(placed) if each is None or each.replica not in usable]
        locally = self._route_locally([prompts[i] for i in left], usable)
        for i, each in zip(left, locally, strict=True):
            placed[i] = each
        found = [each for each in placed if each is not None]
        self._offer(requests, prompts, found, usable)
        return [each.replica for each in found]

    def _offer(
        self,
        requests: Sequence[Request],
        prompts: Sequence[RoutedPrompt],
        placed: Sequence[Placement],
        usable: set[int],
    ) -> None:
        """Have replicas save what others are about to look for; whoever takes long is not waited
        for, and the others compute it."""
        pollers, replicas = self.by_index, self._group.replicas_by_index
        known = usable & replicas.keys() & pollers.keys()
        offers: dict[str, tuple[Any, bytes]] = {}
        far: list[BlockKey] = []
        for request, prompt, place in zip(requests, prompts, placed, strict=True):
            if place.holder not in known or request.cache != "default":
                continue
            last = prompt.keys[place.num_keys - 1]
            name = f"{pollers[place.holder].name} {last.hex()}"
            if name in offers:
                continue
            tokens = request.prompt[: place.num_keys * self._group.info.block_size]
            asked = dataclasses.replace(
                request, prompt=tokens, sampling=SamplingParams(1), num_resumed_tokens=0, logits=0
            )
            offers[name] = replicas[place.holder], pack_call(requests=[asked])
            if not place.same_node:
                far.append(last)
        if not offers:
            return
        deadline = time.monotonic() + OFFER_PATIENCE_S
        saved = gather(
            offers,
            lambda offer: offer[0].offer.remote(offer[1], OFFER_PATIENCE_S),
            OFFER_PATIENCE_S,
            "offer",
        )
        logger.info("offered: %s", saved)
        try:
            # another node finds it by the coordinator, which hears of it a moment later
            while far and time.monotonic() < deadline:
                if all(self._group.coordinator.locate(far, "")):
                    return
                time.sleep(_LOCATE_S)
        except LiteCacheError as error:
            logger.info("it is not known what was saved: %s", error)

    def _route_locally(self, prompts: Sequence[RoutedPrompt], usable: set[int]) -> list[Placement]:
        """Where each goes by what this driver itself has open; nobody is asked for anything."""
        pollers = self.by_index
        places: list[Placement] = []
        if not prompts:
            return places
        with self._local_lock:
            for index in usable:
                poller, rows = pollers[index], self._group.info.max_requests
                load = ReplicaLoad(poller.waiting_tokens, poller.load, rows)
                self._local.report(index, f"node {index}", load)
            for prompt in prompts:
                place = self._local.place(prompt, {}, avoid=self._local.replicas().keys() - usable)
                assert place is not None, "all of these have just reported"
                places.append(Placement(place.replica))
        return places

    def _prompts(self, requests: Sequence[Request]) -> list[RoutedPrompt]:
        info = self._group.info
        keys: dict[tuple[str, int], list[BlockKey]] = {}
        prompts = []
        for request in requests:
            array = request.prompt.array
            known = request.cache_salt, id(array)  # samples of one prompt share its array
            if known not in keys:
                root = info.roots(request.cache_salt)[0]
                keys[known] = chain_keys(root, array, info.block_size)
            leaves_blocks = request.cache != "no-store"
            prompts.append(RoutedPrompt(keys[known], len(array), leaves_blocks))
        return prompts
