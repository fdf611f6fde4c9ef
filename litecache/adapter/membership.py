"""Joining or starting the group of an adapter, and leaving it."""

from __future__ import annotations

import os
from typing import Any

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


def leave(group: Group, pollers: list[ReplicaPoller], owned: bool) -> None:
    """Abort what is open; stop the group where it was this adapter's own.

    Nothing happens in a process forked from the adapter's.
    """
    if os.getpid() != group.connection.pid:
        return
    for poller in pollers:
        poller.close()
    if owned:
        try:
            group.connection.check()
        except GroupError:
            return  # without its Ray the group is gone
        group.stop()
