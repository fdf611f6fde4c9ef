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
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from litecache.actors import storage_shard
from litecache.actors.calls import (
    UNREACHABLE,
    ActorEndedError,
    ReplicaLeftError,
    find_actor,
    gather,
    ready_among,
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
from litecache.storage.namespaces import salt_digest
from litecache.storage.protocol import ShardMethod
from litecache.storage.wire import pack_keys, unpack_flags
from litecache.token_ids import TokenIds

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 900.0
PLACE_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
# The engine answers between two steps, and a long prefill on a CPU is one step of seconds.
STATUS_TIMEOUT_S = 15.0

# By kind: the class, what Ray takes with it only, and what goes before what a user has not chosen.
# A named strategy, so that a placement group that its maker runs in does not capture an actor: it
# would end with that group, under all who have joined.
_KINDS: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "coordinator": (Coordinator, {}, {"num_cpus": 0, "scheduling_strategy": "DEFAULT"}),
    "gpu": (GpuCache, {}, {"scheduling_strategy": "DEFAULT"}),
    "shard": (
        StorageShard,
        {"concurrency_groups": {"bulk": 4}},
        {"num_cpus": 0, "max_concurrency": 8},
    ),
}


class Group:
    """Handles of a running group's actors.

    Attributes:
        spec: its settings.
        connection: the connection to Ray that all handles belong to.
        actors: handles by name; Ray ends an actor that nobody holds.
        coordinator: client of its coordinator.
        info: `EngineInfo` of the model.
    """

    def __init__(self, spec: GroupSpec) -> None:
        self.spec = spec
        self.connection = RayConnection.current()
        self.actors: dict[str, Any] = {}
        self.coordinator = CoordinatorClient(spec.group)
        self.info: Any = None

    @property
    def replicas(self) -> list[Any]:
        """`GpuCache` handles by index."""
        return list(self._of_kind("gpu").values())

    @property
    def shards(self) -> dict[str, Any]:
        """`StorageShard` handles by actor name."""
        return self._of_kind("shard")

    def _of_kind(self, kind: str) -> dict[str, Any]:
        return {name: actor for name, actor in self.actors.items() if f":{kind}:" in name}

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
        create = functools.partial(group._create, options, "detached" if detached else None)
        try:
            group._start_shards(group._place(create), create)
            begun = [replica.begin.remote() for replica in group.replicas]
            result(begun, PLACE_TIMEOUT_S, "beginning to load")
            group.info = _wait_loaded(group.replicas, time.monotonic() + load_timeout_s)
        except BaseException:
            group._undo()
            raise
        return group

    def _create(
        self,
        chosen: Mapping[str, dict[str, Any]],
        lifetime: str | None,
        kind: str,
        name: str,
        *args: Any,
        **options: Any,
    ) -> None:
        """Make an actor with `args`; options that a user has chosen go before ours."""
        actor, with_class, defaults = _KINDS[kind]
        options = {"max_restarts": -1, **defaults, **options, **chosen.get(kind, {})}
        life = {"name": name, "namespace": NAMESPACE, "lifetime": lifetime}
        made = ray.remote(max_restarts=-1, **with_class)(actor).options(**options, **life)
        self.actors[name] = made.remote(*args)

    def _place(self, create: Callable[..., None]) -> list[str]:
        """Create the coordinator and the replicas; the nodes that they are on."""
        spec = self.spec
        try:
            name = coordinator_name(spec.group)
            create("coordinator", name, spec.group, spec.describe())
        except ValueError as error:
            if name not in actor_names(spec.group):
                raise GroupError(f"the coordinator cannot be made: {error}") from error
            raise GroupError(f"a group {spec.group!r} is there already: join it") from error
        resources: dict[str, Any] = {"num_gpus": spec.num_gpus}
        if not spec.num_gpus:
            resources["num_cpus"] = 1
        if spec.replicas > 1:
            resources["scheduling_strategy"] = "SPREAD"
        for index in range(spec.replicas):
            create("gpu", replica_name(spec.group, index), spec, index, **resources)
        try:
            asked = [replica.where.remote() for replica in self.replicas]
            what = f"placing {spec.replicas} GpuCache actor(s)"
            places = result(asked, PLACE_TIMEOUT_S, what)
        except RequestTimeout as error:
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            raise GroupUnavailableError(
                f"{error}: each needs {resources}, free in the cluster: {free}"
            ) from error
        return sorted({place["node_id"] for place in places})

    def _start_shards(self, nodes: list[str], create: Callable[..., None]) -> None:
        """Create the shards of these nodes and wait until their stores are open."""
        spec = self.spec
        ranks = node_ranks(nodes)
        for node_id in nodes:
            here = NodeAffinitySchedulingStrategy(node_id, soft=False)
            stores = shard_options(spec, ranks[node_id], 1 + max(ranks.values()))
            for index, store in enumerate(stores):
                args = spec.group, index, store, storage_shard.LOCK_PATIENCE_S, spec.source.path
                name = shard_name(spec.group, node_id, index)
                create("shard", name, *args, scheduling_strategy=here)
        opening = [shard.info.remote() for shard in self.shards.values()]
        result(opening, PLACE_TIMEOUT_S, "starting the shards")

    def _undo(self) -> None:
        """End whatever was created."""
        if not self.actors:
            return
        try:
            # Closed rather than killed: a dying process would keep its folder locked for a moment.
            gather(self.shards, lambda shard: shard.stop.remote(0.0), STOP_TIMEOUT_S, "closing")
            _end_actors(self.spec.group)
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
            raise no_group(group, "join")
        description = _describe(group, time.monotonic() + STATUS_TIMEOUT_S)
        if expected is not None:
            check_same(group, description, expected)
        joined = cls(GroupSpec.from_description(group, description))
        deadline = time.monotonic() + timeout_s
        names = [replica_name(group, index) for index in range(joined.spec.replicas)]
        joined.actors = {name: find_actor(name, deadline) for name in names}
        joined.info = _first_loaded(joined.replicas, deadline)
        joined.actors |= _find_all([name for name in actor_names(group) if ":shard:" in name])
        joined.actors |= {coordinator_name(group): find_actor(coordinator_name(group), deadline)}
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
            "gpu", lambda r: r.flush.remote(timeout_s), timeout_s + 5, "flush", silent
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
        calls: dict[str, Callable[[Any], Any]] = {}
        if tier in ("gpu", "all"):
            calls["gpu"] = lambda replica: replica.clear_pool.remote()
        if tier != "gpu":
            calls["shard"] = lambda shard: shard.clear.remote(tier)
        for kind, call in calls.items():
            missed |= self._ask(kind, call, STOP_TIMEOUT_S, "clear", silent)[1]
        _refuse_missed("clear", missed)

    def holders(self, keys: Sequence[BlockKey]) -> list[str | None]:
        """For each key the name of a shard that holds it.

        Raises:
            GroupUnavailableError: names the shards that did not answer.
        """
        message = pack_keys(keys)
        answers, missed = self._ask_named(
            "shard", lambda s: s.call.remote(ShardMethod.QUERY, message), STOP_TIMEOUT_S, "query"
        )
        _refuse_missed("query", missed)
        held = {name: unpack_flags(answer) for name, answer in answers.items()}
        return [next((n for n, flags in held.items() if flags[i]), None) for i in range(len(keys))]

    def fetch(self, shard: str, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Bytes of blocks from a shard, None where it has them no more."""
        asked = self.actors[shard].fetch.remote(list(keys))
        blocks: list[bytes | None] = result(asked, STOP_TIMEOUT_S, f"{shard}: fetch")
        return blocks

    def store(
        self, shard: str, blocks: Sequence[tuple[BlockKey, BlockKey, str, bytes]]
    ) -> list[bool]:
        """Give blocks to a shard: (key, parent, namespace, bytes); which of them it holds now."""
        asked = self.actors[shard].take_in.remote(blocks)
        held: list[bool] = result(asked, STOP_TIMEOUT_S, f"{shard}: store")
        return held

    def save_prefix(self, tokens: TokenIds, salt: str) -> None:
        """Have every replica save what it alone holds of a prefix.

        Raises:
            GroupUnavailableError: names the replicas that did not answer; the others have done it.
        """
        _, missed = self._ask_named(
            "gpu", lambda r: r.save_prefix.remote(tokens, salt), STOP_TIMEOUT_S, "save"
        )
        _refuse_missed("save", missed)

    def delete_salt(self, salt: str) -> int:
        """Drop all blocks of a cache salt from every tier; how many shards and pools held.

        Twice: what a request loaded or fetched from a shard that had not deleted yet is gone after
        the second time, because by then no shard has anything to give.

        Raises:
            GroupUnavailableError: names the actors that did not answer; the others have done it.
        """
        digest, roots = salt_digest(salt), self.info.roots(salt)
        calls: dict[str, Callable[[Any], Any]] = {
            "gpu": lambda replica: replica.delete_salt.remote(salt),
            "shard": lambda shard: shard.delete_salt.remote(digest, roots),
        }
        count, missed = 0, set[str]()
        for kind, call in [*calls.items(), *calls.items()]:
            answers, silent = self._ask_named(kind, call, 2 * STOP_TIMEOUT_S, "delete")
            count, missed = count + sum(answers.values()), missed | silent
        _refuse_missed("delete", missed)
        return count

    def set_pinned(self, keys: Sequence[BlockKey], pinned: bool) -> list[bool]:
        """Pin or unpin blocks on all shards; which of them some shard holds.

        Raises:
            GroupUnavailableError: names the shards that did not answer; the others have done it.
        """
        what, silent = "pin" if pinned else "unpin", self._silent()
        answers, missed = self._ask(
            "shard", lambda s: s.set_pinned.remote(keys, pinned), STOP_TIMEOUT_S, what, silent
        )
        _refuse_missed(what, missed)
        return [any(held) for held in zip(*answers, strict=True)] or [False] * len(keys)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> dict[str, Any]:
        """Flush, then end all actors and wait until they are gone.

        Returns:
            The flush reports of replicas and shards that still answered, by actor name.
        """
        self.connection.check()
        return _stop(self.spec.group, timeout_s)

    def status(self) -> dict[str, Any]:
        """What each actor says of itself; one that does not answer in 2 s has an "error"."""
        self.connection.check()
        answers = gather(self.actors, lambda h: h.stats.remote(), CALL_TIMEOUT_S, "stats")
        return {
            name: {"error": str(answer)} if isinstance(answer, LiteCacheError) else answer
            for name, answer in answers.items()
        }

    def _silent(self) -> set[str]:
        self.connection.check()
        return silent_among(self.actors)

    def _ask(
        self,
        kind: str,
        call: Callable[[Any], Any],
        timeout_s: float,
        what: str,
        silent: set[str],
    ) -> tuple[list[Any], set[str]]:
        """Answers, and the names of those that do not answer now; any other error is raised."""
        answers, missed = self._ask_named(kind, call, timeout_s, what, silent)
        return list(answers.values()), missed

    def _ask_named(
        self,
        kind: str,
        call: Callable[[Any], Any],
        timeout_s: float,
        what: str,
        silent: set[str] | None = None,
    ) -> tuple[dict[str, Any], set[str]]:
        """As `_ask`, with the answers by name; None: who is silent is found out."""
        silent = self._silent() if silent is None else silent
        asked = self._of_kind(kind)
        missed = silent & asked.keys()
        able = {name: actor for name, actor in asked.items() if name not in silent}
        answers = gather(able, call, timeout_s, what)
        for name, answer in answers.items():
            if isinstance(answer, UNREACHABLE) and not isinstance(answer, ActorEndedError):
                missed.add(name)
            elif isinstance(answer, LiteCacheError) and not isinstance(answer, ReplicaLeftError):
                raise answer
        return {n: a for n, a in answers.items() if not isinstance(a, LiteCacheError)}, missed


def _refuse_missed(what: str, missed: set[str]) -> None:
    if missed:
        raise GroupUnavailableError(
            f"{what}: no answer from {', '.join(sorted(missed))}; done by the others, call it again"
        )


def _describe(group: str, deadline: float) -> dict[str, Any]:
    """What a group's coordinator says of its settings; it may be restarting."""
    client = CoordinatorClient(group)
    while True:
        try:
            description: dict[str, Any] = client.call("describe")
            return description
        except UNREACHABLE as error:
            if time.monotonic() > deadline:
                text = f"the coordinator of group {group!r} does not answer: {error}"
                raise GroupUnavailableError(text) from error
        time.sleep(0.1)


def _wait_loaded(replicas: Sequence[Any], deadline: float) -> Any:
    """The `EngineInfo` of the replicas, once all have loaded the model."""
    infos = []
    for asked in [replica.info.remote() for replica in replicas]:
        infos.append(result(asked, max(1.0, deadline - time.monotonic()), "loading the model"))
    return infos[0]


def _first_loaded(replicas: Sequence[Any], deadline: float) -> Any:
    """The same, once one has: others may hang, be restarting, or have left the group.

    Raises:
        LiteCacheError: what the last of them said, when none has loaded it.
    """
    asked = {replica.info.remote(): replica for replica in replicas}
    while True:
        left_s = max(1.0, deadline - time.monotonic())
        done = ready_among(asked, left_s)
        if not done:
            raise RequestTimeout(f"no replica has loaded the model within {left_s:.0f} s")
        for ref in done:
            replica = asked.pop(ref)
            try:
                return result(ref, 0.0, "loading the model")
            except ActorEndedError:
                if not asked:
                    raise
            except GroupUnavailableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
                asked[replica.info.remote()] = replica  # it restarts
            except LiteCacheError:
                if not asked:
                    raise


def _actor_names() -> list[str]:
    """Names of the actors of all groups that are alive or starting."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in named if actor["namespace"] == NAMESPACE)


def actor_names(group: str) -> list[str]:
    """Names of the group's actors that are alive or starting."""
    return [name for name in _actor_names() if name.startswith(f"litecache:{group}:")]


def list_groups() -> list[str]:
    """Names of all groups of the cluster."""
    return sorted(name.split(":")[1] for name in _actor_names() if name.endswith(":coordinator"))


def _find_all(names: Sequence[str]) -> dict[str, Any]:
    """Those of these actors that are there."""
    found = {}
    for name in names:
        with contextlib.suppress(GroupUnavailableError):
            found[name] = find_actor(name)
    return found


def no_group(group: str, what: str) -> GroupUnavailableError:
    """The error of whoever wants to `what` a group that is not there: says which are."""
    running = ", ".join(list_groups()) or "none"
    start = f"; start it with `litecache up MODEL --group {group}`" if what == "join" else ""
    return GroupUnavailableError(
        f"there is no group {group!r} to {what}{start} (groups that run here: {running})"
    )


def exists(group: str) -> bool:
    """Whether the group has a coordinator, alive or restarting."""
    return bool(_find_all([coordinator_name(group)]))


def stop_group(group: str, timeout_s: float = STOP_TIMEOUT_S) -> dict[str, Any]:
    """Stop a group found by name, in whatever state its actors are; see `Group.stop`.

    Raises:
        GroupUnavailableError: there is no such group.
    """
    check_group_name(group)
    if not actor_names(group):
        raise no_group(group, "stop")
    return _stop(group, timeout_s)


def _stop(group: str, timeout_s: float) -> dict[str, Any]:
    actors = _find_all(actor_names(group))
    actors.pop(coordinator_name(group), None)
    silent = silent_among(actors)
    timeout_s = min(timeout_s, CALL_TIMEOUT_S) if silent else timeout_s
    reports: dict[str, Any] = {}
    # Replicas first: their flush commits blocks that the shards then write out.
    for kind in (":gpu:", ":shard:"):
        able = {name: a for name, a in actors.items() if kind in name and name not in silent}
        answers = gather(able, lambda a: a.stop.remote(timeout_s), timeout_s + 5, "stop")
        for name, report in answers.items():
            if isinstance(report, LiteCacheError):
                logger.warning("%s", report)
            else:
                reports[name] = report if isinstance(report, dict) else report._asdict()
    _end_actors(group, silent)
    return reports


def _end_actors(group: str, silent: Collection[str] = ()) -> None:
    """Kill actors of a group, the coordinator last, and wait until their names are free.

    Those that answer nothing (`silent`) are not waited for: Ray ends a stopped process when it
    runs on, or by itself after a while.
    """
    actors, coordinator = _find_all(actor_names(group)), coordinator_name(group)
    for name in sorted(actors, key=lambda name: name == coordinator):
        ray.kill(actors[name], no_restart=True)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while left := set(actor_names(group)).difference(silent):
        if time.monotonic() > deadline:
            raise GroupError(f"still there after {STOP_TIMEOUT_S:g} s: {', '.join(sorted(left))}")
        time.sleep(0.02)
