"""Groups of actors: started as a whole or not at all, joined, looked at, stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)
from tiny_config import TINIEST

from litecache.actors import storage_shard
from litecache.actors.calls import actor_names
from litecache.actors.found_groups import exists, list_groups
from litecache.actors.group import Group
from litecache.actors.group_spec import (
    GroupSpec,
    check_actor_options,
    check_same,
    digest,
    plan_shards,
    shard_options,
)
from litecache.actors.metrics_export import MetricsExporter
from litecache.actors.naming import coordinator_name
from litecache.actors.placement import NodeStorage, find_room
from litecache.actors.storage_shard import StorageShard
from litecache.config import CacheConfig
from litecache.engine.loading.model_source import ModelSource
from litecache.errors import (
    CapacityError,
    ConfigError,
    GroupError,
    GroupMismatchError,
    GroupUnavailableError,
    LiteCacheError,
    ModelNotSupportedError,
    StorageFormatError,
    StorageFullError,
    StorageLockedError,
)
from litecache.metrics import Metrics
from litecache.storage import CommitItem, LocalShardClient
from litecache.storage.disk import folder as storage_folder
from litecache.storage.namespaces import salt_digest
from litecache.storage.shard_store import ShardStore


def make_spec(name: str, folder: Path | None = None, **changes: Any) -> GroupSpec:
    model = {**TINIEST, **changes.pop("model", {})}
    settings = {
        "num_blocks": 16,
        "dtype": "float32",
        "ram_bytes": "4MB",
        "storage_dir": None if folder is None else str(folder),
        "storage_bytes": "64MB",
        **changes,
    }
    return GroupSpec(
        name, ModelSource(config=model, weights="random"), CacheConfig(**settings), num_threads=1
    )


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> GroupSpec:
    return make_spec("shared", tmp_path_factory.mktemp("group"), storage_shards=2)


@pytest.fixture(scope="module")
def group(ray_local: None, spec: GroupSpec) -> Iterator[Group]:
    started = Group.start(spec)
    yield started
    if exists("shared"):
        started.stop()


def test_actors_have_the_agreed_names_and_say_what_they_do(group: Group, spec: GroupSpec) -> None:
    node = ray.get_runtime_context().get_node_id()
    assert actor_names("shared") == [
        "litecache:shared:coordinator",
        "litecache:shared:gpu:0",
        f"litecache:shared:shard:{node[:8]}:0",
        f"litecache:shared:shard:{node[:8]}:1",
    ]
    assert list(group.shards) == [f"litecache:shared:shard:{node[:8]}:{index}" for index in (0, 1)]
    assert "shared" in list_groups()
    status = group.status()
    assert sorted(status) == actor_names("shared")
    assert not any("error" in actor for actor in status.values())
    folders = [status[name]["directory"] for name in group.shards]
    assert [Path(folder).name for folder in folders] == ["shard-0", "shard-1"]
    assert status["litecache:shared:gpu:0"]["shards"] == [f"{node[:8]}:0", f"{node[:8]}:1"]


def test_the_coordinator_and_the_shards_load_no_torch(group: Group) -> None:
    status = group.status()
    coordinator = ray.get(group.actors[coordinator_name(group.spec.group)].info.remote())
    pids = [coordinator["pid"], *(status[name]["pid"] for name in group.shards)]
    for pid in pids:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    gpu = status["litecache:shared:gpu:0"]["pid"]
    assert "libtorch" in Path(f"/proc/{gpu}/maps").read_text()


def test_a_group_is_joined_with_equal_settings(group: Group, spec: GroupSpec) -> None:
    joined = Group.attach("shared", spec.describe())
    assert joined.spec == spec
    assert joined.info == group.info
    assert list(joined.shards) == list(group.shards)
    assert Group.attach("shared").spec.config == spec.config
    any_config = {**spec.describe(), "config": None}
    assert Group.attach("shared", any_config).info == group.info


def test_joining_with_other_settings_names_what_differs_and_both_digests(
    group: Group, spec: GroupSpec
) -> None:
    other = make_spec("shared", model={"hidden_size": 64}, block_size=32)
    with pytest.raises(GroupMismatchError) as mismatch:
        Group.attach("shared", other.describe())
    text = str(mismatch.value)
    assert "block_size is 16, not 32" in text
    assert "model.config" in text
    assert "num_blocks" not in text
    assert "its digest" in text
    assert digest(other.describe()) in text
    assert digest(spec.describe()) in text


@pytest.mark.parametrize("lacks", ["config", "source", "replicas"])
def test_a_group_whose_version_describes_itself_otherwise_is_refused_by_its_version(
    spec: GroupSpec, lacks: str
) -> None:
    theirs = {**spec.describe(), "version": "0.0.1", "ranks": 2}
    assert GroupSpec.from_description(spec.group, theirs) == spec
    del theirs[lacks]
    with pytest.raises(GroupMismatchError, match=r"version='0\.0\.1'.*`litecache down --group"):
        GroupSpec.from_description("shared", theirs)


def test_a_group_of_another_version_says_what_to_run(group: Group, spec: GroupSpec) -> None:
    mine = {**spec.describe(), "version": "0.0.1"}
    with pytest.raises(GroupMismatchError) as mismatch:
        check_same("shared", mine, spec.describe())
    text = str(mismatch.value)
    assert text.startswith("version='0.0.1' is invalid: ")
    assert "install that version" in text
    assert "`litecache down --group shared`" in text


def test_a_group_cannot_be_started_twice(group: Group, spec: GroupSpec) -> None:
    with pytest.raises(GroupError, match="there already"):
        Group.start(spec)
    assert len(actor_names("shared")) == 4


def test_a_group_that_is_not_there_cannot_be_joined(ray_local: None) -> None:
    with pytest.raises(GroupUnavailableError, match=r"no group 'nobody'.*`litecache up MODEL"):
        Group.attach("nobody")


@pytest.mark.parametrize("name", ["", "a:b", "a b", "x" * 65, 7])
def test_a_bad_group_name_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="group="):
        Group.start(make_spec(name))


@pytest.mark.parametrize(
    "options", [{"cpu": {}}, {"gpu": 3}, {"shard": {"name": "x"}}, [], {"gpu": {"lifetime": None}}]
)
def test_bad_actor_options_are_refused(options: Any) -> None:
    with pytest.raises(ConfigError, match="actor_options"):
        check_actor_options(options)


def other_format(folder: Path) -> None:
    with ShardStore(str(folder / "shard-0"), storage_bytes=64 << 20, ram_bytes=1 << 20):
        pass
    (folder / "shard-0" / "superblock").write_bytes(b"something else" * 300)


@pytest.mark.parametrize(
    ("prepare", "changes", "error"),
    [
        (other_format, {}, StorageFormatError),
        (None, {"storage_bytes": "12TB"}, StorageFullError),
        pytest.param(None, {"model": {"mamba_d_state": 16}}, ModelNotSupportedError,
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_start_that_is_refused_leaves_nothing_behind(
    ray_local: None, tmp_path: Path, prepare: Any, changes: dict[str, Any], error: type[Exception]
) -> None:
    if prepare is not None:
        prepare(tmp_path)
    with pytest.raises(error):
        Group.start(make_spec("refused", tmp_path, **changes))
    assert actor_names("refused") == []
    assert not exists("refused")
    # The folder is free: no lock stays with a dying process for long.
    if prepare is None and "storage_bytes" not in changes:
        _open_soon(tmp_path / "shard-0")


def test_a_folder_in_use_is_refused(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_shard, "LOCK_PATIENCE_S", 0.3)
    folder = tmp_path / "shard-0"
    with ShardStore(str(folder), storage_bytes=32 << 20, ram_bytes=1 << 20):
        with pytest.raises(StorageLockedError, match=str(folder)):
            Group.start(make_spec("refused", tmp_path))
        assert actor_names("refused") == []


def test_a_shard_without_room_at_its_start_opens_once_there_is(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (options,) = shard_options(make_spec("late", tmp_path).config, 0)
    with monkeypatch.context() as full:
        full.setattr(storage_folder, "disk_room_bytes", lambda path: 0)
        shard = StorageShard("late", 0, options)
        with pytest.raises(StorageFullError):
            shard.attach(os.getpid())
    assert not (tmp_path / "shard-0").exists()
    deadline = time.monotonic() + 60
    while True:
        try:
            shard.attach(os.getpid())
            break
        except StorageFullError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert shard.stop(5)["complete"]


@pytest.mark.slow
def test_a_group_with_fewer_shards_takes_in_those_of_before(
    ray_local: None, tmp_path: Path
) -> None:
    keys = [bytes([number]) * 16 for number in range(8)]
    with ShardStore(str(tmp_path / "shard-1"), storage_bytes=32 << 20, ram_bytes=1 << 20) as store:
        client = LocalShardClient(store)
        refs = client.reserve(4096, len(keys))
        client.commit(
            [CommitItem(*ref, key, bytes(16), "x") for ref, key in zip(refs, keys, strict=True)]
        )
        client.close()
    group = Group.start(make_spec("fewer", tmp_path, storage_shards=1))
    try:
        deadline = time.monotonic() + 60
        while (tmp_path / "shard-1").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (shard,) = group.shards.values()
        assert ray.get(shard.keys.remote(), timeout=30) == b"".join(keys)
    finally:
        group.stop()


def _open_soon(folder: Path) -> None:
    for _ in range(200):
        try:
            ShardStore(str(folder), storage_bytes=32 << 20, ram_bytes=1 << 20).close()
            return
        except StorageLockedError:
            continue
    raise AssertionError(f"{folder} is still locked")


@pytest.mark.parametrize("name", ["ram_bytes", "storage_bytes"])
def test_bounds_too_small_for_the_number_of_shards_are_refused(
    ray_local: None, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=6000000 .* each of the 6 shard"):
        Group.start(
            make_spec("refused", tmp_path, storage_shards=6, **{"ram_bytes": "8MB", name: "6MB"})
        )
    assert actor_names("refused") == []


def test_too_much_memory_is_refused_before_anything_starts(ray_local: None) -> None:
    with pytest.raises(CapacityError, match=r"ram_bytes=.* 85%"):
        Group.start(make_spec("refused", ram_bytes="4TB"))
    assert actor_names("refused") == []


@pytest.mark.parametrize(
    ("options", "replicas", "missing"),
    [
        ({"num_cpus": 1000}, 1, r"each needs CPU 1000; CPU 1000 asked for, \S+ of 8 free"),
        ({"num_gpus": 1}, 1, r"GPU 1; GPU 1 asked for, 0 of 0 free"),
        ({"num_gpus": 1}, "all", r"no GpuCache fits: each needs CPU 1, GPU 1; GPU 1"),
        ({"resources": {"nvme": 1}}, 2, r"each needs CPU 1, nvme 1; nvme 2 asked for, 0 of 0 free"),
        ({"label_selector": {"disk": "nvme"}}, 1, r"enough in all, and no node"),
    ],
)
def test_a_place_that_does_not_exist_is_told_within_seconds_with_what_is_missing(
    ray_local: None, options: dict[str, Any], replicas: Any, missing: str
) -> None:
    spec = dataclasses.replace(make_spec("refused"), replicas=replicas, options={"gpu": options})
    begun = time.monotonic()
    with pytest.raises(GroupUnavailableError, match=missing) as refused:
        Group.start(spec)
    assert time.monotonic() - begun < 20
    assert ray.nodes()[0]["NodeID"][:8] in str(refused.value), "what each node has"
    assert actor_names("refused") == []
    # nor is anything kept from others
    assert find_room(1, {"CPU": 1.0}, "PACK") == [ray.get_runtime_context().get_node_id()]


def test_shards_share_the_bounds_of_a_node_and_nodes_of_one_host_share_no_folder() -> None:
    spec = make_spec("x", Path("/data"), storage_shards=2, ram_bytes=4 << 20)
    first, second = shard_options(spec.config, 0), shard_options(spec.config, 1)
    assert [o["directory"] for o in first] == ["/data/shard-0", "/data/shard-1"]
    assert [o["directory"] for o in second] == ["/data/shard-2", "/data/shard-3"]
    assert sum(o["ram_bytes"] for o in first) == spec.config.ram_bytes
    assert sum(o["storage_bytes"] for o in first) == spec.config.storage_bytes


def test_every_policy_of_the_config_reaches_the_shards() -> None:
    spec = make_spec(
        "x",
        Path("/data"),
        storage_shards=2,
        fsync="always",
        eviction="s3fifo",
        ttl_s=60,
        admission="frequent",
        storage_write_bytes_per_s="4MiB",
        salt_quotas={"alice": "1MiB"},
        salt_ram_quotas={"alice": "2MiB"},
    )
    for options in shard_options(spec.config, 0):
        assert (options["fsync"], options["eviction"]) == ("always", "s3fifo")
        assert (options["ttl_s"], options["admission"]) == (60, "frequent")
        assert options["write_bytes_per_s"] == 2 << 20
        assert options["quotas"] == {salt_digest("alice"): 512 << 10}
        assert options["ram_quotas"] == {salt_digest("alice"): 1 << 20}
    again = GroupSpec.from_description("x", json.loads(json.dumps(spec.describe())))
    assert again == spec


def test_drivers_of_other_salts_join_and_who_has_other_quotas_is_not_told_whose() -> None:
    theirs = make_spec("x", Path("/data"), salt_quotas={"pssst": "1MiB"}, cache_salt="pssst")
    mine = make_spec("x", Path("/data"), salt_quotas={"pssst": "1MiB"}, cache_salt="mine")
    check_same("x", theirs.describe(), mine.describe())
    other = make_spec("x", Path("/data"), salt_quotas={"pssst": "2MiB", "shh": "1MiB"})
    with pytest.raises(GroupMismatchError, match="salt_quotas") as raised:
        check_same("x", theirs.describe(), other.describe())
    assert "pssst" not in str(raised.value)
    assert "shh" not in str(raised.value)


def test_a_node_has_settings_of_its_own_and_keeps_its_folders(ray_local: None) -> None:
    node = ray.get_runtime_context().get_node_id()
    host = socket.gethostname()
    own = NodeStorage(node=host, settings={"storage_dir": ["/a", "/b"], "ram_bytes": "8MB"})
    other = NodeStorage(resource="nvme", settings={"storage_dir": "/c"})
    spec = dataclasses.replace(make_spec("x", Path("/data")), nodes=(other, own))
    ((name, store), second) = plan_shards(spec, [node], {})[node].items()
    assert name == f"litecache:x:shard:{node[:8]}:0"
    assert (store["directory"], second[1]["directory"]) == ("/a/shard-0", "/b/shard-0")
    assert store["ram_bytes"] == 4_000_000
    assert GroupSpec.from_description("x", json.loads(json.dumps(spec.describe()))) == spec
    # those of another node of this host lie in the first folders
    beside = {"another0": {"s": {"directory": "/a/shard-0"}}}
    known = {**beside, node[:8]: {"s": {"directory": "/a/shard-2"}}}
    assert plan_shards(spec, [node], known)[node][name]["directory"] == "/a/shard-2"


def test_settings_of_a_node_that_is_not_there_are_refused(ray_local: None) -> None:
    spec = make_spec("refused")
    absent = dataclasses.replace(spec, nodes=(NodeStorage(node="10.9.8.7"),))
    with pytest.raises(ConfigError, match=f"node='10.9.8.7'.*{socket.gethostname()}"):
        Group.start(absent)
    tiny = NodeStorage(labels={"disk": "none"}, settings={"ram_bytes": 5})
    with pytest.raises(ConfigError, match="ram_bytes=5 is invalid: at least"):
        Group.start(dataclasses.replace(spec, nodes=(tiny,)))
    assert actor_names("refused") == []


def test_a_placement_group_of_ones_own_that_is_too_small_is_told_at_once(ray_local: None) -> None:
    reserved = placement_group([{"CPU": 2}])
    try:
        strategy = PlacementGroupSchedulingStrategy(reserved)
        spec = dataclasses.replace(make_spec("refused"), replicas=3)
        spec = dataclasses.replace(spec, options={"gpu": {"scheduling_strategy": strategy}})
        with pytest.raises(GroupUnavailableError, match=r"do not fit into .*each needs CPU 1, and"):
            Group.start(spec)
        elsewhere = NodeAffinitySchedulingStrategy("ab" * 28, soft=False)
        spec = dataclasses.replace(spec, options={"gpu": {"scheduling_strategy": elsewhere}})
        with pytest.raises(GroupUnavailableError, match=r"the node abab\w+ of actor_options"):
            Group.start(spec)
    finally:
        remove_placement_group(reserved)
    assert actor_names("refused") == []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"node": "a", "resource": "b"},
        {"node": 3},
        {"labels": {"a": 1}},
        {"labels": 3},
        {"node": "a", "settings": {"block_size": 16}},
        {"node": "a", "settings": {"ram_bytes": "x"}},
        {"node": "a", "settings": 3},
    ],
)
def test_a_bad_description_of_a_node_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        NodeStorage(**fields)


def test_counters_reach_rays_metrics_once_per_change(ray_local: None) -> None:
    metrics = Metrics()
    metrics.inc("litecache_prompt_tokens", 5)
    metrics.set("litecache_slab_bytes", 7)
    metrics.observe("litecache_ttft_seconds", 0.2)
    exporter = MetricsExporter(metrics, {"group": "g", "actor": "a"}, interval_s=3600)
    try:
        assert exporter.export() == 3
        assert exporter.export() == 1  # the gauge, which Ray would forget
        metrics.inc("litecache_prompt_tokens", 1)
        metrics.inc("litecache_found_tokens", 1, tier="gpu")
        assert exporter.export() == 3
    finally:
        exporter.close()


def test_a_group_that_is_stopped_leaves_no_actor_and_no_lock(group: Group) -> None:
    folders = [actor["directory"] for actor in group.status().values() if "directory" in actor]
    reports = group.stop()
    assert len(reports) == 3
    assert all(report["complete"] for report in reports.values())
    assert actor_names("shared") == []
    for folder in folders:
        ShardStore(folder, storage_bytes=32 << 20, ram_bytes=1 << 20).close()
    with pytest.raises(LiteCacheError):
        group.flush(1)
