"""A replica whose process ends itself comes back; at last it leaves the group, with the reason."""

from __future__ import annotations

import time
from typing import Any

import pytest
import ray
from test_group import make_spec

from litecache.actors.calls import ActorEndedError, result
from litecache.actors.coordinator_client import CoordinatorClient
from litecache.actors.gpu_cache import MAX_RESTARTS
from litecache.actors.group import Group
from litecache.errors import LiteCacheError

pytestmark = pytest.mark.slow


def break_engine(replica: Any) -> None:
    """Let the next turn of the engine's thread raise."""

    def broken(actor: Any) -> None:
        engine = actor._loading.result()
        engine._scheduler = None
        engine.abort(["nobody"])

    replica.__ray_call__.remote(broken)


def wait_for(replica: Any, pid: int) -> dict[str, Any]:
    """Where a replica is once it has another process and has loaded, or has refused to."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            place: dict[str, Any] = result(replica.where.remote(), 10, "where")
            if place["pid"] != pid:
                result(replica.info.remote(), 100, "info")
                return place
        except ActorEndedError:
            raise
        except LiteCacheError:
            time.sleep(0.1)
    pytest.fail("the replica did not come back")


def test_an_engine_that_dies_is_replaced_until_that_has_not_helped(ray_local: None) -> None:
    group = Group.start(make_spec("failing"))
    try:
        replica = group.replicas[0]
        coordinator = CoordinatorClient("failing", 10.0)
        first = ray.get(replica.where.remote())
        break_engine(replica)
        second = wait_for(replica, first["pid"])
        (reason,) = coordinator.failures(0)
        assert reason.startswith("AttributeError: 'NoneType' object has no attribute")
        for number in range(MAX_RESTARTS - 1):
            coordinator.report_failure(0, f"failure {number}")
        break_engine(replica)
        with pytest.raises(ActorEndedError, match=r"has left its group: .* 4 times .* 'NoneType'"):
            wait_for(replica, second["pid"])
        # it stays as it is, and says why
        (said,) = (each["error"] for name, each in group.status().items() if ":gpu:" in name)
        assert "has left its group" in said
        assert coordinator.route([bytes(16)]) is None
    finally:
        group.stop(1.0)
