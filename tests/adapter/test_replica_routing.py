"""How the rows of a call find their replicas: one question, and without an answer still spread."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from litecache.actors.coordinator import Coordinator, CoordinatorClient
from litecache.actors.naming import NAMESPACE, coordinator_name
from litecache.actors.router import ReplicaLoad
from litecache.adapter import replicas as replicas_module
from litecache.adapter.replicas import ReplicaSet
from litecache.types import Request, SamplingParams


def start_place() -> Any:
    """All of a replica that routing needs."""

    @ray.remote(num_cpus=0)
    class Place:
        async def where(self) -> dict[str, Any]:
            return {"address": None, "ready": True}

    return Place.remote()


class CountingClient(CoordinatorClient):
    """Counts the calls that leave it."""

    calls = 0

    def call(self, method: str, *args: object, timeout_s: float | None = None) -> Any:
        self.calls += 1
        return super().call(method, *args, timeout_s=timeout_s)


@pytest.fixture(scope="module")
def actors(ray_local: None) -> Iterator[tuple[Any, list[Any]]]:
    options = {"name": coordinator_name("routing"), "namespace": NAMESPACE, "num_cpus": 0}
    coordinator = ray.remote(Coordinator).options(**options).remote("routing", {})
    replicas = [start_place() for _ in range(2)]
    ray.get([replica.where.remote() for replica in replicas])
    yield coordinator, replicas
    for actor in (coordinator, *replicas):
        ray.kill(actor)


@pytest.fixture
def driver(actors: tuple[Any, list[Any]]) -> Iterator[ReplicaSet]:
    group: Any = SimpleNamespace(
        spec=SimpleNamespace(group="routing"),
        replicas_by_index=dict(enumerate(actors[1])),
        info=SimpleNamespace(roots=lambda salt: (bytes(16),), block_size=16, max_requests=64),
        coordinator=CountingClient("routing", 1.0),
    )
    for index in range(2):
        group.coordinator.report_replica(index, f"n{index}", ReplicaLoad(epoch=str(time.time())))
    group.coordinator.calls = 0
    made = ReplicaSet(group, "c")
    yield made
    for poller in made.pollers:
        poller.close()


def rows(count: int, length: int = 64, first: int = 0) -> list[Request]:
    """Requests without a common prefix; of other tokens with another `first`."""
    sampling = SamplingParams(max_new_tokens=1)
    return [Request(f"r{i}", "c", [first + i] * length, sampling) for i in range(count)]


def test_all_rows_of_a_call_are_one_question(driver: ReplicaSet) -> None:
    assert Counter(driver.route(rows(40))) == {0: 20, 1: 20}
    assert driver._group.coordinator.calls == 1


def test_a_hung_coordinator_costs_all_rows_one_deadline_and_they_are_spread_by_tokens(
    driver: ReplicaSet, actors: tuple[Any, list[Any]]
) -> None:
    pid = ray.get(actors[0].info.remote())["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert Counter(driver.route(rows(40))) == {0: 20, 1: 20}
        places = driver.route([*rows(1, 6400, first=100), *rows(20, first=200)])
        assert driver._group.coordinator.calls == 1, "it was asked again before it could answer"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert set(places[1:]) == {1 - places[0]}


def test_a_replica_that_does_not_answer_gets_nothing_from_any_driver(driver: ReplicaSet) -> None:
    driver.pollers[0].silent_since = time.monotonic()
    assert driver.route(rows(6)) == [1] * 6
    # another driver, which has not noticed
    driver.pollers[0].silent_since = None
    assert driver.route(rows(6)) == [1] * 6
    driver._group.coordinator.report_replica(0, "n0", ReplicaLoad())
    assert set(driver.route(rows(6))) == {0, 1}


def test_where_no_replica_answers_all_get_their_share(driver: ReplicaSet) -> None:
    for poller in driver.pollers:
        poller.silent_since = time.monotonic()
    assert Counter(driver.route(rows(8))) == {0: 4, 1: 4}


def test_threads_that_submit_at_once_take_in_news_of_members_one_by_one(
    driver: ReplicaSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas_module, "_MEMBERS_S", 0.0)
    faults: list[BaseException] = []

    def look() -> None:
        try:
            for _ in range(300):
                driver._look_for_members()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
