"""Saving: what was dropped once is stored later, and no shard in trouble holds up the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import engine_harness
import pytest
import torch
from engine_harness import Harness, family_source
from plan_driver import random_prompt

from litecache.engine.scheduling import saves
from litecache.engine.scheduling.orders import SaveOrder
from litecache.engine.transfer import saver
from litecache.engine.transfer.codec import SameBytes
from litecache.engine.transfer.shard_set import Leases, ShardSet
from litecache.storage.client import LocalShardClient
from litecache.storage.protocol import Retention, SlotRef
from litecache.types import Request


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_blocks_that_were_dropped_once_are_all_stored_on_their_next_sight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompt(161, seed=4)
    with Harness(family_source("llama"), folders=[tmp_path / "s"]) as harness:
        with monkeypatch.context() as full:
            full.setattr(saver, "SLOT_WAIT_S", 0.01)
            full.setattr(LocalShardClient, "reserve", lambda self, size, n: [])
            wanted = harness.run([prompt], 1)
            assert harness.engine.flush()["complete"]
        assert harness.stores[0].keys() == []
        assert harness.engine.metrics.value("litecache_drops", reason="no_slot") == 10
        assert harness.run([prompt], 1) == wanted
        assert harness.engine.flush()["complete"]
        assert len(harness.stores[0].keys()) == 10
        harness.empty("gpu", "ram")
        assert harness.run([prompt], 1) == wanted
        assert harness.reused == [{"disk": 160}]


def test_what_another_shard_of_the_node_holds_is_not_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompt(161, seed=4)
    folders = [tmp_path / "a", tmp_path / "b"]
    with Harness(family_source("llama"), folders=folders) as harness:
        for chosen in range(2):
            monkeypatch.setattr(ShardSet, "choose", lambda self, key, i=chosen: self.shards[i])
            harness.run([prompt], 1)
            assert harness.engine.flush()["complete"]
            assert [len(store.keys()) for store in harness.stores] == [10, 0]
            harness.empty("gpu")
            monkeypatch.setattr(ShardSet, "stage", lambda self, keys, reads: Leases.none(keys))


def test_what_finds_no_room_in_the_queue_is_saved_once_there_is_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = random_prompt(161, seed=4)
    with Harness(family_source("llama"), folders=[None]) as harness:
        saver = harness.engine._tiers._saver
        monkeypatch.setattr(saver, "_max_queued", 2)
        harness.run([prompt], 1)
        deadline = time.monotonic() + 60
        while len(harness.stores[0].keys()) < 10:
            assert time.monotonic() < deadline, "blocks were never saved"
            harness.engine.flush()
        assert harness.engine.metrics.by_label("litecache_drops", "reason")["queue_full"]


def test_what_a_request_says_of_time_and_retention_goes_with_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = partial(Request, expires_s=4_000_000_000, retention="high")
    monkeypatch.setattr(engine_harness, "Request", request)
    with Harness(family_source("llama"), folders=[tmp_path / "s"]) as harness:
        harness.run([random_prompt(161, seed=4)], 1)
        assert harness.engine.flush()["complete"]
        index = harness.stores[0]._tiers.index
        records = index.records(index.entries())
        assert records["expires_s"].tolist() == [4_000_000_000] * 10
        assert records["retention"].tolist() == [Retention.HIGH] * 10


def test_the_blocks_after_a_dropped_one_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head comes back by being computed, and then the whole chain hits."""
    prompt = random_prompt(161, seed=4)
    original, refusals = LocalShardClient.reserve, [1]

    def reserve(self: LocalShardClient, block_bytes: int, count: int) -> list[SlotRef]:
        if refusals and refusals.pop():
            # on a busy machine the saver may come to its first slots when all blocks are there
            return original(self, block_bytes, count - 2) if count == 10 else []
        return original(self, block_bytes, count)

    fields = {"folders": [tmp_path / "s"], "max_batch_tokens": 32, "max_prefill_tokens": 32}
    with Harness(family_source("llama"), **fields) as harness:
        monkeypatch.setattr(saver, "SLOT_WAIT_S", 0.0)
        monkeypatch.setattr(LocalShardClient, "reserve", reserve)
        wanted = harness.run([prompt], 1)
        harness.empty("gpu")
        dropped = 10 - len(harness.stores[0].keys())
        assert 0 < dropped < 10
        assert harness.run([prompt], 1) == wanted
        harness.empty("gpu")
        assert len(harness.stores[0].keys()) == 10
        assert harness.run([prompt], 1) == wanted
        assert harness.reused == [{"ram": 160}]


def test_a_lost_shard_holds_up_no_save_and_its_runs_go_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [random_prompt(33, seed=i) for i in range(12)]
    folders = [tmp_path / "a", tmp_path / "b"]
    monkeypatch.setattr(saver, "SLOT_WAIT_S", 1e9)
    with Harness(family_source("llama"), folders=folders) as harness:
        monkeypatch.setattr(
            LocalShardClient, "lost", property(lambda self: self.shard_id == "shard0")
        )
        harness.run(prompts, 1)
        assert harness.engine.flush()["complete"]
        assert [len(store.keys()) for store in harness.stores] == [0, 24]
        monkeypatch.setattr(LocalShardClient, "lost", True)
        harness.run([random_prompt(33, seed=99)], 1)
        assert harness.engine.flush()["complete"]
        assert harness.engine.metrics.value("litecache_drops", reason="no_shard") == 2
        monkeypatch.undo()


def test_a_shard_that_gives_no_slots_is_waited_for_once_and_not_in_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, asked = LocalShardClient.reserve, []

    def reserve(self: LocalShardClient, block_bytes: int, count: int) -> Sequence[SlotRef]:
        asked.append(self.shard_id)
        return []

    with Harness(family_source("llama"), folders=[tmp_path / "s"]) as harness:
        monkeypatch.setattr(saver, "SLOT_WAIT_S", 0.2)
        monkeypatch.setattr(LocalShardClient, "reserve", reserve)
        harness.run([random_prompt(33, seed=0)], 1)
        assert harness.engine.flush()["complete"]
        assert len(asked) > 1
        for seed in range(1, 5):
            asked.clear()
            harness.run([random_prompt(33, seed=seed)], 1)
            assert harness.engine.flush()["complete"]
            assert 1 <= len(asked) <= 2  # a block each batch at the most
        monkeypatch.setattr(LocalShardClient, "reserve", original)
        harness.run([random_prompt(33, seed=0)], 1)
        assert harness.engine.flush()["complete"]
        assert len(harness.stores[0].keys()) == 2


def test_what_a_step_has_filled_is_saved_in_batches_that_begin_while_the_engine_rests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, sizes = threading.Event(), []
    original = saver.Saver._save_batch

    class Resting(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            asked.set()
            return super().wait(timeout)

    resting = Resting()

    def save_batch(self: saver.Saver, batch: list[SaveOrder]) -> None:
        sizes.append(len(batch))
        original(self, batch)

    monkeypatch.setattr(saver.Saver, "_save_batch", save_batch)
    with Harness(family_source("llama"), folders=[None]) as harness:
        monkeypatch.setattr(saver, "TURN_S", 3600.0)
        harness.engine._tiers._saver._resting = resting
        harness.run([random_prompt(241, seed=seed) for seed in range(3)], 1)
        assert asked.wait(60), "no batch waits for its turn"
        assert harness.stores[0].keys() == []
        monkeypatch.setattr(saver, "TURN_S", 0.001)
        resting.set()
        assert harness.engine.flush()["complete"]
        assert len(harness.stores[0].keys()) == 45
    assert sizes == [16, 16, 13]


@pytest.mark.parametrize(("owner", "name"), [(ShardSet, "choose"), (SameBytes, "save")])
def test_the_saver_goes_on_after_any_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    """And keeps no slot that it had reserved."""

    def raises(*_: object) -> None:
        raise ZeroDivisionError("planted")

    prompt = random_prompt(33, seed=2)
    with Harness(family_source("llama"), folders=[tmp_path / "s"]) as harness:
        with monkeypatch.context() as broken:
            broken.setattr(owner, name, raises)
            harness.run([prompt], 1)
            assert harness.engine.flush(timeout_s=30)["complete"]
        assert harness.stores[0].stats()["leases"] == 0
        assert harness.engine.metrics.value("litecache_drops", reason="error") == 2
        harness.run([prompt], 1)
        assert harness.engine.flush()["complete"]
        assert len(harness.stores[0].keys()) == 2


@pytest.mark.parametrize("shards", [1, 2])
def test_a_prefix_that_is_hit_in_the_pool_all_the_time_stays_on_disk(
    tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others' blocks pass through a disk that holds half of them."""
    monkeypatch.setattr(saves, "RUN_BYTES", 40 << 10)  # three blocks
    hot = random_prompt(161, seed=1)
    folders = [tmp_path / str(number) for number in range(shards)]
    limits = {"ram_bytes": 1 << 20, "storage_bytes": 1 << 20}
    with Harness(family_source("llama"), folders=folders, **limits) as harness:
        (wanted,) = harness.run([hot], 1)
        assert harness.engine.flush()["complete"]
        kept = [set(store.keys()) for store in harness.stores]
        assert sum(map(len, kept)) == 10
        for seed in range(12 * shards):
            harness.run([random_prompt(161, seed=100 + seed)], 1)
            assert harness.run([hot], 1) == [wanted]
            assert harness.reused == [{"gpu": 160}]
            assert harness.engine.flush()["complete"]
        for keys, store in zip(kept, harness.stores, strict=True):
            assert keys <= set(store.keys()), "the hottest blocks have left"
            assert len(store.keys()) < 200


def test_uses_of_stored_blocks_are_told_in_one_call_for_many_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Sequence[bytes]] = []
    prompt = random_prompt(161, seed=1)
    with Harness(family_source("llama"), folders=[tmp_path / "s"]) as harness:
        harness.run([prompt], 1)
        assert harness.engine.flush()["complete"]
        monkeypatch.setattr(saver, "TOUCH_INTERVAL_S", 1e6)
        harness.engine._tiers._saver._touch_at = 1e18
        monkeypatch.setattr(LocalShardClient, "touch", lambda self, keys: told.append(keys))
        for _ in range(20):
            harness.run([prompt], 1)
        assert told == []
        assert harness.engine.flush()["complete"]
        (keys,) = told
        assert len(keys) == 1
        assert set(keys) < set(harness.stores[0].keys())
