"""The `Coordinator` actor: where blocks are, who is alive, which replica takes a request.

A thin shell over `LocationMap` and `Router`. All of its state is soft: after a restart the shards
see that it does not know their epoch and send their keys again. It imports neither torch nor any
engine, and it is never on the way of a token.

`CoordinatorClient` is how shards, replicas and drivers call it. They must be able to go on without
an answer: it knows nothing that is not known elsewhere. One that does not answer costs a caller one
deadline, not one for each row: for some seconds, or until a report gets through, requests do
without it.
"""

from __future__ import annotations

import gc
import os
import time
import uuid
from collections.abc import Sequence
from typing import Any

import ray

from litecache.actors.calls import UNREACHABLE, result
from litecache.actors.locations import LocationMap, LocationReport, pack_keys, unpack_keys
from litecache.actors.naming import CALL_TIMEOUT_S, NAMESPACE, coordinator_name
from litecache.actors.router import Router
from litecache.errors import GroupUnavailableError
from litecache.hashing import BlockKey

_QUIET_S = 5.0


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
        self._router = Router()
        gc.collect()
        gc.freeze()  # millions of keys would be looked through again and again

    def __repr__(self) -> str:
        return f"Coordinator({self._group})"

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

    async def report_replica(self, index: int, node_id: str, load: int) -> int:
        """Heartbeat of a replica; returns how many live shards other nodes have."""
        self._router.report(index, node_id, load)
        return self._locations.remote_shards(node_id)

    async def report_failure(self, index: int, reason: str) -> None:
        """A replica's process is about to end itself."""
        self._router.note_failure(index, reason)

    async def failures(self, index: int) -> list[str]:
        """Why a replica's process ended itself lately."""
        return self._router.failures(index)

    async def locate(self, keys: bytes, exclude_node: str) -> list[str | None]:
        """One shard on another node for each key."""
        return self._locations.locate(unpack_keys(keys), exclude_node)

    async def route(self, keys: bytes) -> int | None:
        """The replica for a prompt with these blocks."""
        unpacked = unpack_keys(keys)
        return self._router.route(unpacked, self._locations.prefix_by_node(unpacked))

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
        self._check_not_quiet()
        found: list[str | None] = self.call("locate", pack_keys(keys), exclude_node)
        return found

    def route(self, keys: Sequence[BlockKey]) -> int | None:
        """See `Router.route`."""
        self._check_not_quiet()
        index: int | None = self.call("route", pack_keys(keys))
        return index

    def report_shard(self, report: LocationReport) -> bool:
        """See `LocationMap.report`."""
        return bool(self.call("report_shard", *report.packed()))

    def _check_not_quiet(self) -> None:
        if time.monotonic() < self._quiet_until:
            raise GroupUnavailableError(f"{self._name} did not answer a moment ago")

    def call(self, method: str, *args: object, timeout_s: float | None = None) -> Any:
        """Call a method of the actor, whether it answered the last time or not."""
        if self._handle is None:
            try:
                self._handle = ray.get_actor(self._name, NAMESPACE)
            except ValueError as error:
                raise GroupUnavailableError(f"there is no actor {self._name}") from error
        try:
            ref = getattr(self._handle, method).remote(*args)
            answer = result(ref, timeout_s or self._timeout_s, f"{self._name}: {method}")
        except UNREACHABLE as error:
            self._quiet_until = time.monotonic() + _QUIET_S
            if isinstance(error, GroupUnavailableError):
                self._handle = None  # another life of it may have another handle
            raise
        self._quiet_until = 0.0
        return answer
