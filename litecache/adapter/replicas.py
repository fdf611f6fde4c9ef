"""The replicas of a group as one driver sees them, which come and go.

Requests go where they are done soonest, and from a replica that does not answer to another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray.exceptions import RayError

from litecache.actors.calls import gather, ready_among, result
from litecache.actors.group import Group
from litecache.actors.messages import pack_call
from litecache.actors.naming import CALL_TIMEOUT_S, OFFER_PATIENCE_S, replica_name
from litecache.actors.router import Placement, ReplicaLoad, RoutedPrompt, Router
from litecache.adapter.pending import PendingRequest
from litecache.adapter.replica_poller import ReplicaPoller
from litecache.errors import GroupMismatchError, LiteCacheError
from litecache.hashing import BlockKey, chain_keys
from litecache.types import Request, SamplingParams

logger = logging.getLogger(__name__)

# So often it is looked whether the coordinator knows what was saved for another node.
_LOCATE_S = 0.03
# So often a driver that makes calls asks who is in its group; an answer that does not come is given
# up after a while.
_MEMBERS_S, _ASKED_AGAIN_S = 2.0, 30.0


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
                request,
                prompt=tokens,
                sampling=SamplingParams(1),
                num_resumed_tokens=0,
                logits=0,
                mask=None,
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
