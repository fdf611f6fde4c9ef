"""The `Coordinator` actor: where blocks are, who is alive, which replica takes a request.

A thin shell over `LocationMap` and `Router`. All of its state is soft: after a restart the shards
see that it does not know their epoch and send their keys again. It imports neither torch nor any
engine, and it is never on the way of a token. What drivers and replicas tell it carries a version
(`messages.py`): another one is refused, and nothing of it is used.

`CoordinatorClient` is how shards, replicas and drivers call it. They must be able to go on without
an answer: it knows nothing that is not known elsewhere. One that does not answer costs a caller one
deadline, not one for each row: for some seconds, or until a report gets through, requests do
without it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

from litecache.actors.calls import UNREACHABLE, ActorEndedError, find_actor, result
from litecache.actors.locations import LocationMap, LocationReport
from litecache.actors.messages import (
    pack_load,
    pack_routing,
    pack_value,
    unpack_load,
    unpack_routing,
    unpack_value,
)
from litecache.actors.naming import CALL_TIMEOUT_S, coordinator_name
from litecache.actors.router import Placement, ReplicaLoad, RoutedPrompt, Router
from litecache.errors import GroupMismatchError, GroupUnavailableError, LiteCacheError, first_line
from litecache.hashing import BlockKey
from litecache.metrics import Metrics
from litecache.paths import short_model_name
from litecache.storage.key_dict import BATCH_KEYS, join_keys, split_keys

logger = logging.getLogger(__name__)

_QUIET_S = 5.0
_FETCH_TIMEOUT_S = 10.0
# One message asks for no more prompts than have so many keys together, or for one.
_MAX_ROUTED_KEYS = 1 << 18


class Coordinator:
    """Plain class behind the actor.

    Args:
        group: name of the group.
        description: the group's settings, for those who join; plain values.
    """

    def __init__(self, group: str, description: dict[str, Any]) -> None:
        self._group = group
        self._description = description
        self._epoch = uuid.uuid4().hex
        self._locations = LocationMap()
        self._router = Router(description.get("config", {}).get("block_size", 16))
        gc.collect()
        gc.freeze()  # millions of keys would be looked through again and again

    def __repr__(self) -> str:
        model = self._description.get("source") or {}
        kind = (model.get("config") or {}).get("model_type", "")
        named = short_model_name(
            model.get("label") or model.get("path") or f"{kind} (random weights)"
        )
        replicas = self._description.get("replicas")
        return f"Coordinator(group={self._group}, model={named}, replicas={replicas})"

    async def describe(self) -> dict[str, Any]:
        """The group's settings."""
        return self._description

    async def info(self) -> dict[str, Any]:
        """Process and epoch."""
        context = ray.get_runtime_context()
        return {"pid": os.getpid(), "node_id": context.get_node_id(), "epoch": self._epoch}

    async def report_shard(self, *fields: Any) -> bool:
        """See `LocationMap.report`; the fields of a packed `LocationReport`."""
        return self._locations.report(LocationReport.unpacked(*fields))

    async def report_replica(self, message: bytes) -> int:
        """Heartbeat of a replica; returns how many live shards other nodes have."""
        index, node_id, load = unpack_load(message)
        self._router.report(index, node_id, load)
        return self._locations.remote_shards(node_id)

    async def report_failure(self, index: int, reason: str) -> None:
        """A replica's process is about to end itself."""
        self._router.note_failure(index, reason)

    async def retire_replica(self, index: int) -> None:
        """A replica is to go."""
        self._router.forget(index)

    async def members(self) -> dict[int, str]:
        """Replicas that get requests, and their nodes; for drivers: the group may have grown."""
        replicas = self._router.replicas().items()
        return {index: str(each["node_id"]) for index, each in replicas if each["alive"]}

    async def failures(self, index: int) -> list[str]:
        """Why a replica's process ended itself lately."""
        return self._router.failures(index)

    async def locate(self, keys: bytes, exclude_node: str) -> list[str | None]:
        """One shard on another node for each key."""
        return self._locations.locate(split_keys(keys), exclude_node)

    async def route(self, message: bytes) -> bytes:
        """A `Placement` for each of several prompts, or None; see `Router.place`."""
        prompts, silent = unpack_routing(message)
        for index, silent_s in silent.items():
            self._router.note_silence(index, silent_s)
        chosen: list[Placement | None] = []
        num_keys = 0
        for prompt in prompts:
            by_node = self._locations.prefix_by_node(prompt.keys)
            chosen.append(self._router.place(prompt, by_node, avoid=silent))
            num_keys += len(prompt.keys)
            if num_keys >= BATCH_KEYS:
                num_keys = 0
                await asyncio.sleep(0)  # others are answered in between
        return pack_value(chosen)

    async def keys_of(self, shard_id: str) -> bytes:
        """What the map believes a shard to hold, for checks."""
        return b"".join(sorted(self._locations.keys_of(shard_id)))

    async def stats(self) -> dict[str, Any]:
        """Members and the size of the map."""
        return {
            **await self.info(),
            "keys": len(self._locations),
            "shards": self._locations.shards(),
            "replicas": self._router.replicas(),
        }


class CoordinatorClient:
    """A group's coordinator, found by name at the first call.

    Every method raises GroupUnavailableError or RequestTimeout when the coordinator does not
    answer in time.
    """

    def __init__(self, group: str, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._name = coordinator_name(group)
        self._timeout_s = timeout_s
        self._handle: Any = None
        self._quiet_until = 0.0

    def locate(self, keys: Sequence[BlockKey], exclude_node: str) -> list[str | None]:
        """See `LocationMap.locate`."""
        found: list[str | None] = self._ask("locate", join_keys(keys), exclude_node)
        return found

    def route(
        self, prompts: Sequence[RoutedPrompt], silent: Mapping[int, float] | None = None
    ) -> list[Placement | None]:
        """Where each prompt goes, None where no replica is known to be alive; see `Router.place`.

        Args:
            prompts: in one message, as far as one holds them.
            silent: replicas that do not answer the caller, for so many seconds; not chosen.

        Raises:
            GroupMismatchError: the coordinator is of another version.
        """
        chosen: list[Placement | None] = []
        for some in _messages(prompts):
            answer = unpack_value(self._ask("route", pack_routing(some, silent or {})))
            chosen += [each and Placement(*each) for each in answer]
        return chosen

    def report_replica(self, index: int, node_id: str, load: ReplicaLoad) -> int:
        """Tell that a replica is alive, with so much to do; how many live shards other nodes
        have."""
        return int(self.call("report_replica", pack_load(index, node_id, load)))

    def report_shard(self, report: LocationReport) -> bool:
        """See `LocationMap.report`."""
        return bool(self.call("report_shard", *report.packed()))

    def _ask(self, method: str, *args: object) -> Any:
        if time.monotonic() < self._quiet_until:
            raise GroupUnavailableError(f"{self._name} did not answer a moment ago")
        return self.call(method, *args)

    def begin(self, method: str, *args: object) -> Any:
        """Begin a call, whose answer is looked for later; what `.remote()` returned."""
        if self._handle is None:
            self._handle = find_actor(self._name)
        try:
            return getattr(self._handle, method).remote(*args)
        except (AttributeError, TypeError) as error:
            # Ray knows what the methods of the actor's class take
            raise GroupMismatchError(
                f"{self._name}: {method}", first_line(error), "a coordinator of this version"
            ) from error

    def call(self, method: str, *args: object, timeout_s: float | None = None) -> Any:
        """Call a method of the actor, whether it answered the last time or not."""
        try:
            ref = self.begin(method, *args)
            answer = result(ref, timeout_s or self._timeout_s, f"{self._name}: {method}")
        except UNREACHABLE as error:
            self._quiet_until = time.monotonic() + _QUIET_S
            if isinstance(error, ActorEndedError):
                self._handle = None  # a new group's coordinator is another actor of this name
            raise
        self._quiet_until = 0.0
        return answer


def _messages(prompts: Sequence[RoutedPrompt]) -> Iterator[list[RoutedPrompt]]:
    """As many of them as one message holds at a time, in order."""
    some: list[RoutedPrompt] = []
    num_keys = 0
    for prompt in prompts:
        num_keys += len(prompt.keys)
        if some and num_keys > _MAX_ROUTED_KEYS:
            yield some
            some, num_keys = [], len(prompt.keys)
        some.append(prompt)
    if some:
        yield some


class CoordinatedSource:
    """Blocks of other nodes, for the engine: where they are, and their bytes from those shards.

    Without shards on other nodes it answers at once; any failure is a miss. `group` is the one that
    the shards are named after.

    Attributes:
        remote_shards: live shards on other nodes, as the last report said.
    """

    def __init__(
        self, group: str, node_id: str, coordinator: CoordinatorClient, metrics: Metrics
    ) -> None:
        self._group, self._node_id = group, node_id
        self._coordinator = coordinator
        self._metrics = metrics
        self._handles: dict[str, Any] = {}
        self._quiet_until: dict[str, float] = {}
        self.remote_shards = 0

    def locate(self, keys: Sequence[BlockKey]) -> list[str | None]:
        """For each key the id of a shard on another node that holds it, or None."""
        nothing: list[str | None] = [None] * len(keys)
        if not keys or not self.remote_shards:
            return nothing
        try:
            return self._coordinator.locate(keys, self._node_id)
        except LiteCacheError as error:
            logger.info("no locations: %s", error)
            self._metrics.inc("litecache_misses", tier="remote", reason="coordinator_unavailable")
            return nothing

    def fetch(self, shard_id: str, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Bytes of blocks from one shard of another node, None where it has them no more.

        One that did not answer is not asked again for some seconds: each question would hold one
        of the few threads that load.
        """
        if time.monotonic() < self._quiet_until.get(shard_id, 0.0):
            self._metrics.inc("litecache_misses", tier="remote", reason="shard_unavailable")
            return [None] * len(keys)
        try:
            handle = self._handles.get(shard_id)
            if handle is None:
                handle = find_actor(f"litecache:{self._group}:shard:{shard_id}")
                self._handles[shard_id] = handle
            ref = handle.fetch.remote(list(keys))
            blocks: list[bytes | None] = result(ref, _FETCH_TIMEOUT_S, f"{shard_id}: fetch")
            return blocks
        except LiteCacheError as error:
            logger.info("nothing fetched: %s", error)
            self._handles.pop(shard_id, None)
            self._quiet_until[shard_id] = time.monotonic() + _QUIET_S
            self._metrics.inc("litecache_misses", tier="remote", reason="fetch_failed")
            return [None] * len(keys)
