"""The model runner alone: hand-made plans, no scheduler, no Ray. Where a step's time goes.

Random weights of the geometries in scripts/geometries and a pool of random KV. Decode steps are
pipelined as the engine does it (a step starts before the last one's result is read); `host` is the
time `execute` takes. `--profile` adds the kernels of a step by their share of it, `--linear` the
streamed products against the library's, replayed in a CUDA graph over weights larger than the L2.

    python scripts/bench_runner.py [--geometry NAME ...] [--profile] [--linear] [--json FILE]
                                   [--device cpu] [--quick]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_common import GEOMETRIES, Report, Row, parser, summarise

from litecache import CacheConfig
from litecache.engine.kv_layout import KVLayout, KVPool
from litecache.engine.loading.model_loader import load_model
from litecache.engine.loading.model_source import ModelSource
from litecache.engine.running.model_runner import ModelRunner
from litecache.engine.scheduling.orders import NewRow, RowStep, StepPlan, TableUpdate
from litecache.types import SamplingParams

DECODES = ((1, 512), (16, 512), (64, 1024), (64, 4096))
LENGTHS = (8192, 32768)
BLOCK = 16


class Bench:
    """A runner whose rows read a pool of random KV."""

    def __init__(self, name: str, device: str, max_batch_tokens: int, num_blocks: int) -> None:
        config = json.loads((GEOMETRIES / f"{name}.json").read_text(encoding="utf-8"))
        dtype = "float32" if device == "cpu" else "bfloat16"
        loaded = load_model(
            ModelSource(config=config, weights="random"), CacheConfig(device=device, dtype=dtype)
        )
        self.name, self.passes, self.chunk = name, loaded.passes, max_batch_tokens
        self._blocks = num_blocks
        layout = KVLayout.from_specs(loaded.specs, BLOCK)
        pools = [KVPool(group, num_blocks, loaded.device) for group in layout.groups]
        for pool in pools:
            pool.buffer.view(loaded.dtype).normal_(std=0.5)
        self.runner = ModelRunner(
            loaded, layout, pools,
            max_requests=256,
            max_model_len=min(loaded.max_model_len, 40_960),
            max_batch_tokens=max_batch_tokens,
        )  # fmt: skip

    def rows(self, batch: int, length: int, room: int) -> dict[str, Any]:
        """New rows whose blocks lie scattered in the pool."""
        count = -(-(length + room) // BLOCK)
        sampling = SamplingParams(max_new_tokens=room)
        tokens = tuple(range(1, length + 1))
        scatter = [
            tuple(1 + (row * count + i) * 7919 % (self._blocks - 1) for i in range(count))
            for row in range(batch)
        ]
        return {
            "new_rows": tuple(NewRow(row, tokens, length, sampling) for row in range(batch)),
            "table_updates": tuple(TableUpdate(r, 0, 0, b) for r, b in enumerate(scatter)),
        }

    def decode_plan(self, batch: int, position: int, **changes: Any) -> StepPlan:
        return StepPlan(
            1, rows=tuple(RowStep(row, position, 1, True) for row in range(batch)), **changes
        )

    def decode(self, batch: int, length: int, steps: int) -> tuple[list[float], float]:
        """ms a step of each of five runs, and the median ms of `execute`."""
        samples, host = [], []
        for _ in range(6):
            plan = self.decode_plan(batch, length - 1, **self.rows(batch, length, steps + 1))
            last = self.runner.execute(plan)
            last.result()
            started = time.perf_counter()
            for step in range(steps):
                plan = self.decode_plan(batch, length + step)
                before = time.perf_counter()
                handle = self.runner.execute(plan)
                host.append((time.perf_counter() - before) * 1e3)
                last.result()
                last = handle
            last.result()
            samples.append((time.perf_counter() - started) / steps * 1e3)
        return samples[1:], statistics.median(host)

    def first_token(self, length: int, start: int) -> list[float]:
        """ms to compute a prompt from position `start` on, in chunks, of each of three runs."""
        samples = []
        for _ in range(4):
            before = time.perf_counter()
            self._compute(length, start)
            samples.append((time.perf_counter() - before) * 1e3)
        return samples[1:]

    def _compute(self, length: int, start: int) -> None:
        changes = self.rows(1, length, 1)
        for begin in range(start, length, self.chunk):
            end = min(begin + self.chunk, length)
            step = RowStep(0, begin, end - begin, end == length)
            handle = self.runner.execute(StepPlan(1, rows=(step,), **changes))
            changes = {}
        handle.result()

    def profile_prompt(self, length: int) -> list[tuple[str, float, int]]:
        """Kernels of a cold prompt: name, µs, launches."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self._compute(length, 0)
        return _by_time(profiler, 1, 16)

    def profile(self, batch: int, length: int) -> list[tuple[str, float, int]]:
        """Kernels of a decode step: name, µs, launches."""
        from torch.profiler import ProfilerActivity, profile

        plan = self.decode_plan(batch, length - 1, **self.rows(batch, length, 9))
        self.runner.execute(plan).result()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for step in range(5):
                self.runner.execute(self.decode_plan(batch, length + step)).result()
        return _by_time(profiler, 5, 12)


def _by_time(profiler: Any, steps: int, count: int) -> list[tuple[str, float, int]]:
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)
    return [
        (e.key[:48], e.self_device_time_total / steps, e.count // steps) for e in events[:count]
    ]


def graph_us(work: Callable[[int], Any], count: int) -> float:
    """µs of one call, replayed in a CUDA graph of `count` calls."""
    work(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            work(index)
    graph.replay()
    best = float("inf")
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / count * 1e3)
    return best


def copy_gb_s() -> float:
    """What a copy of 2 GiB reads and writes."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_us(lambda _: target.copy_(source), 3) / 1e3


def product(n: int, k: int, gated: bool, tokens: int) -> tuple[float, float]:
    """µs of a streamed product, and of the library's without the gate."""
    from torch.nn import functional

    from litecache.engine.running.passes.triton_linear import stream_linear

    rows = 2 * n if gated else n
    count = max(2, min(24, int(6e8 / (rows * k * 2))))
    weights = [torch.randn(rows, k, device="cuda").bfloat16() for _ in range(count)]
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    return (
        graph_us(lambda i: stream_linear(x, weights[i % count], gated=gated), 2 * count),
        graph_us(lambda i: functional.linear(x, weights[i % count]), 2 * count),
    )


def linear(report: Report) -> None:
    """Streamed products of both geometries, as share of the bandwidth of a copy."""
    limit = copy_gb_s()
    for n, k, gated in (
        (6144, 4096, False), (4096, 4096, False), (14336, 4096, True), (4096, 14336, False),
        (128256, 4096, False), (4096, 1024, False), (1024, 2048, False), (3072, 1024, True),
        (1024, 3072, False),
    ):  # fmt: skip
        for tokens in (1, 8, 16):
            own, library = product(n, k, gated, tokens)
            case = f"linear {n}x{k}{' gated' * gated}, {tokens} tokens"
            rate = (2 if gated else 1) * n * k * 2 / own / 1e3
            report.add(
                Row(case, "streamed", own, "us", library, library / own, "library, ungated"),
                Row(case, "read", rate, "GB/s", limit, rate / limit, "copy"),
            )


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument("--geometry", nargs="+", default=["qwen3-0.6b", "llama-3.1-8b"])
    made.add_argument("--device", default="cuda")
    made.add_argument("--max-batch-tokens", type=int, default=2048)
    made.add_argument("--profile", action="store_true", help="kernels of a step")
    made.add_argument("--parts", nargs="+", default=["decode", "prompt"], help="decode, prompt")
    made.add_argument("--linear", action="store_true", help="streamed products alone")
    options = made.parse_args()
    report = Report("Model runner", options.json)
    if options.linear:
        linear(report)
        report.show()
        return 0
    quick = options.quick
    for name in options.geometry:
        bench = Bench(name, options.device, options.max_batch_tokens, 400 if quick else 12_000)
        report.extra.setdefault("passes", {})[name] = bench.passes
        decodes = DECODES if "decode" in options.parts else ()
        for batch, length in decodes[: 1 if quick else None]:
            samples, host = bench.decode(batch, length // (8 if quick else 1), 4 if quick else 40)
            step = summarise(samples)
            case = f"{name} decode, batch {batch}, context {length}"
            report.add(
                Row(case, "step", step.median, "ms", spread=step.spread, samples=step.samples),
                Row(case, "host", host, "ms"),
            )
            if options.profile and options.device != "cpu":
                report.extra.setdefault("profiles", {})[case] = bench.profile(batch, length)
        lengths = LENGTHS if "prompt" in options.parts else ()
        for length in lengths[: 0 if quick else None]:
            for start, what in ((0, "cold"), (length - 1, "full hit")):
                first = summarise(bench.first_token(length, start))
                report.add(
                    Row(f"{name} {what}, {length} tokens", "first token", first.median, "ms",
                        spread=first.spread, samples=first.samples)
                )  # fmt: skip
            if options.profile and options.device != "cpu":
                kernels = bench.profile_prompt(length)
                report.extra.setdefault("profiles", {})[f"{name} cold, {length} tokens"] = kernels
        del bench
    for case, kernels in report.extra.get("profiles", {}).items():
        report.console.print(case)
        for kernel, us, launches in kernels:
            report.console.print(f"  {us:9.1f} us {launches:5d} x  {kernel}", highlight=False)
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
