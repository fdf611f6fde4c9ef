"""Fault injection: power cuts and disk errors in a simulated file system, and real SIGKILLs.

`--count` faults are injected by the simulated disk (`tests/storage/fault_files.py`), `--kills` real
SIGKILLs hit a writing process, `--ray-kills` more hit a Ray actor. An oracle keeps its own sha256
of every block. Half of the kills come at random instants, the others just before the Nth file
operation of a kind, while the process writes or still replays. Exit status 1 on any wrong byte,
lost durable block, leak or hang, or when one of the three planted bugs is not caught.

    python scripts/fault_storage.py --seed 1 --count 20000 --kills 300 --ray-kills 20
"""

from __future__ import annotations

import collections
import itertools
import logging
import multiprocessing
import os
import random
import select
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bench_common import Report, Row, parser
from rich.progress import Progress, track

TESTS = Path(__file__).resolve().parents[1] / "tests" / "storage"
sys.path.insert(0, str(TESTS))

from fault_world import BUGS, BrokenPromiseError, Tally, first_violation, run_world  # noqa: E402
from storage_help import MIB, bytes_of, fast_folder, key_of  # noqa: E402
from test_kill9 import SIZES, Life, check_after_kill, kill_rounds  # noqa: E402

from litecache.storage import CommitItem, LocalShardClient, ShardStore  # noqa: E402

HANG_S = 120
WAVE = 32


class HangError(Exception):
    """A world took too long."""


def hang(number: int, frame: object) -> None:
    raise HangError(f"longer than {HANG_S} s")


def world(seed: int) -> tuple[int, Tally | str]:
    """One life of a store on a faulty disk: what it saw, or the promise that was broken."""
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANG_S)
    try:
        return seed, run_world(seed)
    except (BrokenPromiseError, AssertionError, HangError) as found:
        return seed, f"{type(found).__name__}: {found}"
    finally:
        signal.alarm(0)


def simulated(report: Report, seed: int, count: int, processes: int) -> bool:
    """Worlds on a faulty disk until `count` faults were injected."""
    tally = Tally()
    begun = time.monotonic()
    violations = 0
    with (
        multiprocessing.get_context("spawn").Pool(processes) as pool,
        Progress(console=report.console) as progress,
    ):
        bar = progress.add_task("faults of the simulated disk", total=count)
        # in waves, so that every world that was begun ends and cleans up
        for first in itertools.count(seed, WAVE):
            for number, seen in pool.imap(world, range(first, first + WAVE)):
                if isinstance(seen, str):
                    violations += 1
                    report.console.print(f"[red]seed {number}: {seen}")
                    continue
                tally.faults += seen.faults
                tally.cuts += seen.cuts
                tally.untouched += seen.untouched
                tally.hits += seen.hits
                progress.update(bar, completed=sum(tally.faults.values()))
            if sum(tally.faults.values()) >= count:
                break
    spent = time.monotonic() - begun
    for kind, number in sorted(tally.faults.items()):
        report.add(Row("simulated disk", f"faults: {kind}", number, ""))
    share = tally.hits / max(1, tally.untouched)
    report.add(
        Row("simulated disk", "faults in all", sum(tally.faults.values()), ""),
        Row("simulated disk", "power cuts", tally.cuts, ""),
        Row("simulated disk", "violations", violations, "", 0),
        Row("simulated disk", "untouched durable blocks hit", share, "", 0.95),
        Row("simulated disk", "time", spent, "s"),
    )
    return not violations and share >= 0.95


def planted(report: Report, seed: int) -> bool:
    """Each planted bug must be noticed."""
    caught = [first_violation(bug, range(seed, seed + 60)) for bug in BUGS]
    for bug, how in zip(BUGS, caught, strict=True):
        report.console.print(f"  planted '{bug}': {how or 'NOT CAUGHT'}")
    report.add(Row("planted bugs", "caught", sum(map(bool, caught)), "", len(BUGS)))
    return all(caught)


def kills(report: Report, seed: int, count: int) -> bool:
    """SIGKILLs of a writing process, from outside and at file operations."""
    begun = time.monotonic()
    where: collections.Counter[str] = collections.Counter()
    with Progress(console=report.console) as progress:
        bar = progress.add_task("SIGKILLs", total=count)

        def tell(life: Life) -> None:
            phase = "while writing" if life.opened else "during replay"
            where[f"at {life.where or 'a random instant'}, {phase}"] += 1
            progress.advance(bar)

        hits, asked = kill_rounds(count, seed, tell)
    for place, number in sorted(where.items()):
        report.add(Row("SIGKILL", place, number, ""))
    report.add(
        Row("SIGKILL", "kills", count, ""),
        Row("SIGKILL", "durable blocks hit", hits / max(1, asked), "", 1.0, samples=asked),
        Row("SIGKILL", "time", time.monotonic() - begun, "s"),
    )
    return hits == asked


class Writer:
    """What the Ray actor runs: stores blocks and says which are durable."""

    def __init__(self, folder: str, nbytes: int) -> None:
        self.store = ShardStore(
            folder, storage_bytes=48 * MIB, ram_bytes=8 * MIB, fsync_interval_s=0.02
        )
        self.client = LocalShardClient(self.store)
        self.nbytes = nbytes

    def pid(self) -> int:
        return os.getpid()

    def write(self, first: int, count: int) -> list[int]:
        items, parent = [], bytes(16)
        for number, ref in enumerate(self.client.reserve(self.nbytes, count), first):
            key = key_of(number)
            self.client.arena.buffer(ref.slot, self.nbytes)[:] = bytes_of(key, self.nbytes)
            items.append(CommitItem(*ref, key, parent, "ray"))
            parent = key
        self.client.commit(items)
        numbers = list(range(max(0, first - 64), first + count))
        return [n for n, d in zip(numbers, self.store.durable(map_keys(numbers)), strict=True) if d]


def map_keys(numbers: list[int]) -> list[bytes]:
    return [key_of(number) for number in numbers]


def ray_kills(report: Report, seed: int, count: int) -> bool:
    """SIGKILLs of a Ray actor that holds the store."""
    import ray

    path = f"{TESTS}:{Path(__file__).parent}"
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    draw = random.Random(seed)
    folder = fast_folder()
    hits = asked = number = 0
    try:
        actor_class: Any = ray.remote(Writer)
        for _ in track(range(count), "SIGKILLs of a Ray actor", console=report.console):
            nbytes = draw.choice(SIZES)
            actor = actor_class.remote(folder, nbytes)
            pid = ray.get(actor.pid.remote(), timeout=60)
            first, durable = number, set()
            stop = time.monotonic() + draw.uniform(0.05, 0.6)
            while time.monotonic() < stop:
                durable |= set(ray.get(actor.write.remote(number, 8), timeout=60))
                number += 8
            actor.write.remote(number, 8)
            kill_and_wait(pid)
            number += 8
            found, wanted = check_after_kill(folder, sorted(durable), first, number, nbytes)
            hits, asked = hits + found, asked + wanted
            number += 100
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    report.add(
        Row("SIGKILL of a Ray actor", "kills", count, ""),
        Row("SIGKILL of a Ray actor", "durable blocks hit", hits / max(1, asked), "", 1.0,
            samples=asked),
    )  # fmt: skip
    return hits == asked


def kill_and_wait(pid: int) -> None:
    """SIGKILL, then wait for the last thread: until then the kernel keeps its locks."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        assert poller.poll(30_000), "the actor did not die"
    finally:
        os.close(pidfd)


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--count", type=int, default=20_000, help="faults of the simulated disk")
    made.add_argument("--kills", type=int, default=300)
    made.add_argument("--ray-kills", type=int, default=20)
    made.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = made.parse_args()
    if args.quick:
        args.count, args.kills, args.ray_kills = 500, 5, 0
    logging.disable(logging.CRITICAL)
    report = Report("Faults", args.json)
    good = [
        planted(report, args.seed),
        simulated(report, args.seed * 1_000_000, args.count, args.processes),
    ]
    good.append(kills(report, args.seed, args.kills))
    if args.ray_kills:
        good.append(ray_kills(report, args.seed, args.ray_kills))
    report.show()
    report.console.print("every promise held" if all(good) else "[red]a promise was broken")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
