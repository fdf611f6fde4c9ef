"""The coordinator under many keys: rates, bytes and waits, measured in a real actor.

    python scripts/bench_coordinator.py [--blocks 1000000] [--full] [--json FILE] [--quick]

A `Coordinator` actor takes the reports of two shards in batches of 4,096 keys, until it knows
`--blocks` of them (`--full`: ten million, about 2.5 GB). What happens inside is timed inside, by
the CPU time of its thread and by the clock: on a machine that others use, too, the clock also
counts their turns. Then 262,144 keys come and 524,288 go, by reports and with a shard that begins
another life, while a client calls all the time.

Exit status 1 where a line does not hold: 1,000,000 keys registered a second, or on a slower machine
0.4 of what a bare dict takes in the same run; 512 keys looked up within 2 ms of the actor's CPU
time, within 4 ms through a call; at most 250 bytes a block; no turn of more than 50 ms of CPU time.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from bench_common import Report, Row, own_ray, parser, summarise

from litecache.actors.coordinator import Coordinator, CoordinatorClient
from litecache.actors.locations import LocationReport
from litecache.actors.naming import NAMESPACE, coordinator_name
from litecache.storage.key_dict import BATCH_KEYS, split_keys

GROUP = "bench-coordinator"
COMING, GOING = 262_144, 524_288
LOOKED_UP, LOOKUPS = 512, 50
RATE, DICT_SHARE = 1e6, 0.4
LOOKUP_MS, CALL_MS, WAIT_MS = 2.0, 4.0, 50.0
BLOCK_BYTES = 250


def batch(shard: str, number: int) -> bytes:
    """The keys of one report; the same for the same number."""
    return random.Random(f"{shard} {number}").randbytes(16 * BATCH_KEYS)


def resident_bytes() -> int:
    """Memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


class Spent:
    """CPU time of this thread and time by the clock, in seconds, of one or more calls."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.clock: list[float] = []

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call and note."""
        cpu, clock = time.thread_time(), time.perf_counter()
        try:
            return function(*args)
        finally:
            self.cpu.append(time.thread_time() - cpu)
            self.clock.append(time.perf_counter() - clock)


# Inside the actor


def fill(actor: Any, shard: str, blocks: int) -> dict[str, Any]:
    """Take the reports of a shard, as the actor's method does."""
    located = actor._locations
    located.report(LocationReport(shard, f"node {shard}", 1, 0, (), part=0, last=True))
    before = resident_bytes()
    spent = Spent()
    count = -(-blocks // BATCH_KEYS)

    def take(fields: tuple[Any, ...]) -> None:
        assert located.report(LocationReport.unpacked(*fields))

    for number in range(count):
        fields = (shard, f"node {shard}", 1, number + 1, batch(shard, number), b"")
        spent.call(take, fields)
    return {
        "keys": count * BATCH_KEYS,
        "bytes": resident_bytes() - before,
        "cpu": spent.cpu,
        "clock": spent.clock,
    }


def bare(actor: Any, blocks: int) -> float:
    """Keys a second, by CPU time, into a dict that grows alike."""
    plain: dict[bytes, int] = {}
    spent = Spent()

    def take(joined: bytes) -> None:
        for key in split_keys(joined):
            plain[key] = 1

    for number in range(-(-blocks // BATCH_KEYS)):
        spent.call(take, batch("bare", number))
    return len(plain) / sum(spent.cpu)


def look_up(actor: Any, shard: str, batches: int) -> dict[str, list[float]]:
    """Where prefixes and blocks are, other keys each time."""
    found: dict[str, list[float]] = {}
    for name, method in (
        ("prefix_by_node", actor._locations.prefix_by_node),
        ("locate", actor._locations.locate),
    ):
        spent = Spent()
        for keys in some_keys(shard, batches):
            spent.call(method, keys)
        found[name], found[f"{name} clock"] = spent.cpu, spent.clock
    return found


def some_keys(shard: str, batches: int) -> list[list[bytes]]:
    """512 keys at a time, from all over the shard's."""
    rng = random.Random(0)
    numbers = rng.sample(range(batches), min(batches, 64))
    pool = [key for number in numbers for key in split_keys(batch(shard, number))]
    return [rng.sample(pool, LOOKED_UP) for _ in range(LOOKUPS)]


def watch(actor: Any) -> None:
    """Time every report that comes from now on."""
    spent = actor._spent = Spent()
    report = type(actor._locations).report.__get__(actor._locations)
    actor._locations.report = lambda message: spent.call(report, message)


def watched(actor: Any) -> tuple[float, float, int]:
    """The longest report since `watch`, CPU and clock, and how many keys there are."""
    spent = actor._spent
    return max(spent.cpu), max(spent.clock), len(actor._locations)


# Outside


class Sender:
    """One shard's reports, one after the other, as its thread sends them."""

    def __init__(self, client: CoordinatorClient, shard: str, seq: int = 0) -> None:
        self._client, self._shard, self._seq = client, shard, seq
        self.epoch = 1

    def send(self, added: bytes = b"", removed: bytes = b"") -> None:
        """One message of changes."""
        self._seq += 1
        fields = (self._shard, f"node {self._shard}", self.epoch, self._seq, added, removed)
        assert self._client.call("report_shard", *fields)

    def begin(self) -> None:
        """Another life, without keys."""
        self.epoch, self._seq = self.epoch + 1, 0
        fields = (self._shard, f"node {self._shard}", self.epoch, 0, b"", b"", 0, True)
        assert self._client.call("report_shard", *fields)


def waits(handle: Any, work: Callable[[], None]) -> dict[str, Any]:
    """Call all the time while something else is done: how long the calls took."""
    ray.get(handle.__ray_call__.remote(watch))
    client = CoordinatorClient(GROUP, 30.0)
    keys = split_keys(batch("a", 0))[:16]
    done = threading.Event()

    def run() -> None:
        try:
            work()
        finally:
            done.set()

    thread = threading.Thread(target=run)
    thread.start()
    spent: list[float] = []
    while not done.is_set():
        began = time.perf_counter()
        client.locate(keys, "")
        spent.append(time.perf_counter() - began)
    thread.join()
    cpu, clock, keys_left = ray.get(handle.__ray_call__.remote(watched))
    return {"calls": spent, "cpu": cpu, "clock": clock, "keys": keys_left}


class Bench:
    """The figures of one actor and how many promises were not held.

    Args:
        report: takes the rows.
        blocks: that the actor is to know.
    """

    def __init__(self, report: Report, blocks: int) -> None:
        self._report = report
        self._blocks = blocks
        self._case = f"{blocks:,} blocks"
        name = coordinator_name(GROUP)
        options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0}
        self._handle = ray.remote(Coordinator).options(**options).remote(GROUP, {})
        self._client = CoordinatorClient(GROUP, 30.0)
        self._batches = 0
        self.not_held = 0

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._handle)

    def _inside(self, function: Callable[..., Any], *args: Any) -> Any:
        return ray.get(self._handle.__ray_call__.remote(function, *args))

    def _promise(self, good: bool, text: str) -> str:
        self.not_held += not good
        return f"{text}: {'held' if good else 'NOT held'}"

    def register(self) -> None:
        """How fast keys are taken, and what they weigh."""
        filled = self._inside(fill, "a", self._blocks)
        self._batches = filled["keys"] // BATCH_KEYS
        rate = filled["keys"] / sum(filled["cpu"])
        plain = self._inside(bare, min(self._blocks, 2_000_000))
        text = f"a bare dict; {RATE:,.0f}, or {DICT_SHARE} of it"
        text = self._promise(rate >= RATE or rate >= DICT_SHARE * plain, text)
        by_clock = filled["keys"] / sum(filled["clock"])
        weight = filled["bytes"] / filled["keys"]
        self._report.add(
            Row(self._case, "registered, CPU time", rate, "keys/s", plain, rate / plain, text),
            Row(self._case, "registered, clock", by_clock, "keys/s"),
            Row(self._case, "memory", weight, "bytes/block", BLOCK_BYTES, weight / BLOCK_BYTES,
                self._promise(weight <= BLOCK_BYTES, "at most")),
        )  # fmt: skip

    def look_up(self) -> None:
        """How long 512 keys take, inside and through a call."""
        looked = self._inside(look_up, "a", self._batches)
        for name in ("prefix_by_node", "locate"):
            self._milliseconds(f"{name}, {LOOKED_UP} keys, CPU time", looked[name], LOOKUP_MS)
            self._milliseconds(f"{name}, {LOOKED_UP} keys, clock", looked[f"{name} clock"])
        calls = Spent()
        for keys in some_keys("a", self._batches):
            calls.call(self._client.locate, keys, "")
        self._milliseconds(f"a call that locates {LOOKED_UP} keys, clock", calls.clock, CALL_MS)

    def _milliseconds(self, metric: str, seconds: list[float], most: float | None = None) -> None:
        ms = summarise([each * 1e3 for each in seconds])
        text = ratio = None
        if most is not None:
            text, ratio = self._promise(ms.median <= most, "at most"), ms.median / most
        self._report.add(
            Row(self._case, metric, ms.median, "ms", most, ratio, text, ms.spread, ms.samples)
        )

    def wait(self, coming: int, going: int) -> None:
        """How long calls wait while so many keys come and go."""
        for shard in ("b", "c"):
            self._inside(fill, shard, going)
        known = Sender(self._client, "a", self._batches)
        leaving, restarting = (Sender(self._client, s, going // BATCH_KEYS) for s in "bc")
        first = self._batches * BATCH_KEYS

        def come() -> None:
            for number in range(coming // BATCH_KEYS):
                known.send(added=batch("more", number))

        def go() -> None:
            for number in range(going // BATCH_KEYS):
                leaving.send(removed=batch("b", number))

        def restart() -> None:
            restarting.begin()
            for _ in range(2 + (first + coming + going) // BATCH_KEYS):
                known.send()

        for what, work, left in (
            (f"while {coming:,} keys come", come, first + coming + 2 * going),
            (f"while {going:,} keys are removed", go, first + coming + going),
            (f"while a shard of {going:,} keys begins again", restart, first + coming),
        ):
            seen = waits(self._handle, work)
            assert seen["keys"] == left, f"{seen['keys']} keys are left, not {left}"
            turn, longest = seen["cpu"] * 1e3, max(seen["calls"]) * 1e3
            text = self._promise(turn <= WAIT_MS, "at most")
            for metric, value, peer, samples in (
                ("longest turn, CPU time,", turn, text, 1),
                ("longest turn, clock,", seen["clock"] * 1e3, "the same", 1),
                ("longest call, clock,", longest, "the same", len(seen["calls"])),
            ):
                self._report.add(
                    Row(self._case, f"{metric} {what}", value, "ms", WAIT_MS, value / WAIT_MS,
                        peer, samples=samples)
                )  # fmt: skip


def main() -> None:
    """Command line."""
    made = parser(__doc__ or "")
    made.add_argument("--blocks", type=int, default=1_000_000)
    made.add_argument("--full", action="store_true", help="ten million blocks")
    options = made.parse_args()
    blocks = 10_000_000 if options.full else 200_000 if options.quick else options.blocks
    report = Report("Coordinator", options.json, {"blocks": blocks})
    own_ray()
    bench = Bench(report, blocks)
    try:
        bench.register()
        bench.look_up()
        share = 8 if options.quick else 1
        bench.wait(COMING // share, GOING // share)
    finally:
        bench.close()
    report.show()
    sys.exit(1 if bench.not_held else 0)


if __name__ == "__main__":
    main()
