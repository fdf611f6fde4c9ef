"""The disk tier against the bare disk and memcpy, in the same run.

`--dir D` (required): where the store and the raw file lie. Raw and shard alternate in turns of 256
MiB; the figure is the median of the paired ratios. `--index` measures the key index instead.

    python scripts/bench_storage.py --dir /var/tmp/bench --json out.json --plot out.png
"""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from bench_common import Report, Row, alternate, parser, summarise

from litecache.storage import CommitItem, LocalShardClient, ShardStore, SlotRef

KIB, MIB = 1 << 10, 1 << 20
SIZES = {"360 KiB": 360 * KIB, "2 MiB": 2 * MIB, "16 MiB": 16 * MIB}
BATCH = 64
ROOT = bytes(16)


class RawFile:
    """Bare O_DIRECT `preadv`/`pwritev` of a preallocated file, the limit.

    Its memory is of the kind that processes can share (memfd), as any shard needs; the rate with
    private anonymous memory is reported beside it.
    """

    def __init__(self, path: str, nbytes: int, turn_bytes: int, *, shared: bool = True) -> None:
        self.nbytes, self.turn_bytes = nbytes, turn_bytes
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self.fd, 0, nbytes)
        memory_fd = os.memfd_create("raw") if shared else -1
        if shared:
            os.posix_fallocate(memory_fd, 0, turn_bytes)
        self.memory = mmap.mmap(memory_fd, turn_bytes)
        self.view = memoryview(self.memory)
        self.view[:] = np.random.default_rng(0).bytes(turn_bytes)
        self.at = 0
        for start in range(0, nbytes, turn_bytes):
            os.pwritev(self.fd, [self.view], start)
        os.fdatasync(self.fd)

    def turn(self, kind: str, threads: int, request: int) -> float:
        """GB/s of one turn; each goes on where the last one ended."""
        base = self.at
        self.at = (self.at + self.turn_bytes) % self.nbytes
        call = os.preadv if kind == "read" else os.pwritev

        def one(offset: int) -> None:
            call(self.fd, [self.view[offset : offset + request]], base + offset)

        with ThreadPoolExecutor(threads) as pool:
            begun = time.perf_counter()
            list(pool.map(one, range(0, self.turn_bytes, request)))
            if kind == "write":
                os.fdatasync(self.fd)
            return self.turn_bytes / (time.perf_counter() - begun) / 1e9

    def best(self, kind: str, quick: bool) -> tuple[int, int]:
        """Threads and request size that are fastest here."""
        threads = (2, 4) if quick else (1, 2, 4, 8)
        requests = (16 * MIB,) if quick else (4 * MIB, 8 * MIB, 16 * MIB)
        rates = {
            (t, r): max(self.turn(kind, t, r) for _ in range(2)) for t in threads for r in requests
        }
        return max(rates, key=lambda pair: rates[pair])

    def close(self) -> None:
        os.close(self.fd)


class Shard:
    """A store that is written and read through the shard's API in batches of 64 blocks."""

    def __init__(
        self, folder: str, block: int, disk: int, ram: int, turn_bytes: int, threads: int
    ) -> None:
        self.store = ShardStore(
            folder, storage_bytes=disk, ram_bytes=ram, io_threads=threads, fsync="interval"
        )
        self.client = LocalShardClient(self.store)
        self.block = block
        self.turn_blocks = turn_bytes // block
        self.batch = min(BATCH, self.turn_blocks)
        self.source = np.random.default_rng(1).integers(0, 256, turn_bytes, np.uint8)
        self.target = np.empty(turn_bytes, np.uint8)
        self.target[:] = 1
        self.own = memoryview(self.target)
        self.turns: list[list[bytes]] = []
        self.chunk = 0

    def write_turn(self) -> float:
        """GB/s from the first commit of filled slots until all of a turn's blocks are durable.

        The client's copy into the slots is not counted: on a GPU it is a DMA from the device.
        """
        keys = [os.urandom(16) for _ in range(self.turn_blocks)]
        items: list[CommitItem] = []
        while len(items) < len(keys):
            refs = self.client.reserve(self.block, min(self.batch, len(keys) - len(items)))
            if not refs:
                self.client.flush(60)
            for ref in refs:
                done = len(items)
                start = done * self.block
                self.client.arena.buffer(ref.slot, self.block)[:] = self.source[
                    start : start + self.block
                ].data
                parent = keys[done - 1] if done else ROOT
                items.append(CommitItem(ref.slot, ref.generation, keys[done], parent, "bench"))
        begun = time.perf_counter()
        for start in range(0, len(items), self.batch):
            self.client.commit(items[start : start + self.batch])
        report = self.client.flush(60)
        elapsed = time.perf_counter() - begun
        assert report.pending == 0, report
        self.turns.append(keys)
        return self.turn_blocks * self.block / elapsed / 1e9

    def _next_turn(self) -> list[bytes]:
        self.chunk = (self.chunk + 1) % len(self.turns)
        return self.turns[self.chunk]

    def read_turn(self) -> float:
        """GB/s of staging one turn's blocks from disk."""
        keys = self._next_turn()
        self.store.clear("ram")
        return self._stage(keys, copy=False)

    def hit_turn(self) -> float:
        """GB/s of staging one turn's blocks from RAM and copying them into an own buffer."""
        keys = self.turns[-1]
        self._stage(keys, copy=False)
        return self._stage(keys, copy=True)

    def _stage(self, keys: list[bytes], *, copy: bool) -> float:
        begun = time.perf_counter()
        window: list[tuple[int, list[SlotRef]]] = []
        hits = 0
        for start in range(0, len(keys), self.batch):
            results = self.client.stage(keys[start : start + self.batch])
            window.append((start, [SlotRef(r.slot, r.generation) for r in results if r.slot >= 0]))
            if len(window) > 2:
                hits += self._take(*window.pop(0), copy=copy)
        for start, refs in window:
            hits += self._take(start, refs, copy=copy)
        elapsed = time.perf_counter() - begun
        assert hits >= 0.99 * len(keys), f"only {hits} of {len(keys)} blocks hit"
        return hits * self.block / elapsed / 1e9

    def _take(self, start: int, refs: list[SlotRef], *, copy: bool) -> int:
        hits = sum(self.client.wait(refs))
        if copy:
            for i, ref in enumerate(refs):
                at = (start + i) * self.block
                self.own[at : at + self.block] = self.client.arena.buffer(ref.slot, self.block)
        self.client.release(refs)
        return hits

    def memcpy_turn(self) -> float:
        """GB/s of copying the same bytes block by block."""
        begun = time.perf_counter()
        for at in range(0, self.turn_blocks * self.block, self.block):
            self.target[at : at + self.block] = self.source[at : at + self.block]
        return self.turn_blocks * self.block / (time.perf_counter() - begun) / 1e9

    def close(self) -> None:
        self.client.close()
        self.store.close()


@contextmanager
def scratch(path: str) -> Iterator[str]:
    """An own folder below `path`, removed afterwards."""
    os.makedirs(path, exist_ok=True)
    folder = os.path.join(path, f"bench-storage-{os.getpid()}")
    os.mkdir(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def paired(
    report: Report, case: str, metric: str, ours: Callable[[], float], limit: Callable[[], float],
    rounds: int, peer: str,
) -> None:  # fmt: skip
    """Add the median of paired ratios, with quartiles, and both rates."""
    samples = alternate(rounds, {"ours": ours, "limit": limit})
    mine, bound = summarise(samples["ours"]), summarise(samples["limit"])
    ratio = summarise([a / b for a, b in zip(samples["ours"], samples["limit"], strict=True)])
    rate, limit_rate = mine.median, bound.median
    report.add(
        Row(case, metric, rate, "GB/s", limit_rate, ratio.median, peer, mine.spread, rounds),
        Row(case, f"{metric}, paired", ratio.median, "", 1, None, "ratio", ratio.spread, rounds),
    )


def bench_size(report: Report, folder: str, raw: RawFile, name: str, args: object) -> None:
    """All rows of one block size."""
    block = SIZES[name]
    rounds = args.rounds  # type: ignore[attr-defined]
    turn = raw.turn_bytes // block * block
    disk, ram = args.disk_bytes, args.ram_bytes  # type: ignore[attr-defined]
    shard = Shard(f"{folder}/shard-{block}", block, disk, ram, turn, args.threads)  # type: ignore[attr-defined]
    settings = {kind: raw.best(kind, args.quick) for kind in ("read", "write")}  # type: ignore[attr-defined]
    say = ", ".join(f"{k} {t} x {r >> 20} MiB" for k, (t, r) in settings.items())
    report.console.print(f"{name}: raw limit is best of threads x request: {say}")

    def bare(kind: str) -> Callable[[], float]:
        return lambda: raw.turn(kind, *settings[kind])

    try:
        paired(report, name, "write, new files", shard.write_turn, bare("write"),
               max(2, disk // turn // 2), "O_DIRECT pwritev")  # fmt: skip
        while shard.store.stats()["slab_bytes"] < disk * 0.9 or shard.turns[0:1] == []:
            before = len(shard.store)
            shard.write_turn()
            if len(shard.store) <= before:
                break
        keep = int(len(shard.store) // shard.turn_blocks) - 1
        shard.turns = shard.turns[-max(1, keep) :]
        paired(report, name, "write, overwriting", shard.write_turn, bare("write"), rounds,
               "O_DIRECT pwritev")  # fmt: skip
        shard.turns = shard.turns[-max(1, keep) :]
        paired(report, name, "cold read", shard.read_turn, bare("read"), rounds, "O_DIRECT preadv")
        shard.turns = shard.turns[-1:]
        paired(report, name, "RAM hit", shard.hit_turn, shard.memcpy_turn, rounds, "memcpy")
        age(shard, disk)
        paired(report, name, "cold read, aged store", shard.read_turn, bare("read"), rounds,
               "O_DIRECT preadv")  # fmt: skip
    finally:
        shard.close()
        shutil.rmtree(f"{folder}/shard-{block}", ignore_errors=True)


def age(shard: Shard, disk_bytes: int) -> None:
    """Churn of four times the capacity: chains of random length, some refreshed at random."""
    draw = np.random.default_rng(7)
    chains: list[list[bytes]] = []
    written = 0
    longest = max(2, min(shard.turn_blocks, BATCH * 2))
    while written < 4 * disk_bytes:
        keys: list[bytes] = []
        length = int(draw.integers(1, longest + 1))
        parent = ROOT
        while len(keys) < length:
            refs = shard.client.reserve(shard.block, min(16, length - len(keys)))
            if not refs:
                time.sleep(0.0005)
                continue
            items = []
            for ref in refs:
                key = os.urandom(16)
                shard.client.arena.buffer(ref.slot, shard.block)[:64] = os.urandom(64)
                items.append(CommitItem(ref.slot, ref.generation, key, parent, "aged"))
                keys.append(key)
                parent = key
            shard.client.commit(items)
        written += length * shard.block
        chains.append(keys)
        for i in draw.integers(max(0, len(chains) - 400), len(chains), 2):
            shard.client.touch(chains[int(i)])
    shard.client.flush(60)
    alive = [chain for chain in chains if all(shard.client.query(chain))]
    order = draw.permutation(len(alive))
    pool = [key for i in order for key in alive[int(i)]]
    size = shard.turn_blocks
    shard.turns = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]


def bench_light_mem(report: Report, folder: str, quick: bool) -> None:
    """The same tensor through `light_mem` and `PyLocalCacheService`, if `light_mem` is there."""
    try:
        import light_mem
        import torch
    except ImportError:
        report.console.print("light_mem is not importable: no comparison with it")
        return
    from litecache.storage import PyLocalCacheService

    pages, page_bytes = (64 if quick else 256), MIB
    kv = torch.randint(0, 256, (pages, page_bytes), dtype=torch.uint8)
    makers = {
        "light_mem": lambda: light_mem.PyLocalCacheService(
            kvcache_tensor=kv, file=f"{folder}/peer", storage_size=4 << 30, num_shard=4,
            num_worker=16),
        "litecache": lambda: PyLocalCacheService(
            kvcache_tensor=kv, file=f"{folder}/ours", storage_size=4 << 30, num_shard=4,
            num_worker=16),
    }  # fmt: skip
    for name, make in makers.items():
        service = make()
        for mode, label in (("w", "write until ready"), ("r", "read")):
            rates = []
            for turn in range(3):
                tokens = list(range(turn * pages, (turn + 1) * pages))
                begun = time.perf_counter()
                task = service.create(
                    tokens=tokens,
                    kv_page_indexer=torch.arange(pages, dtype=torch.int32),
                    mode=mode,
                )
                while not task.ready():
                    time.sleep(0.0005)
                rates.append(pages * page_bytes / (time.perf_counter() - begun) / 1e9)
            result = summarise(rates)
            report.add(Row("PyLocalCacheService", label, result.median, "GB/s", None, None, name,
                           result.spread, 3))  # fmt: skip


def bench_index(report: Report, quick: bool) -> None:
    """Query time of 1,000 keys in one call, and memory of ten million entries."""
    from litecache.storage.block_index import BlockIndex
    from litecache.storage.eviction.queues import Queues

    count = 1_000_000 if quick else 10_000_000
    before = _rss_bytes()
    index, queues = BlockIndex(), Queues("lru")
    draw = np.random.default_rng(0)
    words = draw.integers(0, 2**64, (count, 2), np.uint64)
    entries = index.insert_words(words)
    zeros = np.zeros(count, np.int64)
    queues.extend(entries, zeros + 90, zeros, words[:, 0])
    sample = words[draw.integers(0, count, 200_000)].tobytes()
    del words, zeros, entries
    used = _rss_bytes() - before
    report.add(Row("index", f"RSS of {count:,} entries", used / 1e9, "GB", 1.5, None, "bound"))
    report.add(Row("index", "bytes an entry", used / count, "B", 150, None, "bound"))
    keys = [sample[i : i + 16] for i in range(0, len(sample), 16)]
    times = []
    for start in range(0, len(keys), 1000):
        begun = time.perf_counter()
        found = index.find_many(keys[start : start + 1000])
        times.append((time.perf_counter() - begun) * 1e3)
        assert (found >= 0).all()
    result = summarise(times)
    report.add(
        Row("index", "query of 1,000 keys", result.median, "ms", 1.0, None, "bound", result.spread,
            result.samples)
    )  # fmt: skip


def _rss_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


def plot(report: Report, path: Path) -> None:
    """Bars of all rates beside their limits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report.rows if row.unit == "GB/s" and row.ratio is not None]
    metrics = list(dict.fromkeys(row.metric for row in rows))
    figure, axes = pyplot.subplots(1, len(metrics), figsize=(3 * len(metrics), 3.4))
    for axis, metric in zip(np.atleast_1d(axes), metrics, strict=True):
        mine = [row for row in rows if row.metric == metric]
        at = np.arange(len(mine))
        axis.bar(at - 0.2, [row.value for row in mine], 0.4, label="shard")
        axis.bar(at + 0.2, [row.limit or 0 for row in mine], 0.4, label=mine[0].peer)
        for x, row in zip(at, mine, strict=True):
            axis.text(x, row.value, f"{row.ratio:.2f}", ha="center", va="bottom", fontsize=8)
        axis.set_xticks(at, [row.case for row in mine], fontsize=8)
        axis.set_title(metric, fontsize=9)
        axis.set_ylabel("GB/s")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--dir", help="folder on the disk to measure")
    made.add_argument("--index", action="store_true", help="measure the key index instead")
    made.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES))
    made.add_argument("--rounds", type=int, default=20, help="pairs of turns")
    made.add_argument("--turn-mib", type=int, default=256)
    made.add_argument("--disk-bytes", type=int, default=3 << 30, help="size of the store")
    made.add_argument("--ram-bytes", type=int, default=1 << 30)
    made.add_argument("--threads", type=int, default=4, help="I/O threads of the shard")
    made.add_argument("--plot", type=Path, metavar="PNG")
    args = made.parse_args()
    report = Report("Disk tier", args.json)
    if args.index:
        bench_index(report, args.quick)
        report.show()
        return
    if not args.dir:
        made.error("--dir is required")
    if args.quick:
        args.sizes, args.rounds, args.turn_mib = ["2 MiB"], 3, 64
        args.disk_bytes, args.ram_bytes = 512 << 20, 256 << 20
    with scratch(os.path.abspath(args.dir)) as folder:
        turn = args.turn_mib << 20
        raw = RawFile(f"{folder}/raw", args.disk_bytes // turn * turn, turn)
        for name in args.sizes:
            bench_size(report, folder, raw, name, args)
        raw.close()
        private = RawFile(f"{folder}/raw", turn, turn, shared=False)
        for kind in ("read", "write"):
            threads, request = private.best(kind, args.quick)
            rates = summarise([private.turn(kind, threads, request) for _ in range(8)])
            report.add(
                Row("raw disk", f"{kind}, private memory", rates.median, "GB/s", None, None,
                    f"{threads} threads x {request >> 20} MiB", rates.spread, 8)
            )  # fmt: skip
        private.close()
        bench_light_mem(report, folder, args.quick)
    report.show()
    if args.plot:
        plot(report, args.plot)


if __name__ == "__main__":
    sys.exit(main())
