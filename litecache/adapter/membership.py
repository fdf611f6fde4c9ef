"""Joining or starting the group of an adapter, and leaving it."""

from __future__ import annotations

from typing import Any

import ray

from litecache.actors.group import Group, exists
from litecache.actors.group_spec import GroupSpec
from litecache.adapter.poller import ReplicaPoller
from litecache.errors import GroupError


def join_or_start(
    spec: GroupSpec,
    joinable: bool,
    any_config: bool,
    detached: bool,
    options: dict[str, dict[str, Any]],
) -> tuple[Group, bool]:
    """The group, and whether it was started here."""
    expected = spec.describe()
    if any_config:
        expected["config"] = None
    if joinable and exists(spec.group):
        return Group.attach(spec.group, expected), False
    try:
        return Group.start(spec, detached=detached, actor_options=options), True
    except GroupError:
        # Another driver may have started it in the meantime: then this one joins.
        if not joinable or not exists(spec.group):
            raise
    return Group.attach(spec.group, expected), False


def leave(pollers: list[ReplicaPoller], owned: Group | None) -> None:
    """Abort what is open; stop the group where it was this adapter's own."""
    for poller in pollers:
        poller.close()
    if owned is not None and ray.is_initialized():
        owned.stop()
