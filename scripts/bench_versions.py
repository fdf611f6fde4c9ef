"""Two checkouts of LiteCache against each other, in one run, in alternating turns.

Each checkout runs in a process of its own, with its own package and its own bench_*.py, and both
stay up: a turn asks one, then the other, in reverse order every second time. The figure of a case
is the mean of log(new rate / old rate) over the pairs with its 95 % interval (Student's t), so 1.0
is equal and more is better; `--at-least` fails the run where the upper end of an interval is lower.

    git worktree add ../old cb6bebe
    python scripts/bench_versions.py --old ../old --set engine [--geometry llama-3.1-8b]
    python scripts/bench_versions.py --old ../old --set cpu storage --dir /var/tmp/bench

Sets: engine (decode-1, -16, -64 and GPU hits, without Ray), cpu (prefill and decode of SmolLM2
through Ray, batch 1 and 8), storage (write, cold read and RAM hit at each of --sizes, through the
actor or with --in-process), idle (what the actors of a group use while nobody asks).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SETS = ("engine", "cpu", "storage", "idle")
# Two-sided 97.5 % points of Student's t for 2 to 30 pairs; beyond, the normal distribution's.
_T = [
    12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045,
]  # fmt: skip

Sample = Callable[[], float]


# The side that measures: runs in a process whose sys.path is that of its checkout


def _engine_cases(args: dict[str, Any]) -> Iterator[tuple[str, Sample]]:
    """Milliseconds become rates, so that more is better everywhere."""
    import bench_engine
    from bench_common import geometry

    from litecache import CacheConfig

    _, config = geometry(args["geometry"])
    blocks = args["num_blocks"]
    cache = CacheConfig(
        device=args["device"], num_blocks=blocks, admission="none",
        max_model_len=min(config["max_position_embeddings"], 16 * blocks - 64, 9000),
    )  # fmt: skip
    client = bench_engine.InProcess(config, cache)
    scale = 32 if args["quick"] else 1
    bench = bench_engine.Bench(client, config["vocab_size"], 1, scale)
    for name, measure in (
        ("decode-1", lambda: bench.decode(1, 512)),
        ("decode-16", lambda: bench.decode(16, 512)),
        ("decode-64", lambda: bench.decode(64, 1024)),
        ("hit-2000", lambda: bench.first_token(2000, hit=True)),
        ("hit-8192", lambda: bench.first_token(8192, hit=True)),
        ("cold-8192", lambda: bench.first_token(8192, hit=False)),
    ):
        yield name, lambda measure=measure: 1e3 / statistics.median(measure())
    client.close()


def _cpu_cases(args: dict[str, Any]) -> Iterator[tuple[str, Sample]]:
    import bench_cpu

    from litecache.adapter.gguf import convert_gguf, packaged_gguf

    bench = bench_cpu.Bench(str(convert_gguf(packaged_gguf())), len(os.sched_getaffinity(0)))
    new = 8 if args["quick"] else bench_cpu.NEW_TOKENS
    for batch in (1,) if args["quick"] else (1, 8):
        yield f"prefill, batch {batch}", lambda b=batch: b / bench.litecache_seconds(b, new)[0]
        yield f"decode, batch {batch}", lambda b=batch: b / bench.litecache_seconds(b, new)[1]
    bench.llm.close()


def _storage_cases(args: dict[str, Any]) -> Iterator[tuple[str, Sample]]:
    from storage_bench.backends import Actor, InProcess
    from storage_bench.cases import SIZES
    from storage_bench.shard_turns import ShardTurns

    disk, turn = args["disk_bytes"], args["turn_mib"] << 20
    for size in args["sizes"]:
        folder = tempfile.mkdtemp(prefix="bench-versions-", dir=args["dir"])
        options = {
            "directory": f"{folder}/shard", "storage_bytes": disk, "ram_bytes": 3 * turn,
            "io_threads": 4, "fsync": "interval",
        }  # fmt: skip
        backend = (InProcess if args["in_process"] else Actor)(options)
        turns = ShardTurns(backend, SIZES[size], turn)
        try:
            for _ in range(disk // turn):  # the slab at its full size
                turns.write()
            yield f"{size}, write", turns.write
            turns.turns = turns.turns[-(disk // turn - 1) :]
            yield f"{size}, cold read", turns.read
            turns.turns = turns.turns[-1:]
            yield f"{size}, RAM hit", turns.hit
        finally:
            backend.close()
            shutil.rmtree(folder, ignore_errors=True)


def _idle_cases(args: dict[str, Any]) -> Iterator[tuple[str, Sample]]:
    import time

    import bench_idle
    from bench_common import GEOMETRIES, own_ray
    from transformers import AutoConfig

    from litecache import CacheConfig, KVCacheAdapter

    model = AutoConfig.from_pretrained(GEOMETRIES / "smollm2-135m.json")
    with tempfile.TemporaryDirectory(prefix="bench-versions-") as store:
        config = CacheConfig(
            num_blocks=128, ram_bytes="128MB", storage_dir=store, storage_bytes="1GB", device="cpu"
        )
        own_ray()
        with KVCacheAdapter(model, cache_config=config, weights="random") as llm:
            llm.generate_batch([list(range(100, 400))], max_new_tokens=8)
            llm.flush()
            pids = [bench_idle.process_of(a) for a in bench_idle.litecache_actors().values()]

            def per_cpu_second() -> float:
                before = sum(map(bench_idle.cpu_seconds, pids))
                time.sleep(3 if args["quick"] else 15)
                return 1 / max(0.01, sum(map(bench_idle.cpu_seconds, pids)) - before)

            yield "actors at rest", per_cpu_second


_CASES = {
    "engine": _engine_cases, "cpu": _cpu_cases, "storage": _storage_cases, "idle": _idle_cases,
}  # fmt: skip


def _serve() -> None:
    """Answer requests, a JSON line each, on the standard output that this process began with."""
    args = json.loads(sys.stdin.readline())
    sys.path[:0] = [f"{args['checkout']}/scripts", args["checkout"]]
    sys.path.remove(str(HERE.parent))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the library prints
    import litecache

    assert litecache.__file__.startswith(args["checkout"]), litecache.__file__
    for name, sample in _CASES[args["set"]](args):
        if args["only"] and not name.startswith(tuple(args["only"])):
            continue
        print(json.dumps(name), file=out)
        while sys.stdin.readline().strip() == "again":
            print(json.dumps(sample()), file=out)
    print(json.dumps(None), file=out)


# The side that asks


class Contestant:
    """One checkout's process."""

    def __init__(self, name: str, checkout: Path, args: dict[str, Any]) -> None:
        self.name = name
        args = {**args, "checkout": str(checkout)}
        environment = {**os.environ, "PYTHONPATH": str(checkout), "RAY_worker_niceness": "0"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE), "--serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            cwd=checkout,  # Ray's workers look for the package where their driver runs, first
        )  # fmt: skip
        self._say(json.dumps(args))

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"error: the process of {self.name} ended with {self._process.wait()}")
        return json.loads(line)

    def case(self) -> str | None:
        """The name of the next case, None after the last."""
        name: str | None = self._hear()
        return name

    def sample(self) -> float:
        """One measurement of the present case."""
        self._say("again")
        value: float = self._hear()
        return value

    def next(self) -> None:
        """On to the next case."""
        self._say("next")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios and its 95 % interval."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), 0.0, math.inf
    t = _T[len(logs) - 2] if len(logs) - 2 < len(_T) else 1.96
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def _compare(name: str, options: Namespace, report: Any) -> float:
    """One set; returns the lowest upper end of its intervals."""
    from bench_common import Row, alternate, summarise

    given = {**vars(options), "set": name, "json": None}
    given = {key: str(v.resolve()) if isinstance(v, Path) else v for key, v in given.items()}
    old = Contestant("old", options.old.resolve(), given)
    new = Contestant("new", HERE.parents[1], given)
    worst = math.inf
    try:
        while True:
            case = old.case()
            if case != new.case():
                sys.exit(f"error: the checkouts measure different cases in {name}")
            if case is None:
                return worst
            samples = alternate(options.pairs, {"old": old.sample, "new": new.sample})
            ratios = [b / a for a, b in zip(samples["old"], samples["new"], strict=True)]
            mean, low, high = interval(ratios)
            worst = min(worst, high)
            before, after = summarise(samples["old"]), summarise(samples["new"])
            report.add(
                Row(f"{name}: {case}", "rate, new against old", after.median, "1/unit",
                    before.median, mean, "old", after.spread, options.pairs),
                Row(f"{name}: {case}", "ratio, 95 % interval", mean, "", None, None, None,
                    (low, high), options.pairs),
            )  # fmt: skip
            old.next()
            new.next()
    finally:
        old.close()
        new.close()


def main() -> int:
    from bench_common import Report, parser

    made = parser(__doc__ or "")
    made.add_argument("--old", type=Path, required=True, help="checkout to compare with")
    made.add_argument("--set", nargs="+", choices=SETS, default=["cpu"])
    made.add_argument("--only", nargs="+", default=[], help="names of cases, or their beginnings")
    made.add_argument("--pairs", type=int, default=11)
    made.add_argument("--at-least", type=float, default=0.0, help="lowest upper end allowed")
    made.add_argument("--geometry", default="llama-3.1-8b")
    made.add_argument("--device", default="cuda")
    made.add_argument("--num-blocks", type=int, default=5000)
    made.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    made.add_argument("--sizes", nargs="+", default=["2 MiB"])
    made.add_argument("--in-process", action="store_true", help="storage without Ray")
    made.add_argument("--disk-bytes", type=int, default=2 << 30)
    made.add_argument("--turn-mib", type=int, default=256)
    options = made.parse_args()
    if options.quick:
        options.pairs = min(options.pairs, 3)
        options.disk_bytes, options.turn_mib = 256 << 20, 64
    report = Report(f"{options.pairs} pairs, new against old", options.json)
    worst = min(_compare(name, options, report) for name in options.set)
    report.show()
    print(f"lowest upper end of a 95 % interval: {worst:.3f}")
    return 0 if worst >= options.at_least else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        _serve()
    else:
        sys.exit(main())
