"""Where replicas and shards go: what they need against what the nodes of the cluster have.

Before any replica is made a placement group asks Ray for room for all of them. Ray answers at once
whether there is any, and on which nodes; the placement group is given back, and the replicas are
made on those nodes. So what is impossible is known within seconds, and nothing has started.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from litecache.checks import check_integer, check_text, is_a
from litecache.config import check_setting
from litecache.errors import ConfigError, GroupUnavailableError

logger = logging.getLogger(__name__)

MOST_REPLICAS = 4096
STRATEGIES = ("SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK")
# What a node may have of its own.
NODE_SETTINGS = (
    *("ram_bytes", "storage_dir", "storage_bytes", "storage_write_bytes_per_s", "storage_shards"),
)
# A group that has just ended gives back what it had within a moment; a node that joins has it soon.
ROOM_TIMEOUT_S, _INFEASIBLE_TIMEOUT_S = 10.0, 1.0
_MOST_NODES_TOLD = 8


@dataclass(frozen=True, kw_only=True)
class NodeStorage:
    """Storage settings of the nodes that it describes, which go before the group's own.

    Attributes:
        node: a node's id (or the first eight digits of it or more), IP address or host name.
        labels: that a node has, as `ray start --labels` gave them.
        resource: a resource that a node has, as `ray start --resources` gave it.
        settings: fields of `CacheConfig` by name, those of NODE_SETTINGS.

    Raises:
        ConfigError: none or several of `node`, `labels` and `resource`, or a wrong setting.
    """

    node: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    resource: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check each field and make its value a plain one."""
        for name in ("labels", "settings"):
            if not is_a(getattr(self, name), dict):
                raise ConfigError(name, getattr(self, name), "a mapping")
        for name in ("node", "resource"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        for label, value in self.labels.items():
            check_text("labels", label)
            check_text(f"labels[{label!r}]", value)
        given = [name for name in ("node", "labels", "resource") if getattr(self, name)]
        if len(given) != 1:
            valid = "exactly one of them (a node by id, IP address or host name)"
            raise ConfigError("node, labels, resource", ", ".join(given) or None, valid)
        checked = {}
        for name, value in self.settings.items():
            if name not in NODE_SETTINGS:
                raise ConfigError(name, value, f"one of {', '.join(NODE_SETTINGS)}")
            checked[name] = check_setting(name, name, value)
        object.__setattr__(self, "settings", checked)

    def describes(self, node: Mapping[str, Any]) -> bool:
        """Whether it is about this node of `ray.nodes()`."""
        if self.node is not None:
            names = (node["NodeManagerAddress"], node["NodeManagerHostname"], node["NodeName"])
            return self.node in names or (
                len(self.node) >= 8 and str(node["NodeID"]).startswith(self.node)
            )
        if self.resource is not None:
            return float(node["Resources"].get(self.resource, 0)) > 0
        return bool(self.labels.items() <= node.get("Labels", {}).items())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a file."""
        values = {name: getattr(self, name) for name in ("node", "labels", "resource")}
        settings = {n: list(v) if isinstance(v, tuple) else v for n, v in self.settings.items()}
        return {name: value for name, value in values.items() if value} | settings

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NodeStorage:
        """The inverse of `to_dict`."""
        which = {name: values[name] for name in ("node", "labels", "resource") if name in values}
        settings = {name: value for name, value in values.items() if name not in which}
        return cls(**which, settings=settings)


def check_replicas(name: str, value: Any) -> int | str:
    """A number of replicas, or "all".

    Raises:
        ConfigError: something else.
    """
    valid = f'an integer from 1 to {MOST_REPLICAS}, or "all"'
    if is_a(value, str) and str.__str__(value) == "all":
        return "all"
    return check_integer(name, value, 1, MOST_REPLICAS, valid)


def check_placement(name: str, value: Any) -> str:
    """A strategy of Ray's placement groups.

    Raises:
        ConfigError: another.
    """
    valid = f"one of {', '.join(STRATEGIES)}"
    strategy = check_text(name, value, valid)
    if strategy not in STRATEGIES:
        raise ConfigError(name, value, valid)
    return strategy


def check_node_storage(nodes: Any) -> tuple[NodeStorage, ...]:
    """Settings of single nodes.

    Raises:
        ConfigError: something else than NodeStorage in a list.
    """
    if not is_a(nodes, list, tuple) or not all(is_a(each, NodeStorage) for each in nodes):
        raise ConfigError("nodes", nodes, "a list of litecache.NodeStorage, or None")
    return tuple(nodes)


def alive_nodes() -> list[dict[str, Any]]:
    """The cluster's nodes, as `ray.nodes()` tells of them."""
    return [node for node in ray.nodes() if node["Alive"]]


def going_nodes() -> set[str]:
    """Ids of the nodes that Ray drains, told by `ray drain-node` or by its autoscaler."""
    from ray._private.state import state  # Ray has no public way to ask

    try:
        return set(state.get_draining_nodes())
    except Exception as error:  # none, as far as is known
        logger.info("which nodes are to go is not known: %s", error)
        return set()


def check_nodes(nodes: Sequence[NodeStorage]) -> None:
    """Refuse settings of a node that is not there: others would take its place in silence.

    Raises:
        ConfigError: names the nodes that there are. Labels and resources may describe none, yet.
    """
    there = alive_nodes()
    for each in nodes:
        if each.node is not None and not any(each.describes(node) for node in there):
            told = ", ".join(map(node_name, there[:_MOST_NODES_TOLD]))
            raise ConfigError("node", each.node, f"a node of the cluster, which has {told}")


def count_all(needs: Mapping[str, float], labels: Mapping[str, str] | None = None) -> int:
    """How many replicas there are when there is one per GPU, or per node where none needs one.

    Args:
        needs: what each asks for.
        labels: that its node must have, as Ray's `label_selector`.

    Raises:
        GroupUnavailableError: none fits on any node.
    """
    nodes = alive_nodes()
    fits = [_fit(node, needs, labels) for node in nodes]
    count = sum(fits) if "GPU" in needs else sum(map(bool, fits))
    if not count:
        raise GroupUnavailableError(f"no GpuCache fits: {_told(1, needs, nodes)}")
    return count


def fitting_nodes(needs: Mapping[str, float], labels: Mapping[str, str] | None = None) -> list[str]:
    """Ids of the nodes that could hold a replica if they held nothing else."""
    return [node["NodeID"] for node in alive_nodes() if _fit(node, needs, labels)]


def _fit(
    node: Mapping[str, Any], needs: Mapping[str, float], labels: Mapping[str, str] | None
) -> int:
    """How many replicas a node could hold."""
    has, own = node["Resources"], node.get("Labels", {})
    for name, value in (labels or {}).items():
        # conditions of several values are Ray's to judge, when it is asked for room
        if re.fullmatch(r"[\w./-]+", value) and own.get(name) != value:
            return 0
    return min((int(has.get(name, 0) / each + 1e-9) for name, each in needs.items()), default=1)


def check_own_strategy(count: int, needs: Mapping[str, float], strategy: Any) -> None:
    """Whether replicas fit where a user's own strategy wants them, as far as that can be told.

    Args:
        count: how many.
        needs: what each asks for.
        strategy: of `ray.util.scheduling_strategies`.

    Raises:
        GroupUnavailableError: a placement group that is not there, not ready or too small, or a
            node without room; names what is missing.
    """
    if isinstance(strategy, NodeAffinitySchedulingStrategy) and not strategy.soft:
        if strategy.node_id not in [node["NodeID"] for node in alive_nodes()]:
            raise GroupUnavailableError(
                f"the node {strategy.node_id} of actor_options is not there"
            )
        find_room(count, needs, "PACK", [strategy.node_id] * count)
    if not isinstance(strategy, PlacementGroupSchedulingStrategy):
        return
    group, index = strategy.placement_group, strategy.placement_group_bundle_index
    where = f"the placement group {group.id.hex()[:12]} of actor_options"
    if not group.wait(ROOM_TIMEOUT_S):
        state = placement_group_table(group).get("state", "unknown")
        raise GroupUnavailableError(f"{where} is not ready: its state is {state}")
    bundles = group.bundle_specs if index < 0 else [group.bundle_specs[index]]
    node_like = [{"Resources": bundle} for bundle in bundles]
    if sum(_fit(bundle, needs, None) for bundle in node_like) < count:
        one = ", ".join(f"{name} {value:g}" for name, value in needs.items())
        raise GroupUnavailableError(
            f"{count} GpuCache actor(s) do not fit into {where}: each needs {one}, and its bundles "
            f"have {', '.join(map(str, bundles[:_MOST_NODES_TOLD]))}"
        )


def find_room(
    count: int,
    needs: Mapping[str, float],
    strategy: str,
    on_nodes: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
) -> list[str | None]:
    """The node for each of so many replicas.

    Args:
        count: how many.
        needs: what each asks for; nothing fits anywhere, which Ray decides later (None).
        strategy: of a placement group.
        on_nodes: the node of each, if it is given already.
        labels: that each node must have, as Ray's `label_selector`.

    Raises:
        GroupUnavailableError: they do not fit; names what is missing and what the nodes have.
    """
    if not needs:
        return [*on_nodes] or [None] * count
    chosen = [{"ray.io/node-id": node_id} for node_id in on_nodes] or [{}] * count
    selectors = [{**(labels or {}), **each} for each in chosen]
    asked = placement_group([dict(needs)] * count, strategy, bundle_label_selector=selectors)
    begun = time.monotonic()
    # Waited for as for any object, so that Ray lends the CPU of a task that starts a group;
    # `asked.wait` would keep it.
    ready = asked.ready()
    try:
        while not ray.wait([ready], timeout=1.0)[0]:
            state = placement_group_table(asked)["stats"]["scheduling_state"]
            waited_s = time.monotonic() - begun
            if waited_s > (_INFEASIBLE_TIMEOUT_S if state == "INFEASIBLE" else ROOM_TIMEOUT_S):
                why = _told(count, needs, alive_nodes())
                raise GroupUnavailableError(
                    f"{count} GpuCache actor(s) do not fit ({strategy}): {why}; ask for fewer "
                    "replicas, or see `ray status` for what else runs"
                )
        places = placement_group_table(asked)["bundles_to_node_id"]
        return [places[index] for index in range(count)]
    finally:
        remove_placement_group(asked)


def _told(count: int, needs: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> str:
    """What is missing, and what each node has."""
    free = _free()
    totals, rests = [], []
    for name, each in needs.items():
        has = sum(node["Resources"].get(name, 0) for node in nodes)
        left = sum(free.get(node["NodeID"], {}).get(name, 0) for node in nodes)
        if count * each > left:
            totals.append(f"{name} {count * each:g} asked for, {left:g} of {has:g} free")
    for node in nodes[:_MOST_NODES_TOLD]:
        all_, unused = node["Resources"], free.get(node["NodeID"], {})
        rest = ", ".join(f"{n} {unused.get(n, 0):g} of {all_.get(n, 0):g}" for n in needs)
        rests.append(f"{node_name(node)}: {rest}")
    more = f" and {len(nodes) - _MOST_NODES_TOLD} more" if len(nodes) > _MOST_NODES_TOLD else ""
    one = ", ".join(f"{name} {value:g}" for name, value in needs.items())
    missing = "; ".join(totals) or "there is enough in all, and no node has enough for its share"
    return f"each needs {one}; {missing}; free on {'; '.join(rests)}{more}"


def _free() -> Mapping[str, Mapping[str, float]]:
    from ray._private.state import available_resources_per_node  # Ray has no public way to ask

    try:
        free: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    except (
        Exception
    ) as error:  # through a Ray client, for one: what nodes have is told all the same
        logger.info("what is free is not known: %s", error)
        return {}
    return free


def node_name(node: Mapping[str, Any]) -> str:
    """A node's host name, address and the first digits of its id."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"
