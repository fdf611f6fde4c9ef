"""A group of actors: started as a whole or not at all, joined, stopped, looked at.

The coordinator's name is the group's lock: whoever creates that actor starts the rest, everyone
else joins after comparing settings. Order of a start: coordinator, replicas (which only then have a
node), the shards of those nodes, and last the models, so that everything that can be refused
quickly is refused before the slow part. Whatever fails in a start, nothing that was started stays.
"""

from __future__ import annotations

import dataclasses
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
    actor_names,
    find_actor,
    gather,
    ready_among,
    result,
    silent_among,
)
from litecache.actors.cluster import RayConnection
from litecache.actors.coordinator import Coordinator, CoordinatorClient
from litecache.actors.found_groups import (
    STOP_TIMEOUT_S,
    end_actors,
    exists,
    find_all,
    no_group,
    replicas_of,
    shards_by_node,
    stop_actors,
    users_of,
)
from litecache.actors.gpu_cache import GpuCache
from litecache.actors.group_spec import (
    GroupSpec,
    check_actor_options,
    check_memory,
    check_same,
    check_shares,
    check_stores,
    plan_shards,
)
from litecache.actors.naming import (
    CALL_TIMEOUT_S,
    NAMESPACE,
    check_group_name,
    coordinator_name,
    replica_index,
    replica_name,
)
from litecache.actors.placement import (
    alive_nodes,
    check_nodes,
    check_own_strategy,
    count_all,
    find_room,
    fitting_nodes,
)
from litecache.actors.storage_shard import StorageShard
from litecache.errors import (
    GroupError,
    GroupUnavailableError,
    LiteCacheError,
    RequestTimeout,
    first_line,
)
from litecache.hashing import BlockKey
from litecache.storage.namespaces import salt_digest
from litecache.storage.protocol import ShardMethod
from litecache.storage.wire import pack_keys, unpack_flags
from litecache.token_ids import TokenIds

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 900.0
PLACE_TIMEOUT_S = 60.0
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
        self._made: list[str] = []
        self.coordinator = CoordinatorClient(spec.group)
        self.info: Any = None

    @property
    def replicas(self) -> list[Any]:
        """`GpuCache` handles, in order of their numbers."""
        return list(self.replicas_by_index.values())

    @property
    def replicas_by_index(self) -> dict[int, Any]:
        """`GpuCache` handles by number; where some have gone there are gaps."""
        found = {replica_index(name): actor for name, actor in self._of_kind("gpu").items()}
        return dict(sorted(found.items()))

    @property
    def shards(self) -> dict[str, Any]:
        """`StorageShard` handles by actor name."""
        return self._of_kind("shard")

    @property
    def is_own(self) -> bool:
        """Started here, not joined."""
        return coordinator_name(self.spec.group) in self._made

    def _of_kind(self, kind: str) -> dict[str, Any]:
        return {name: actor for name, actor in self.actors.items() if f":{kind}:" in name}

    @classmethod
    def start(
        cls,
        spec: GroupSpec,
        *,
        load_timeout_s: float = LOAD_TIMEOUT_S,
    ) -> Group:
        """Start all actors of a group and load the model.

        Args:
            spec: settings.
            load_timeout_s: how long the model may take to load.

        Raises:
            GroupError: a group of this name is there already.
            LiteCacheError: something was refused; nothing stays behind.
        """
        check_group_name(spec.group)
        check_actor_options(spec.options)
        check_nodes(spec.nodes)
        if every := spec.replicas == "all":
            spec = dataclasses.replace(spec, replicas=count_all(spec.needs, spec.labels))
        check_shares(spec)
        check_memory(spec)
        group, needs = cls(spec), spec.needs
        try:
            group._create_coordinator()
            on_nodes = fitting_nodes(needs, spec.labels) if every and "GPU" not in needs else []
            group.grow(range(int(spec.replicas)), on_nodes, load_timeout_s)
        except BaseException:
            group._end_made(set())
            raise
        return group

    def _create(self, kind: str, name: str, *args: Any, **options: Any) -> None:
        """Make an actor with `args`; options that a user has chosen go before ours."""
        actor, with_class, defaults = _KINDS[kind]
        chosen = self.spec.options.get(kind, {})
        options = {"max_restarts": -1, **defaults, **options, **chosen}
        lifetime = "detached" if self.spec.detached else None
        life = {"name": name, "namespace": NAMESPACE, "lifetime": lifetime}
        made = ray.remote(max_restarts=-1, **with_class)(actor).options(**options, **life)
        self.actors[name] = made.remote(*args)
        self._made.append(name)

    def _create_coordinator(self) -> None:
        group, name = self.spec.group, coordinator_name(self.spec.group)
        try:
            self._create("coordinator", name, group, self.spec.describe())
        except ValueError as error:
            if name not in actor_names(group):
                raise GroupError(f"the coordinator cannot be made: {error}") from error
            raise GroupError(f"a group {group!r} is there already: join it") from error

    def grow(
        self, indexes: Sequence[int], on_nodes: Sequence[str], load_timeout_s: float
    ) -> list[str]:
        """Make replicas of these numbers, and the shards that their nodes lack; their names.

        Args:
            indexes: of the replicas.
            on_nodes: the node of each, where it is not Ray's to choose.
            load_timeout_s: how long the model may take to load.

        Raises:
            LiteCacheError: something was refused; nothing that was made here stays.
        """
        kept = set(self.actors)
        try:
            return self._grow(indexes, on_nodes, load_timeout_s)
        except BaseException:
            self._end_made(kept)
            raise

    def _grow(
        self, indexes: Sequence[int], on_nodes: Sequence[str], load_timeout_s: float
    ) -> list[str]:
        names = self._place(indexes, on_nodes)
        made = {name: self.actors[name] for name in names}
        asked = [replica.where.remote() for replica in made.values()]
        what = f"starting the process of {len(names)} GpuCache actor(s)"
        places = result(asked, PLACE_TIMEOUT_S, what)
        self._start_shards(sorted({place["node_id"] for place in places}))
        begun = [replica.begin.remote() for replica in made.values()]
        result(begun, PLACE_TIMEOUT_S, "beginning to load")
        loading = [replica.info.remote() for replica in made.values()]
        self.info = result(loading, load_timeout_s, "loading the model")[0]
        return names

    def _place(self, indexes: Sequence[int], on_nodes: Sequence[str]) -> list[str]:
        """Find room for replicas, and make them there."""
        spec, count = self.spec, len(indexes)
        resources: dict[str, Any] = {"num_gpus": spec.num_gpus}
        if not spec.num_gpus:
            resources["num_cpus"] = 1
        nodes: list[str | None] = [None] * count
        own = spec.options.get("gpu", {}).get("scheduling_strategy")
        if own is None or isinstance(own, str):
            nodes = find_room(count, spec.needs, spec.placement, on_nodes, spec.labels)
        else:
            check_own_strategy(count, spec.needs, own)
        names = []
        for index, node_id in zip(indexes, nodes, strict=True):
            if node_id is not None:
                # When the node is lost Ray may start it on another one.
                resources["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
                    node_id, soft=True
                )
            elif count > 1:
                resources["scheduling_strategy"] = "SPREAD"
            names.append(replica_name(spec.group, index))
            try:
                self._create("gpu", names[-1], spec, index, **resources)
            except ValueError as error:
                raise GroupError(f"{names[-1]} is there already: {first_line(error)}") from error
        return names

    def _start_shards(self, node_ids: Sequence[str]) -> None:
        """Create the shards that these nodes lack and wait until their stores are open.

        Raises:
            GroupMismatchError: there are shards, of other groups with the same ones, whose
                settings are others.
        """
        spec, there = self.spec, shards_by_node(self.spec.shards_of)
        alive = {node["NodeID"][:8] for node in alive_nodes()}
        there = {node: shards for node, shards in there.items() if node in alive}
        known = _settings_of(there, {node_id[:8] for node_id in node_ids})
        opening = []
        for node_id, stores in plan_shards(spec, node_ids, known).items():
            if node_id[:8] in there:
                check_stores(spec.shards_of, known[node_id[:8]], stores)
                self.actors |= there[node_id[:8]]
                continue
            here = NodeAffinitySchedulingStrategy(node_id, soft=False)
            for index, (name, store) in enumerate(stores.items()):
                args = spec.shards_of, index, store, storage_shard.LOCK_PATIENCE_S, spec.source.path
                self._create("shard", name, *args, scheduling_strategy=here)
                opening.append(self.actors[name].info.remote())
        result(opening, PLACE_TIMEOUT_S, "starting the shards")

    def _end_made(self, kept: Collection[str]) -> None:
        """End what this group has made, but for `kept`, and forget what it found."""
        made = [name for name in self._made if name not in kept]
        shards = {name: self.actors[name] for name in made if ":shard:" in name}
        try:
            if self.spec.shard_group and set(users_of(self.spec.shards_of)) - {self.spec.group}:
                made, shards = [name for name in made if name not in shards], {}
            # Closed rather than killed: a dying process would keep its folder locked for a moment.
            gather(shards, lambda shard: shard.stop.remote(0.0), STOP_TIMEOUT_S, "closing")
            end_actors(made)
        except LiteCacheError as error:
            logger.warning("%s", error)
        self.actors = {name: actor for name, actor in self.actors.items() if name in kept}
        self._made = [name for name in self._made if name in kept]

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
        joined.actors = find_all(replicas_of(group, deadline))
        joined.info = _first_loaded(joined.replicas, deadline)
        for shards in shards_by_node(joined.spec.shards_of).values():
            joined.actors |= shards
        joined.actors |= {coordinator_name(group): find_actor(coordinator_name(group), deadline)}
        return joined

    def refresh(self, forgotten: Collection[str] = ()) -> None:
        """Find actors that have come, and let go of those that are no more.

        Args:
            forgotten: names whose actor is another one now, if there is one.

        Raises:
            LiteCacheError: Ray does not say.
        """
        spec = self.spec
        names = set(actor_names(spec.group))
        names |= {name for name in actor_names(spec.shards_of) if ":shard:" in name}
        kept = {n: a for n, a in self.actors.items() if n in names and n not in forgotten}
        # the handles of actors that were made here keep them alive: they stay as they are
        self.actors = kept | find_all(sorted(names - kept.keys()))

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
        complete = not unavailable and all(r["complete"] for r in reports.values())
        total: dict[str, Any] = {"complete": complete, "unavailable": unavailable}
        for name in ("written", "pending", "failed"):
            total[name] = sum(r[name] for r in reports.values())
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
        answers, missed = self._ask(
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
        _, missed = self._ask(
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
            answers, silent = self._ask(kind, call, 2 * STOP_TIMEOUT_S, "delete")
            count, missed = count + sum(answers.values()), missed | silent
        _refuse_missed("delete", missed)
        return count

    def set_pinned(self, keys: Sequence[BlockKey], pinned: bool) -> list[bool]:
        """Pin or unpin blocks on all shards; which of them some shard holds.

        Raises:
            GroupUnavailableError: names the shards that did not answer; the others have done it.
        """
        what = "pin" if pinned else "unpin"
        answers, missed = self._ask(
            "shard", lambda s: s.set_pinned.remote(keys, pinned), STOP_TIMEOUT_S, what
        )
        _refuse_missed(what, missed)
        return [any(held) for held in zip(*answers.values(), strict=True)] or [False] * len(keys)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> dict[str, Any]:
        """Flush, then end all actors and wait until they are gone.

        Returns:
            The flush reports of replicas and shards that still answered, by actor name.
        """
        self.connection.check()
        return stop_actors(self.spec.group, timeout_s)

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
        silent: set[str] | None = None,
    ) -> tuple[dict[str, Any], set[str]]:
        """Answers by name, and who does not answer now; any other error is raised.

        Who is `silent` is found out where that is None.
        """
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


def _first_loaded(replicas: Sequence[Any], deadline: float) -> Any:
    """`EngineInfo`, once a replica has it: others may hang, be restarting, or have left the group.

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


def _settings_of(
    by_node: Mapping[str, Mapping[str, Any]], needed: Collection[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Arguments of the stores of shards, by node and name.

    Raises:
        LiteCacheError: a shard of a node that is needed does not tell; others may be silent.
    """
    known: dict[str, dict[str, dict[str, Any]]] = {}
    for node, shards in by_node.items():
        timeout_s = STATUS_TIMEOUT_S if node in needed else CALL_TIMEOUT_S
        answers = gather(shards, lambda s: s.settings.remote(), timeout_s, "settings")
        for name, answer in answers.items():
            if not isinstance(answer, LiteCacheError):
                known.setdefault(node, {})[name] = answer
            elif node in needed:
                raise answer
    return known
