"""Lookups and loads: neither waits behind the other, and a load tells what has landed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import pytest
import torch

from litecache.engine.kv_layout import KVLayout, KVPool, KVSpec
from litecache.engine.scheduling.orders import LoadOrder, StageOrder
from litecache.engine.transfer.block_copier import BlockCopier, PinnedArenas, SameBytes
from litecache.engine.transfer.loader import LOAD_THREADS, Loader
from litecache.engine.transfer.shard_set import ShardSet
from litecache.metrics import Metrics
from litecache.storage.arena.view import ArenaView
from litecache.storage.client import LocalShardClient
from litecache.storage.protocol import CommitItem, SlotRef, SlotState
from litecache.storage.shard_store import ShardStore

KEYS = [bytes([n]) * 16 for n in range(1, LOAD_THREADS + 2)]


class SlowToRelease(LocalShardClient):
    """A shard that holds up every load, because giving back leases takes as long as it likes."""

    go_on = threading.Event()

    def release(self, slots: Sequence[SlotRef]) -> None:
        assert self.go_on.wait(60)
        super().release(slots)


def test_a_lookup_does_not_wait_behind_slow_loads() -> None:
    staged: queue.Queue[int] = queue.Queue()
    loaded: queue.Queue[int] = queue.Queue()
    with ShardStore(None, ram_bytes=1 << 20) as store:
        client = SlowToRelease(store)
        slots = client.reserve(4096, len(KEYS))
        items = [
            CommitItem(*slot, key, bytes(16), "t") for slot, key in zip(slots, KEYS, strict=True)
        ]
        client.commit(items)
        loader = Loader(
            [],
            ShardSet([client], None, Metrics()),
            lambda: BlockCopier(torch.device("cpu"), lambda: None, PinnedArenas()),
            staged=lambda ticket, _: staged.put(ticket),
            loaded=lambda order, done, ended: loaded.put(order.ticket),
            metrics=Metrics(),
            codec=SameBytes(),
        )
        for ticket, key in enumerate(KEYS[:LOAD_THREADS]):
            loader.stage(StageOrder(ticket, {(0, 0): key}))
            assert staged.get(timeout=60) == ticket
            loader.load(LoadOrder(ticket, {}))
        loader.stage(StageOrder(99, {(0, 0): KEYS[-1]}))
        assert staged.get(timeout=20) == 99
        assert loaded.empty()
        client.go_on.set()
        assert sorted(loaded.get(timeout=60) for _ in range(LOAD_THREADS)) == list(
            range(LOAD_THREADS)
        )
        loader.close()
        client.close()


@pytest.mark.parametrize("given_up", [False, True])
def test_a_load_tells_what_has_landed_while_the_rest_is_still_being_read(
    monkeypatch: pytest.MonkeyPatch, given_up: bool
) -> None:
    """And when it is cancelled it ends without waiting for that rest."""
    told: queue.Queue[tuple[list[tuple[int, int]], bool]] = queue.Queue()
    staged: queue.Queue[dict[tuple[int, int], str]] = queue.Queue()
    group = KVLayout.from_specs([KVSpec(1, 8, 8, "float32")], 8).groups[0]
    pool = KVPool(group, 8, "cpu")
    read, slow = threading.Event(), set()
    original = ArenaView.state

    def state(self: ArenaView, slot: int, generation: int) -> SlotState | None:
        if slot in slow and not read.is_set():
            return SlotState.LOADING
        return original(self, slot, generation)

    with ShardStore(None, ram_bytes=1 << 20) as store:
        client = LocalShardClient(store)
        slots = client.reserve(group.block_bytes, 4)
        for number, slot in enumerate(slots):
            client.arena.block(slot.slot, group.block_bytes)[:] = number + 1
        keys = KEYS[:4]
        items = [
            CommitItem(*slot, key, bytes(16), "t") for slot, key in zip(slots, keys, strict=True)
        ]
        client.commit(items)
        slow.update(slot.slot for slot in slots[2:])
        monkeypatch.setattr(ArenaView, "state", state)
        loader = Loader(
            [pool],
            ShardSet([client], None, Metrics()),
            lambda: BlockCopier(torch.device("cpu"), lambda: None, PinnedArenas()),
            staged=lambda _, found: staged.put(found),
            loaded=lambda order, done, ended: told.put((sorted(done), ended)),
            metrics=Metrics(),
            codec=SameBytes(),
        )
        loader.stage(StageOrder(7, {(0, n): key for n, key in enumerate(keys)}))
        assert len(staged.get(timeout=60)) == 4
        loader.load(LoadOrder(7, {(0, n): n + 1 for n in range(4)}))
        assert told.get(timeout=60) == ([(0, 0), (0, 1)], False)
        assert pool.buffer[1:5, 0].tolist() == [1, 2, 0, 0]
        if given_up:
            loader.cancel(7)
            assert told.get(timeout=60) == ([], True)
        else:
            read.set()
            rest, ended = told.get(timeout=60)
            while not ended:
                more, ended = told.get(timeout=60)
                rest += more
            assert sorted(rest) == [(0, 2), (0, 3)]
            assert pool.buffer[1:5, -1].tolist() == [1, 2, 3, 4]
        read.set()
        loader.close()
        assert store.stats()["leases"] == 0
        client.close()
