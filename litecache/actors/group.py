"""A group of actors: started as a whole or not at all, joined, stopped, looked at.

Whoever creates the coordinator starts the rest (`group_start.py`), everyone else joins after
comparing settings. Whatever fails in a start, nothing that was started stays.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from litecache.actors.calls import (
    UNREACHABLE,
    ActorEndedError,
    ReplicaLeftError,
    gather,
    result,
    silent_among,
)
from litecache.actors.cluster import RayConnection
from litecache.actors.coordinator import CoordinatorClient
from litecache.actors.group_spec import GroupSpec, check_same
from litecache.actors.group_start import (
    PLACE_TIMEOUT_S,
    STOP_TIMEOUT_S,
    GroupStart,
    actor_names,
    end_actors,
    wait_loaded,
)
from litecache.actors.naming import (
    CALL_TIMEOUT_S,
    NAMESPACE,
    check_group_name,
    coordinator_name,
    replica_name,
)
from litecache.actors.placement import (
    check_actor_options,
    check_memory,
    check_shares,
)
from litecache.errors import GroupUnavailableError, LiteCacheError
from litecache.hashing import BlockKey

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 900.0
# The engine answers between two steps, and a long prefill on a CPU is one step of seconds.
STATUS_TIMEOUT_S = 15.0


class Group:
    """Handles of a running group's actors.

    Attributes:
        spec: its settings.
        connection: the connection to Ray that all handles belong to.
        coordinator: client of its coordinator.
        coordinator_handle: kept, because Ray ends an actor that nobody holds.
        replicas: `GpuCache` handles by index.
        shards: `StorageShard` handles by actor name.
        info: `EngineInfo` of the model.
    """

    def __init__(
        self,
        spec: GroupSpec,
        coordinator_handle: Any,
        replicas: list[Any],
        shards: dict[str, Any],
        info: Any,
    ) -> None:
        self.spec = spec
        self.connection = RayConnection.current()
        self.coordinator_handle = coordinator_handle
        self.coordinator = CoordinatorClient(spec.group)
        self.replicas = replicas
        self.shards = shards
        self.info = info

    @classmethod
    def start(
        cls,
        spec: GroupSpec,
        *,
        detached: bool = False,
        actor_options: dict[str, dict[str, Any]] | None = None,
        load_timeout_s: float = LOAD_TIMEOUT_S,
    ) -> Group:
        """Start all actors of a group and load the model.

        Args:
            spec: settings.
            detached: the group outlives this driver.
            actor_options: Ray options per kind ("gpu", "shard", "coordinator").
            load_timeout_s: how long the model may take to load.

        Raises:
            GroupError: a group of this name is there already.
            LiteCacheError: something was refused; nothing stays behind.
        """
        check_group_name(spec.group)
        options = check_actor_options(actor_options)
        check_shares(spec)
        check_memory(spec)
        starter = GroupStart(spec, detached, options)
        try:
            starter.place()
            starter.start_shards()
            info = starter.load(load_timeout_s)
        except BaseException:
            starter.undo()
            raise
        return cls(spec, starter.coordinator, starter.replicas, starter.shards, info)

    @classmethod
    def attach(
        cls,
        group: str,
        expected: dict[str, Any] | None = None,
        *,
        timeout_s: float = LOAD_TIMEOUT_S,
    ) -> Group:
        """Join a running group.

        Args:
            group: its name.
            expected: description (`GroupSpec.describe`) that it must agree with; None = any.
            timeout_s: how long to wait for its model.

        Raises:
            GroupUnavailableError: there is no such group, or it does not answer.
            GroupMismatchError: its settings differ.
        """
        check_group_name(group)
        if not exists(group):
            raise GroupUnavailableError(f"there is no group {group!r} to join")
        description = CoordinatorClient(group).call("describe", timeout_s=PLACE_TIMEOUT_S)
        if expected is not None:
            check_same(group, description, expected)
        spec = GroupSpec.from_description(group, description)
        deadline = time.monotonic() + timeout_s
        replicas = [_find(replica_name(group, i), deadline) for i in range(spec.replicas)]
        info = wait_loaded(replicas, deadline, all_of_them=False)
        shards = {}
        for name in _shard_names(spec, replicas):
            with contextlib.suppress(ValueError):
                shards[name] = ray.get_actor(name, NAMESPACE)
        coordinator = _find(coordinator_name(group), deadline)
        return cls(spec, coordinator, replicas, shards, info)

    def flush(self, timeout_s: float = STOP_TIMEOUT_S) -> dict[str, Any]:
        """Save what is only in pools and make the shards write out what is dirty.

        Returns:
            `{"complete": bool, "written": n, "pending": n, "failed": n, "unavailable": names}`
            over all replicas.
        """
        silent = self._silent()
        if silent & self.shards.keys():  # replicas wait for their shards
            timeout_s = min(timeout_s, CALL_TIMEOUT_S)
        reports, missed = self._ask(
            self._replicas, lambda r: r.flush.remote(timeout_s), timeout_s + 5, "flush", silent
        )
        unavailable = sorted({*missed, *silent} - {coordinator_name(self.spec.group)})
        complete = not unavailable and all(r["complete"] for r in reports)
        total: dict[str, Any] = {"complete": complete, "unavailable": unavailable}
        for name in ("written", "pending", "failed"):
            total[name] = sum(r[name] for r in reports)
        return total

    def clear(self, tier: str) -> None:
        """Drop cached blocks: "gpu" (the pools), "ram" (after writing it out), "disk" or "all".

        Raises:
            GroupUnavailableError: names the actors that did not answer; the others have done it.
        """
        silent, missed = self._silent(), set[str]()
        calls: list[tuple[dict[str, Any], Callable[[Any], Any]]] = []
        if tier in ("gpu", "all"):
            calls.append((self._replicas, lambda r: r.clear_pool.remote()))
        if tier != "gpu":
            calls.append((self.shards, lambda s: s.clear.remote(tier)))
        for handles, call in calls:
            missed |= self._ask(handles, call, STOP_TIMEOUT_S, "clear", silent)[1]
        _refuse_missed("clear", missed)

    def set_pinned(self, keys: Sequence[BlockKey], pinned: bool) -> list[bool]:
        """Pin or unpin blocks on all shards; which of them some shard holds.

        Raises:
            GroupUnavailableError: names the shards that did not answer; the others have done it.
        """
        what = "pin" if pinned else "unpin"
        answers, missed = self._ask(
            *(self.shards, lambda s: s.set_pinned.remote(keys, pinned), STOP_TIMEOUT_S, what),
            self._silent(),
        )
        _refuse_missed(what, missed)
        return [any(held) for held in zip(*answers, strict=True)] or [False] * len(keys)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> dict[str, Any]:
        """Flush, then end all actors and wait until they are gone.

        Returns:
            The flush reports of replicas and shards that still answered, by actor name.
        """
        self.connection.check()
        return _stop(self.spec.group, self._replicas, self.shards, timeout_s)

    def status(self) -> dict[str, Any]:
        """What each actor says of itself; one that does not answer in 2 s has an "error"."""
        self.connection.check()
        answers = gather(self._actors, lambda h: h.stats.remote(), CALL_TIMEOUT_S, "stats")
        return {
            name: {"error": str(answer)} if isinstance(answer, LiteCacheError) else answer
            for name, answer in answers.items()
        }

    @property
    def _replicas(self) -> dict[str, Any]:
        return {replica_name(self.spec.group, i): r for i, r in enumerate(self.replicas)}

    @property
    def _actors(self) -> dict[str, Any]:
        coordinator = {coordinator_name(self.spec.group): self.coordinator_handle}
        return {**self._replicas, **self.shards, **coordinator}

    def _silent(self) -> set[str]:
        self.connection.check()
        return silent_among(self._actors)

    def _ask(
        self,
        handles: dict[str, Any],
        call: Callable[[Any], Any],
        timeout_s: float,
        what: str,
        silent: set[str],
    ) -> tuple[list[Any], set[str]]:
        """Answers, and the names of those that do not answer now; any other error is raised."""
        asked = {name: handle for name, handle in handles.items() if name not in silent}
        answers = gather(asked, call, timeout_s, what)
        missed = silent & handles.keys()
        for name, answer in answers.items():
            if isinstance(answer, UNREACHABLE) and not isinstance(answer, ActorEndedError):
                missed.add(name)
            elif isinstance(answer, LiteCacheError) and not isinstance(answer, ReplicaLeftError):
                raise answer
        return [a for a in answers.values() if not isinstance(a, LiteCacheError)], missed


def _refuse_missed(what: str, missed: set[str]) -> None:
    if missed:
        raise GroupUnavailableError(
            f"{what}: no answer from {', '.join(sorted(missed))}; done by the others, call it again"
        )


def exists(group: str) -> bool:
    """Whether the group has a coordinator, alive or restarting."""
    try:
        ray.get_actor(coordinator_name(group), NAMESPACE)
    except ValueError:
        return False
    return True


def list_groups() -> list[str]:
    """Names of all groups of the cluster."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        actor["name"].split(":")[1]
        for actor in named
        if actor["namespace"] == NAMESPACE and actor["name"].endswith(":coordinator")
    )


def stop_group(group: str, timeout_s: float = STOP_TIMEOUT_S) -> dict[str, Any]:
    """Stop a group found by name, in whatever state its actors are; see `Group.stop`.

    Raises:
        GroupUnavailableError: there is no such group.
    """
    check_group_name(group)
    handles = {}
    for name in actor_names(group):
        with contextlib.suppress(ValueError):
            handles[name] = ray.get_actor(name, NAMESPACE)
    if not handles:
        raise GroupUnavailableError(f"there is no group {group!r} to stop")
    return _stop(
        group,
        {name: handle for name, handle in handles.items() if ":gpu:" in name},
        {name: handle for name, handle in handles.items() if ":shard:" in name},
        timeout_s,
    )


def _stop(
    group: str, replicas: dict[str, Any], shards: dict[str, Any], timeout_s: float
) -> dict[str, Any]:
    reports: dict[str, Any] = {}
    silent = silent_among({**replicas, **shards})
    timeout_s = min(timeout_s, CALL_TIMEOUT_S) if silent else timeout_s
    # Replicas first: their flush commits blocks that the shards then write out.
    for handles in (replicas, shards):
        able = {name: handle for name, handle in handles.items() if name not in silent}
        answers = gather(able, lambda h: h.stop.remote(timeout_s), timeout_s + 5, "stop")
        for name, report in answers.items():
            if isinstance(report, LiteCacheError):
                logger.warning("%s", report)
            else:
                reports[name] = report if isinstance(report, dict) else report._asdict()
    end_actors(group, [*replicas.values(), *shards.values()], silent)
    return reports


def _find(name: str, deadline: float) -> Any:
    """An actor that another driver may still be creating."""
    while True:
        try:
            return ray.get_actor(name, NAMESPACE)
        except ValueError as error:
            if time.monotonic() > deadline:
                raise GroupUnavailableError(f"there is no actor {name}") from error
            time.sleep(0.1)


def _shard_names(spec: GroupSpec, replicas: list[Any]) -> list[str]:
    try:
        asked = [replica.where.remote() for replica in replicas]
        places = result(asked, STATUS_TIMEOUT_S, "asking for the replicas' nodes")
    except UNREACHABLE as error:
        raise GroupUnavailableError(f"group {spec.group!r} does not answer: {error}") from error
    nodes = sorted({place["node_id"] for place in places})
    return [name for node_id in nodes for name in spec.shard_names(node_id)]
