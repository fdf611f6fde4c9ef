"""A group of actors: started as a whole or not at all, joined, stopped, looked at.

The coordinator's name is the group's lock: whoever creates that actor starts the rest, everyone
else joins after comparing settings. Order of a start: coordinator, replicas (which only then have a
node), the shards of those nodes, and last the models, so that everything that can be refused
quickly is refused before the slow part. Whatever fails in a start, nothing that was started stays.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from litecache.actors import storage_shard
from litecache.actors.calls import (
    UNREACHABLE,
    ActorEndedError,
    ReplicaLeftError,
    gather,
    result,
    silent_among,
)
from litecache.actors.cluster import RayConnection
from litecache.actors.coordinator import Coordinator, CoordinatorClient
from litecache.actors.gpu_cache import GpuCache
from litecache.actors.group_spec import (
    GroupSpec,
    check_actor_options,
    check_memory,
    check_same,
    check_shares,
    node_ranks,
    shard_options,
)
from litecache.actors.naming import (
    CALL_TIMEOUT_S,
    NAMESPACE,
    check_group_name,
    coordinator_name,
    replica_name,
    shard_name,
)
from litecache.actors.storage_shard import StorageShard
from litecache.errors import GroupError, GroupUnavailableError, LiteCacheError, RequestTimeout
from litecache.hashing import BlockKey

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 900.0
PLACE_TIMEOUT_S = 60.0
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
        connection: the connection to Ray that all handles belong to.
        coordinator: client of its coordinator.
        coordinator_handle: kept, because Ray ends an actor that nobody holds.
        replicas: `GpuCache` handles by index.
        shards: `StorageShard` handles by actor name.
        info: `EngineInfo` of the model.
    """

    def __init__(self, spec: GroupSpec) -> None:
        self.spec = spec
        self.connection = RayConnection.current()
        self.coordinator = CoordinatorClient(spec.group)
        self.coordinator_handle: Any = None
        self.replicas: list[Any] = []
        self.shards: dict[str, Any] = {}
        self.info: Any = None

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
        group = cls(spec)
        lifetime = "detached" if detached else None
        common = {"namespace": NAMESPACE, "max_restarts": -1, "lifetime": lifetime}
        create = functools.partial(_create, common, options)
        try:
            group._start_shards(group._place(create), create)
            begun = [replica.begin.remote() for replica in group.replicas]
            result(begun, PLACE_TIMEOUT_S, "beginning to load")
            group.info = wait_loaded(group.replicas, time.monotonic() + load_timeout_s)
        except BaseException:
            group._undo()
            raise
        return group

    def _place(self, create: Callable[..., Any]) -> list[str]:
        """Create the coordinator and the replicas; the nodes that they are on."""
        spec = self.spec
        try:
            self.coordinator_handle = create(
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
            self.replicas.append(create(GpuCache, name, "gpu", resources).remote(spec, index))
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
        return sorted({place["node_id"] for place in places})

    def _start_shards(self, nodes: list[str], create: Callable[..., Any]) -> None:
        """Create the shards of these nodes and wait until their stores are open."""
        spec = self.spec
        ranks = node_ranks(nodes)
        for node_id in nodes:
            affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
            for index, store_options in enumerate(
                shard_options(spec, ranks[node_id], 1 + max(ranks.values()))
            ):
                name = shard_name(spec.group, node_id, index)
                options = {**_SHARD_OPTIONS, "scheduling_strategy": affinity}
                self.shards[name] = create(StorageShard, name, "shard", options).remote(
                    *(spec.group, index, store_options, storage_shard.LOCK_PATIENCE_S),
                    model=spec.source.path,
                )
        result(
            [shard.info.remote() for shard in self.shards.values()],
            PLACE_TIMEOUT_S,
            "starting the shards",
        )

    def _undo(self) -> None:
        """End whatever was created."""
        if self.coordinator_handle is None:
            return
        # Closed rather than killed: a dying process would keep its folder locked for a moment.
        closing = [shard.stop.remote(0.0) for shard in self.shards.values()]
        for ref in closing:
            with contextlib.suppress(LiteCacheError):
                result(ref, STOP_TIMEOUT_S, "closing a shard")
        try:
            end_actors(self.spec.group, [*self.replicas, *self.shards.values()])
        except LiteCacheError as error:
            logger.warning("%s", error)

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
        joined = cls(GroupSpec.from_description(group, description))
        deadline = time.monotonic() + timeout_s
        names = [replica_name(group, index) for index in range(joined.spec.replicas)]
        joined.replicas = [_find(name, deadline) for name in names]
        joined.info = wait_loaded(joined.replicas, deadline, all_of_them=False)
        for name in _shard_names(joined.spec, joined.replicas):
            with contextlib.suppress(ValueError):
                joined.shards[name] = ray.get_actor(name, NAMESPACE)
        joined.coordinator_handle = _find(coordinator_name(group), deadline)
        return joined

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


def _create(
    common: dict[str, Any],
    chosen: dict[str, dict[str, Any]],
    kind: type,
    name: str,
    options_of: str,
    defaults: dict[str, Any],
) -> Any:
    """A class of actors with its options: those of the user go before `defaults`."""
    options = {**common, **defaults, **chosen.get(options_of, {}), "name": name}
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
