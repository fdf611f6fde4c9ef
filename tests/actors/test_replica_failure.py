"""A replica whose process ends itself comes back; at last it leaves the group, with the reason."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from guided_rows import ToyGuide
from test_group import make_spec
from tiny_config import TINIEST
from transformers import AutoConfig, AutoModelForCausalLM

from litecache.actors.calls import ActorEndedError, result
from litecache.actors.coordinator import CoordinatorClient
from litecache.actors.gpu_cache import MAX_RESTARTS
from litecache.actors.group import Group
from litecache.actors.router import RoutedPrompt
from litecache.adapter.pending import PendingRequest
from litecache.adapter.replicas import ReplicaSet
from litecache.engine.loading.model_source import ModelSource
from litecache.errors import LiteCacheError
from litecache.types import Request, SamplingParams

pytestmark = pytest.mark.slow


def break_engine(replica: Any) -> None:
    """Let the next turn of the engine's thread raise."""

    def broken(actor: Any) -> None:
        engine = actor._loading.result()
        engine._scheduler = None
        engine.abort(["nobody"])

    replica.__ray_call__.remote(broken)


def slow_down(replica: Any) -> None:
    """Let a step take so long that there is time to end it in the middle of a request."""

    def slow(actor: Any) -> None:
        runner = actor._loading.result()._runner
        if "execute" not in vars(runner):
            execute = runner.execute
            runner.execute = lambda plan: (time.sleep(0.05), execute(plan))[1]

    result(replica.__ray_call__.remote(slow), 30, "slowing down")


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


class Pair:
    """Two replicas, and what a request of 60 tokens answers, free and guided."""

    def __init__(self) -> None:
        self.group = Group.start(dataclasses.replace(make_spec("pair"), replicas=2))
        driver = Driver(self, "first")
        self.expected = driver.begin("undisturbed").wait()
        guide = ToyGuide(self.group.info.vocab_size)
        self.guided = driver.begin("undisturbed and guided", guide).wait()
        driver.close()
        for replica in self.group.replicas:
            slow_down(replica)


class Driver:
    """A client of the pair."""

    def __init__(self, pair: Pair, name: str) -> None:
        self.replicas, self.name = ReplicaSet(pair.group, name), name

    def begin(self, name: str, guide: Any = None, index: int | None = None) -> PendingRequest:
        sampling = SamplingParams(max_new_tokens=60, temperature=1.0, seed=7)
        mask = None if guide is None else guide.mask
        request = Request(name, self.name, list(range(1, 20)), sampling, mask=mask)
        pending = PendingRequest(request, streaming=True, guide=guide)
        self.replicas.submit([pending], index)
        return pending

    def running(self) -> int:
        """The replica that has a request."""
        (index,) = (i for i, poller in enumerate(self.replicas.pollers) if poller.load)
        return index

    def close(self) -> None:
        for poller in self.replicas.pollers:
            poller.close()


@pytest.fixture(scope="module")
def pair(ray_local: None) -> Iterator[Pair]:
    """Whose replicas hang in one test after the other; in the last one leaves."""
    made = Pair()
    yield made
    made.group.stop(1.0)


def test_an_engine_that_dies_is_replaced_until_that_has_not_helped(ray_local: None) -> None:
    group = Group.start(make_spec("failing"))
    try:
        replica = group.replicas[0]
        coordinator = CoordinatorClient("failing", 10.0)
        first = ray.get(replica.where.remote())
        break_engine(replica)
        second = wait_for(replica, first["pid"])
        (reason,) = coordinator.call("failures", 0)
        assert reason.startswith("AttributeError: 'NoneType' object has no attribute")
        for number in range(MAX_RESTARTS - 1):
            coordinator.call("report_failure", 0, f"failure {number}")
        break_engine(replica)
        with pytest.raises(ActorEndedError, match=r"has left its group: .* 4 times .* 'NoneType'"):
            wait_for(replica, second["pid"])
        # it stays as it is, and says why
        (said,) = (each["error"] for name, each in group.status().items() if ":gpu:" in name)
        assert "has left its group" in said
        assert coordinator.route([RoutedPrompt([bytes(16)], 16)]) == [None]
    finally:
        group.stop(1.0)


def test_a_replica_that_hangs_is_left_out_and_its_requests_end_elsewhere(pair: Pair) -> None:
    driver = Driver(pair, "hanging")
    pollers = driver.replicas.pollers
    disturbed = driver.begin("disturbed")
    next(disturbed.stream())
    running = driver.running()
    pid = ray.get(pair.group.replicas[running].where.remote())["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert disturbed.wait() == pair.expected
        assert disturbed.tried == {pollers[running].name}
        for number in range(3):
            later = driver.begin(f"later {number}")
            assert later.wait() == pair.expected
            assert later.tried == set(), "it was tried once more"
    finally:
        os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + 60
    while pollers[running].silent_since is not None:
        assert time.monotonic() < deadline, "it answers, and is still taken for silent"
        time.sleep(0.1)
    driver.close()


def test_joining_does_not_wait_for_a_replica_that_hangs(pair: Pair) -> None:
    """It was up to fifteen minutes, and then refused, though the other one served."""
    group = pair.group
    pid = ray.get(group.replicas[0].where.remote())["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        joined = Group.attach("pair", timeout_s=100)
        assert time.monotonic() - began < 15
        assert joined.info == group.info
        assert joined.actors.keys() == group.actors.keys()
        replicas = ReplicaSet(joined, "other")
        request = Request("r", "other", range(1, 20), SamplingParams(max_new_tokens=5))
        pending = PendingRequest(request)
        replicas.submit([pending])
        assert len(pending.wait()) == 5
        for poller in replicas.pollers:
            poller.close()
    finally:
        os.kill(pid, signal.SIGCONT)


def test_what_a_replica_that_left_was_doing_goes_on_with_the_others(pair: Pair) -> None:
    group, driver = pair.group, Driver(pair, "leaving")
    for index, replica in enumerate(group.replicas):
        result(replica.where.remote(), 30)  # it goes on from where it was stopped
        for number in range(MAX_RESTARTS):
            group.coordinator.call("report_failure", index, f"failure {number}")
    disturbed = driver.begin("disturbed")
    next(disturbed.stream())
    running = driver.running()
    beside = driver.begin("disturbed and guided", ToyGuide(group.info.vocab_size), running)
    next(beside.stream())
    break_engine(group.replicas[running])
    assert (disturbed.wait(), beside.wait()) == (pair.expected, pair.guided)
    assert disturbed.tried == beside.tried == {driver.replicas.pollers[running].name}
    # what comes later avoids it, and joining finds the one that is left
    assert driver.begin("later").wait() == pair.expected
    assert group.flush(30.0)["complete"]
    joined = Group.attach("pair", timeout_s=60)
    assert joined.info == group.info
    driver.close()


def test_a_replica_that_is_refused_at_its_restart_tries_again(
    ray_local: None, tmp_path: Path
) -> None:
    """What was there at the start may be away for a moment; it used to stay refused for ever."""
    folder, away = tmp_path / "model", tmp_path / "away"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINIEST)).save_pretrained(folder)
    spec = dataclasses.replace(make_spec("refused"), source=ModelSource(path=str(folder)))
    group = Group.start(spec)
    try:
        replica = group.replicas[0]
        first = ray.get(replica.where.remote())
        folder.rename(away)
        os.kill(first["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 100
        while not (reasons := group.coordinator.call("failures", 0)):
            assert time.monotonic() < deadline, "its refusal ends its process"
            time.sleep(0.1)
        away.rename(folder)
        assert "model" in reasons[0]
        assert wait_for(replica, first["pid"])["pid"] != first["pid"]
    finally:
        group.stop(1.0)
