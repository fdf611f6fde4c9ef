from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

import pytest
import ray

from litecache.actors.naming import NAMESPACE
from litecache.actors.operating import watch
from litecache.actors.operating.watch import GroupWatch, statuses
from litecache.errors import GroupUnavailableError, StorageFullError

NAME = "litecache:watched:gpu:0"


class Told:
    """Answers as a replica does that is in the state it is told to be in."""

    def __init__(self) -> None:
        self.state, self.asked, self.runs_on = "up", 0, asyncio.Event()

    async def be(self, state: str) -> None:
        self.state = state
        self.runs_on.set()
        self.runs_on = asyncio.Event()

    async def count(self) -> int:
        return self.asked

    async def where(self) -> dict[str, Any]:
        if self.state == "silent":
            await self.runs_on.wait()
        return {"pid": os.getpid(), "ready": self.state != "loading"}

    async def stats(self) -> dict[str, Any]:
        self.asked += 1
        if self.state in ("busy", "loading", "silent"):
            await self.runs_on.wait()
        if self.state == "failed":
            raise StorageFullError("the disk is full")
        return {"pid": os.getpid()}


@pytest.fixture
def replica(ray_local: None) -> Any:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find tests
    made = ray.remote(Told).options(
        name=NAME, namespace=NAMESPACE, num_cpus=0, max_restarts=1, max_task_retries=-1
    )
    actor = made.remote()
    ray.get(actor.where.remote(), timeout=60)
    yield actor
    ray.kill(actor)


def test_a_look_tells_the_state_of_an_actor_within_its_time(replica: Any) -> None:
    group = GroupWatch("watched")
    for state in ("up", "busy", "loading", "silent", "failed", "up"):
        ray.get(replica.be.remote(state), timeout=30)
        slow = state in ("busy", "loading", "silent")
        for _ in range(2):  # the first may be told what was asked in the state before
            begun = time.monotonic()
            view = group.look(0.5 if slow else 20.0)[NAME]
            assert time.monotonic() - begun < (5 if slow else 25)
        assert view.state == state
        assert (view.stats is not None) == (state == "up")
        assert ("error" in statuses({NAME: view})[NAME]) == (state != "up")
        assert ("the disk is full" in view.error) == (state == "failed")


def test_an_actor_that_does_not_answer_is_asked_once_and_not_at_every_look(replica: Any) -> None:
    group = GroupWatch("watched")
    assert group.look(20.0)[NAME].state == "up"
    ray.get(replica.be.remote("silent"), timeout=30)
    before = ray.get(replica.count.remote(), timeout=30)
    for _ in range(4):
        assert group.look(0.2)[NAME].state == "silent"
    assert ray.get(replica.count.remote(), timeout=30) == before + 1
    ray.get(replica.be.remote("up"), timeout=30)
    assert group.look(20.0)[NAME].state == "up"


def test_an_actor_that_has_ended_is_told_for_a_while_and_a_group_that_has_gone_is_an_error(
    replica: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = GroupWatch("watched")
    pid = group.look(20.0)[NAME].stats["pid"]
    ray.kill(replica, no_restart=False)
    deadline = time.monotonic() + 60
    # the kill takes a moment: until then the old process may still answer
    while (view := group.look(2.0)[NAME]).state != "up" or view.stats["pid"] == pid:
        assert view.state in ("up", "restarting", "silent")
        assert time.monotonic() < deadline
    ray.kill(replica)
    while (view := group.look(2.0)[NAME]).state != "gone":
        assert time.monotonic() < deadline
    monkeypatch.setattr(watch, "GONE_S", 0.0)
    with pytest.raises(GroupUnavailableError, match="no group 'watched'"):
        group.look(0.5)
    with pytest.raises(GroupUnavailableError, match="no group 'watched'"):
        GroupWatch("watched").look(0.5)
