"""What defines a group: its settings, its model, and how both are compared when others join.

Also where its actors go and what they need there, checked before anything is started.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

import litecache
from litecache.actors.naming import shard_name
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
        replicas: number of `GpuCache` actors.
        num_threads: torch's threads in each on a CPU; None = the machine's cores.
        num_gpus: GPUs per replica; 0 = it runs on the CPU.
    """

    group: str
    source: ModelSource
    config: CacheConfig
    replicas: int = 1
    num_threads: int | None = None
    num_gpus: float = 0

    def shard_names(self, node_id: str) -> list[str]:
        """Actor names of a node's shards."""
        count = len(self.config.shard_folders)
        return [shard_name(self.group, node_id, index) for index in range(count)]

    def describe(self) -> dict[str, Any]:
        """Plain values, kept by the coordinator for those who join."""
        config, source = self.config.to_dict(), dataclasses.asdict(self.source)
        return {"version": VERSION, **vars(self), "config": config, "source": source}

    @classmethod
    def from_description(cls, group: str, description: dict[str, Any]) -> GroupSpec:
        """The inverse of `describe`; GroupMismatchError: of a version that described otherwise."""
        given = {**description, "group": group}
        try:
            fields = {field.name: given[field.name] for field in dataclasses.fields(cls)}
            source, config = ModelSource(**given["source"]), CacheConfig(**given["config"])
            return cls(**{**fields, "source": source, "config": config})
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
        "version": description["version"],
        **{f"model.{name}": value for name, value in source if name != "label"},
        **{name: value for name, value in config if name not in ("models_bytes", "cache_salt")},
    }
    # by digest, since what differs is told in an error
    for name, value in config:
        if name.startswith("salt_"):
            comparable[name] = {salt_digest(salt): quota for salt, quota in value.items()}
    return comparable


def check_same(group: str, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Compare a running group's description with a driver's, whose "config" None agrees with any.

    Raises:
        GroupMismatchError: names the fields that differ, with both values and both digests.
    """
    if mine["config"] is None:
        mine = {**mine, "config": theirs["config"]}
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


def check_actor_options(options: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]]:
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


def shard_options(spec: GroupSpec, node_rank: int, nodes: int = 1) -> list[dict[str, Any]]:
    """Arguments of `ShardStore` for each shard of a node.

    Args:
        spec: the group.
        node_rank: of the node among the group's nodes on the same host. Shards of a second node
            on one host (as tests make them) get folders of their own.
        nodes: how many of the group's nodes are on that host.
    """
    config = spec.config
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


def node_ranks(node_ids: list[str]) -> dict[str, int]:
    """Each node's rank among those of the same host, in order of node id."""
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    ranks: dict[str, int] = {}
    seen: Counter[str] = Counter()
    for node_id in sorted(set(node_ids)):
        host = hosts.get(node_id, node_id)
        ranks[node_id] = seen[host]
        seen[host] += 1
    return ranks


def check_shares(spec: GroupSpec) -> None:
    """Refuse bounds that leave a shard less than it can work with.

    Raises:
        ConfigError: names the bound and how many shards divide it.
    """
    config = spec.config
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
    here = socket.gethostname()
    store = sum(
        int(node["Resources"].get("object_store_memory", 0))
        for node in ray.nodes()
        if node["Alive"] and node["NodeManagerHostname"] == here
    )
    # On a GPU the weights pass through the page cache only.
    weights = 0 if spec.num_gpus else spec.replicas * weight_bytes(spec.source)
    total = spec.config.ram_bytes + store + weights
    if total > MEMORY_SHARE * limit:
        raise CapacityError(
            f"ram_bytes={spec.config.ram_bytes:,} + Ray's object store {store:,} + weights "
            f"{weights:,} = {total:,} bytes is more than {MEMORY_SHARE:.0%} of the memory limit "
            f"{limit:,}: lower ram_bytes, or start Ray with a smaller object_store_memory"
        )


def weight_bytes(source: ModelSource) -> int:
    """Bytes of a folder's weight files; 0 where they are not known yet (hub names, random)."""
    if source.path is None or source.weights == "random" or not os.path.isdir(source.path):
        return 0
    files = Path(source.path)
    return sum(
        file.stat().st_size for suffix in ("*.safetensors", "*.bin") for file in files.glob(suffix)
    )
