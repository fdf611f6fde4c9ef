"""Mutated stores: no crash, no hang, no wrong block, and untouched blocks still hit.

A sound store is made once per process; each round mutates one of its files (bit flips, cuts,
splices, zeroed runs, gigantic lengths, old or foreign pieces, forged record fields), opens it and
reads every block. A store may refuse a file of another format with a LiteCacheError, nothing else.
Rounds are numbered: round N of a seed is the same in every run, so `--first N` goes on where a run
was stopped, and `--first N --count 1` repeats the round that a failure names.

    python scripts/fuzz_storage.py --count 100000
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench_common import Report, Row, parser
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "storage"))

from fuzz_world import FuzzStore, Outcome

ROUNDS = 200
HANG_S = 60


class Part(NamedTuple):
    """What a run of rounds saw."""

    outcome: Outcome
    rounds: int
    slowest_s: float
    failures: list[str]


class HangError(Exception):
    """A round took too long."""


def rounds(seed: int, first: int, count: int) -> Part:
    """Run some rounds; any exception but a LiteCacheError is a failure that names its round."""
    logging.disable(logging.CRITICAL)
    total, slowest, failures = Outcome(), 0.0, []
    signal.signal(signal.SIGALRM, hang)
    fuzz = FuzzStore()
    try:
        for number in range(first, first + count):
            begun = time.monotonic()
            signal.alarm(HANG_S)
            try:
                outcome = fuzz.round(random.Random(seed * 1_000_003 + number))
            except Exception as error:
                failures.append(f"round {number}: {type(error).__name__}: {error}")
            else:
                total += outcome
                if outcome.wrong or outcome.hits < outcome.untouched:
                    failures.append(f"round {number}: {outcome}")
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.monotonic() - begun)
    finally:
        fuzz.close()
    return Part(total, count, slowest, failures)


def hang(number: int, frame: object) -> None:
    raise HangError(f"longer than {HANG_S} s")


def work(job: tuple[int, int, int]) -> Part:
    return rounds(*job)


def all_parts(seed: int, first: int, count: int, processes: int) -> Iterator[Part]:
    """The rounds, spread over processes."""
    jobs = [
        (seed, start, min(ROUNDS, first + count - start))
        for start in range(first, first + count, ROUNDS)
    ]
    if processes == 1:
        yield from map(work, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(work, jobs)


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--count", type=int, default=100_000)
    made.add_argument("--first", type=int, default=0, help="number of the first round")
    made.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = made.parse_args()
    count = 500 if args.quick else args.count
    report = Report("Mutated files", args.json)
    total, slowest, failures = Outcome(), 0.0, []
    begun = time.monotonic()
    parts = all_parts(args.seed, args.first, count, args.processes)
    steps = -(-count // ROUNDS)
    for part in track(parts, f"{count} mutations", steps, console=report.console):
        total += part.outcome
        slowest = max(slowest, part.slowest_s)
        failures += part.failures
        for failure in part.failures:
            report.console.print(f"[red]seed {args.seed}, {failure}")
    report.add(
        Row("fuzz", "mutations", count, ""),
        Row("fuzz", "refused with a clear error", total.refused, ""),
        Row("fuzz", "untouched blocks asked", total.untouched, ""),
        Row("fuzz", "untouched blocks hit", total.hits / max(1, total.untouched), "", 1.0),
        Row("fuzz", "touched blocks that still hit, right", total.touched_hits, ""),
        Row("fuzz", "wrong blocks", total.wrong, "", 0),
        Row("fuzz", "failed rounds", len(failures), "", 0),
        Row("fuzz", "slowest round", slowest, "s"),
        Row("fuzz", "time", time.monotonic() - begun, "s"),
    )
    report.show()
    good = not failures and not total.wrong and total.hits == total.untouched
    report.console.print("every promise held" if good else "[red]a promise was broken")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
