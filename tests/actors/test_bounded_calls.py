"""No question to a coordinator, a shard or to Ray itself waits longer than its deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import (
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    WorkerCrashedError,
)

from litecache.actors import calls
from litecache.actors import coordinator as coordinator_module
from litecache.actors.calls import ActorEndedError, find_actor, result
from litecache.actors.coordinator import CoordinatedSource, CoordinatorClient
from litecache.errors import GroupError, GroupUnavailableError, RequestTimeout
from litecache.metrics import Metrics
from litecache.threads import fault_counts

KEYS = [bytes([n]) * 16 for n in range(3)]


@pytest.fixture
def silent_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A Ray whose head is cut off: it does not say whether there is an actor of a name."""
    asked: list[str] = []
    mended = threading.Event()

    def get_actor(name: str, namespace: str) -> Any:
        asked.append(name)
        mended.wait(60)
        raise ValueError(name)

    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(calls, "CALL_TIMEOUT_S", 0.05)
    yield asked
    mended.set()


def test_looking_up_an_actor_ends_with_its_deadline_though_ray_does_not_answer(
    silent_ray: list[str],
) -> None:
    for _ in range(3):
        with pytest.raises(RequestTimeout, match="looking up the actor gone"):
            find_actor("gone", time.monotonic() + 30)
    assert silent_ray == ["gone"], "each question takes another thread"


def test_a_coordinator_that_cannot_be_looked_up_costs_one_deadline(silent_ray: list[str]) -> None:
    client = CoordinatorClient("cut-off")
    with pytest.raises(RequestTimeout):
        client.locate(KEYS, "node")
    for _ in range(20):
        with pytest.raises(GroupUnavailableError, match="a moment ago"):
            client.locate(KEYS, "node")
    assert len(silent_ray) == 1


def test_a_shard_of_another_node_that_does_not_answer_is_left_alone_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def find(name: str) -> Any:
        asked.append(name)
        raise RequestTimeout(f"{name} took longer than 2 s")

    monkeypatch.setattr(coordinator_module, "find_actor", find)
    metrics = Metrics()
    source = CoordinatedSource("g", "here", CoordinatorClient("g"), metrics)
    for _ in range(5):
        assert source.fetch("there:0", KEYS) == [None] * 3
    assert asked == ["litecache:g:shard:there:0"]
    assert source.fetch("elsewhere:0", KEYS) == [None] * 3
    assert len(asked) == 2
    assert metrics.by_label("litecache_misses", "reason") == {
        "fetch_failed": 2,
        "shard_unavailable": 4,
    }


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (NodeDiedError("the node is gone"), GroupUnavailableError),
        (ObjectLostError("00", None, "main"), GroupUnavailableError),
        (WorkerCrashedError(), GroupUnavailableError),
        (OutOfMemoryError("killed by the memory monitor"), GroupUnavailableError),
        (ActorUnschedulableError("its node is dead"), ActorEndedError),
        (RayError("whatever else"), GroupError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_ray_says_of_a_dead_node_or_process_lets_others_go_on(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[GroupError]
) -> None:
    """`GroupUnavailableError` is tried again elsewhere; any other ends the request."""

    def get(ref: object, timeout: float | None) -> Any:
        raise raised

    monkeypatch.setattr(calls, "_get", get)
    with pytest.raises(kind) as caught:
        result(None, 1.0, "a poll")
    assert type(caught.value) is kind


def test_an_actor_that_is_not_there_is_an_answer_and_no_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def get_actor(name: str, namespace: str) -> Any:
        raise ValueError(f"no {name}")

    monkeypatch.setattr(ray, "get_actor", get_actor)
    before = fault_counts()
    for _ in range(3):
        with pytest.raises(GroupUnavailableError, match="there is no actor absent"):
            find_actor("absent")
    assert fault_counts() == before


def test_an_actors_class_is_imported_before_the_time_of_its_lookup_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: done.append(name))
    monkeypatch.setattr(calls.importlib, "import_module", done.append)
    for name in ("litecache:g:gpu:0", "litecache:g:shard:0a:0", "litecache:g:coordinator"):
        find_actor(name)
    modules = [f"litecache.actors.{name}" for name in ("gpu_cache", "storage_shard", "coordinator")]
    assert done[::2] == modules
