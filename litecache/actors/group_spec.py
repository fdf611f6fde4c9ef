"""What defines a group: its settings, its model, and how both are compared when others join."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import litecache
from litecache.actors.naming import shard_name
from litecache.config import CacheConfig
from litecache.engine.loading.model_source import ModelSource
from litecache.errors import GroupMismatchError, shown

VERSION = litecache.__version__


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
        return {
            "version": VERSION,
            "config": self.config.to_dict(),
            "source": dataclasses.asdict(self.source),
            "replicas": self.replicas,
            "num_threads": self.num_threads,
            "num_gpus": self.num_gpus,
        }

    @classmethod
    def from_description(cls, group: str, description: dict[str, Any]) -> GroupSpec:
        """The inverse of `describe`."""
        return cls(
            group,
            ModelSource(**description["source"]),
            CacheConfig(**description["config"]),
            description["replicas"],
            description["num_threads"],
            description["num_gpus"],
        )


def digest(description: dict[str, Any]) -> str:
    """Of what must agree between a group and those who join it."""
    text = json.dumps(_comparable(description), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _comparable(description: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": description["version"],
        **{f"model.{name}": value for name, value in description["source"].items()},
        **description["config"],
    }


def check_same(group: str, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Compare a running group with what a driver expects of it.

    Args:
        group: its name.
        theirs: the running group's description.
        mine: the driver's; its "config" may be None, which agrees with any.

    Raises:
        GroupMismatchError: names the fields that differ, with both values and both digests.
    """
    if mine["config"] is None:
        mine = {**mine, "config": theirs["config"]}
    if digest(theirs) == digest(mine):
        return
    left, right = _comparable(theirs), _comparable(mine)
    differing = [
        f"{name} is {shown(left.get(name))}, not {shown(right.get(name))}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]
    raise GroupMismatchError(
        f"group {group!r} runs with other settings: {'; '.join(differing)} "
        f"(its digest {digest(theirs)}, yours {digest(mine)}); "
        "join with the same settings, use another group name, or stop it with `litecache down`"
    )
