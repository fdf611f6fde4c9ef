"""`RayShardClient` against a real `StorageShard` actor."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from litecache.actors.calls import result
from litecache.actors.shard_client import RayShardClient
from litecache.actors.storage_shard import StorageShard
from litecache.actors.stub import Stub
from litecache.engine.transfer.shard_set import ShardSet
from litecache.errors import StorageError, StorageLockedError
from litecache.metrics import Metrics
from litecache.storage import wire
from litecache.storage.arena.view import pack_word
from litecache.storage.protocol import (
    CommitItem,
    CommitStatus,
    ShardMethod,
    SlotRef,
    SlotState,
    StageResult,
    StageStatus,
)
from litecache.storage.shard_store import ShardStore
from litecache.types import Tier

BLOCK = 8192
Connect = Callable[..., RayShardClient]
KEYS = [bytes([n]) * 16 for n in range(1, 4)]


def start(folder: Path | None, *settings: Any) -> Any:
    store = {
        "directory": None if folder is None else str(folder / "shard-0"),
        "storage_bytes": 32 << 20,
        "ram_bytes": 4 << 20,
    }
    actor = ray.remote(concurrency_groups={"bulk": 2})(StorageShard)
    return actor.options(num_cpus=0, max_concurrency=4).remote("t", 0, store, *settings)


@pytest.fixture(scope="module")
def actor(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    handle = start(tmp_path_factory.mktemp("shard"))
    yield handle
    ray.kill(handle)


@pytest.fixture(params=["socket", "actor"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "actor":
        monkeypatch.setattr(Stub, "connect", lambda stub, address: None)
    return str(request.param)


@pytest.fixture
def shard(actor: Any) -> Iterator[Any]:
    """The actor that these tests share, without a client, a lease or a block of another test."""
    yield actor
    wait_until(lambda: result(actor.stats.remote(), 10)["store"]["clients"] == 0)
    assert leases(actor) == 0
    result(actor.clear.remote("all"), 20)
    assert result(actor.keys.remote(), 10) == b""


@pytest.fixture
def connect(shard: Any) -> Iterator[Connect]:
    """Makes clients of the shard and closes them after the test."""
    clients: list[RayShardClient] = []

    def connect(**options: Any) -> RayShardClient:
        clients.append(RayShardClient(shard, "s", **options))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def put(client: RayShardClient, keys: list[bytes]) -> None:
    slots = client.reserve(BLOCK, len(keys))
    for slot, key in zip(slots, keys, strict=True):
        client.arena.buffer(slot.slot, BLOCK)[:] = key * (BLOCK // 16)
    items = [CommitItem(*slot, key, bytes(16)) for slot, key in zip(slots, keys, strict=True)]
    assert client.commit(items) == [CommitStatus.STORED] * len(keys)


def leases(handle: Any) -> int:
    return int(result(handle.stats.remote(), 10)["store"]["leases"])


def slot_of(staged: StageResult) -> SlotRef:
    return SlotRef(staged.slot, staged.generation)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def suspend(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    # a thread that runs on another core goes on until the signal has reached it
    stats = [Path(f"/proc/{pid}/task/{task}/stat") for task in os.listdir(f"/proc/{pid}/task")]
    wait_until(lambda: all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in stats))


def test_blocks_go_in_and_come_out_through_the_shared_arena(
    shard: Any, connect: Connect, transport: str
) -> None:
    client = connect()
    assert (client._stub.channel is not None) == (transport == "socket")
    assert client.query(KEYS) == [False] * 3
    put(client, KEYS)
    assert client.query(KEYS) == [True] * 3
    assert client.flush(10).complete
    assert client.durable(KEYS) == [True] * 3
    found = client.stage([*KEYS, bytes(16)])
    assert [r.status for r in found] == [StageStatus.READY] * 3 + [StageStatus.MISS]
    for key, stage in zip(KEYS, found, strict=False):
        assert bytes(client.arena.buffer(stage.slot, 16)) == key
        assert client.arena.holds(stage.slot, stage.generation)
    client.release([SlotRef(r.slot, r.generation) for r in found[:3]])
    wait_until(lambda: leases(shard) == 0)
    assert result(shard.fetch.remote(KEYS[:1]), 10) == [KEYS[0] * (BLOCK // 16)]
    client.close()
    wait_until(lambda: result(shard.stats.remote(), 10)["store"]["clients"] == 0)


def test_a_shard_that_is_killed_answers_miss_and_is_reported_lost_once(
    ray_local: None, tmp_path: Path, transport: str
) -> None:
    handle = start(tmp_path)
    lost: queue.Queue[RayShardClient] = queue.Queue()
    metrics = Metrics()
    client = RayShardClient(handle, "s", metrics=metrics, on_lost=lost.put)
    put(client, KEYS)
    os.kill(result(handle.info.remote(), 10)["pid"], signal.SIGKILL)
    assert [r.status for r in client.stage(KEYS)] == [StageStatus.MISS] * 3
    assert lost.get(timeout=60) is client
    assert client.lost
    assert client.reserve(BLOCK, 2) == []
    assert client.query(KEYS) == [False] * 3
    assert client.commit([CommitItem(0, 0, KEYS[0], KEYS[1])]) == [CommitStatus.STALE]
    assert client.cancel(KEYS) == [False] * 3
    assert client.durable(KEYS) == [False] * 3
    assert not client.flush(1).complete
    client.release([SlotRef(0, 0)])
    client.touch(KEYS)
    assert lost.empty()
    assert metrics.by_label("litecache_misses", "reason")["shard_lost"] == 1
    client.close()


def test_leases_of_an_answer_that_comes_too_late_are_returned(
    shard: Any, connect: Connect, transport: str
) -> None:
    client = connect()
    put(client, KEYS)
    pid = result(shard.info.remote(), 10)["pid"]
    client.timeout_s = 0.3
    suspend(pid)
    try:
        assert [r.status for r in client.stage(KEYS)] == [StageStatus.MISS] * 3
        started, client.timeout_s = time.monotonic(), 60.0
        assert client.reserve(BLOCK, 1) == []  # not asked while the late call is open
        assert time.monotonic() - started < 30
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: client.query(KEYS) == [True] * 3)
    wait_until(lambda: leases(shard) == 0)
    assert not client.lost
    assert client.stage(KEYS[:1])[0].status is StageStatus.READY


def test_a_wait_for_a_shard_that_is_killed_ends_and_says_so(
    ray_local: None, tmp_path: Path
) -> None:
    handle = start(tmp_path)
    lost: queue.Queue[RayShardClient] = queue.Queue()
    client = RayShardClient(handle, "s", on_lost=lost.put)
    (slot,) = client.reserve(BLOCK, 1)
    # as if a read were under way: the state that nobody will change any more
    client.arena._words[slot.slot * 4] = pack_word(slot.generation, SlotState.LOADING)
    os.kill(result(handle.info.remote(), 10)["pid"], signal.SIGKILL)
    started = time.monotonic()
    assert client.wait([slot], timeout_s=20) == [False]
    assert time.monotonic() - started < 10
    assert lost.get(timeout=60) is client
    assert client.lost


def test_leases_end_with_the_client_process(shard: Any) -> None:
    @ray.remote(num_cpus=0)
    class Holder:
        def hold(self, handle: Any) -> int:
            self.client = RayShardClient(handle, "s")
            return len(self.client.reserve(BLOCK, 3))

    holder = Holder.remote()
    assert ray.get(holder.hold.remote(shard)) == 3
    assert leases(shard) == 3
    ray.kill(holder)
    wait_until(lambda: leases(shard) == 0)


def test_several_batches_are_under_way_and_leases_ride_with_the_next(
    shard: Any, connect: Connect
) -> None:
    client = connect()
    put(client, KEYS)
    pending = [client.stage_async([key]) for key in KEYS]
    refs = [slot_of(call.result()[0]) for call in pending]
    assert client.wait(refs) == [True] * 3
    assert [bytes(client.arena.block(ref.slot, 16)) for ref in refs] == KEYS
    assert leases(shard) == 3
    (again,) = client.stage_async(KEYS[:1], released=refs[1:]).result()
    assert leases(shard) == 2
    client.stage_async([bytes(16)], released=[refs[0], slot_of(again)]).result()
    assert leases(shard) == 0


def test_an_abandoned_stage_leaves_no_lease(shard: Any, connect: Connect) -> None:
    client = connect()
    put(client, KEYS)
    client.stage_async(KEYS).abandon()
    # the shard answers in order, so this one's answer comes after the abandoned one's
    wait_until(lambda: client.stage_async(KEYS[:1]).result()[0].status is StageStatus.READY)
    wait_until(lambda: leases(shard) == 1)


def test_leases_that_cannot_ride_with_a_stage_are_returned_alone(
    shard: Any, connect: Connect
) -> None:
    client = connect()
    put(client, KEYS)
    held = [slot_of(result) for result in client.stage(KEYS)]
    pid = result(shard.info.remote(), 10)["pid"]
    client.timeout_s = 0.3
    suspend(pid)
    try:
        assert client.stage(KEYS[:1])[0].status is StageStatus.MISS
        missed = client.stage_async(KEYS, released=held).result()
        assert [r.status for r in missed] == [StageStatus.MISS] * 3
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: leases(shard) == 0)


def test_a_client_that_dies_with_stages_under_way_leaves_no_lease(
    shard: Any, connect: Connect
) -> None:
    mine = connect()
    put(mine, KEYS)
    (kept,) = mine.stage(KEYS[:1])

    @ray.remote(num_cpus=0)
    class Busy:
        def stage(self, handle: Any) -> int:
            self.client = RayShardClient(handle, "s")
            held = [SlotRef(r.slot, r.generation) for r in self.client.stage(KEYS)]
            self.client.stage_async(KEYS[:2], released=held[:2]).result()
            self.calls = [self.client.stage_async(KEYS, released=held[2:]) for _ in range(4)]
            return os.getpid()

    busy = Busy.remote()
    os.kill(ray.get(busy.stage.remote(shard)), signal.SIGKILL)
    wait_until(lambda: result(shard.stats.remote(), 10)["store"]["clients"] == 1)
    assert leases(shard) == 1
    assert mine.wait([slot_of(kept)]) == [True]


def test_the_shards_of_several_folders_are_asked_together(ray_local: None, tmp_path: Path) -> None:
    handles = [start(tmp_path / name) for name in ("a", "b")]
    clients = [RayShardClient(handle, f"s{i}") for i, handle in enumerate(handles)]
    put(clients[0], KEYS[:2])
    put(clients[1], KEYS[1:])
    for handle in handles:
        result(handle.clear.remote("ram"), 20)
    shards = ShardSet(clients, None, Metrics())
    found = shards.stage([*KEYS, bytes(16)])
    assert [found.of[o].tier if o >= 0 else None for o in found.origins] == [*[Tier.DISK] * 3, None]
    assert {shard_id for shard_id, _, _ in found.by_shard()} == {"s0", "s1"}
    for _, shard, places in found.by_shard():
        assert shard is not None
        mine = found.part(places)
        held = zip(mine.slots.tolist(), mine.generations.tolist(), mine.keys, strict=True)
        for slot, generation, key in held:
            assert shard.arena.wait([SlotRef(slot, generation)]) == [True]
            assert bytes(shard.arena.block(slot, 16)) == key
    # the block that both have is leased once, the spare lease went back
    wait_until(lambda: sum(map(leases, handles)) == 3)
    shards.give_back(found)
    wait_until(lambda: sum(map(leases, handles)) == 0)
    os.kill(result(handles[0].info.remote(), 10)["pid"], signal.SIGKILL)
    found = shards.stage(KEYS)
    assert [found.of[o].shard_id if o >= 0 else None for o in found.origins] == [None, "s1", "s1"]
    for handle in handles:
        ray.kill(handle)


def test_messages_of_another_version_are_refused_and_change_nothing(
    shard: Any, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()
    put(client, KEYS)
    monkeypatch.setattr(wire, "PROTOCOL_VERSION", 1)
    old = wire.pack_stage(client._client_id, KEYS, [])
    monkeypatch.undo()
    spoken = f"slot protocol 1 cannot be read: this side speaks {wire.PROTOCOL_VERSION}"
    with pytest.raises(StorageError, match=spoken):
        result(shard.call.remote(ShardMethod.STAGE, old), 10)
    with pytest.raises(StorageError, match="a list is no packed message"):
        result(shard.call.remote(ShardMethod.QUERY, KEYS), 10)
    assert leases(shard) == 0
    assert client.query(KEYS) == [True] * 3


def test_a_flush_does_not_delay_short_calls(shard: Any, connect: Connect) -> None:
    client = connect()
    put(client, KEYS)
    done = threading.Event()
    flushing = threading.Thread(target=lambda: (client.flush(10), done.set()))
    flushing.start()
    assert client.query(KEYS) == [True] * 3
    flushing.join(20)
    assert done.is_set()


def test_what_keeps_a_store_from_opening_is_told_by_its_class(
    ray_local: None, tmp_path: Path
) -> None:
    with ShardStore(str(tmp_path / "shard-0"), storage_bytes=32 << 20, ram_bytes=1 << 20):
        handle = start(tmp_path, 0.3)
        with pytest.raises(StorageLockedError, match="shard-0"):
            result(handle.info.remote(), 20)
    ray.kill(handle)


def test_a_shard_process_loads_neither_torch_nor_transformers(shard: Any) -> None:
    pid = result(shard.info.remote(), 10)["pid"]
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "libray" in maps or "_raylet" in maps
    assert "libtorch" not in maps
    assert "tokenizers" not in maps
