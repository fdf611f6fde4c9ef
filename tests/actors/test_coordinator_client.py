"""A coordinator that hangs costs its callers one deadline, and is used again once it answers."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import ray

from litecache.actors.coordinator import Coordinator, CoordinatorClient
from litecache.actors.messages import pack_load, pack_routing
from litecache.actors.naming import NAMESPACE, coordinator_name
from litecache.actors.router import Placement, ReplicaLoad, RoutedPrompt
from litecache.errors import (
    GroupMismatchError,
    GroupUnavailableError,
    LiteCacheError,
    RequestTimeout,
)
from litecache.types import MESSAGE_VERSION

KEYS = [bytes([n]) * 16 for n in range(4)]
PROMPT = RoutedPrompt(KEYS, 64)


def start(group: str, kind: type = Coordinator) -> Any:
    name = coordinator_name(group)
    options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0}
    return ray.remote(kind).options(**options).remote(group, {})


def test_a_hung_coordinator_costs_one_deadline_for_any_number_of_rows(ray_local: None) -> None:
    handle = start("hung")
    pid = ray.get(handle.info.remote())["pid"]
    driver, replica = CoordinatorClient("hung", 2.0), CoordinatorClient("hung", 2.0)
    replica.report_replica(0, "node", ReplicaLoad())
    assert driver.route([PROMPT] * 3) == [Placement(0)] * 3
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(RequestTimeout):
            driver.route([PROMPT] * 50)
        for _ in range(50):
            with pytest.raises(GroupUnavailableError, match="did not answer a moment ago"):
                driver.route([PROMPT] * 50)
        for _ in range(20):
            with pytest.raises(LiteCacheError):
                replica.locate(KEYS, "node")
        assert time.monotonic() - began < 30
        with pytest.raises(RequestTimeout):
            replica.report_replica(0, "node", ReplicaLoad())
    finally:
        os.kill(pid, signal.SIGCONT)
    # a report that gets through says that it is back
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            replica.report_replica(0, "node", ReplicaLoad())
            break
        except LiteCacheError:
            continue
    assert replica.locate(KEYS, "node") == [None] * len(KEYS)
    ray.kill(handle)


def test_another_version_is_refused_on_either_side_and_nothing_of_it_is_used(
    ray_local: None,
) -> None:
    handle = start("versions")
    client = CoordinatorClient("versions", 10.0)
    load, routing = pack_load(0, "node", ReplicaLoad()), pack_routing([PROMPT], {})
    current = bytes([MESSAGE_VERSION])
    for method, message in (("report_replica", load), ("route", routing)):
        assert message[1:2] == current
        other = message[:1] + bytes([MESSAGE_VERSION - 1]) + message[2:]
        with pytest.raises(GroupMismatchError, match=f"version={MESSAGE_VERSION - 1} "):
            client.call(method, other)
    assert client.route([PROMPT]) == [None]
    ray.kill(handle)

    class Older:
        """As coordinators were before messages had versions."""

        def __init__(self, group: str, description: dict[str, Any]) -> None:
            pass

        async def route(self, keys: bytes, leaves_blocks: bool) -> int | None:
            return 0

    handle = start("older", Older)
    with pytest.raises(GroupMismatchError, match=r"older:coordinator: route=.* this version"):
        CoordinatorClient("older", 10.0).route([PROMPT])
    ray.kill(handle)
