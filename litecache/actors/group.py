"""A group of actors: started as a whole or not at all, joined, stopped, looked at.

The coordinator's name is the group's lock: whoever creates that actor starts the rest, everyone
else joins after comparing settings. Order of a start: coordinator, replicas (which only then have
a node), the shards of those nodes, and last the models, so that everything that can be refused
quickly is refused before the slow part. Whatever fails, nothing that was started stays.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from litecache.actors.calls import UNREACHABLE, result
from litecache.actors.coordinator import Coordinator
from litecache.actors.coordinator_client import CoordinatorClient
from litecache.actors.gpu_cache import GpuCache
from litecache.actors.group_spec import GroupSpec, check_same
from litecache.actors.naming import (
    NAMESPACE,
    check_group_name,
    coordinator_name,
    replica_name,
    shard_name,
)
from litecache.actors.placement import (
    check_actor_options,
    check_memory,
    check_shares,
    node_ranks,
    shard_options,
)
from litecache.actors.storage_shard import StorageShard
from litecache.errors import GroupError, GroupUnavailableError, LiteCacheError, RequestTimeout

logger = logging.getLogger(__name__)

PLACE_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 30.0
# The engine answers between two steps, and a long prefill on a CPU is one step of seconds.
STATUS_TIMEOUT_S = 15.0

_COORDINATOR_OPTIONS: dict[str, Any] = {"num_cpus": 0}
_SHARD_OPTIONS: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 8}
# Ray takes these with the class only, not with `.options`.
_CLASS_OPTIONS: dict[type, dict[str, Any]] = {StorageShard: {"concurrency_groups": {"bulk": 4}}}


class Group:
    """Handles of a running group's actors.

    Attributes:
        spec: its settings.
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
        starter = _Starter(spec, detached, options)
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
        description = CoordinatorClient(group).describe(timeout_s=PLACE_TIMEOUT_S)
        if expected is not None:
            check_same(group, description, expected)
        spec = GroupSpec.from_description(group, description)
        deadline = time.monotonic() + timeout_s
        replicas = [_find(replica_name(group, i), deadline) for i in range(spec.replicas)]
        info = _wait_loaded(replicas, deadline)
        shards = {}
        for name in _shard_names(spec, replicas):
            with contextlib.suppress(ValueError):
                shards[name] = ray.get_actor(name, NAMESPACE)
        coordinator = _find(coordinator_name(group), deadline)
        return cls(spec, coordinator, replicas, shards, info)

    def flush(self, timeout_s: float = STOP_TIMEOUT_S) -> dict[str, Any]:
        """Save what is only in pools and make the shards write out what is dirty.

        Returns:
            `{"complete": bool, "written": n, "pending": n, "failed": n}` over all replicas.
        """
        refs = [replica.flush.remote(timeout_s) for replica in self.replicas]
        reports = [result(ref, timeout_s + 5, "flush") for ref in refs]
        total: dict[str, Any] = {"complete": all(r["complete"] for r in reports)}
        for name in ("written", "pending", "failed"):
            total[name] = sum(r[name] for r in reports)
        return total

    def clear(self, tier: str) -> None:
        """Drop cached blocks: "gpu" (the pools), "ram" (after writing it out), "disk" or "all"."""
        if tier in ("gpu", "all"):
            result([r.clear_pool.remote() for r in self.replicas], STOP_TIMEOUT_S, "clear")
        if tier != "gpu":
            refs = [shard.clear.remote(tier) for shard in self.shards.values()]
            result(refs, STOP_TIMEOUT_S, "clear")

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> dict[str, Any]:
        """Flush, then end all actors and wait until they are gone.

        Returns:
            The flush reports of replicas and shards that still answered, by actor name.
        """
        replicas = {replica_name(self.spec.group, i): r for i, r in enumerate(self.replicas)}
        return _stop(self.spec.group, replicas, self.shards, timeout_s)

    def status(self) -> dict[str, Any]:
        """What each actor says of itself; an actor that does not answer has an "error"."""
        named: dict[str, Any] = {
            replica_name(self.spec.group, i): r for i, r in enumerate(self.replicas)
        }
        named.update(self.shards)
        refs = {name: handle.stats.remote() for name, handle in named.items()}
        actors: dict[str, Any] = {}
        for name, ref in refs.items():
            try:
                actors[name] = result(ref, STATUS_TIMEOUT_S, name)
            except LiteCacheError as error:
                actors[name] = {"error": str(error)}
        try:
            actors[coordinator_name(self.spec.group)] = self.coordinator.stats()
        except LiteCacheError as error:
            actors[coordinator_name(self.spec.group)] = {"error": str(error)}
        return actors


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
    # Replicas first: their flush commits blocks that the shards then write out.
    for handles in (replicas, shards):
        refs = {name: handle.stop.remote(timeout_s) for name, handle in handles.items()}
        for name, ref in refs.items():
            try:
                report = result(ref, timeout_s + 5, f"{name}: stop")
                reports[name] = report if isinstance(report, dict) else report._asdict()
            except LiteCacheError as error:
                logger.warning("%s", error)
    end_actors(group, [*replicas.values(), *shards.values()])
    return reports


def end_actors(group: str, handles: list[Any]) -> None:
    """Kill actors of a group, the coordinator last, and wait until their names are free.

    Raises:
        GroupError: an actor is still there after the deadline.
    """
    for handle in handles:
        ray.kill(handle, no_restart=True)
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(coordinator_name(group), NAMESPACE), no_restart=True)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (left := actor_names(group)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        raise GroupError(f"still there after {STOP_TIMEOUT_S:g} s: {', '.join(left)}")


def actor_names(group: str) -> list[str]:
    """Names of the group's actors that are alive or starting."""
    named = ray.util.list_named_actors(all_namespaces=True)
    prefix = f"litecache:{group}:"
    return sorted(
        actor["name"]
        for actor in named
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix)
    )


class _Starter:
    """One attempt to start a group, and its undoing."""

    def __init__(self, spec: GroupSpec, detached: bool, options: dict[str, dict[str, Any]]) -> None:
        self._spec = spec
        self._options = options
        self._common = {
            "namespace": NAMESPACE,
            "max_restarts": -1,
            "lifetime": "detached" if detached else None,
        }
        self._nodes: list[str] = []
        self.replicas: list[Any] = []
        self.shards: dict[str, Any] = {}
        self.coordinator: Any = None

    def place(self) -> None:
        """Create the coordinator and the replicas; afterwards each has a node."""
        spec = self._spec
        try:
            self.coordinator = self._create(
                Coordinator, coordinator_name(spec.group), "coordinator", _COORDINATOR_OPTIONS
            ).remote(spec.group, spec.describe())
        except ValueError as error:
            raise GroupError(f"a group {spec.group!r} is there already: join it") from error
        resources: dict[str, Any] = {"num_cpus": 1} if not spec.num_gpus else {}
        resources["num_gpus"] = spec.num_gpus
        for index in range(spec.replicas):
            if spec.replicas > 1:
                resources["scheduling_strategy"] = "SPREAD"
            name = replica_name(spec.group, index)
            self.replicas.append(self._create(GpuCache, name, "gpu", resources).remote(spec, index))
        try:
            places = result(
                [replica.where.remote() for replica in self.replicas],
                PLACE_TIMEOUT_S,
                f"placing {spec.replicas} GpuCache actor(s)",
            )
        except RequestTimeout as error:
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            raise GroupUnavailableError(
                f"{error}: each needs {resources}, free in the cluster: {free}"
            ) from error
        self._nodes = sorted({place["node_id"] for place in places})

    def start_shards(self) -> None:
        """Create the shards of the replicas' nodes and wait until their stores are open."""
        spec = self._spec
        ranks = node_ranks(self._nodes)
        for node_id in self._nodes:
            affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
            for index, store_options in enumerate(shard_options(spec, ranks[node_id])):
                name = shard_name(spec.group, node_id, index)
                options = {**_SHARD_OPTIONS, "scheduling_strategy": affinity}
                self.shards[name] = self._create(StorageShard, name, "shard", options).remote(
                    spec.group, index, store_options
                )
        result(
            [shard.info.remote() for shard in self.shards.values()],
            PLACE_TIMEOUT_S,
            "starting the shards",
        )

    def load(self, timeout_s: float) -> Any:
        """Let the replicas load their model."""
        begun = [replica.begin.remote() for replica in self.replicas]
        result(begun, PLACE_TIMEOUT_S, "beginning to load")
        return _wait_loaded(self.replicas, time.monotonic() + timeout_s)

    def undo(self) -> None:
        """End whatever was created."""
        if self.coordinator is None:
            return
        # Closed rather than killed: a dying process would keep its folder locked for a moment.
        closing = [shard.stop.remote(0.0) for shard in self.shards.values()]
        for ref in closing:
            with contextlib.suppress(LiteCacheError):
                result(ref, STOP_TIMEOUT_S, "closing a shard")
        try:
            end_actors(self._spec.group, [*self.replicas, *self.shards.values()])
        except LiteCacheError as error:
            logger.warning("%s", error)

    def _create(self, kind: type, name: str, options_of: str, defaults: dict[str, Any]) -> Any:
        options = {**self._common, **defaults, **self._options.get(options_of, {}), "name": name}
        class_options = _CLASS_OPTIONS.get(kind)
        actor_class = ray.remote(**class_options)(kind) if class_options else ray.remote(kind)
        return actor_class.options(**options)


def _wait_loaded(replicas: list[Any], deadline: float) -> Any:
    """The `EngineInfo` of the replicas, once all have loaded the model."""
    infos = result(
        [replica.info.remote() for replica in replicas],
        max(1.0, deadline - time.monotonic()),
        "loading the model",
    )
    return infos[0]


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
