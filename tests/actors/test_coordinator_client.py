"""A coordinator that hangs costs its callers one deadline, and is used again once it answers."""

from __future__ import annotations

import os
import signal
import time

import pytest
import ray

from litecache.actors.coordinator import Coordinator, CoordinatorClient
from litecache.actors.naming import NAMESPACE, coordinator_name
from litecache.errors import GroupUnavailableError, LiteCacheError, RequestTimeout

KEYS = [bytes([n]) * 16 for n in range(4)]


def test_a_hung_coordinator_costs_one_deadline_for_any_number_of_rows(ray_local: None) -> None:
    name = coordinator_name("hung")
    options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0}
    handle = ray.remote(Coordinator).options(**options).remote("hung", {})
    pid = ray.get(handle.info.remote())["pid"]
    driver, replica = CoordinatorClient("hung", 2.0), CoordinatorClient("hung", 2.0)
    replica.call("report_replica", 0, "node", 0)
    assert driver.route(KEYS) == 0
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(RequestTimeout):
            driver.route(KEYS)
        for _ in range(50):
            with pytest.raises(GroupUnavailableError, match="did not answer a moment ago"):
                driver.route(KEYS)
        for _ in range(20):
            with pytest.raises(LiteCacheError):
                replica.locate(KEYS, "node")
        assert time.monotonic() - began < 30
        with pytest.raises(RequestTimeout):
            replica.call("report_replica", 0, "node", 0)
    finally:
        os.kill(pid, signal.SIGCONT)
    # a report that gets through says that it is back
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            replica.call("report_replica", 0, "node", 0)
            break
        except LiteCacheError:
            continue
    assert replica.locate(KEYS, "node") == [None] * len(KEYS)
    ray.kill(handle)
