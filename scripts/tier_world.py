"""What bench_tiers.py, bench_trace.py and chaos_loads.py put below an engine: a disk that can be
slowed down or stopped inside the file layer, and a scratch folder; and the way of a RAM hit without
an engine around it."""

from __future__ import annotations

import contextlib
import math
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from litecache import CacheConfig
from litecache.engine.kv_layout import KVLayout, KVPool, KVSpec
from litecache.engine.loading.model_source import ModelSource
from litecache.engine.scheduling.cost_model import CostModel
from litecache.engine.scheduling.orders import Schedule, StepResult
from litecache.engine.scheduling.prefix_cache import PrefixCache
from litecache.engine.scheduling.scheduler import Scheduler
from litecache.engine.tier_engine import TierEngine, Tokens
from litecache.engine.transfer.block_copier import (
    BlockCopier,
    HostBlocks,
    Numbers,
    PinnedArenas,
    Rows,
)
from litecache.engine.transfer.codec import SameBytes
from litecache.engine.transfer.lower_tiers import LowerTiers
from litecache.hashing import chain_keys, root_key
from litecache.metrics import Metrics
from litecache.storage.client import ShardClient
from litecache.storage.disk.files import Files
from litecache.storage.protocol import CommitItem
from litecache.token_ids import TokenIds
from litecache.types import Request, SamplingParams, TokenDelta

GB = 1_000_000_000


class SlowFiles(Files):
    """A folder whose reads are as slow as told, and stop when told.

    Attributes:
        bytes_per_s: of all reads together; 0 = as fast as the disk.
        stall_after: so many bytes from now one read, and all behind it, wait `stall_s`; None = no.
    """

    def __init__(self, bytes_per_s: float = 0.0) -> None:
        self.bytes_per_s = bytes_per_s
        self.stall_after: int | None = None
        self.stall_s = 1.0
        self._free = 0.0
        self._order = threading.Lock()

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read, then wait until a disk of that rate would have answered."""
        done = super().read(fd, buffers, offset)
        with self._order:
            now = time.monotonic()
            self._free = max(self._free, now)
            if self.stall_after is not None:
                self.stall_after -= done
                if self.stall_after <= 0:
                    self.stall_after = None
                    self._free += self.stall_s
            if self.bytes_per_s:
                self._free += done / self.bytes_per_s
            wait_s = self._free - now
        if wait_s > 0:
            time.sleep(wait_s)
        return done

    def settle(self) -> None:
        """Wait until what was read so far has been answered."""
        time.sleep(max(0.0, self._free - time.monotonic()))


class BenchEngine(TierEngine):
    """One whose parts are switched off for comparison, which no user can do.

    Args:
        model: config of a geometry; the weights are random.
        config, files: see `TierEngine`.

    Attributes:
        beats: set to a list, it collects when tokens came out, once a step.
    """

    def __init__(
        self, model: dict[str, Any], config: CacheConfig, files: Files | None = None
    ) -> None:
        self.beats: list[float] | None = None
        super().__init__(ModelSource(config=model, weights="random"), config, files)

    def _receive(self, deltas: list[tuple[str, TokenDelta]]) -> None:
        if self.beats is not None:
            self.beats.append(time.perf_counter())
        super()._receive(deltas)

    @contextlib.contextmanager
    def decoding(self, count: int, length: int, rng: np.random.Generator) -> Iterator[None]:
        """So many requests decode meanwhile."""
        limit = self.engine.info.max_model_len - length
        open_ = [self.submit(self.prompt(length, rng), limit) for _ in range(count)]
        for _, answer in open_:
            answer.started.wait(120)
        try:
            yield
        finally:
            self.engine.abort([name for name, _ in open_])
            for _, answer in open_:
                answer.done.wait(60)

    def stored(self, prompt: Tokens) -> int:
        """How many of its blocks the shards hold."""
        keys = self.keys(prompt)
        held = [client.query(keys) for client in self._clients]
        return sum(any(column) for column in zip(*held, strict=True))

    def restart_shards(self, config: CacheConfig | None = None) -> None:
        """Close the shards and open them again from what lies on disk, or others."""
        self.flush()
        self.engine.clear_pool(120.0)
        self.config = config or self.config
        self._close_shards()
        self.engine.set_shards(self._open())

    def saving(self, on: bool) -> None:
        """Whether what is computed from now on is saved."""
        policy = self.config.admission if on else "none"
        saves = self.engine._scheduler.saves
        self.engine.call(lambda: setattr(saves, "_admission", policy))

    def tiers(self, on: bool) -> None:
        """Without them the engine neither looks up nor saves, as one that was made without."""
        costs = self.engine._costs if on else None
        self.engine.call(lambda: setattr(self.engine._scheduler.loads, "_cost", costs))
        self.saving(on)

    def forgive(self) -> None:
        """Plan with every source again, also those that were left out."""
        costs = self.engine._costs
        sources = costs._sources.values() if costs is not None else ()
        self.engine.call(lambda: [setattr(source, "out", False) for source in sources])


@contextlib.contextmanager
def scratch(parent: Path | None, keep: bool = False) -> Iterator[Path]:
    """A folder for the shards: a temporary one, or a named one that is kept when told."""
    if parent is not None and keep:
        parent.mkdir(parents=True, exist_ok=True)
        yield parent
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-tiers-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def model_limits(config: dict[str, Any]) -> int:
    """The longest sequence of a geometry."""
    return int(config["max_position_embeddings"])


class HitTimes(NamedTuple):
    """Seconds of one RAM hit, from `submit` on, and CPU seconds of all this process did for it.

    Attributes:
        ordered: hashed, looked for in the pool, and the lookup ordered.
        staged: the shard's answer is with the scheduler.
        first, last: the first and the last copy have been handed over.
        ready: all has landed and the step behind it is planned.
        cpu: until then.
    """

    ordered: float
    staged: float
    first: float
    last: float
    ready: float
    cpu: float


class _HandedOver(SameBytes):
    """A codec whose copies end at once: what a copy costs the host before the device has it."""

    def __init__(self) -> None:
        super().__init__(BlockCopier(torch.device("cpu"), lambda step: None, PinnedArenas()))
        self.times: list[float] = []

    def load(self, pool: KVPool, blocks: Numbers, slots: HostBlocks) -> None:
        Rows(pool.buffer, blocks).addresses()
        slots.addresses()  # type: ignore[union-attr]
        self.times.append(time.perf_counter())


class HitPath:
    """Scheduler and transfer over one shard, without a model: from a prompt to the copies of its
    blocks from RAM, and back. Nothing is copied.

    Args:
        client: of the shard.
        num_blocks: of the longest prompt, and of the pool.
    """

    BLOCK = 16
    ROOT = root_key({"bench": "hit path"})

    def __init__(self, client: ShardClient, num_blocks: int) -> None:
        self._client, self._names = client, 0
        layout = KVLayout.from_specs([KVSpec(1, 32, 32, "float32")], self.BLOCK)
        self._nbytes = layout.groups[0].block_bytes
        pools = [KVPool(layout.groups[0], num_blocks + 8, "cpu")]
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._scheduler = Scheduler(
            PrefixCache(layout.groups, num_blocks + 7),
            lambda salt: (self.ROOT,),
            max_requests=8,
            max_batch_tokens=2048,
            max_prefill_tokens=8192,
            cost=CostModel(self.BLOCK, prefill_tokens=8192, loads="all"),
            admission="none",
            lookup_patience_s=math.inf,
        )
        self._tiers = LowerTiers(
            *(pools, [client], None),
            scheduler=self._scheduler,
            post=self._inbox.put,
            carry_out=self._carry_out,
            device=torch.device("cpu"),
            event_of=lambda step: None,
            namespace_of=lambda salt: "bench",
            resting=threading.Event(),
            metrics=Metrics(),
        )
        self._copies = _HandedOver()
        self._tiers._loader._make_codec = lambda: self._copies

    def store(self, prompt: TokenIds) -> None:
        """Have the shard hold a prompt's blocks in RAM."""
        keys = chain_keys(self.ROOT, prompt.array, self.BLOCK)
        slots = self._client.reserve(self._nbytes, len(keys))
        parents = [self.ROOT, *keys]
        self._client.commit(
            [CommitItem(*slot, *names) for slot, *names in zip(slots, keys, parents, strict=False)]
        )

    def ask(self, prompt: TokenIds) -> HitTimes:
        """One request whose prefix lies in RAM, all of it."""
        self._names += 1
        self._copies.times.clear()
        sampling = SamplingParams(1, 1)
        request = Request(f"r{self._names}", "bench", prompt, sampling, cache="read-only")
        began_cpu, began = time.process_time(), time.perf_counter()
        self._carry_out(self._scheduler.add(request, time.monotonic()))
        ordered = time.perf_counter()
        staged = 0.0
        while True:
            out = self._scheduler.schedule(time.monotonic())
            self._carry_out(out)
            if out.plan is not None:
                break
            self._inbox.get(timeout=10)()
            staged = staged or time.perf_counter()
        ready, cpu = time.perf_counter(), time.process_time() - began_cpu
        result = StepResult(out.plan.step, (1,))
        done = self._scheduler.on_result(result, time.monotonic())
        self._carry_out(done)
        (delta,) = (delta for _, delta in done.deltas)
        loaded = (delta.reused_tokens or {}).get("ram", 0)
        assert loaded == len(prompt) // self.BLOCK * self.BLOCK, f"{loaded} tokens were loaded"
        self._scheduler.cache.evict_idle()
        times = (ordered, staged, self._copies.times[0], self._copies.times[-1], ready)
        return HitTimes(*(at - began for at in times), cpu)

    def prompt(self, num_blocks: int, seed: int) -> TokenIds:
        """Random tokens: whole blocks and a question."""
        rng = np.random.default_rng(seed)
        return TokenIds(rng.integers(10, 100_000, size=num_blocks * self.BLOCK + self.BLOCK // 2))

    def close(self) -> None:
        """End the transfer's threads."""
        self._tiers.close()

    def _carry_out(self, schedule: Schedule) -> None:
        self._tiers.carry_out(schedule)
