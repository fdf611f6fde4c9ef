"""Every thread of the product is started with a fault; what it served goes on, or ends and says so.

The fault comes instead of the first call of the thread's function. Threads are found in the
sources: one that no test here starts fails the last test.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

import litecache
from litecache import threads
from litecache.actors import gpu_cache
from litecache.actors.gpu_cache import GpuCache
from litecache.actors.group import Group
from litecache.actors.group_spec import GroupSpec
from litecache.actors.locations import LocationMap, LocationReporter
from litecache.actors.metrics_export import MetricsExporter
from litecache.actors.ray_engine import RayEngine
from litecache.actors.shard_client import AttachedShards, RayShardClient
from litecache.actors.storage_shard import StorageShard
from litecache.adapter.pending import PendingRequest
from litecache.adapter.replicas import ReplicaSet
from litecache.config import CacheConfig
from litecache.engine.engine import Engine
from litecache.engine.loading.model_source import ModelSource
from litecache.errors import GroupError, GroupUnavailableError, LiteCacheError
from litecache.hashing import BlockKey
from litecache.metrics import Metrics
from litecache.serving.service import ModelService
from litecache.serving.settings import ServeSettings
from litecache.sockets.channel import SocketChannel
from litecache.sockets.server import SocketServer
from litecache.storage import LocalCacheService
from litecache.storage.client import LocalShardClient
from litecache.storage.protocol import CommitItem
from litecache.storage.shard_store import ShardStore
from litecache.types import Request, SamplingParams

MODEL = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SOURCE = ModelSource(config=MODEL, weights="random")
CONFIG = CacheConfig(num_blocks=16, dtype="float32", ram_bytes="4MB", device="cpu")
BLOCK = 8192
KEYS = [bytes([n]) * 16 for n in range(1, 5)]
started: set[str] = set()
pytestmark = pytest.mark.slow  # all of them together: the last test asks what the others started


@pytest.fixture(autouse=True)
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Make the first call of every thread's function raise; counts the faults by name."""
    seen: dict[str, int] = {}

    def faulty(start: Callable[..., Any]) -> Callable[..., Any]:
        def begin(run: Callable[[], None], name: str, *rest: Any) -> Any:
            kind = name.rstrip("0123456789")
            started.add(kind)

            def once_broken() -> None:
                if kind not in seen:
                    seen[kind] = 1
                    raise RuntimeError(f"a fault in {name}")
                run()

            return start(once_broken, name, *rest)

        return begin

    for name in ("start_service", "start_job"):
        original = getattr(threads, name)
        for module in list(sys.modules.values()):
            if getattr(module, name, None) is original:
                monkeypatch.setattr(module, name, faulty(original))
    monkeypatch.setattr(threads, "_PAUSE_S", (0.001, 0.01))
    interval = sys.getswitchinterval()
    yield seen
    sys.setswitchinterval(interval)


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not go on"
        time.sleep(0.002)


def put(client: LocalShardClient, keys: list[BlockKey]) -> None:
    slots = client.reserve(BLOCK, len(keys))
    client.commit(
        [CommitItem(*slot, key, bytes(16), "t") for slot, key in zip(slots, keys, strict=True)]
    )


def test_a_socket_server_goes_on(faults: dict[str, int]) -> None:
    server = SocketServer(f"fault-{time.monotonic_ns()}", {1: lambda message: message[::-1]})
    first = SocketChannel(server.address)
    with pytest.raises(GroupUnavailableError):
        first.answer(first.call(1, b"ab"), 60)
    second = SocketChannel(server.address)
    assert second.answer(second.call(1, b"ab"), 60) == b"ba"
    assert faults == {"accept": 1, "connection": 1}
    for channel in (first, second):
        channel.close()
    server.close()


def test_a_store_goes_on(faults: dict[str, int], tmp_path: Path) -> None:
    with ShardStore(str(tmp_path / "s"), storage_bytes=16 << 20, ram_bytes=4 << 20) as store:
        client = LocalShardClient(store)
        put(client, KEYS)
        assert store.flush(60.0).complete
        until(lambda: all(client.durable(KEYS)))
        other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        store.attach(other.pid)
        assert store.stats()["clients"] == 2
        other.kill()
        other.wait()
        until(lambda: store.stats()["clients"] == 1)
        client.close()
    assert {"io-", "durability", "reaper"} <= faults.keys()


def test_a_shard_of_an_earlier_setting_waits_for_the_next_start(
    faults: dict[str, int], tmp_path: Path
) -> None:
    sizes = {"storage_bytes": 16 << 20, "ram_bytes": 4 << 20}
    with ShardStore(str(tmp_path / "shard-1"), **sizes) as store:
        client = LocalShardClient(store)
        put(client, KEYS)
        assert store.flush(60.0).complete
        client.close()
    with ShardStore(str(tmp_path / "shard-0"), shards=1, **sizes) as store:
        until(lambda: "retired" in faults)
    with ShardStore(str(tmp_path / "shard-0"), shards=1, **sizes) as store:
        until(lambda: not (tmp_path / "shard-1").exists())
        assert all(store.query(KEYS))


def test_a_cache_service_goes_on(faults: dict[str, int], tmp_path: Path) -> None:
    kv = np.random.default_rng(0).integers(0, 256, (128, 4096), dtype=np.uint8)
    cache = LocalCacheService(str(tmp_path / "c"), 64 << 20, 1, kv, 2)
    cache.run()
    task = cache.create("write", [1, 2], np.arange(128))
    assert task.wait(60)
    assert set(task.results()) <= {"stored", "exists"}
    cache.close()
    assert "worker-" in faults


def test_reports_and_exports_go_on(faults: dict[str, int]) -> None:
    with ShardStore(None, ram_bytes=4 << 20) as store:
        client, located = LocalShardClient(store), LocationMap()

        put(client, KEYS)
        reporter = LocationReporter(store, located.report, "s", "n", 0.01)
        until(lambda: located.keys_of("s") == set(KEYS))
        reporter.close()
        client.close()
    exporter = MetricsExporter(Metrics(), {}, 0.01)
    exporter.close()
    assert faults.keys() >= {"location-report", "metrics-export"}


def test_a_lost_shard_is_attached_again_all_the_same(faults: dict[str, int]) -> None:
    with ShardStore(None, ram_bytes=4 << 20) as store:
        lost: list[Callable[[], None]] = []

        def connect(name: str, on_lost: Callable[[], None]) -> LocalShardClient:
            lost.append(on_lost)
            return LocalShardClient(store, name)

        watch = AttachedShards(["a"], connect)
        changes: queue.Queue[list[Any]] = queue.Queue()
        watch.watch(changes.put)
        assert [client.shard_id for client in changes.get(timeout=60)] == ["a"]
        lost[-1]()
        assert [client.shard_id for client in changes.get(timeout=60)] == ["a"]
        watch.close()
    assert faults.keys() >= {"shard-watch", "shard-attach"}


def test_a_client_whose_late_calls_cannot_be_settled_is_lost_and_attached_anew(
    ray_local: None, faults: dict[str, int]
) -> None:
    options = {"directory": None, "ram_bytes": 4 << 20}
    shard = ray.remote(concurrency_groups={"bulk": 1})(StorageShard).options(num_cpus=0)
    handle = shard.remote("late", 0, options)
    lost: queue.Queue[RayShardClient] = queue.Queue()
    client = RayShardClient(handle, "s", timeout_s=0.05, on_lost=lost.put)
    pid = ray.get(handle.info.remote())["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert client.query(KEYS) == [False] * 4
        assert lost.get(timeout=60) is client
    finally:
        os.kill(pid, signal.SIGCONT)
    assert client.lost
    assert RayShardClient(handle, "s").query(KEYS) == [False] * 4
    ray.kill(handle)
    assert "late-shard-calls" in faults


def submit(engine: Engine, name: str) -> None:
    engine.submit([Request(name, "c", list(range(1, 40)), SamplingParams(max_new_tokens=3))])


def test_an_engine_that_fails_tells_its_process_and_a_saver_goes_on(
    faults: dict[str, int],
) -> None:
    dead: queue.Queue[BaseException] = queue.Queue()
    with pytest.raises(RuntimeError, match="a fault in engine"):
        Engine(SOURCE, CONFIG, sink=lambda _: None, num_threads=1, on_death=dead.put)
    assert "a fault in engine" in str(dead.get(timeout=60))
    with ShardStore(None, ram_bytes=4 << 20) as store:
        client = LocalShardClient(store)
        told: queue.Queue[Any] = queue.Queue()
        engine = Engine(SOURCE, CONFIG, sink=told.put, shards=[client], num_threads=1)
        submit(engine, "r")
        until(lambda: told.get(timeout=60)[-1][1].finish_reason is not None)
        assert engine.flush(60.0)["complete"]
        assert len(store.keys()) == 2
        engine.close()
        client.close()
    assert faults.keys() >= {"engine", "save"}


def ready(faults: dict[str, int], broken: str) -> Any:
    """What a replica says once it has loaded, when one of its threads has a fault."""
    faults.update({name: 1 for name in ("preload", "load", "engine") if name != broken})
    faults.pop(broken, None)

    async def load() -> Any:
        cache = GpuCache(GroupSpec("faulty", SOURCE, CONFIG, num_threads=1), 0)
        await cache.begin()
        try:
            return await asyncio.wait_for(cache.info(), 100)
        finally:
            until(lambda: broken in faults)
            with contextlib.suppress(LiteCacheError):
                await cache.stop(1.0)

    return asyncio.run(load())


def test_a_replica_loads_or_says_why_not(
    ray_local: None, faults: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_cache, "was_restarted", lambda: False)  # asked of workers alone
    assert ready(faults, "preload").vocab_size == 64
    with pytest.raises(GroupError, match="a fault in load"):
        ready(faults, "load")
    assert ready(faults, "replica-report").vocab_size == 64


def test_a_driver_goes_on(ray_local: None, faults: dict[str, int], tmp_path: Path) -> None:
    group = Group.start(GroupSpec("driven", SOURCE, CONFIG, num_threads=1))
    try:
        replicas = ReplicaSet(group, "c")
        sampling = SamplingParams(max_new_tokens=3)
        pending = PendingRequest(Request("r", "c", [1, 2, 3], sampling))
        replicas.submit([pending])
        until(lambda: pending.done)
        assert len(pending.tokens) == 3
        for poller in replicas.pollers:
            poller.close()
    finally:
        group.stop(1.0)
    kv = np.random.default_rng(0).integers(0, 256, (64, 4096), dtype=np.uint8)
    cache = LocalCacheService(str(tmp_path / "c"), 64 << 20, 1, kv, 1, engine=RayEngine)
    cache.run()
    task = cache.create("write", [1], np.arange(64))
    assert task.wait(60)
    assert task.results() == ["stored"]
    cache.close()
    assert faults.keys() >= {"poll", "block-outcomes", "actor-lookup"}


def test_a_server_says_why_it_did_not_load(faults: dict[str, int]) -> None:
    service = ModelService(ServeSettings(model="m"), lambda: pytest.fail("not reached"))
    service.start()
    assert service.wait(60)
    assert service.state == "failed"
    assert "a fault in serve-load" in service.failure
    service.stop_threads()
    assert faults == {"serve-load": 1}


def test_what_ends_outside_of_a_thread_of_the_product_says_why_it_did_not(
    faults: dict[str, int],
) -> None:
    ended = threading.Event()
    before = threads.fault_counts().get("finalizer", 0)
    for _ in range(2):  # the first has the fault
        inside = threading.Thread(
            target=threads.run_outside, args=(ended.set,), name="litecache-some"
        )
        inside.start()
        inside.join()
    assert ended.wait(60)
    until(lambda: threads.fault_counts().get("finalizer", 0) == before + 1)
    assert faults == {"finalizer": 1}


def names_in_sources() -> set[str]:
    """The names of all threads that the product starts, numbers cut off."""
    names = set()
    for path in Path(litecache.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = getattr(getattr(node, "func", None), "id", None)
            if isinstance(node, ast.Call) and called in ("start_service", "start_job"):
                name = node.args[1]
                if isinstance(name, ast.Constant):
                    names.add(str(name.value))
                    continue
                assert isinstance(name, ast.JoinedStr), f"{path}:{node.lineno}"
                first = name.values[0]
                names.add(first.value if isinstance(first, ast.Constant) else "io-")
    return names


def test_no_thread_was_left_out() -> None:
    assert names_in_sources() == started
