"""Calls to the coordinator from shards, replicas and drivers, each with a deadline.

Whoever calls must be able to go on without an answer: the coordinator knows nothing that is not
known elsewhere. One that does not answer costs a caller one deadline, not one for each row: for
some seconds, or until a report gets through, requests do without it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from litecache.actors.calls import UNREACHABLE, result
from litecache.actors.location_map import pack_keys
from litecache.actors.naming import CALL_TIMEOUT_S, NAMESPACE, coordinator_name
from litecache.errors import GroupUnavailableError
from litecache.hashing import BlockKey

_QUIET_S = 5.0


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

    def report_shard(
        self,
        shard_id: str,
        node_id: str,
        epoch: int,
        seq: int,
        added: Sequence[BlockKey],
        removed: Sequence[BlockKey],
    ) -> bool:
        """See `LocationMap.apply`."""
        packed = pack_keys(added), pack_keys(removed)
        return bool(self._call("report_shard", shard_id, node_id, epoch, seq, *packed))

    def begin_resync(self, shard_id: str, node_id: str, epoch: int, seq: int) -> bool:
        """See `LocationMap.begin_resync`."""
        return bool(self._call("begin_resync", shard_id, node_id, epoch, seq))

    def add_keys(self, shard_id: str, epoch: int, keys: Sequence[BlockKey], last: bool) -> bool:
        """See `LocationMap.add_keys`."""
        return bool(self._call("add_keys", shard_id, epoch, pack_keys(keys), last))

    def report_replica(self, index: int, node_id: str, load: int) -> int:
        """Heartbeat of a replica; how many live shards other nodes have."""
        return int(self._call("report_replica", index, node_id, load))

    def report_failure(self, index: int, reason: str) -> None:
        """See `Router.note_failure`."""
        self._call("report_failure", index, reason)

    def failures(self, index: int) -> list[str]:
        """See `Router.failures`."""
        failures: list[str] = self._call("failures", index)
        return failures

    def locate(self, keys: Sequence[BlockKey], exclude_node: str) -> list[str | None]:
        """See `LocationMap.locate`."""
        self._check_not_quiet()
        found: list[str | None] = self._call("locate", pack_keys(keys), exclude_node)
        return found

    def route(self, keys: Sequence[BlockKey]) -> int | None:
        """See `Router.route`."""
        self._check_not_quiet()
        index: int | None = self._call("route", pack_keys(keys))
        return index

    def describe(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The group's settings."""
        description: dict[str, Any] = self._call("describe", timeout_s=timeout_s)
        return description

    def stats(self) -> dict[str, Any]:
        """Members and the size of the map."""
        stats: dict[str, Any] = self._call("stats")
        return stats

    def _check_not_quiet(self) -> None:
        if time.monotonic() < self._quiet_until:
            raise GroupUnavailableError(f"{self._name} did not answer a moment ago")

    def _call(self, method: str, *args: object, timeout_s: float | None = None) -> Any:
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
