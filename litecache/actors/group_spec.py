"""What defines a group: its settings, its model, and how both are compared when others join.

Also where its actors go and what they need there, checked before anything is started.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

import litecache
from litecache.actors.naming import shard_name
from litecache.actors.placement import NodeStorage, alive_nodes
from litecache.config import CacheConfig
from litecache.engine.loading.model_source import ModelSource
from litecache.errors import CapacityError, ConfigError, GroupMismatchError, first_line, shown
from litecache.machine_memory import memory_limit_bytes
from litecache.storage.namespaces import salt_digest

VERSION = litecache.__version__
MEMORY_SHARE = 0.85
MIN_SHARE_BYTES = 1 << 20
ACTOR_KINDS = ("gpu", "shard", "coordinator")


@dataclass(frozen=True)
class GroupSpec:
    """Everything an actor needs to start, and to start again after a crash.

    Attributes:
        group: name of the group.
        source: the model.
        config: the cache.
        replicas: number of `GpuCache` actors at the start, or "all": one per GPU, or per node
            where they run on CPUs.
        num_threads: torch's threads in each on a CPU; None = the machine's cores.
        num_gpus: GPUs per replica; 0 = it runs on the CPU.
        placement: how replicas are spread over nodes, as Ray's placement groups have it.
        nodes: storage settings of single nodes.
        shard_group: the group that its shards are named after; None = itself. Groups of other
            models with the same one share them.
        detached: the actors outlive the driver that made them.
        options: Ray's, by kind of actor.
    """

    group: str
    source: ModelSource
    config: CacheConfig
    replicas: int | str = 1
    num_threads: int | None = None
    num_gpus: float = 0
    placement: str = "SPREAD"
    nodes: tuple[NodeStorage, ...] = ()
    shard_group: str | None = None
    detached: bool = False
    options: Mapping[str, dict[str, Any]] = field(default_factory=dict, hash=False)

    @property
    def shards_of(self) -> str:
        """The group that its shards are named after."""
        return self.shard_group or self.group

    @property
    def needs(self) -> dict[str, float]:
        """What a replica asks Ray for, by the name of the resource."""
        options = self.options.get("gpu", {})
        needs = {
            "CPU": options.get("num_cpus", None if self.num_gpus else 1) or 0,
            "GPU": options.get("num_gpus", self.num_gpus) or 0,
            "memory": options.get("memory") or 0,
            **(options.get("resources") or {}),
        }
        if kind := options.get("accelerator_type"):
            needs[f"accelerator_type:{kind}"] = 0.001
        return {name: float(count) for name, count in needs.items() if count}

    @property
    def labels(self) -> dict[str, str]:
        """Labels that a replica's node must have, as Ray's `label_selector`."""
        return dict(self.options.get("gpu", {}).get("label_selector") or {})

    def config_on(self, node: Mapping[str, Any]) -> CacheConfig:
        """Its settings on a node of `ray.nodes()`: the first entry that describes it counts.

        Raises:
            ConfigError: they do not go together.
        """
        for each in self.nodes:
            if each.describes(node):
                return dataclasses.replace(self.config, **each.settings)
        return self.config

    def describe(self) -> dict[str, Any]:
        """Values for those who join, kept by the coordinator; plain but for `options`."""
        config, source = self.config.to_dict(), dataclasses.asdict(self.source)
        nodes = [each.to_dict() for each in self.nodes]
        return {
            **{"version": VERSION, **vars(self)},
            **{"config": config, "source": source, "nodes": nodes},
        }

    @classmethod
    def from_description(cls, group: str, description: dict[str, Any]) -> GroupSpec:
        """The inverse of `describe`; GroupMismatchError: of a version that described otherwise."""
        given = {**description, "group": group}
        try:
            fields = {field.name: given[field.name] for field in dataclasses.fields(cls)}
            source, config = ModelSource(**given["source"]), CacheConfig(**given["config"])
            nodes = tuple(map(NodeStorage.from_dict, given["nodes"]))
            return cls(**{**fields, "source": source, "config": config, "nodes": nodes})
        except (KeyError, TypeError):
            version = description.get("version")
            raise GroupMismatchError(
                "version", version, f"{VERSION}, {_same_version(group)}"
            ) from None


def _same_version(group: str) -> str:
    return (
        "this side's: install that version of LiteCache here, or run "
        f"`litecache down --group {group}` and start the group anew with this one"
    )


def digest(description: dict[str, Any]) -> str:
    """Of what must agree between a group and those who join it."""
    text = json.dumps(_comparable(description), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _comparable(description: dict[str, Any]) -> dict[str, Any]:
    # A label is no property of the model; each driver bounds what it writes itself, and has a salt
    # of its own.
    source, config = description["source"].items(), description["config"].items()
    comparable = {
        **{name: description[name] for name in ("version", "nodes", "shard_group")},
        **{f"model.{name}": value for name, value in source if name != "label"},
        **{name: value for name, value in config if name not in ("models_bytes", "cache_salt")},
    }
    # by digest, since what differs is told in an error
    for name, value in config:
        if name.startswith("salt_"):
            comparable[name] = {salt_digest(salt): quota for salt, quota in value.items()}
    return comparable


def check_same(group: str, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Compare a running group's description with a driver's.

    There "config", "nodes" and "shard_group" of None agree with any.

    Raises:
        GroupMismatchError: names the fields that differ, with both values and both digests.
    """
    for name in ("config", "nodes", "shard_group"):
        if mine[name] is None:
            mine = {**mine, name: theirs[name]}
    if digest(theirs) == digest(mine):
        return
    if theirs["version"] != mine["version"]:
        raise GroupMismatchError("version", theirs["version"], f"{VERSION}, {_same_version(group)}")
    left, right = _comparable(theirs), _comparable(mine)
    differing = [
        f"{name} is {shown(left.get(name))}, not {shown(right.get(name))}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]
    raise GroupMismatchError(
        f"group {group!r} runs with other settings: {'; '.join(differing)} "
        f"(its digest {digest(theirs)}, yours {digest(mine)}); "
        "join with the same settings, use another group name, or stop it with "
        f"`litecache down --group {group}`"
    )


def check_stores(
    shard_group: str, there: Mapping[str, dict[str, Any]], mine: Mapping[str, dict[str, Any]]
) -> None:
    """Compare the shards of a node, which other groups made, with those that a group would make.

    Args:
        shard_group: whose shards they are.
        there: arguments of their stores, by name.
        mine: those of the group's own.

    Raises:
        GroupMismatchError: names what differs.
    """
    differing = [
        f"{name} is {shown(there[shard].get(name))}, not {shown(value)}"
        for shard in mine.keys() & there.keys()
        for name, value in mine[shard].items()
        if name != "shards" and there[shard].get(name) != value
    ]
    if len(there) != len(mine):
        differing.append(f"a node has {len(there)} of them, not {len(mine)}")
    if differing:
        raise GroupMismatchError(
            f"the shards of {shard_group!r} run with other settings: {'; '.join(differing)}; give "
            "all models that share them the same storage settings, or another group of shards"
        )


def check_actor_options(options: Mapping[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """Options per kind of actor, passed through to Ray.

    Raises:
        ConfigError: an unknown kind, not a dict, or an option that LiteCache sets itself.
    """
    kinds = f"any of {', '.join(ACTOR_KINDS)}"
    if options is not None and not isinstance(options, dict):
        raise ConfigError("actor_options", options, f"a dict with {kinds}")
    for kind, values in (options or {}).items():
        if kind not in ACTOR_KINDS:
            raise ConfigError("actor_options", kind, kinds)
        field = f"actor_options[{kind!r}]"
        if not isinstance(values, dict):
            raise ConfigError(field, values, "a dict of Ray actor options")
        for name in ("name", "namespace", "lifetime", "get_if_exists"):
            if name in values:
                raise ConfigError(field, name, "options other than the actor's name and life")
        _check_with_ray(field, values)
    return {kind: dict(values) for kind, values in (options or {}).items()}


def _check_with_ray(field: str, values: dict[str, Any]) -> None:
    valid = "options of Ray actors"
    try:
        ray.remote(type("NeverStarted", (), {})).options(**values)
        if any(isinstance(value, int) and abs(value) >= 1 << 62 for value in values.values()):
            valid += ", of at most 62 bits"
            raise OverflowError
        if values.get("max_concurrency") == 0:
            valid += ", with a max_concurrency of at least 1"
            raise ValueError
    except Exception as error:  # whatever Ray makes of them
        valid += f" ({first_line(error)})"
        raise ConfigError(field, values, valid) from error


def choose_num_gpus(config: CacheConfig, options: dict[str, dict[str, Any]]) -> float:
    """GPUs that each replica asks Ray for; 0 = it runs on the CPU.

    Raises:
        ConfigError: the config wants a GPU and the cluster has none, or names one by number.
    """
    asked = options.get("gpu", {}).get("num_gpus")
    if asked is not None:
        return float(asked)
    if config.device == "cpu":
        return 0
    if config.device is not None and config.device.startswith("cuda:"):
        raise ConfigError("device", config.device, '"cuda": Ray picks the GPU of an actor')
    has_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("device", "cuda", '"cpu" or None: the Ray cluster has no GPU')
    return 1 if has_gpu else 0


def shard_options(config: CacheConfig, node_rank: int, nodes: int = 1) -> list[dict[str, Any]]:
    """Arguments of `ShardStore` for each shard of a node.

    Args:
        config: the group's settings on that node.
        node_rank: of the node among the group's nodes on the same host. Shards of a second node
            on one host get folders of their own.
        nodes: how many of the group's nodes are on that host.
    """
    folders: list[str | None] = [None] * config.storage_shards
    if config.storage_dir is not None:
        first = node_rank * config.storage_shards
        folders = [
            os.path.join(folder, f"shard-{index}")
            for folder in config.storage_dir
            for index in range(first, first + config.storage_shards)
        ]
    budget = config.storage_write_bytes_per_s
    disk, ram = (
        {salt_digest(salt): quota // len(folders) for salt, quota in quotas.items()}
        for quotas in (config.salt_quotas, config.salt_ram_quotas)
    )
    return [
        {
            "directory": folder,
            "shards": nodes * config.storage_shards,
            "storage_bytes": config.storage_bytes // len(folders),
            "ram_bytes": config.ram_bytes // len(folders),
            "fsync": config.fsync,
            "eviction": config.eviction,
            # of the others the engine copies nothing out that is not worth the disk
            "admission": "frequent" if config.admission == "frequent" else "all",
            "ttl_s": config.ttl_s,
            "write_bytes_per_s": budget and max(1, budget // len(folders)),
            "quotas": disk,
            "ram_quotas": ram,
        }
        for folder in folders
    ]


def plan_shards(
    spec: GroupSpec, node_ids: Sequence[str], known: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Arguments of `ShardStore` for all shards of some nodes, by node and by the shard's name.

    Args:
        spec: the group.
        node_ids: the nodes.
        known: arguments of the shards that are there already, by the first eight digits of their
            node's id and by name.
    """
    nodes = {node["NodeID"]: node for node in alive_nodes()}
    host_of = {node_id[:8]: node["NodeManagerHostname"] for node_id, node in nodes.items()}
    # by host and folder, and in there by node: ranks of those that share the folder
    ranks: defaultdict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for node, stores in known.items():
        for store in stores.values():
            folder, name = os.path.split(store["directory"] or "shard-0")
            rank = int(name.rpartition("-")[2]) // spec.config.storage_shards
            ranks[host_of.get(node, ""), folder][node] = rank
    planned = {}
    for node_id in sorted(node_ids):
        node, config = node_id[:8], spec.config_on(nodes[node_id])
        places = [(host_of[node], folder) for folder in config.storage_dir or [""]]
        taken = {other: rank for place in places for other, rank in ranks[place].items()}
        free = next(rank for rank in itertools.count() if rank not in taken.values())
        for place in places:
            ranks[place][node] = taken.get(node, free)
        planned[node_id] = config, places
    stores_of = {}
    for node_id in node_ids:
        config, places = planned[node_id]
        count = 1 + max(rank for place in places for rank in ranks[place].values())
        options = shard_options(config, ranks[places[0]][node_id[:8]], count)
        names = [shard_name(spec.shards_of, node_id, index) for index in range(len(options))]
        stores_of[node_id] = dict(zip(names, options, strict=True))
    return stores_of


def check_shares(spec: GroupSpec) -> None:
    """Refuse bounds that leave a shard less than it can work with.

    Raises:
        ConfigError: names the bound and how many shards divide it.
    """
    by_node = [dataclasses.replace(spec.config, **node.settings) for node in spec.nodes]
    for config in (spec.config, *by_node):
        count = len(config.shard_folders)
        for name in ("ram_bytes", "storage_bytes"):
            total = getattr(config, name)
            if (name == "ram_bytes" or config.storage_dir) and total // count < MIN_SHARE_BYTES:
                valid = f"at least {MIN_SHARE_BYTES:,} for each of the {count} shard(s) of a node"
                raise ConfigError(name, total, valid)


def check_memory(spec: GroupSpec) -> None:
    """Refuse when arenas, object store and weights exceed 85 % of this machine's memory.

    Raises:
        CapacityError: with all the numbers. Other machines check for themselves, by the arena.
    """
    limit = memory_limit_bytes()
    nodes = alive_nodes()
    here = [node for node in nodes if node["NodeManagerHostname"] == socket.gethostname()]
    store = sum(int(node["Resources"].get("object_store_memory", 0)) for node in here)
    ram_bytes = spec.config_on(here[0]).ram_bytes if here else 0
    # On a GPU the weights pass through the page cache only.
    weights = 0 if spec.num_gpus else replicas_here(spec, here, nodes) * weight_bytes(spec.source)
    total = ram_bytes + store + weights
    if total > MEMORY_SHARE * limit:
        raise CapacityError(
            f"ram_bytes={ram_bytes:,} + Ray's object store {store:,} + weights "
            f"{weights:,} = {total:,} bytes is more than {MEMORY_SHARE:.0%} of the memory limit "
            f"{limit:,}: lower ram_bytes, or start Ray with a smaller object_store_memory"
        )


def replicas_here(spec: GroupSpec, here: Sized, nodes: Sized) -> int:
    """How many replicas come to this machine, as far as that is known before they are placed."""
    assert isinstance(spec.replicas, int), "all are counted by now"
    spread = spec.placement in ("SPREAD", "STRICT_SPREAD")
    return math.ceil(spec.replicas * len(here) / len(nodes)) if spread else spec.replicas


def weight_bytes(source: ModelSource) -> int:
    """Bytes of a folder's weight files; 0 where they are not known yet (hub names, random)."""
    if source.path is None or source.weights == "random" or not os.path.isdir(source.path):
        return 0
    files = Path(source.path)
    return sum(
        file.stat().st_size for suffix in ("*.safetensors", "*.bin") for file in files.glob(suffix)
    )
