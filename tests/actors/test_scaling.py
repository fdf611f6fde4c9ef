"""Groups that grow and shrink while drivers use them, and groups that share their shards."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from test_group import make_spec
from test_replica_failure import slow_down

from litecache.actors.calls import actor_names, result
from litecache.actors.coordinator import CoordinatorClient
from litecache.actors.found_groups import stop_group, users_of
from litecache.actors.group import Group
from litecache.actors.operating.scaling import drain_node, scale_group
from litecache.adapter.pending import PendingRequest
from litecache.adapter.replicas import ReplicaSet
from litecache.errors import GroupError, GroupMismatchError, GroupUnavailableError
from litecache.types import Request, SamplingParams

pytestmark = pytest.mark.slow


def begin(replicas: ReplicaSet, name: str, index: int | None = None) -> PendingRequest:
    sampling = SamplingParams(max_new_tokens=60, temperature=1.0, seed=7)
    prompt = list(range(1, 20))
    pending = PendingRequest(Request(name, replicas._client_id, prompt, sampling), streaming=True)
    replicas.submit([pending], index)
    return pending


def until(happened: Callable[[], Any], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def stopped() -> Iterator[list[str]]:
    """Names of groups that are stopped at the end."""
    names: list[str] = []
    yield names
    for name in names:
        if actor_names(name):
            stop_group(name, 1.0)


@pytest.fixture(scope="module")
def growing(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """A detached group; tests leave it with the two replicas that the next one may want."""
    spec = make_spec("growing", tmp_path_factory.mktemp("growing"))
    yield Group.start(dataclasses.replace(spec, detached=True))
    stop_group("growing", 1.0)


def test_running_drivers_follow_a_group_that_grows_and_shrinks_with_the_same_tokens(
    growing: Group,
) -> None:
    driver = ReplicaSet(growing, "c")
    expected = begin(driver, "undisturbed").wait()
    told: list[tuple[str, str]] = []

    def tell(name: str, what: str) -> None:
        told.append((name.rpartition(":")[2], what))

    try:
        # another process, as `litecache scale`
        report = scale_group(Group.attach("growing"), 3, tell=tell)
        assert (report.replicas, len(report.added)) == (3, 2)
        assert ("2", "takes requests") in told
        numbers = iter(range(1000))

        def grown() -> bool:
            assert begin(driver, f"more {next(numbers)}").wait() == expected
            return set(driver.by_index) == {0, 1, 2}

        until(grown)
        request = begin(driver, "x")
        assert set(driver.route([request.request] * 6)) == {0, 1, 2}
        assert request.wait() == expected
        for replica in driver._group.replicas:
            slow_down(replica)
        # one of the replicas that go is busy for longer than it may take
        disturbed = begin(driver, "disturbed", 2)
        next(disturbed.stream())
        report = scale_group(Group.attach("growing"), 1, timeout_s=0.5, tell=tell)
        assert [gone.name[-5:] for gone in report.departed] == ["gpu:1", "gpu:2"]
        assert [gone.moved for gone in report.departed] == [0, 1]
        assert all(gone.complete for gone in report.departed)
        assert ("2", "draining: 1 open request(s)") in told
        assert disturbed.wait() == expected
        assert disturbed.tried == {"litecache:growing:gpu:2"}
        assert [name for name in actor_names("growing") if ":gpu:" in name] == [
            "litecache:growing:gpu:0"
        ]

        def shrunk() -> bool:
            assert begin(driver, f"less {next(numbers)}").wait() == expected
            return set(driver.by_index) == {0}

        until(shrunk)
        # and with the numbers that were there before
        scale_group(Group.attach("growing"), 2)
        until(lambda: begin(driver, f"again {next(numbers)}").wait() and len(driver.by_index) == 2)
        assert begin(driver, "second", 1).wait() == expected
    finally:
        for poller in driver.pollers:
            poller.close()


def test_a_replica_that_is_to_go_takes_nothing_new_until_nobody_says_so(
    growing: Group,
) -> None:
    group = Group.attach("growing")
    scale_group(group, 2)
    driver = ReplicaSet(group, "d")
    try:
        expected = begin(driver, "undisturbed", 0).wait()
        replica, coordinator = group.replicas[0], CoordinatorClient("growing", 10.0)
        assert result(replica.drain.remote(60.0), 10) == 0
        assert coordinator.call("members").keys() == {1}
        # who does not know goes on with the other
        astray = begin(driver, "astray", 0)
        assert astray.wait() == expected
        assert astray.tried == {"litecache:growing:gpu:0"}
        assert result(replica.drain.remote(0.0), 10) == 0
        until(lambda: coordinator.call("members").keys() == {0, 1})
        until(lambda: driver.by_index[0].silent_since is None)
        # a scale that is refused changes nothing
        with pytest.raises(GroupUnavailableError, match=r"do not fit.*CPU 98 asked for"):
            scale_group(group, 100)
        assert coordinator.call("members").keys() == {0, 1}
        with pytest.raises(GroupError, match="all replicas of group 'growing' are on node"):
            drain_node(ray.get_runtime_context().get_node_id())
        assert len([name for name in actor_names("growing") if ":gpu:" in name]) == 2
    finally:
        for poller in driver.pollers:
            poller.close()


def test_a_group_of_another_driver_alone_is_not_scaled(ray_local: None, stopped: list[str]) -> None:
    stopped.append("private-one")
    group = Group.start(make_spec("private-one"))
    with pytest.raises(GroupError, match="belongs to the driver that started it"):
        scale_group(Group.attach("private-one"), 2)
    assert scale_group(group, 1).departed == []


def test_models_side_by_side_share_one_group_of_shards(
    ray_local: None, tmp_path: Path, stopped: list[str]
) -> None:
    stopped.extend(["duo.a", "duo.b"])
    groups, drivers = {}, {}
    for name, layers in (("duo.a", 1), ("duo.b", 2)):
        spec = make_spec(name, tmp_path, model={"num_hidden_layers": layers})
        spec = dataclasses.replace(spec, shard_group="duo", detached=True)
        groups[name] = Group.start(spec)
        drivers[name] = ReplicaSet(groups[name], "c")
    try:
        node = ray.get_runtime_context().get_node_id()
        (shard,) = actor_names("duo")
        assert shard == f"litecache:duo:shard:{node[:8]}:0"
        assert list(groups["duo.a"].shards) == list(groups["duo.b"].shards) == [shard]
        assert users_of("duo") == ["duo.a", "duo.b"]
        expected = {name: begin(driver, "first").wait() for name, driver in drivers.items()}
        assert expected["duo.a"] != expected["duo.b"], "they are different models"
        for name, group in groups.items():
            assert group.flush(30.0)["complete"]
            group.clear("gpu")
            again = begin(drivers[name], "again")
            assert again.wait() == expected[name]
        held = len(result(groups["duo.a"].actors[shard].keys.remote(), 10)) // 16
        assert held >= 2
        # both coordinators know all that is there
        for name in groups:
            asked = CoordinatorClient(name, 10.0)
            until(lambda asked=asked: len(asked.call("keys_of", shard[-10:])) // 16 == held)
        other = dataclasses.replace(
            make_spec("duo.c", tmp_path, eviction="s3fifo"), shard_group="duo", detached=True
        )
        with pytest.raises(GroupMismatchError, match="eviction is 'lru', not 's3fifo'"):
            Group.start(other)
        assert actor_names("duo.c") == []
        # a shard that dies tells both again
        ray.kill(groups["duo.a"].actors[shard], no_restart=False)
        for name in groups:
            asked = CoordinatorClient(name, 10.0)
            until(lambda asked=asked: len(asked.call("keys_of", shard[-10:])) // 16 == held)
        assert stop_group("duo.a").keys() == {"litecache:duo.a:gpu:0"}
        assert actor_names("duo") == [shard]
        assert begin(drivers["duo.b"], "alone").wait() == expected["duo.b"]
        assert shard in stop_group("duo.b")
        assert actor_names("duo") == []
    finally:
        for driver in drivers.values():
            for poller in driver.pollers:
                poller.close()
