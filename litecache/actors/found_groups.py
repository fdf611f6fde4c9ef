"""Groups as anybody finds them, by the names of their actors: which there are, and their end.

Nothing here holds a group: a `Group` (group.py) starts or joins one and keeps its handles.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Sequence
from typing import Any

import ray

from litecache.actors.calls import (
    actor_names,
    all_actor_names,
    find_actor,
    gather,
    silent_among,
)
from litecache.actors.coordinator import CoordinatorClient
from litecache.actors.naming import CALL_TIMEOUT_S, check_group_name, coordinator_name
from litecache.errors import GroupError, GroupUnavailableError, LiteCacheError

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30.0


def list_groups() -> list[str]:
    """Names of all groups of the cluster."""
    return sorted(name.split(":")[1] for name in all_actor_names() if name.endswith(":coordinator"))


def find_all(names: Sequence[str]) -> dict[str, Any]:
    """Those of these actors that are there."""
    found = {}
    for name in names:
        with contextlib.suppress(GroupUnavailableError):
            found[name] = find_actor(name)
    return found


def replicas_of(group: str, deadline: float) -> list[str]:
    """Names of a group's replicas; until `deadline` somebody may still be making the first."""
    while True:
        names = [name for name in actor_names(group) if ":gpu:" in name]
        if names:
            return names
        if not exists(group) or time.monotonic() > deadline:
            raise GroupUnavailableError(f"group {group!r} has no replica")
        time.sleep(0.1)


def shards_by_node(group: str) -> dict[str, dict[str, Any]]:
    """Handles of a group's shards by the first digits of their node's id, and by name."""
    found: dict[str, dict[str, Any]] = {}
    for name, shard in find_all([n for n in actor_names(group) if ":shard:" in n]).items():
        found.setdefault(name.split(":")[-2], {})[name] = shard
    return found


def users_of(shard_group: str) -> list[str]:
    """Names of the groups whose shards are those of `shard_group`, as far as they tell.

    One that does not answer may be using them, and counts.
    """
    users = []
    for group in list_groups():
        try:
            description = CoordinatorClient(group).call("describe")
            used = description.get("shard_group") or group
        except LiteCacheError:
            used = shard_group
        if used == shard_group:
            users.append(group)
    return users


def no_group(group: str, what: str) -> GroupUnavailableError:
    """The error of whoever wants to `what` a group that is not there: says which are."""
    running = ", ".join(list_groups()) or "none"
    start = f"; start it with `litecache up MODEL --group {group}`" if what == "join" else ""
    return GroupUnavailableError(
        f"there is no group {group!r} to {what}{start} (groups that run here: {running})"
    )


def exists(group: str) -> bool:
    """Whether the group has a coordinator, alive or restarting."""
    return bool(find_all([coordinator_name(group)]))


def stop_group(group: str, timeout_s: float = STOP_TIMEOUT_S) -> dict[str, Any]:
    """Stop a group found by name, in whatever state its actors are; see `Group.stop`.

    Raises:
        GroupUnavailableError: there is no such group.
    """
    check_group_name(group)
    if not actor_names(group):
        raise no_group(group, "stop")
    return stop_actors(group, timeout_s)


def stop_actors(group: str, timeout_s: float) -> dict[str, Any]:
    """End what is there of a group, and its shards' own group where no other uses that; reports."""
    actors, shared = find_all(actor_names(group)), _shared_by(group)
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
                reports[name] = report
    end_actors(actor_names(group), silent)
    if shared is not None and actor_names(shared) and not users_of(shared):
        reports |= stop_actors(shared, timeout_s)
    return reports


def _shared_by(group: str) -> str | None:
    """The group whose shards a group uses; None: its own, or it does not tell."""
    try:
        shared: str | None = CoordinatorClient(group).call("describe").get("shard_group")
    except LiteCacheError:
        return None
    return shared


def end_actors(names: Collection[str], silent: Collection[str] = ()) -> None:
    """Kill actors, the coordinator last, and wait until their names are free.

    Those that answer nothing (`silent`) are not waited for: Ray ends a stopped process when it
    runs on, or by itself after a while.
    """
    actors = find_all(sorted(names))
    for name in sorted(actors, key=lambda name: name.endswith(":coordinator")):
        ray.kill(actors[name], no_restart=True)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while left := set(names).intersection(all_actor_names()).difference(silent):
        if time.monotonic() > deadline:
            raise GroupError(f"still there after {STOP_TIMEOUT_S:g} s: {', '.join(sorted(left))}")
        time.sleep(0.02)
