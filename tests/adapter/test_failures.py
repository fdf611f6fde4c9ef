"""What the caller sees when an actor dies: the same tokens, a little later."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shared_adapter import SharedAdapter

from litecache.actors.calls import result
from litecache.actors.naming import coordinator_name, replica_name
from litecache.actors.outbox import HEARTBEAT_TIMEOUT_S
from litecache.adapter import KVCacheAdapter
from litecache.errors import GroupUnavailableError, LiteCacheError
from litecache.types import PollReply

SETTINGS = {"do_sample": True, "seed": 17, "eos_token_id": 210}


def wait_for(condition: Callable[[], Any], timeout_s: float = 90) -> Any:
    """State of other processes can only be asked for."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return value


def kill(llm: KVCacheAdapter, name: str) -> int:
    actors = llm.group.status()
    pid: int = actors[name]["pid"]
    os.kill(pid, signal.SIGKILL)
    return pid


def shard_of(llm: KVCacheAdapter) -> str:
    (name,) = llm.group.shards
    return name


def prompt(length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 210, (1, length), generator=torch.Generator().manual_seed(seed))


def reuse(llm: KVCacheAdapter, ids: torch.Tensor) -> tuple[list[int], dict[str, int]]:
    out = llm.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
    return out.sequences[0].tolist(), out.litecache.reused_tokens[0]


def test_a_stream_goes_on_with_the_same_tokens_when_its_gpu_cache_is_killed(
    llm: KVCacheAdapter,
) -> None:
    ids = prompt(50, seed=1)
    expected = list(llm.stream(input_ids=ids, as_tokens=True, max_new_tokens=200, **SETTINGS))
    stream = llm.stream(input_ids=ids, as_tokens=True, max_new_tokens=200, **SETTINGS)
    tokens = [next(stream) for _ in range(20)]
    kill(llm, replica_name(llm.group.spec.group, 0))
    tokens += list(stream)
    assert tokens == expected
    # What it had computed before the crash came back from the shard.
    assert llm.stats().reused_tokens.get("ram", 0) >= 48


@pytest.mark.slow
def test_logits_come_though_the_gpu_cache_is_killed_meanwhile(llm: KVCacheAdapter) -> None:
    ids = torch.cat([prompt(300, seed=100 + row) for row in range(4)])
    expected = llm.forward(ids, cache_salt="first")
    pids = []
    name = replica_name(llm.group.spec.group, 0)
    timer = threading.Timer(0.02, lambda: pids.append(kill(llm, name)))
    timer.start()
    for turn in range(3):
        found = llm.forward(ids, cache_salt=f"turn {turn}")
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        timer.join()
    assert llm.group.status()[name]["pid"] != pids[0]


def test_requests_go_on_when_a_shard_is_killed_and_it_serves_again_when_it_is_back(
    llm: KVCacheAdapter,
) -> None:
    ids = prompt(60, seed=2)
    tokens, _ = reuse(llm, ids)
    llm.flush()
    before = llm.stats().shards[shard_of(llm)]
    kill(llm, shard_of(llm))
    llm.clear("gpu")
    assert reuse(llm, ids) == (tokens, {})
    wait_for(lambda: llm.stats().shards.get(shard_of(llm), {}).get("clients"))
    after = llm.stats().shards[shard_of(llm)]
    assert after["epoch"] != before["epoch"]
    wait_for(lambda: llm.clear("gpu") or reuse(llm, ids) == (tokens, {"disk": 48}))


def keys_of(llm: KVCacheAdapter) -> bytes:
    handle = llm.group.shards[shard_of(llm)]
    held: bytes = result(handle.keys.remote(), 10)
    return held


def keys_in_map(llm: KVCacheAdapter) -> bytes:
    shard_id = shard_of(llm).split(":shard:")[1]
    try:
        coordinator = llm.group.actors[coordinator_name(llm.group.spec.group)]
        known: bytes = result(coordinator.keys_of.remote(shard_id), 10)
    except LiteCacheError:
        return b""
    return known


def test_a_restarted_coordinator_learns_again_where_all_blocks_are(
    llm: KVCacheAdapter,
) -> None:
    ids = prompt(70, seed=3)
    tokens, _ = reuse(llm, ids)
    llm.flush()
    wait_for(lambda: keys_in_map(llm) == keys_of(llm))
    name = coordinator_name(llm.group.spec.group)
    handle = llm.group.actors[name]
    first = result(handle.info.remote(), 10)
    os.kill(first["pid"], signal.SIGKILL)
    assert reuse(llm, ids)[0] == tokens
    more = prompt(40, seed=4)
    reuse(llm, more)
    llm.flush()

    def restarted() -> bool:
        try:
            return bool(result(handle.info.remote(), 10)["epoch"] != first["epoch"])
        except GroupUnavailableError:
            return False

    wait_for(restarted)
    held = keys_of(llm)
    assert len(held) >= 16 * 6
    wait_for(lambda: keys_in_map(llm) == held)
    assert "error" not in llm.group.status()[name]


@pytest.mark.slow
def test_a_stream_goes_on_when_its_gpu_cache_does_not_answer_for_a_while(
    llm: KVCacheAdapter,
) -> None:
    ids = prompt(45, seed=6)
    expected = list(llm.stream(input_ids=ids, as_tokens=True, max_new_tokens=300, **SETTINGS))
    pid = llm.group.status()[replica_name(llm.group.spec.group, 0)]["pid"]
    stream = llm.stream(input_ids=ids, as_tokens=True, max_new_tokens=300, **SETTINGS)
    tokens = [next(stream) for _ in range(5)]
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(8)  # longer than any poll may take
    finally:
        os.kill(pid, signal.SIGCONT)
    assert tokens + list(stream) == expected


@pytest.mark.slow
def test_a_driver_that_was_suspended_and_given_up_gets_the_same_tokens(
    llm: KVCacheAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(46, seed=7)
    expected = list(llm.stream(input_ids=ids, as_tokens=True, max_new_tokens=300, **SETTINGS))
    (poller,) = llm._replicas.pollers
    take, suspended = poller._take, []

    def sleep_once(reply: PollReply) -> None:
        if len(poller._open) == 1 and not suspended:
            suspended.append(True)
            time.sleep(HEARTBEAT_TIMEOUT_S + 2)
        take(reply)

    monkeypatch.setattr(poller, "_take", sleep_once)
    stream = llm.stream(input_ids=ids, as_tokens=True, max_new_tokens=300, **SETTINGS)
    assert list(stream) == expected
    assert suspended


def test_blocks_on_disk_are_used_after_all_actors_were_stopped_and_started_again(
    shared_adapter: SharedAdapter,
) -> None:
    ids = prompt(90, seed=5)
    tokens, _ = reuse(shared_adapter.adapter, ids)
    again = shared_adapter.restart()
    assert reuse(again, ids) == (tokens, {"disk": 80})
