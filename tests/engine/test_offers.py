"""A prefix that only one replica's pool holds comes to another one by the shards of their node."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
from engine_harness import Harness, family_source
from plan_driver import random_prompt

from litecache.engine.transfer.saver import Saver
from litecache.storage.client import LocalShardClient
from litecache.storage.shard_store import ShardStore
from litecache.types import Request, SamplingParams

PROMPT = random_prompt(100, seed=11)
ASKED = Request("q", "c", PROMPT, SamplingParams(4), cache_salt="s")
UNSAVED = replace(ASKED, cache="read-only")


@pytest.fixture
def store() -> Iterator[ShardStore]:
    with ShardStore(None, ram_bytes=16 << 20, io_threads=0) as made:
        yield made
        made.check_integrity()


@contextmanager
def engine(store: ShardStore, **config: object) -> Iterator[Harness]:
    """An engine over the store."""
    with (
        closing(LocalShardClient(store)) as client,
        Harness(family_source("llama"), shards=[client], **config) as made,
    ):
        yield made


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_is_offered_is_loaded_by_the_other_engine_and_gives_the_same_tokens(
    store: ShardStore, family: str
) -> None:
    source = family_source(family)
    with (
        closing(LocalShardClient(store, "a")) as one,
        closing(LocalShardClient(store, "b")) as two,
        Harness(source, shards=[one]) as holder,
        Harness(source, shards=[two]) as other,
    ):
        wanted = holder.serve([UNSAVED])
        assert len(store) == 0
        assert other.engine.offer(ASKED, 10.0)  # which has nothing to offer
        assert len(store) == 0
        assert holder.engine.offer(ASKED, 10.0)
        assert len(store) == 6 * len(holder.engine.info.block_bytes)
        assert holder.engine.offer(ASKED, 10.0)  # is not copied again
        assert other.serve([ASKED]) == wanted
        assert other.reused == [{"ram": 96}]
        assert other.serve([replace(ASKED, cache_salt="t")]) == wanted
        assert other.reused == [{}]


@pytest.mark.parametrize("cache", ["read-only", "no-store"])
def test_who_saves_nothing_has_nothing_saved_on_his_account(store: ShardStore, cache: str) -> None:
    with engine(store) as holder:
        holder.serve([UNSAVED])
        assert not holder.engine.offer(replace(ASKED, cache=cache), 10.0)
        assert len(store) == 0


def test_admission_none_is_kept_to(store: ShardStore) -> None:
    with engine(store, admission="none") as holder:
        holder.serve([ASKED])
        assert not holder.engine.offer(ASKED, 10.0)
        assert len(store) == 0


def test_an_offer_goes_ahead_of_what_waits_and_what_finds_no_room_is_the_last_of_the_queue(
    store: ShardStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saver is held up until both are queued."""
    held, order, save = threading.Event(), list[str](), Saver._save_batch

    def slow(self: Saver, batch: list) -> None:  # type: ignore[type-arg]
        held.wait(30)
        order.extend(each.salt for each in batch)
        save(self, batch)

    monkeypatch.setattr(Saver, "_save_batch", slow)
    monkeypatch.setattr("litecache.engine.transfer.saver.FEWEST_BLOCKS", 2)
    with engine(store, num_blocks=288) as holder:
        holder.serve([UNSAVED])
        for seed in range(12):
            prompt = random_prompt(112, seed=100 + seed)
            holder.serve([replace(ASKED, prompt=prompt, cache_salt="many")])
        assert not holder.engine.offer(ASKED, 0.05)  # in that time
        held.set()
        holder.engine.flush()
        assert order[:2] == ["many"] * 2  # was being copied
        assert order[2:8] == ["s"] * 6
        # one in four blocks of the pool may wait; the others come once there is room
        deadline = time.monotonic() + 60
        while order.count("many") < 12 * 7:
            assert time.monotonic() < deadline, "refused blocks were never saved"
            holder.engine.flush()
