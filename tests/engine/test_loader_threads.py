"""Lookups and loads: neither waits behind the other, and each block is told once, as it ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from litecache.engine.kv_layout import KVLayout, KVPool, KVSpec
from litecache.engine.scheduling.below import BlockRef, as_pairs, as_refs
from litecache.engine.scheduling.orders import CancelOrder, LoadOrder, LoadReport, StageOrder
from litecache.engine.transfer import loader
from litecache.engine.transfer.block_copier import BlockCopier, PinnedArenas
from litecache.engine.transfer.codec import SameBytes
from litecache.engine.transfer.loader import LOAD_THREADS, Loader
from litecache.engine.transfer.shard_set import ShardSet
from litecache.metrics import Metrics
from litecache.storage.arena.view import ArenaView
from litecache.storage.client import LocalShardClient
from litecache.storage.protocol import CommitItem, SlotState
from litecache.storage.shard_store import ShardStore


class Rig:
    """A loader over one pool and a shard in RAM; blocks in `slow` are being read until `read`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_blocks: int) -> None:
        self.staged: queue.Queue[dict[BlockRef, str]] = queue.Queue()
        self.told: queue.Queue[LoadReport] = queue.Queue()
        self.read, self.slow = threading.Event(), set[int]()
        original = ArenaView.states

        def states(arena: ArenaView, slots: Any, generations: Any) -> Any:
            told = original(arena, slots, generations)
            if not self.read.is_set():
                told[np.isin(slots, list(self.slow))] = SlotState.LOADING
            return told

        monkeypatch.setattr(ArenaView, "states", states)
        group = KVLayout.from_specs([KVSpec(1, 8, 8, "float32")], 8).groups[0]
        self.pool = KVPool(group, num_blocks + 1, "cpu")
        self.store = ShardStore(None, ram_bytes=1 << 20)
        self.client = LocalShardClient(self.store)
        self.slots = self.client.reserve(group.block_bytes, num_blocks)
        for number, slot in enumerate(self.slots):
            self.client.arena.block(slot.slot, group.block_bytes)[:] = number + 1
        self.keys = [bytes([n]) * 16 for n in range(1, num_blocks + 1)]
        items = [
            CommitItem(*s, k, bytes(16), "t") for s, k in zip(self.slots, self.keys, strict=True)
        ]
        self.client.commit(items)
        self.loader = Loader(
            [self.pool],
            ShardSet([self.client], None, Metrics()),
            lambda: SameBytes(BlockCopier(torch.device("cpu"), lambda step: None, PinnedArenas())),
            staged=lambda _, found: self.staged.put(found.as_dict()),
            loaded=self.told.put,
            metrics=Metrics(),
        )

    def load(self, ticket: int, *indices: int) -> None:
        """Look blocks up and order them, each into the pool's block of its number."""
        self.stage(ticket, *indices)
        assert self.staged.get(timeout=60) == {(0, n): "ram:local" for n in indices}
        self.order(ticket, *indices)

    def stage(self, ticket: int, *indices: int) -> None:
        """Look blocks up."""
        keys = [self.keys[n] for n in indices]
        self.loader.stage(StageOrder(ticket, as_refs((0, n) for n in indices), keys))

    def order(self, ticket: int, *indices: int) -> None:
        """Order blocks that were found."""
        blocks = np.array(indices) + 1
        refs = as_refs((0, n) for n in indices)
        self.loader.load(LoadOrder(ticket, refs, blocks, np.zeros_like(blocks)))

    def reports(self, count: int) -> tuple[list[int], list[int]]:
        """Indices landed and lost, when so many have been told."""
        landed: list[int] = []
        lost: list[int] = []
        while len(landed) + len(lost) < count:
            report = self.told.get(timeout=60)
            landed += [index for _, index in report.landed]
            lost += [index for _, index in report.lost]
        return sorted(landed), sorted(lost)

    def close(self) -> None:
        self.read.set()
        self.loader.close()
        assert self.told.empty(), "a block was told twice"
        assert self.store.stats()["leases"] == 0
        self.client.close()
        self.store.close()


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(monkeypatch, LOAD_THREADS + 1)
    yield made
    made.close()


def test_a_lookup_does_not_wait_behind_slow_loads(rig: Rig) -> None:
    rig.slow.update(slot.slot for slot in rig.slots)
    for ticket in range(LOAD_THREADS):
        rig.load(ticket, ticket)
    rig.stage(99, LOAD_THREADS)
    assert rig.staged.get(timeout=60) == {(0, LOAD_THREADS): "ram:local"}
    assert rig.told.empty()
    rig.read.set()
    assert rig.reports(LOAD_THREADS) == (list(range(LOAD_THREADS)), [])


def test_what_is_looked_up_later_bears_the_names_of_its_own_sources(rig: Rig) -> None:
    """Though the shards have changed since the ticket's first lookup."""
    rig.stage(7, 0, 1)
    assert rig.staged.get(timeout=60) == {(0, 0): "ram:local", (0, 1): "ram:local"}
    again = LocalShardClient(rig.store, "again")
    rig.loader._shards.replace([again])
    rig.stage(7, 2, 3)
    assert rig.staged.get(timeout=60) == {(0, 2): "ram:again", (0, 3): "ram:again"}
    rig.order(7, 0, 1, 2, 3)
    assert rig.reports(4) == ([0, 1, 2, 3], [])
    rig.loader._shards.replace([rig.client])
    again.close()


@pytest.mark.parametrize("given_up", [False, True])
def test_a_load_tells_what_has_landed_while_the_rest_is_still_being_read(
    rig: Rig, given_up: bool
) -> None:
    """And when it is cancelled the rest is lost at once, without waiting for the read."""
    rig.slow.update(slot.slot for slot in rig.slots[2:])
    rig.load(7, 0, 1, 2, 3)
    assert rig.reports(2) == ([0, 1], [])
    assert rig.pool.buffer[1:5, 0].tolist() == [1, 2, 0, 0]
    if given_up:
        rig.loader.cancel(CancelOrder(7))
        assert rig.reports(2) == ([], [2, 3])
    else:
        rig.read.set()
        assert rig.reports(2) == ([2, 3], [])
    assert rig.pool.buffer[1:5, -1].tolist() == [1, 2, *((0, 0) if given_up else (3, 4))]


def test_blocks_of_a_load_are_cancelled_one_by_one_and_others_are_ordered_later(rig: Rig) -> None:
    rig.slow.update(slot.slot for slot in rig.slots)
    rig.stage(7, *range(5))
    assert len(rig.staged.get(timeout=60)) == 5
    rig.order(7, 4, 3, 2)
    rig.loader.cancel(CancelOrder(7, as_refs([(0, 2), (0, 9)])))
    assert rig.reports(1) == ([], [2])
    rig.order(7, 2, 1)
    assert rig.reports(1) == ([], [2])  # its lease is gone
    rig.read.set()
    assert rig.reports(3) == ([1, 3, 4], [])
    rig.loader.discard(7)


def test_a_load_in_which_nothing_arrives_any_more_is_given_up_and_its_source_named(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "LOAD_TIMEOUT_S", 0.05)
    rig.slow.update(slot.slot for slot in rig.slots)
    rig.load(7, 0, 1)
    report = rig.told.get(timeout=60)
    assert sorted(as_pairs(report.lost)) == [(0, 0), (0, 1)]
    assert report.failed == {"ram:local"}


def test_a_slot_that_changed_under_its_copy_is_lost(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    confirm = ArenaView.confirm
    later = np.uint64(1)
    monkeypatch.setattr(
        ArenaView,
        "confirm",
        lambda arena, slots, generations, keys: confirm(arena, slots, generations + later, keys),
    )
    rig.load(7, 0, 1)
    assert rig.reports(2) == ([], [0, 1])


def test_copies_that_raise_are_lost_and_the_next_load_works(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(SameBytes, "load", lambda *_: 1 / 0)
        rig.load(7, 0, 1)
        assert rig.reports(2) == ([], [0, 1])
    rig.load(8, 0, 1)
    assert rig.reports(2) == ([0, 1], [])
