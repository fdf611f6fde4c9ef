"""What an engine has below its pool: the shards of its node, and who copies blocks there and back.

The scheduler orders, this carries out: stages and loads go to the loader, saves to the saver. What
they report comes back as messages for the engine's thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from litecache.engine.kv_layout import KVPool
from litecache.engine.scheduling.below import FoundBelow
from litecache.engine.scheduling.orders import LoadReport, SaveOrder, Schedule
from litecache.engine.scheduling.scheduler import Scheduler
from litecache.engine.transfer.block_copier import BlockCopier, PinnedArenas
from litecache.engine.transfer.codec import Codec, EightBits, SameBytes
from litecache.engine.transfer.loader import Loader
from litecache.engine.transfer.saver import Saver
from litecache.engine.transfer.shard_set import RemoteSource, ShardSet
from litecache.metrics import Metrics
from litecache.storage.client import ShardClient

MAX_QUEUED_SAVES_SHARE = 4
"""One in so many pool blocks may wait to be saved: they cannot be evicted meanwhile."""


class LowerTiers:
    """Loader and saver over the shards.

    Args:
        pools: of the KV groups.
        shards: clients of the shards on this node.
        remote: blocks of other nodes.
        scheduler: is told what was staged, loaded and saved.
        post: runs a function on the engine's thread.
        carry_out: for what the scheduler orders in return.
        device: of the pools.
        event_of: the event behind a step that has not ended.
        namespace_of: a cache salt's namespace on the shards.
        resting: set each time that the engine's thread begins to wait, see `Saver`.
        metrics: where to count.
    """

    def __init__(
        self,
        pools: Sequence[KVPool],
        shards: Sequence[ShardClient],
        remote: RemoteSource | None,
        *,
        scheduler: Scheduler,
        post: Callable[[Callable[[], None]], None],
        carry_out: Callable[[Schedule], None],
        device: torch.device,
        event_of: Callable[[int], torch.cuda.Event | None],
        namespace_of: Callable[[str], str],
        resting: threading.Event,
        metrics: Metrics,
    ) -> None:
        self._shards = ShardSet(shards, remote, metrics)
        self._pinned = PinnedArenas()

        kind = SameBytes if pools[0].group.stored is None else EightBits

        def codec() -> Codec:
            return kind(BlockCopier(device, event_of, self._pinned))

        for_saves = codec()
        if isinstance(for_saves, EightBits):
            for_saves.try_out(pools)

        def staged(ticket: int, found: FoundBelow) -> None:
            post(lambda: carry_out(scheduler.loads.on_staged(ticket, found)))

        def loaded(report: LoadReport) -> None:
            post(lambda: carry_out(scheduler.loads.on_loaded(report)))

        def saved(orders: list[SaveOrder], dropped: list[SaveOrder]) -> None:
            post(lambda: carry_out(scheduler.saves.on_saved(orders, dropped)))

        self._scheduler = scheduler
        self._loader = Loader(
            *(pools, self._shards, codec),
            staged=staged,
            loaded=loaded,
            metrics=metrics,
        )
        self._saver = Saver(
            pools,
            self._shards,
            for_saves,
            namespace_of=namespace_of,
            max_queued=max(64, scheduler.cache.pools[0].num_blocks // MAX_QUEUED_SAVES_SHARE),
            done=saved,
            resting=resting,
            metrics=metrics,
        )

    def carry_out(self, schedule: Schedule) -> None:
        """Begin what the scheduler has ordered; called on the engine's thread."""
        for stage in schedule.stages:
            self._loader.stage(stage)
        for load in schedule.loads:
            self._loader.load(load)
        for cancel in schedule.cancels:
            self._loader.cancel(cancel)
        for ticket in schedule.discards:
            self._loader.discard(ticket)
        if schedule.touches:
            self._saver.touch(schedule.touches)
        if schedule.saves:
            refused = self._saver.submit(schedule.saves)
            if refused:
                self._scheduler.saves.on_refused(refused)

    def save_first(self, orders: list[SaveOrder]) -> list[SaveOrder]:
        """Save these before all that waits, as far as there is room; those that will be. Called on
        the engine's thread."""
        refused = self._saver.submit(orders, first=True)
        self._scheduler.saves.on_refused(refused)
        return [order for order in orders if order not in refused]

    def wait_saved(self, orders: Sequence[SaveOrder], timeout_s: float) -> bool:
        """Wait until these saves have ended; False if they have not in that time."""
        return self._saver.wait_for(orders, timeout_s)

    def drain(self, timeout_s: float) -> bool:
        """Wait until all saves that were ordered have ended; False if they have not."""
        return self._saver.drain(timeout_s)

    def flush(self, deadline: float) -> dict[str, Any]:
        """Wait for saves and make the shards write out what is dirty; see `Engine.flush`.

        Args:
            deadline: of `time.monotonic()`.
        """
        report: dict[str, Any] = {"written": 0, "pending": 0, "failed": 0}
        report["complete"] = self.drain(max(0.0, deadline - time.monotonic()))
        for shard in self._shards.shards:
            part = shard.flush(max(0.1, deadline - time.monotonic()))
            report["complete"] = report["complete"] and part.complete
            for name in ("written", "pending", "failed"):
                report[name] += getattr(part, name)
        return report

    def replace(self, shards: Sequence[ShardClient]) -> None:
        """Use these local shards from now on; leases and copies under way keep their clients."""
        self._shards.replace(shards)

    def close(self) -> None:
        """End the threads and let the arenas go."""
        self._loader.close()
        self._saver.close()
        self._pinned.close()
