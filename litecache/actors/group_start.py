"""Starting a group, and ending its actors.

The coordinator's name is the group's lock: whoever creates that actor starts the rest. Order of a
start: coordinator, replicas (which only then have a node), the shards of those nodes, and last the
models, so that everything that can be refused quickly is refused before the slow part.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from litecache.actors import storage_shard
from litecache.actors.calls import ActorEndedError, result
from litecache.actors.coordinator import Coordinator
from litecache.actors.gpu_cache import GpuCache
from litecache.actors.group_spec import GroupSpec
from litecache.actors.naming import NAMESPACE, coordinator_name, replica_name, shard_name
from litecache.actors.placement import node_ranks, shard_options
from litecache.actors.storage_shard import StorageShard
from litecache.errors import GroupError, GroupUnavailableError, LiteCacheError, RequestTimeout

logger = logging.getLogger(__name__)

PLACE_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0

_COORDINATOR_OPTIONS: dict[str, Any] = {"num_cpus": 0}
_SHARD_OPTIONS: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 8}
# Ray takes these with the class only, not with `.options`.
_CLASS_OPTIONS: dict[type, dict[str, Any]] = {StorageShard: {"concurrency_groups": {"bulk": 4}}}


class GroupStart:
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
            if coordinator_name(spec.group) not in actor_names(spec.group):
                raise GroupError(f"the coordinator cannot be made: {error}") from error
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
            for index, store_options in enumerate(
                shard_options(spec, ranks[node_id], 1 + max(ranks.values()))
            ):
                name = shard_name(spec.group, node_id, index)
                options = {**_SHARD_OPTIONS, "scheduling_strategy": affinity}
                self.shards[name] = self._create(StorageShard, name, "shard", options).remote(
                    spec.group, index, store_options, storage_shard.LOCK_PATIENCE_S
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
        return wait_loaded(self.replicas, time.monotonic() + timeout_s)

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


def wait_loaded(replicas: list[Any], deadline: float, *, all_of_them: bool = True) -> Any:
    """The `EngineInfo` of the replicas, once they have loaded the model.

    Args:
        replicas: their handles.
        deadline: by the monotonic clock.
        all_of_them: False passes over those that have left the group, while one is there.
    """
    infos = []
    for asked in [replica.info.remote() for replica in replicas]:
        try:
            infos.append(result(asked, max(1.0, deadline - time.monotonic()), "loading the model"))
        except ActorEndedError as error:
            left = error
            if all_of_them:
                raise
    if not infos:
        raise left
    return infos[0]


def end_actors(group: str, handles: list[Any], silent: Collection[str] = ()) -> None:
    """Kill actors of a group, the coordinator last, and wait until their names are free.

    Args:
        group: its name.
        handles: all but the coordinator.
        silent: names of actors that answer nothing. Ray ends a stopped process when it runs on,
            or by itself after a while: they are not waited for.

    Raises:
        GroupError: another actor is still there after the deadline.
    """
    for handle in handles:
        ray.kill(handle, no_restart=True)
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(coordinator_name(group), NAMESPACE), no_restart=True)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while left := set(actor_names(group)).difference(silent):
        if time.monotonic() > deadline:
            raise GroupError(f"still there after {STOP_TIMEOUT_S:g} s: {', '.join(sorted(left))}")
        time.sleep(0.02)


def actor_names(group: str) -> list[str]:
    """Names of the group's actors that are alive or starting."""
    named = ray.util.list_named_actors(all_namespaces=True)
    prefix = f"litecache:{group}:"
    return sorted(
        actor["name"]
        for actor in named
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix)
    )
