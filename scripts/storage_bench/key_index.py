"""The index alone: bytes a block at any size, the longest call, and the calls of a store.

`--against DIR` compares the store's calls with those of another checkout, in alternating turns:
each side is a process of its own that measures when it is told to.
"""

from __future__ import annotations

import gc
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench_common import REPOSITORY, Report, Row, alternate, summarise

_MOST_BYTES, _MOST_MS = 250.0, 50.0
_CHAIN = 128
_PIECE = 64
_SIZES = (1_000_000, 3_000_000, 6_000_000, 10_000_000)
_CALLS = ("stage of 64", "query of 1,000", "eviction, lru", "eviction, s3fifo")
_GOALS = (2.0, 1.6, 10.0, 10.0)
_EVICTION_BLOCKS = 200_000


def bench_index(report: Report, quick: bool, against: Path | None) -> None:
    """Add the rows; `quick` stops at a million blocks and takes few turns."""
    sizes = _SIZES[:1] if quick else _SIZES
    for what in ("shard", "coordinator"):
        done = subprocess.run(
            [sys.executable, __file__, what, *map(str, sizes)],
            env={**os.environ, "PYTHONPATH": _path(REPOSITORY)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        for line in done.stdout.splitlines():
            size, per_block, longest, waited = line.split()
            case = f"{what}, {int(size):,} blocks"
            report.add(
                Row(case, "most bytes a block", float(per_block), "B", _MOST_BYTES, None,
                    "bound"),
                Row(case, "longest call, CPU", float(longest), "ms", _MOST_MS, None, "bound"),
                Row(case, "longest call, with what else the machine did", float(waited), "ms"),
            )  # fmt: skip
    _bench_calls(report, 3 if quick else 15, against)


def _path(tree: Path) -> str:
    return f"{tree}:{REPOSITORY / 'scripts'}"


def _bench_calls(report: Report, rounds: int, against: Path | None) -> None:
    sides = {"this": _Side(REPOSITORY)} | ({"other": _Side(against)} if against else {})
    for call, goal in zip(_CALLS, _GOALS, strict=True):
        contestants = {name: side.measure(call) for name, side in sides.items()}
        samples = alternate(rounds, contestants)
        mine = summarise(samples["this"])
        ratio = None
        if against:
            pairs = zip(samples["other"], samples["this"], strict=True)
            ratio = summarise([theirs / ours for theirs, ours in pairs]).median
        peer = f"{against}, goal {goal} times as fast" if against else None
        limit = summarise(samples["other"]).median if against else None
        report.add(
            Row("store", call, mine.median, "us", limit, ratio, peer, mine.spread, mine.samples)
        )
    for side in sides.values():
        side.close()


class _Side:
    """A process that imports LiteCache from one checkout."""

    def __init__(self, tree: Path) -> None:
        self._child = subprocess.Popen(
            [sys.executable, __file__, "calls"],
            env={**os.environ, "PYTHONPATH": _path(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, call: str) -> Callable[[], float]:
        """A function that returns one sample of a call, in microseconds."""

        def sample() -> float:
            assert self._child.stdin is not None
            assert self._child.stdout is not None
            self._child.stdin.write(call + "\n")
            self._child.stdin.flush()
            return float(self._child.stdout.readline())

        return sample

    def close(self) -> None:
        """End the process."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def _rss_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


def _grow(sizes: Sequence[int], add: Callable[[list[bytes]], None]) -> None:
    """Add chains of random keys piece by piece and print what it took, at each size."""
    draw = random.Random(0)
    gc.freeze()
    before, count, next_sample = _rss_bytes(), 0, 500_000
    longest = waited = most = 0.0
    for size in sizes:
        while count < size:
            raw = draw.randbytes(16 * _PIECE)
            keys = [raw[at : at + 16] for at in range(0, len(raw), 16)]
            begun, begun_cpu = time.perf_counter(), time.thread_time()
            add(keys)
            longest = max(longest, time.thread_time() - begun_cpu)
            waited = max(waited, time.perf_counter() - begun)
            count += len(keys)
            # a part or a column grows every few thousand blocks: look often
            if count >= next_sample:
                most = max(most, (_rss_bytes() - before) / count)
                next_sample += 8192
        print(count, most, longest * 1e3, waited * 1e3, flush=True)
        longest = waited = most = 0.0


def _grow_shard(sizes: Sequence[int]) -> None:
    from litecache.storage.block_index import BlockIndex
    from litecache.storage.eviction.queues import Queues

    index = BlockIndex()
    queues = Queues("lru", index)
    last, chained = bytes(16), 0

    def add(keys: list[bytes]) -> None:
        nonlocal last, chained
        parent = last if chained else bytes(16)
        for key in keys:
            entry = index.insert(key, parent)
            index.disk[entry], index.pages[entry] = entry + 1, 90
            queues.insert(entry, 90, 0)
            parent = key
        last, chained = parent, (chained + len(keys)) % _CHAIN

    _grow(sizes, add)


def _grow_coordinator(sizes: Sequence[int]) -> None:
    from litecache.actors.locations import LocationMap, LocationReport

    located = LocationMap()
    located.report(LocationReport("a", "n", 1, 0, [], part=0, last=True))
    waiting: list[bytes] = []
    seq = 0

    def add(keys: list[bytes]) -> None:
        nonlocal seq
        waiting.extend(keys)
        if len(waiting) >= 4096:
            seq += 1
            located.report(LocationReport("a", "n", 1, seq, waiting))
            waiting.clear()

    _grow(sizes, add)


class _Calls:
    """The measured calls over stores of RAM alone, so that no disk takes part."""

    def __init__(self) -> None:
        from litecache.storage import LocalShardClient, ShardStore

        self._make = ShardStore
        self._attach = LocalShardClient
        self._store = ShardStore(None, ram_bytes=64 << 20, io_threads=0)
        self._client = LocalShardClient(self._store)
        self._keys = [random.Random(n).randbytes(16) for n in range(8192)]
        self._put(self._client, self._keys)
        self._full: dict[str, LocalShardClient] = {}
        self._numbers = iter(range(1 << 40))

    @staticmethod
    def _put(client: object, keys: Sequence[bytes]) -> None:
        from litecache.storage import CommitItem

        for start in range(0, len(keys), _PIECE):
            parent, items = bytes(16), []
            slots = client.reserve(4096, len(keys[start : start + _PIECE]))  # type: ignore[attr-defined]
            for slot, key in zip(slots, keys[start : start + _PIECE], strict=True):
                items.append(CommitItem(*slot, key, parent, "bench"))
                parent = key
            client.commit(items)  # type: ignore[attr-defined]

    def stage(self) -> float:
        """Microseconds of a stage of 64 keys of a chain, all in RAM."""
        from litecache.storage import SlotRef

        times = []
        for start in range(0, len(self._keys), _PIECE):
            keys = [bytes(bytearray(key)) for key in self._keys[start : start + _PIECE]]
            begun = time.perf_counter()
            results = self._client.stage(keys)
            times.append(time.perf_counter() - begun)
            self._client.release([SlotRef(r.slot, r.generation) for r in results])
        return summarise(times).median * 1e6

    def query(self) -> float:
        """Microseconds of a query of 1,000 keys that are there."""
        times = []
        for start in range(0, len(self._keys) - 1000, 250):
            keys = [bytes(bytearray(key)) for key in self._keys[start : start + 1000]]
            begun = time.perf_counter()
            assert all(self._client.query(keys))
            times.append(time.perf_counter() - begun)
        return summarise(times).median * 1e6

    def evict(self, policy: str) -> float:
        """Microseconds of a reservation that evicts one of 200,000 blocks."""
        if policy not in self._full:
            store = self._make(
                None, ram_bytes=_EVICTION_BLOCKS * 4096, io_threads=0, eviction=policy
            )
            client = self._full[policy] = self._attach(store)
            self._put(client, [self._fresh() for _ in range(_EVICTION_BLOCKS // _PIECE * _PIECE)])
        client, times = self._full[policy], []
        while len(times) < 20:
            begun = time.perf_counter()
            (slot,) = client.reserve(4096, 1)
            times.append(time.perf_counter() - begun)
            from litecache.storage import CommitItem

            client.commit([CommitItem(*slot, self._fresh(), bytes(16), "bench")])
        return sum(times) / len(times) * 1e6

    def _fresh(self) -> bytes:
        return random.Random(-1 - next(self._numbers)).randbytes(16)


def _serve_calls() -> None:
    calls = _Calls()
    ways = dict(
        zip(
            _CALLS,
            (calls.stage, calls.query, lambda: calls.evict("lru"), lambda: calls.evict("s3fifo")),
            strict=True,
        )
    )
    for line in sys.stdin:
        print(ways[line.rstrip("\n")](), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "calls":
        _serve_calls()
    else:
        grow = {"shard": _grow_shard, "coordinator": _grow_coordinator}[sys.argv[1]]
        grow([int(size) for size in sys.argv[2:]])
