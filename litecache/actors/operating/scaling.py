"""More or fewer replicas of a running group, and nodes that are to go.

Who is to go is drained first: it gets no new requests, the running ones end, or after a while go
on elsewhere with the tokens so far, and what only it holds is saved. A replica is draining only as
long as somebody says so again and again, so whoever dies in the middle of this leaves a group as
it was. Drivers learn of new replicas from the coordinator, and of those that have gone from Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from litecache.actors.calls import UNREACHABLE, gather, silent_among
from litecache.actors.found_groups import end_actors, list_groups, shards_by_node
from litecache.actors.group import LOAD_TIMEOUT_S, PLACE_TIMEOUT_S, Group
from litecache.actors.naming import CALL_TIMEOUT_S, DRAIN_TIMEOUT_S, replica_name
from litecache.actors.placement import (
    NodeStorage,
    alive_nodes,
    check_replicas,
    count_all,
    fitting_nodes,
    node_name,
)
from litecache.checks import check_seconds, check_text
from litecache.errors import ConfigError, GroupError, LiteCacheError

logger = logging.getLogger(__name__)

SAVE_TIMEOUT_S = 30.0
# A replica takes requests again when nobody has told it for so long that it is to go.
_HOLD_S, _ASK_S = 10.0, 0.5

# Told about each step: a replica's or a shard's name, and what it does.
Tell = Callable[[str, str], None]


class Departure(NamedTuple):
    """How an actor went.

    Attributes:
        name: of the actor.
        moved: requests that were still open, and went on elsewhere.
        written: blocks that were saved at the end.
        complete: everything is saved.
    """

    name: str
    moved: int
    written: int
    complete: bool


class ScaleReport(NamedTuple):
    """What a change of a group came to.

    Attributes:
        replicas: how many it has now.
        added: names of new replicas.
        departed: of those that went, and of shards.
    """

    replicas: int
    added: list[str]
    departed: list[Departure]


def _tell_nobody(name: str, what: str) -> None:
    logger.info("%s: %s", name, what)


def scale_group(
    group: Group,
    replicas: int | str,
    *,
    timeout_s: float = DRAIN_TIMEOUT_S,
    tell: Tell = _tell_nobody,
) -> ScaleReport:
    """Give a group so many replicas; those with the highest numbers go first.

    Args:
        group: a running one, started here or detached.
        replicas: how many, or "all": one per GPU of the cluster, or per node without.
        timeout_s: how long running requests may take to end.
        tell: gets each step.

    Raises:
        GroupUnavailableError: there is no room; names what is missing. Nothing has changed.
        LiteCacheError: new replicas were refused; none of them is left.
    """
    wanted, timeout_s = check_replicas("replicas", replicas), check_seconds("timeout", timeout_s)
    _check_owner(group)
    spec, there = group.spec, group.replicas_by_index
    on_nodes: list[str] = []
    if wanted == "all":
        wanted = count_all(spec.needs, spec.labels)
        if "GPU" not in spec.needs:
            used = {place["node_id"] for place in _places(group).values()}
            on_nodes = [node for node in fitting_nodes(spec.needs, spec.labels) if node not in used]
            wanted = len(there) + len(on_nodes)
    more = int(wanted) - len(there)
    if more > 0:
        free = (index for index in range(len(there) + more) if index not in there)
        indexes = [next(free) for _ in range(more)]
        for index in indexes:
            tell(replica_name(spec.group, index), "starting, and loading the model")
        added = group.grow(indexes, on_nodes, LOAD_TIMEOUT_S)
        for name in added:
            tell(name, "takes requests")
        return ScaleReport(len(group.replicas), added, [])
    last = sorted(there)[int(wanted) :]
    names = [replica_name(spec.group, index) for index in last]
    return ScaleReport(int(wanted), [], _take_away(group, names, timeout_s, tell))


def drain_node(
    node: str, *, timeout_s: float = DRAIN_TIMEOUT_S, tell: Tell = _tell_nobody
) -> dict[str, ScaleReport]:
    """Take the replicas and shards of all groups from a node, which is then free to go.

    Args:
        node: its id (or the first eight digits of it or more), IP address or host name.
        timeout_s: how long running requests may take to end.
        tell: gets each step.

    Returns:
        By group what it has now. Blocks on the node's disks stay there.

    Raises:
        ConfigError: no such node, or several.
        GroupError: a group would have no replica left; nothing has changed.
    """
    node_id, timeout_s = _node_id(node), check_seconds("timeout", timeout_s)
    going: list[tuple[Group, list[str]]] = []
    for name in list_groups():
        group = Group.attach(name, timeout_s=PLACE_TIMEOUT_S)
        places = _places(group)
        here = [replica for replica, place in places.items() if place["node_id"] == node_id]
        if here:
            _check_owner(group)
        if here and len(here) == len(group.replicas):
            raise GroupError(
                f"all replicas of group {name!r} are on node {node}: start others first, by "
                f"`litecache scale N --group {name}`, or stop it, by `litecache down`"
            )
        going.append((group, here))
    reports = {}
    for group, here in going:
        gone = _take_away(group, here, timeout_s, tell)
        reports[group.spec.group] = ScaleReport(len(group.replicas), [], gone)
    for group, _ in going:
        shards = shards_by_node(group.spec.shards_of).get(node_id[:8], {})
        reports[group.spec.group].departed.extend(_close_shards(shards, tell))
    return reports


def _check_owner(group: Group) -> None:
    group.connection.check()
    if not group.spec.detached and not group.is_own:
        raise GroupError(
            f"group {group.spec.group!r} belongs to the driver that started it: scale it there, by "
            "KVCacheAdapter.scale, or start a detached one with `litecache up`"
        )


def _node_id(node: str) -> str:
    described = NodeStorage(node=check_text("node", node))
    nodes = alive_nodes()
    found = [each for each in nodes if described.describes(each)]
    if len(found) != 1:
        told = ", ".join(map(node_name, found or nodes))
        raise ConfigError("node", node, f"one node of the cluster; there are {told}")
    return str(found[0]["NodeID"])


def _places(group: Group) -> dict[str, dict[str, Any]]:
    """Where each replica is, by name."""
    asked = {replica_name(group.spec.group, i): r for i, r in group.replicas_by_index.items()}
    places = gather(asked, lambda replica: replica.where.remote(), CALL_TIMEOUT_S * 4, "where")
    for place in places.values():
        if isinstance(place, LiteCacheError):
            raise place
    return places


def _take_away(group: Group, names: Sequence[str], timeout_s: float, tell: Tell) -> list[Departure]:
    """Drain replicas, save what they hold, end them."""
    leaving = {name: group.actors[name] for name in names}
    silent = silent_among(leaving)
    for name in silent:
        tell(name, "does not answer: its requests go on elsewhere")
    able = {name: replica for name, replica in leaving.items() if name not in silent}
    try:
        moved = _drain(able, timeout_s, tell)
        for name in able:
            tell(name, "saving what it holds")
        stopping = gather(able, lambda r: r.stop.remote(SAVE_TIMEOUT_S), SAVE_TIMEOUT_S + 5, "stop")
    except BaseException:
        for replica in able.values():
            replica.drain.remote(0.0)
        raise
    end_actors(names, silent)
    for name in names:
        group.actors.pop(name, None)
    return _departed(names, stopping, moved, tell)


def _drain(replicas: dict[str, Any], timeout_s: float, tell: Tell) -> dict[str, int]:
    """Wait until no request is open; how many of each replica still are when time is up."""
    deadline, told = time.monotonic() + timeout_s, dict[str, int]()
    while replicas:
        answers = gather(replicas, lambda r: r.drain.remote(_HOLD_S), CALL_TIMEOUT_S, "drain")
        for name, answer in answers.items():
            if isinstance(answer, UNREACHABLE):
                continue  # between two answers; who stays away has nothing open that can end
            if isinstance(answer, LiteCacheError):
                raise answer
            if told.get(name) != answer:
                tell(name, f"draining: {answer} open request(s)")
            told[name] = answer
        if not any(told.get(name) for name in replicas) or time.monotonic() > deadline:
            break
        time.sleep(_ASK_S)
    return told


def _close_shards(shards: dict[str, Any], tell: Tell) -> list[Departure]:
    """Write out what is only in the RAM of a node's shards, and end them."""
    silent = silent_among(shards)
    able = {name: shard for name, shard in shards.items() if name not in silent}
    for name in able:
        tell(name, "writing out what is not on its disk")
    answers = gather(able, lambda s: s.stop.remote(SAVE_TIMEOUT_S), SAVE_TIMEOUT_S + 5, "stop")
    end_actors(shards.keys(), silent)
    return _departed(shards, answers, {}, tell)


def _departed(
    names: Iterable[str], reports: Mapping[str, Any], moved: Mapping[str, int], tell: Tell
) -> list[Departure]:
    """How actors went, by what they said as they stopped; those that said nothing saved nothing."""
    departed = []
    for name in names:
        report = reports.get(name)
        saved = report if isinstance(report, dict) else {}
        gone = Departure(
            name, moved.get(name, 0), saved.get("written", 0), bool(saved.get("complete"))
        )
        departed.append(gone)
        went_on = f", {gone.moved} request(s) went on elsewhere" if gone.moved else ""
        rest = "" if gone.complete else "; not all could be saved"
        tell(name, f"gone: {gone.written} block(s) written{went_on}{rest}")
    return departed
