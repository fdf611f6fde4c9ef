"""What saving and lookups cost the interpreter, without a model and without a device.

The scheduler, the transfer and a shard of one process, as in bench_tiers.py; nothing is copied,
checksummed, read or written, and a make-believe device takes its time while the interpreter is
free. What is left is Python's own work, which a step of the engine waits for.

    python scripts/bench_bursts.py [--only save lookup] [--rows 64] [--rounds 3] [--json FILE]

save: rows that decode and end a block in the same step, with saving off and on. The gap between two
tokens is what a client sees; of the engine's thread is told what it does in a turn in which blocks
end, and in the others; of each other thread what it takes of the CPU for the blocks of one such
step. lookup: requests whose prefix lies on disk, of a model that computes faster than the disk
reads (Qwen3-0.6B's geometry): from `add` to the plan that computes all of it, and the CPU of all
threads until nothing is leased any more.
"""

from __future__ import annotations

import gc
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_common import Report, Row, parser, summarise
from tier_world import scratch

from litecache.engine.kv_layout import KVLayout, KVPool, KVSpec
from litecache.engine.scheduling.cost_model import CostModel
from litecache.engine.scheduling.orders import Schedule, StepPlan, StepResult
from litecache.engine.scheduling.prefix_cache import PrefixCache
from litecache.engine.scheduling.scheduler import Scheduler
from litecache.engine.tier_engine import Tokens
from litecache.engine.transfer.block_copier import HostBlocks, Numbers, Rows
from litecache.engine.transfer.codec import SameBytes
from litecache.engine.transfer.lower_tiers import LowerTiers
from litecache.hashing import chain_keys, root_key
from litecache.metrics import Metrics
from litecache.storage import LocalShardClient, ShardStore, block_io
from litecache.storage.disk import slab
from litecache.storage.disk.files import Files
from litecache.storage.protocol import CommitItem
from litecache.threads import take_short_turns
from litecache.token_ids import TokenIds
from litecache.types import Request, SamplingParams

BLOCK = 16
ROOT = root_key({"bench": "bursts"})
STEP_S, LAUNCH_S, LAUNCHES = 5.7e-3, 1e-3, 20
"""Of a step: the device's time, the host's for launching it, and how often that lets others run."""
NBYTES = 4096
BYTES_8B, BYTES_06B = 2 << 20, 1_835_008
"""Of blocks of real geometries: requests hold as many blocks as they would of those."""
DISK_RATE = 1.8e9
STEPS_06B = ((64, 5.3e-3), (576, 6e-3), (2112, 15e-3), (8256, 32.8e-3), (32_832, 0.271))
"""Tokens, and seconds that an H200 took for them, of 29 November 2026."""


class NoFiles(Files):
    """A folder whose slab takes everything and keeps nothing."""

    def write(self, fd: int, buffers: Any, offset: int) -> int:
        """All of it is written."""
        return sum(map(len, buffers))

    def read(self, fd: int, buffers: Any, offset: int) -> int:
        """All of it is read."""
        return sum(map(len, buffers))

    sync = staticmethod(lambda fd: None)


class NoCopies(SameBytes):
    """A codec whose copies end at once."""

    def save(self, pool: KVPool, blocks: Numbers, slots: HostBlocks) -> None:
        """Only the addresses are told."""
        Rows(pool.buffer, blocks).addresses()
        slots.addresses()  # type: ignore[union-attr]

    load = save


@contextmanager
def without_bytes(block_bytes: int) -> Iterator[None]:
    """No checksums, and requests of as many blocks as blocks of that size have."""
    scale, nothing = block_bytes // NBYTES, lambda memory, key: 0
    told = {
        "_MIN_REQUEST_BYTES": block_io._MIN_REQUEST_BYTES // scale,
        "MAX_REQUEST_BYTES": block_io.MAX_REQUEST_BYTES // scale,
        "_READ_BYTES": block_io._READ_BYTES // scale,
        "checksum": nothing,
    }
    with ExitStack() as undo:
        for module, name, value in (
            *((block_io, name, value) for name, value in told.items()),
            (slab, "checksum", nothing),
        ):
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


class World:
    """Scheduler and transfer over one shard.

    Args:
        folder: of the shard.
        num_blocks: of the pool.
        saves: whether what is computed is saved.
    """

    def __init__(self, folder: Path, num_blocks: int, *, saves: bool) -> None:
        layout = KVLayout.from_specs([KVSpec(1, 32, 32, "float32")], BLOCK)
        assert layout.groups[0].block_bytes == NBYTES
        pools = [KVPool(layout.groups[0], num_blocks + 8, "cpu")]
        self.store = ShardStore(
            str(folder), storage_bytes=1 << 30, ram_bytes=64 << 20, files=NoFiles()
        )
        self.client = LocalShardClient(self.store)
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.costs = CostModel(BLOCK, token_s=5e-6, step_s=2e-3, prefill_tokens=8192)
        self.scheduler = Scheduler(
            PrefixCache(layout.groups, num_blocks + 7),
            lambda salt: (ROOT,),
            max_requests=256,
            max_batch_tokens=2048,
            max_prefill_tokens=1 << 20,
            cost=self.costs,
            admission="all" if saves else "none",
            lookup_patience_s=10.0,
        )
        self.resting = threading.Event()
        self.tiers = LowerTiers(
            *(pools, [self.client], None),
            scheduler=self.scheduler,
            post=self.inbox.put,
            carry_out=self.tiers_carry_out,
            device=torch.device("cpu"),
            event_of=lambda step: None,
            namespace_of=lambda salt: "bench",
            resting=self.resting,
            metrics=Metrics(),
        )
        self.tiers._saver._codec = NoCopies(self.tiers._saver._codec.copier)
        self.beats: list[float] = []
        self.asked = 0

    def tiers_carry_out(self, schedule: Schedule) -> None:
        if schedule.deltas:
            self.beats.append(time.perf_counter())
        self.tiers.carry_out(schedule)

    def schedule(self) -> StepPlan | None:
        """The next step, its orders carried out."""
        out = self.scheduler.schedule(time.monotonic())
        self.tiers_carry_out(out)
        return out.plan

    def wait_for(self, ended_at: float) -> float:
        """Until the device is through with a step; seconds."""
        began = time.perf_counter()
        self.resting.set()
        if ended_at > began:
            time.sleep(ended_at - began)
        return time.perf_counter() - began

    def finish(self, plan: StepPlan) -> None:
        """A step has drawn a token for each row."""
        result = StepResult(plan.step, (11,) * sum(row.sample for row in plan.rows))
        tell = self.tiers_carry_out
        self.tiers_carry_out(self.scheduler.on_result(result, time.monotonic(), tell))

    def take(self, wait_s: float = 0.0) -> None:
        """Messages of the transfer's threads."""
        try:
            self.inbox.get(timeout=wait_s)()
            while True:
                self.inbox.get_nowait()()
        except queue.Empty:
            return

    def put_on_disk(self, prompt: Tokens) -> None:
        """The shard has a prompt's blocks on its disk alone."""
        keys = chain_keys(ROOT, prompt, BLOCK)
        slots = self.client.reserve(NBYTES, len(keys))
        named = zip(slots, keys, [ROOT, *keys], strict=False)
        self.client.commit([CommitItem(*slot, *names) for slot, *names in named])
        self.store.clear("ram")

    def ask(self, prompt: TokenIds) -> tuple[float, float]:
        """Seconds from a request's coming to its plan, and of CPU until nothing is leased."""
        self.asked += 1
        request = Request(f"r{self.asked}", "bench", prompt, SamplingParams(1, 1))
        began, began_cpu = time.perf_counter(), time.process_time()
        self.tiers_carry_out(self.scheduler.add(request, time.monotonic()))
        while (plan := self.schedule()) is None:
            self.take(10.0)
        planned_s = time.perf_counter() - began
        while self.scheduler.num_running:
            if plan is not None:
                self.finish(plan)
            self.take(0.0 if plan is not None else 0.001)
            plan = self.schedule()
        while self.store.stats()["leases"]:
            time.sleep(0.001)
        cpu_s = time.process_time() - began_cpu
        self.scheduler.cache.evict_idle()
        self.store.clear("ram")
        return planned_s, cpu_s

    def close(self) -> None:
        self.tiers.close()
        self.client.close()
        self.store.close()


def launch() -> None:
    """What a host does to launch a step: short pieces of Python, and calls that let others run."""
    for _ in range(LAUNCHES):
        until = time.thread_time() + LAUNCH_S / LAUNCHES
        while time.thread_time() < until:
            pass
        time.sleep(0)


def thread_work() -> dict[str, Work]:
    """What the threads of this process have done, by their names."""
    work: dict[str, Work] = {}
    for thread in threading.enumerate():
        folder = Path(f"/proc/self/task/{thread.native_id}")
        try:
            ran_s = int((folder / "schedstat").read_text().split()[0]) / 1e9
            status = (folder / "status").read_text()
        except OSError:
            continue
        slept = int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
        name = thread.name.rstrip("0123456789_-").removeprefix("litecache-")
        before = work.get(name, Work(0.0, 0))
        work[name] = Work(before.cpu_s + ran_s, before.sleeps + slept)
    return work


class Work(NamedTuple):
    """CPU of threads, and how often they went to sleep, for a lock or Python's own."""

    cpu_s: float
    sleeps: float


class Decoding(NamedTuple):
    """Gaps between tokens and turns of the engine's thread, ms; threads' work by burst."""

    gaps: list[float]
    ends: list[float]
    others: list[float]
    threads: dict[str, Work]


def decode(folder: Path, rows: int, steps: int, *, on: bool) -> Decoding:
    """Steps of rows that end their blocks together."""
    world = World(folder, rows * (steps // BLOCK + 4), saves=on)
    rng = np.random.default_rng(1)
    for row in range(rows):
        prompt = TokenIds(rng.integers(10, 100_000, size=BLOCK - 1))
        request = Request(f"r{row}", "bench", prompt, SamplingParams(steps + 2, steps + 2))
        world.tiers_carry_out(world.scheduler.add(request, time.monotonic()))
    running: list[tuple[StepPlan, float]] = []
    free_at, first = 0.0, 0
    times: dict[bool, list[float]] = {True: [], False: []}
    before: dict[str, Work] = {}
    while world.scheduler.num_running or world.scheduler.num_waiting:
        began, waited, ends = time.perf_counter(), 0.0, False
        plan = world.schedule()
        if plan is not None:
            launch()
            free_at = max(free_at, time.perf_counter()) + STEP_S
            running.append((plan, free_at))
        if len(running) > (plan is not None):
            done, ended_at = running.pop(0)
            waited = world.wait_for(ended_at)
            ends = any((row.start + row.num_tokens) % BLOCK == 0 for row in done.rows)
            world.finish(done)
        world.take()
        if plan is not None and len(plan.rows) == rows and plan.num_tokens == rows:
            if not before:
                before, first = thread_work(), len(world.beats)
            times[ends].append((time.perf_counter() - began - waited) * 1e3)
    gaps = np.diff(world.beats[first:]) * 1e3
    world.tiers.drain(10)
    bursts, threads = steps // BLOCK, {}
    for name, after in thread_work().items():
        cpu_s, sleeps = (b - a for a, b in zip(before.get(name, Work(0.0, 0)), after, strict=True))
        threads[name] = Work(cpu_s / bursts, sleeps / bursts)
    world.close()
    return Decoding(gaps.tolist(), times[True], times[False], threads)


def saving(report: Report, rows: int, rounds: int, steps: int) -> None:
    """Rows that end a block together, with saving off and on in turns."""
    found: dict[bool, list[Decoding]] = {False: [], True: []}
    for turn in range(rounds):
        for on in (False, True) if turn % 2 else (True, False):
            with scratch(None) as folder, without_bytes(BYTES_8B):
                gc.collect()
                gc.freeze()
                found[on].append(decode(folder, rows, steps, on=on))
    for on, runs in found.items():
        case = f"{rows} rows, saving {'on' if on else 'off'}"
        gaps = [run.gaps[: steps // BLOCK * BLOCK] for run in runs]
        report.add(_row(case, "gap of tokens, p50", [float(np.median(run)) for run in gaps], "ms"))
        longest = np.reshape(gaps, (-1, BLOCK)).max(axis=1)
        report.add(_row(case, "gap of tokens, longest of a block", longest.tolist(), "ms"))
        p99 = [float(np.percentile(run, 99)) for run in gaps]
        report.add(_row(case, "gap of tokens, p99", p99, "ms"))
        report.add(_row(case, "turn in which blocks end", [t for r in runs for t in r.ends], "ms"))
        report.add(_row(case, "turn", [t for run in runs for t in run.others], "ms"))
        for name in ("save", "io", "durability") if on else ():
            work = [run.threads[name] for run in runs]
            report.add(_row(case, f"CPU a burst: {name}", [w.cpu_s * 1e3 for w in work], "ms"))
            report.add(_row(case, f"sleeps a burst: {name}", [w.sleeps for w in work], ""))


def lookup(report: Report, rounds: int, lengths: Sequence[int]) -> None:
    """Prefixes on disk, all of which are computed."""
    for blocks in lengths:
        with scratch(None) as folder, without_bytes(BYTES_06B):
            world = World(folder, blocks + 64, saves=False)
            for tokens, seconds in STEPS_06B * 5:
                world.costs.note_step(
                    prefill_tokens=tokens, context_tokens=0, num_decodes=0, seconds=seconds
                )
            source = world.costs._source("disk:local")
            source.rate = source.best = DISK_RATE * NBYTES / BYTES_06B
            prompt = np.random.default_rng(blocks).integers(10, 99_999, size=blocks * BLOCK + 64)
            world.put_on_disk(prompt)
            gc.collect()
            gc.freeze()
            asked = [world.ask(TokenIds(prompt)) for _ in range(rounds + 1)][1:]
            world.close()
        case = f"lookup of {blocks} blocks on disk"
        report.add(_row(case, "submitted to planned", [one[0] * 1e3 for one in asked], "ms"))
        cpu = [one[1] * 1e6 / blocks for one in asked]
        report.add(_row(case, "CPU, until all is given back", cpu, "us a block"))


def _row(case: str, metric: str, samples: Sequence[float], unit: str) -> Row:
    figure = summarise(samples)
    return Row(case, metric, figure.median, unit, spread=figure.spread, samples=figure.samples)


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument("--only", nargs="+", choices=("save", "lookup"), default=["save", "lookup"])
    made.add_argument("--rows", type=int, default=64)
    made.add_argument("--rounds", type=int, default=3)
    options = made.parse_args()
    take_short_turns()
    report = Report("Python's work for saves and lookups", options.json)
    if "save" in options.only:
        saving(report, options.rows, options.rounds, 48 if options.quick else 256)
    if "lookup" in options.only:
        lookup(report, 4 * options.rounds, (128,) if options.quick else (128, 512, 2048))
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
