"""The first token by where its prefix lies: nowhere, in the GPU pool, in RAM, on disk.

Random weights of the geometries in scripts/geometries; engine and shards in this process, without
Ray. Every case is a prefix of `--lengths` tokens and a question of 64 more. A round asks cold
(tokens never seen), then the same prefix from RAM, from the pool and from disk, so that all are
pairs of one moment; figures are medians of `--pairs` rounds after one that is not counted. All
limits are measured in the same run: C(n) is its own cold curve, H(n) its own hits in the pool, D
what O_DIRECT reads of the shard's request size give, R what a pinned copy gives.

    python scripts/bench_tiers.py [--geometry NAME ...] [--lengths N ...] [--only CASE ...]
        [--pairs 7] [--decodes 16] [--disk-gbps 0.2] [--tier-codec int8] [--loads all|none|model]
        [--dir FOLDER] [--json FILE] [--plot FILE] [--quick] [--device cpu]

Cases: first (the first prompt of each size against the second), idle and busy (the engine idle, and
beside `--decodes` decodes), throttled (the disk at `--disk-gbps`), stalled (the disk stops for a
second in mid-load), restart (the shards closed and opened again), saving (cold and a decode step
with saving on and off), host (no model, no device: what the host does for a RAM hit of 512, 2,048
and 4,096 blocks, from `submit` to the copies handed over, with a shard of this process and with an
actor over its socket; `--only host` needs no GPU). The promises (docs/tiers.md):

    RAM    at most H(n) + 1.15 x bytes / R + 3 ms
    disk   at most 1.10 x (min over m of max(C(m), bytes(n - m) / D) + H(n)) + 3 ms,
           at 2,048 tokens at most C(n) + 3 ms
    hit    never slower than cold by more than 5 % or 3 ms, whichever is larger
    first  slower than the second by at most 10 % or 5 ms, whichever is larger
    host   the first copy within 2 ms of the plan, 2 us of CPU a block
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import Report, Row, geometry, parser, summarise
from storage_bench.backends import Actor, InProcess
from tier_world import GB, BenchEngine, HitPath, SlowFiles, model_limits, scratch

from litecache import CacheConfig
from litecache.engine.tier_engine import Tokens, copy_rate
from litecache.engine.worth import ColdCurve
from litecache.threads import take_short_turns

CASES = ("first", "idle", "busy", "throttled", "stalled", "restart", "saving", "host")
QUESTION = 64
DECODE_PROMPT = 512
HOST_BLOCK_US = 2.0
"""What a RAM hit may take of the CPU."""


class Bench:
    """One geometry: an engine over a folder, prompts and the limits of this run."""

    def __init__(self, name: str, config: dict[str, Any], options: Any, folder: Path) -> None:
        self.name, self.options, self.folder = name, options, folder
        self.question = 16 if options.quick else QUESTION
        self.lengths: list[int] = options.lengths
        self.rng = np.random.default_rng(int(time.time()) if not options.quick else 0)
        self.files = SlowFiles()
        fields: dict[str, Any] = {}
        if options.tier_codec:
            fields["tier_codec"] = options.tier_codec
        longest = max(self.lengths) + self.question + 64
        cache = CacheConfig(
            device=options.device,
            max_model_len=min(model_limits(config), max(longest, 4096)),
            num_blocks=options.num_blocks,
            ram_bytes=options.ram_bytes,
            storage_dir=str(folder),
            storage_bytes=options.storage_bytes,
            max_requests=64,
            **fields,
        )
        started = time.perf_counter()
        self.world = BenchEngine(config, cache, self.files)
        self.start_s = time.perf_counter() - started
        self.world.saving(False)
        self.curves = {"idle": ColdCurve(), "busy": ColdCurve()}
        self._prefixes: dict[int, Tokens] = {}
        self._disk: list[float] = []
        self._raw: Any = None
        self.copy = copy_rate(options.device)

    # Prompts

    def fresh(self, length: int) -> Tokens:
        """Tokens nobody has seen, the question's included."""
        return self.world.prompt(length + self.question, self.rng)

    def asked(self, prefix: Tokens) -> Tokens:
        """A prefix with a new question."""
        return np.concatenate([prefix, self.world.prompt(self.question, self.rng)])

    def prefix(self, length: int) -> Tokens:
        """The stored prefix of a length, the same in every run; computed and saved at first."""
        if length not in self._prefixes:
            tokens = self.world.prompt(length, np.random.default_rng(length))
            if self.world.stored(tokens) < len(self.world.keys(tokens)):
                self.world.saving(True)
                self.world.ask(self.asked(tokens))
                self.world.flush()
                self.world.saving(False)
                held, wanted = self.world.stored(tokens), len(self.world.keys(tokens))
                if held < wanted:
                    raise RuntimeError(f"{held} of {wanted} blocks of {length} tokens were saved")
            self._prefixes[length] = tokens
        return self._prefixes[length]

    # Limits

    def nbytes(self, tokens: float) -> float:
        """KV bytes of so many tokens as the tiers hold them."""
        size = self.world.config.block_size
        return tokens / size * self.world.block_bytes

    def read_disk(self) -> None:
        """One sample of D."""
        from litecache.storage.disk.raw_disk import MIB, RawDisk

        turn = 64 * MIB if self.options.quick else 512 * MIB
        if self._raw is None:
            self._raw = RawDisk(str(self.folder / "raw"), 2 * turn, turn)
        self._disk.append(self._raw.turn("read", 2, 16 * MIB) * GB)

    def trust_disk(self, prefix: Tokens) -> None:
        """Let the disk answer, so that the next plan asks it again after it had stalled."""
        self.files.settle()
        self.world.forgive()
        self.world.clear("ram")
        self.world.ask(self.asked(prefix))
        self.world.clear("gpu")

    def disk_rate(self) -> float:
        """D, bytes per second."""
        rate = statistics.median(self._disk)
        return min(rate, self.files.bytes_per_s or rate)

    def disk_limit(self, length: int, load: str, hit_ms: float, cold_ms: float) -> float:
        """What the issue promises of a disk hit, ms."""
        if length <= 2048:
            return cold_ms + 3
        at = np.arange(0, length + 1, self.world.config.block_size)
        load_ms = self.nbytes(length - at) / self.disk_rate() * 1e3
        best = float(np.maximum(self.curves[load](at), load_ms).min())
        return 1.10 * (best + hit_ms) + 3

    def ram_limit(self, length: int, hit_ms: float) -> float:
        """What the issue promises of a RAM hit, ms."""
        return hit_ms + 1.15 * self.nbytes(length) / self.copy * 1e3 + 3

    def close(self) -> None:
        """End the engine."""
        if self._raw is not None:
            self._raw.close()
        self.world.close()


def never_slower(cold_ms: float) -> float:
    """A hit may take so long."""
    return cold_ms + max(3.0, 0.05 * cold_ms)


def _row(case: str, metric: str, samples: Sequence[float], limit: float | None, says: str) -> Row:
    figure = summarise(samples)
    held = limit is None or figure.median <= limit
    ratio = None if limit is None else figure.median / limit
    peer = None if limit is None else f"{says}: {'held' if held else 'NOT held'}"
    spread, count = figure.spread, figure.samples
    return Row(case, metric, figure.median, "ms", limit, ratio, peer, spread, count)


def first_prompts(bench: Bench, report: Report) -> None:
    """The first prompt of each size in the engine's life against the second."""
    for length in bench.lengths:
        first, second = (bench.world.ask(bench.fresh(length)).first_ms for _ in range(2))
        bench.curves["idle"].add(length + bench.question, second)
        limit = second + max(5.0, 0.1 * second)
        row = _row(f"{bench.name} {length}", "first prompt", [first], limit, "second + 10 %")
        report.add(row)
        bench.world.clear("gpu")


def cold_curve(bench: Bench, load: str) -> None:
    """Points of C(n) between and below the lengths that are measured."""
    length = 256 if bench.options.quick else 512
    while length < max(bench.lengths):
        if length not in bench.lengths:
            for turn in range(2 if length > 8192 else 3):
                ms = bench.world.ask(bench.fresh(length)).first_ms
                if turn:
                    bench.curves[load].add(length + bench.question, ms)
                bench.world.clear("gpu")
        length *= 2


def by_source(
    bench: Bench, report: Report, load: str, *, only_disk: bool, stall: bool = False, name: str = ""
) -> None:
    """Cold, RAM, pool and disk in turns, for each length."""
    from contextlib import nullcontext

    world, options = bench.world, bench.options
    kinds = ("cold", "disk") if only_disk else ("cold", "RAM", "pool", "disk")
    for length in bench.lengths:
        prefix = bench.prefix(length)
        samples: dict[str, list[float]] = {kind: [] for kind in kinds}
        reused: dict[str, dict[str, int]] = {}
        for turn in range(-1, options.pairs):
            busy = world.decoding(options.decodes, DECODE_PROMPT // (8 if options.quick else 1),
                                  bench.rng) if load == "busy" else nullcontext()  # fmt: skip
            with busy:
                for kind in kinds:
                    if kind != "pool":
                        world.clear("gpu")
                    if kind == "RAM":
                        world.fill_ram(prefix)
                    if kind == "disk":
                        bench.read_disk()
                        if stall:
                            bench.trust_disk(prefix)
                            bench.files.stall_after = int(bench.nbytes(length) / 8)
                        world.clear("ram")
                    asked = bench.fresh(length) if kind == "cold" else bench.asked(prefix)
                    answer = world.ask(asked)
                    bench.files.stall_after = None
                    if turn >= 0:
                        samples[kind].append(answer.first_ms)
                        reused[kind] = answer.reused
                        if kind == "cold":
                            bench.curves[load].add(len(asked), answer.first_ms)
        _tell(bench, report, f"{bench.name} {name or load} {length}", load, length, samples, reused)


def _tell(
    bench: Bench, report: Report, case: str, load: str, length: int,
    samples: dict[str, list[float]], reused: dict[str, dict[str, int]],
) -> None:  # fmt: skip
    cold = statistics.median(samples["cold"])
    rows = [_row(case, "cold", samples["cold"], None, "")]
    hit = statistics.median(samples["pool"]) if "pool" in samples else None
    if hit is not None:
        rows.append(_row(case, "pool hit", samples["pool"], never_slower(cold), "cold + 5 %"))
        limit = bench.ram_limit(length, hit)
        rows.append(_row(case, "RAM hit", samples["RAM"], limit, "H + 1.15 bytes / R + 3 ms"))
    else:
        hit = 0.0
    slowest = never_slower(cold)
    if "pool" in samples:
        rows.append(
            _row(case, "RAM hit, never slower", samples["RAM"], slowest, "cold + 5 % or 3 ms")
        )
        limit = bench.disk_limit(length, load, hit, cold)
        says = "C + 3 ms" if length <= 2048 else "1.10 (min max(C, bytes / D) + H) + 3 ms"
        rows.append(_row(case, "disk hit", samples["disk"], limit, says))
    rows.append(
        _row(case, "disk hit, never slower", samples["disk"], slowest, "cold + 5 % or 3 ms")
    )
    for kind, tiers in reused.items():
        if kind in ("RAM", "disk"):
            loaded = sum(n for tier, n in tiers.items() if tier != "gpu")
            nbytes = bench.nbytes(loaded) / GB
            rows.append(Row(case, f"{kind} hit loaded", nbytes, "GB", bench.nbytes(length) / GB,
                            nbytes * GB / bench.nbytes(length), "all of the prefix"))  # fmt: skip
    report.add(*rows)


def restart(bench: Bench, report: Report) -> None:
    """Disk hits right after the shards were opened again, the arena untouched."""
    for length in bench.lengths:
        prefix = bench.prefix(length)
        cold = bench.world.ask(bench.fresh(length)).first_ms
        bench.world.restart_shards()
        ms = bench.world.ask(bench.asked(prefix)).first_ms
        says = "cold + 5 % or 3 ms"
        case = f"{bench.name} restart {length}"
        report.add(_row(case, "disk hit", [ms], never_slower(cold), says))


def saving(bench: Bench, report: Report) -> None:
    """What saving costs a cold prompt and a decode step."""
    world, length = bench.world, bench.lengths[min(1, len(bench.lengths) - 1)]
    batch, steps = (8, 16) if bench.options.quick else (64, 128)
    cold: dict[bool, list[float]] = {False: [], True: []}
    step: dict[bool, list[float]] = {False: [], True: []}
    gaps: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(-1, bench.options.pairs):
        for on in (False, True) if turn % 2 else (True, False):
            world.clear("gpu")
            world.saving(on)
            ms = world.ask(bench.fresh(length)).first_ms
            world.beats = beats = []
            asks = [world.submit(bench.fresh(256), steps)[1] for _ in range(batch)]
            for answer in asks:
                answer.done.wait(300)
            world.beats = None
            began, last = max(a.first for a in asks), max(a.last for a in asks)
            if turn >= 0:
                cold[on].append(ms)
                step[on].append((last - began) * 1e3 / (steps - 1))
                gaps[on] += list(np.diff([beat for beat in beats if began <= beat <= last]) * 1e3)
            world.flush()
    world.saving(False)
    name = bench.name
    off = statistics.median(cold[False])
    report.add(_row(f"{name} saving {length}", "cold", cold[True], off * 1.03, "off + 3 %"))
    off = statistics.median(step[False])
    says = "off + 2 %"
    report.add(_row(f"{name} saving decode {batch}", "step", step[True], off * 1.02, says))
    slow = {on: float(np.percentile(gaps[on], 99)) for on in gaps}
    row = _row(
        f"{name} saving decode {batch}", "step, p99", [slow[True]], slow[False] * 1.1, "off + 10 %"
    )
    report.add(row)


def host(report: Report, rounds: int, *, quick: bool) -> None:
    """What the host does for a RAM hit, without a model and without a copy."""
    take_short_turns()  # as a replica does
    lengths = (64, 256) if quick else (512, 2048, 4096)
    for backend in (InProcess,) if quick else (InProcess, Actor):
        shard = backend({"directory": None, "ram_bytes": 256 << 20})
        path = HitPath(shard.client, max(lengths))
        gc.collect()
        gc.freeze()
        for blocks in lengths:
            prompt = path.prompt(blocks, seed=blocks)
            path.store(prompt)
            times = [path.ask(prompt) for _ in range(rounds + 1)][1:]
            case = f"host {backend.name} {blocks} blocks"
            first = [(one.first - one.staged) * 1e3 for one in times]
            report.add(_row(case, "plan to the first copy", first, 2.0, "2 ms"))
            for metric in ("first", "last", "ready"):
                samples = [getattr(one, metric) * 1e3 for one in times]
                report.add(_row(case, f"submitted to {metric}", samples, None, ""))
            figure = summarise([one.cpu * 1e6 / blocks for one in times])
            held = "held" if figure.median <= HOST_BLOCK_US else "NOT held"
            report.add(
                Row(case, "CPU of this process", figure.median, "us a block", HOST_BLOCK_US,
                    figure.median / HOST_BLOCK_US, held, figure.spread, figure.samples)
            )  # fmt: skip
        path.close()
        shard.close()


def run(bench: Bench, report: Report, only: Sequence[str]) -> None:
    """The chosen cases of one geometry."""
    options, name = bench.options, bench.name
    report.add(Row(name, "start", bench.start_s, "s"))
    if "first" in only:
        first_prompts(bench, report)
    bench.read_disk()
    for load in ("idle", "busy"):
        if load in only:
            cold_curve(bench, "idle")
            if load == "busy":
                with bench.world.decoding(options.decodes, 64, bench.rng):
                    cold_curve(bench, "busy")
            by_source(bench, report, load, only_disk=False)
    if "throttled" in only:
        bench.files.bytes_per_s = options.disk_gbps * GB
        by_source(bench, report, "idle", only_disk=True, name=f"disk {options.disk_gbps:g} GB/s")
        bench.files.bytes_per_s = 0
    if "stalled" in only:
        by_source(bench, report, "idle", only_disk=True, stall=True, name="disk stalls 1 s")
    if "restart" in only:
        restart(bench, report)
    if "saving" in only:
        saving(bench, report)
    report.add(
        Row(name, "D, O_DIRECT reads", bench.disk_rate() / GB, "GB/s", samples=len(bench._disk)),
        Row(name, "R, host to pool", bench.copy / GB, "GB/s"),
        Row(name, "KV bytes", bench.nbytes(1), "bytes a token"),
    )
    costs = bench.world.engine.stats().get("costs")
    if costs:
        report.extra.setdefault("costs", {})[name] = costs
        if costs.get("first_token_error") is not None:
            error, count = costs["first_token_error"], costs["first_tokens"]
            report.add(
                Row(name, "predicted against actual", error * 100, "%", 15.0, error / 0.15,
                    "median; " + ("held" if error <= 0.15 else "NOT held"), samples=count)
            )  # fmt: skip
    report.write()


def plot(report: Report, path: Path) -> bool:
    """First tokens by length and source, their limits as marks; False without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, dict[str, dict[int, Row]]] = {}
    for row in report.rows:
        head, _, length = row.case.rpartition(" ")
        if row.unit == "ms" and length.isdigit() and row.metric in (
            "cold", "pool hit", "RAM hit", "disk hit",
        ):  # fmt: skip
            groups.setdefault(head, {}).setdefault(row.metric, {}).setdefault(int(length), row)
    if not groups:
        return False
    figure, axes = pyplot.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.6), squeeze=False)
    for axis, (head, metrics) in zip(axes[0], groups.items(), strict=True):
        for metric, points in metrics.items():
            lengths = sorted(points)
            (line,) = axis.loglog(lengths, [points[n].value for n in lengths], "o-", label=metric)
            marked = [n for n in lengths if points[n].limit is not None]
            limits = [points[n].limit for n in marked]
            axis.loglog(marked, limits, "_", color=line.get_color(), markersize=14)
        shown = sorted({length for points in metrics.values() for length in points})
        axis.set_xticks(shown, [f"{length:,}" for length in shown])
        axis.minorticks_off()
        axis.set_title(head, fontsize=9)
        axis.set_xlabel("tokens of the prefix")
        axis.set_ylabel("first token, ms (marks: the promise)")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument("--geometry", nargs="+", default=["llama-3.1-8b", "qwen3-0.6b"])
    made.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768, 65536])
    made.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    made.add_argument("--pairs", type=int, default=7)
    made.add_argument("--decodes", type=int, default=16)
    made.add_argument("--disk-gbps", type=float, default=0.2, help="of the case throttled")
    made.add_argument("--tier-codec", default=None)
    made.add_argument("--loads", choices=("model", "all", "none"), default=None)
    made.add_argument("--device", default="cuda")
    made.add_argument("--num-blocks", type=int, default=None)
    made.add_argument("--ram-bytes", type=int, default=12 * GB)
    made.add_argument("--storage-bytes", type=int, default=24 * GB)
    made.add_argument("--dir", type=Path, default=None, help="where the shards' folder is made")
    made.add_argument("--keep", action="store_true", help="--dir is the folder, and stays")
    made.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG")
    options = made.parse_args()
    if options.loads:
        os.environ["LITECACHE_LOADS"] = options.loads
    if options.quick:
        options.geometry, options.lengths, options.pairs = ["tiny"], [256, 1024], 2
        options.ram_bytes, options.storage_bytes = 128 << 20, 256 << 20
        options.num_blocks, options.decodes, options.device = 512, 2, "cpu"
    report = Report("First token by source", options.json)
    if "host" in options.only:
        host(report, 3 * options.pairs, quick=options.quick)
    for each in options.geometry if options.only != ["host"] else ():
        name, config = geometry(each)
        limit = model_limits(config) - QUESTION - 64
        options.lengths = [n for n in options.lengths if n <= limit] or [limit]
        with scratch(options.dir, options.keep) as folder:
            bench = Bench(name, config, options, folder)
            try:
                run(bench, report, options.only)
            finally:
                bench.close()
    report.show()
    broken = [row for row in report.rows if row.peer and row.peer.endswith("NOT held")]
    judged = [row for row in report.rows if row.peer and row.peer.endswith("held")]
    report.console.print(f"{len(judged) - len(broken)} of {len(judged)} promises held")
    if options.plot and not plot(report, options.plot):
        report.console.print("no plot: matplotlib is not installed, or there is nothing to show")
    return 0


if __name__ == "__main__":
    sys.exit(main())
