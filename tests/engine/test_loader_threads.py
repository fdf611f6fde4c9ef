"""Lookups and loads: neither kind waits behind the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import torch

from litecache.engine.scheduling.orders import LoadOrder, StageOrder
from litecache.engine.transfer.block_copier import BlockCopier, PinnedArenas, SameBytes
from litecache.engine.transfer.loader import LOAD_THREADS, Loader
from litecache.engine.transfer.shard_set import ShardSet
from litecache.metrics import Metrics
from litecache.storage.client import LocalShardClient
from litecache.storage.protocol import CommitItem, SlotRef
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
