"""Chaos in mid-load: shards killed, stopped and restarted while prefixes load and compute at once.

    python scripts/chaos_loads.py [--splits 500] [--seed 0] [--json FILE]

An engine in this process (a tiny random model in float32) over two shard actors of a Ray of the
script's own, as a replica has them. Prompts of shared prefixes are asked again and again, four at a
time; each load is forced to begin at a random block. A moment after such a plan one of the shards
is killed with SIGKILL, stopped for up to three seconds, or closed in order and started again; Ray
brings it back over its folder. Until `--splits` prompts were partly loaded and partly computed, and
a tenth as many faults were over, every answer must have the tokens of an engine without tiers. At
the end the books of engine and
shards must be in order, no lease held, and no descriptor, thread, mapping, shared memory file,
memory or process more than before. Exits 1 otherwise.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from bench_common import Report, Row, parser
from chaos import MIB, end_ray, orphans, start_ray
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "engine"))

from engine_harness import Harness, family_source
from split_world import NEW_TOKENS, SMALL_STEPS, shared_prefixes, tokens_without_tiers
from tier_world import SlowFiles

from litecache.actors.calls import result
from litecache.actors.shard_client import AttachedShards, RayShardClient
from litecache.actors.storage_shard import StorageShard
from litecache.errors import LiteCacheError

FAMILY = "llama"
PROMPTS = 40
TOGETHER = 4
SHARDS = ("a", "b")
# the prompts' blocks do not fit: RAM evicts, too
OPTIONS = {"storage_bytes": 16 * MIB, "ram_bytes": MIB, "fsync_interval_s": 0.05}
# a block takes 6 ms, about as long as to compute its tokens: most faults come in mid-load
DISK_BYTES_PER_S = 2e6
FAULTS = ("killed", "stopped", "restarted")
SETTLE_S = 60.0
# what Python, Ray and malloc keep comes and goes in steps
MORE_MEMORY = 24 * MIB
MORE_DESCRIPTORS = 3
MORE_THREADS = 6


class Shard(StorageShard):
    """Of no group, on a slow disk; tells whether its books are in order."""

    has_coordinator = False

    def __init__(self, group: str, index: int, options: dict[str, Any]) -> None:
        super().__init__(group, index, {**options, "files": SlowFiles(DISK_BYTES_PER_S)})

    def check_integrity(self) -> None:
        self._open_store.check_integrity()


def status_bytes(pid: int, *fields: str) -> int:
    """The sum of fields of /proc/PID/status, which are in KiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return sum(int(re.search(rf"^{name}:\s+(\d+) kB", text, re.M)[1]) << 10 for name in fields)  # type: ignore[index]


def figures(pid: int) -> dict[str, int]:
    """What a process holds; `arenas`: distinct ones that it maps."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "arenas": len(set(re.findall(r"memfd:(litecache-[0-9a-f]+)", maps))),
        "memory": status_bytes(pid, "RssAnon", "RssFile"),
    }


class World:
    """Engine, shards, and what is done to them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng, self.fault_rng = random.Random(seed), random.Random(f"faults {seed}")
        self.prompts = shared_prefixes(PROMPTS, self.rng)
        self.wanted = tokens_without_tiers(FAMILY, self.prompts)
        self.faults: Counter[str] = Counter()
        self.asked = self.splits = self.in_mid_load = 0
        self.reused: Counter[str] = Counter()
        self.problems: list[str] = []
        self._planned, self._over = threading.Event(), threading.Event()
        self._handles = {name: self._start_shard(n) for n, name in enumerate(SHARDS)}
        result([handle.info.remote() for handle in self._handles.values()], SETTLE_S, "starting")
        self.attached = AttachedShards(SHARDS, self._connect)
        self.harness = Harness(
            family_source(FAMILY), shards=self.attached.clients(), loads=self._place, **SMALL_STEPS
        )
        self.harness.engine._overlap = 1  # the next step is planned while one runs, as on a GPU
        self.attached.watch(self.harness.engine.set_shards)

    def _start_shard(self, index: int) -> Any:
        made = ray.remote(concurrency_groups={"bulk": 4}, max_restarts=-1)(Shard)
        options = {"directory": str(self.folder / f"shard-{index}"), **OPTIONS}
        return made.options(num_cpus=0, max_concurrency=8).remote("chaos", index, options)

    def _connect(self, name: str, on_lost: Callable[..., None]) -> RayShardClient:
        metrics = self.harness.engine.metrics if hasattr(self, "harness") else None
        return RayShardClient(self._handles[name], name, metrics=metrics, on_lost=on_lost)

    def _place(self, first: int, end: int) -> int:
        self._planned.set()
        return self.rng.randint(first, end)

    # Requests

    def ask(self) -> None:
        """Four prompts whose blocks are below the pool, as far as the shards are there."""
        rng = self.rng
        self.harness.engine.clear_pool()
        if rng.random() < 0.7:
            for handle in self._handles.values():
                handle.clear.remote("ram")
        self.check(rng.sample(range(PROMPTS), TOGETHER))
        for found, reused in zip(self.harness.found, self.harness.reused, strict=True):
            self.reused.update(reused)
            loaded = sum(reused.values()) - reused.get("gpu", 0)
            self.splits += 0 < loaded < sum(found.values()) - found.get("gpu", 0)

    def check(self, numbers: list[int]) -> None:
        """Ask prompts at once and compare."""
        given = self.harness.run([self.prompts[number] for number in numbers], NEW_TOKENS)
        self.asked += len(numbers)
        for number, tokens in zip(numbers, given, strict=True):
            if tokens != self.wanted[number]:
                self.problems.append(f"prompt {number}: {tokens} and not {self.wanted[number]}")

    # Faults

    def strike(self) -> None:
        """Until the run is over: a fault, a moment after a load was planned, to its end."""
        rng = self.fault_rng
        while not self._over.wait(rng.uniform(0, 0.3)):
            name, kind = rng.choice(SHARDS), rng.choice(FAULTS)
            try:
                pid = self.pid(name)
                self._planned.clear()
                if not self._planned.wait(5) or self._over.wait(rng.uniform(0, 0.02)):
                    continue
                under_way = len(self.harness.engine._scheduler.loads._copies)
                self._fault(name, kind, pid)
            except (LiteCacheError, ProcessLookupError):
                continue  # it is just coming back
            self.faults[kind] += 1
            self.in_mid_load += bool(under_way)

    def _fault(self, name: str, kind: str, pid: int) -> None:
        if kind == "killed":
            os.kill(pid, signal.SIGKILL)
        elif kind == "stopped":
            os.kill(pid, signal.SIGSTOP)
            self._over.wait(self.fault_rng.choice((0.05, 0.5, 3.0)) * self.fault_rng.random())
            os.kill(pid, signal.SIGCONT)
        else:
            result(self._handles[name].stop.remote(5.0), 10, "stop")
            ray.kill(self._handles[name], no_restart=False)

    def pid(self, name: str) -> int:
        return int(result(self._handles[name].info.remote(), 10, "info")["pid"])

    def run(self, splits: int, progress: Progress) -> None:
        """Ask and strike until so many prompts were split."""
        bar = progress.add_task("split loads", total=splits)
        striking = threading.Thread(target=self.strike, name="strike")
        striking.start()
        try:
            while not self.problems and (
                self.splits < splits
                or sum(self.faults.values()) < splits // 10
                or not self.in_mid_load
            ):
                # what is asked meanwhile finds one shard, or none
                if self.rng.random() < 0.3:
                    self._wait("all shards are attached", self._all_attached)
                self.ask()
                told = f"split loads, {self.asked} asked, {sum(self.faults.values())} faults"
                progress.update(bar, completed=self.splits, description=told)
        finally:
            self._over.set()
            striking.join()

    # Before and after

    def settle(self) -> None:
        """All shards are attached, and everything was asked, saved, and loaded again."""
        self._wait("all shards are attached", self._all_attached)
        for _ in range(2):
            self.check(list(range(PROMPTS)))
            self.harness.engine.flush()
            self.harness.engine.clear_pool()

    def figures(self) -> dict[str, dict[str, int]]:
        """Of this process and of the shards."""
        gc.collect()
        return {
            "engine": figures(os.getpid()),
            **{f"shard {n}": figures(self.pid(n)) for n in SHARDS},
        }

    def check_books(self) -> None:
        """Integrity of all parts; nothing is held."""
        self.harness.check()
        self._wait("no lease is held", lambda: not self._held())
        for name, handle in self._handles.items():
            result(handle.check_integrity.remote(), 30, f"{name}: check_integrity")

    def _held(self) -> dict[str, Any]:
        held: dict[str, Any] = {}
        for name, handle in self._handles.items():
            store = result(handle.stats.remote(), 10, "stats")["store"]
            held[f"{name} leases"] = store["leases"]
            held[f"{name} clients"] = store["clients"] - 1
            slots = store["ram_slots"]
            held |= {f"{name} {s}": n for s, n in slots.items() if s not in ("clean", "dirty")}
        return {what: count for what, count in held.items() if count}

    def _all_attached(self) -> bool:
        return len(self.attached.clients()) == len(SHARDS)

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SETTLE_S
        while True:
            with contextlib.suppress(LiteCacheError):
                if condition():
                    return
            if time.monotonic() > deadline:
                self.problems.append(f"not within {SETTLE_S:g} s: {what} {self._held()}")
                return
            time.sleep(0.1)

    def compare(self, before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> None:
        """What there is more of than before."""
        most = {"descriptors": MORE_DESCRIPTORS, "threads": MORE_THREADS, "arenas": 0}
        most["memory"] = MORE_MEMORY
        for process, counts in after.items():
            for what, count in counts.items():
                if count > before[process][what] + most[what]:
                    self.problems.append(
                        f"{process}: {count:,} {what} and not {before[process][what]:,}"
                    )

    def close(self) -> None:
        self._over.set()
        self.attached.close()
        clients = self.attached.clients()
        self.harness.close()
        for client in clients:
            client.close()
        for handle in self._handles.values():
            ray.kill(handle)


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--splits", type=int, default=500)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    splits = 20 if options.quick else options.splits
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # each fault is told many times
    report = Report("Chaos in mid-load", options.json)
    # short, because Ray makes sockets under it
    folder = Path(tempfile.mkdtemp(prefix="lc-cl-", dir="/tmp"))
    shared, begun = orphans(), time.monotonic()
    problems: list[str] = []
    try:
        start_ray(folder)
        world = World(folder, options.seed)
        problems = world.problems
        try:
            world.settle()
            before = world.figures()
            with Progress(console=report.console) as progress:
                world.run(splits, progress)
            world.settle()
            world.check_books()
            after = world.figures()
            world.compare(before, after)
            misses = world.harness.engine.metrics.by_label("litecache_misses", "reason")
        finally:
            world.close()
        report.add(Row("prompts", "asked", world.asked, ""))
        report.add(Row("prompts", "partly loaded, partly computed", world.splits, "", splits))
        report.add(*(Row("reused from", t, n, "tokens") for t, n in sorted(world.reused.items())))
        report.add(*(Row("shards", kind, world.faults[kind], "times") for kind in FAULTS))
        report.add(Row("shards", "of these while blocks were loading", world.in_mid_load, "times"))
        report.add(*(Row("misses", reason, n, "") for reason, n in sorted(misses.items())))
        for process, counts in after.items():
            for what, count in counts.items():
                unit = "B" if what == "memory" else ""
                limit = before[process][what]
                report.add(
                    Row(
                        process,
                        what,
                        count,
                        unit,
                        limit,
                        count / limit if limit else None,
                        "before",
                    )
                )
    finally:
        problems += end_ray(folder)
        shutil.rmtree(folder, ignore_errors=True)
    if new := orphans() - shared:
        problems.append(f"left in /dev/shm: {sorted(new)}")
    report.add(Row("all", "problems", len(problems), "", 0))
    report.add(Row("all", "time", time.monotonic() - begun, "s"))
    report.extra["problems"] = problems
    report.show()
    for problem in problems[:40]:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
