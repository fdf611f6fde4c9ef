"""LiteCache against Hugging Face's `generate`, in one run and on one device.

Prompts of 512 random tokens, 128 new tokens, greedy, random weights of the geometries in
scripts/geometries, bfloat16 on a GPU. Three contestants answer the same batches, one after the
other, so that one model at a time is in memory:

    litecache   the public API: adapter, Ray actor and back; the pool is cleared before each call
    plain       `generate` with its dynamic cache and sdpa attention
    static      `generate(cache_implementation="static")`, whose decode forward is compiled

A rate is batch * new tokens over the seconds of the whole call, prompts included. A time to the
first token is, for HF, the time of a call for one token; a step is what is left, by token. The
models have no end token: no contestant pays for ignoring it. `static` is warmed up until a call
neither compiles nor records a CUDA graph, and the run ends where HF did not compile at all. On a
CPU its forward is traced by Dynamo and not compiled further: that is a test of this script alone.

    python scripts/bench_hf.py [--geometry NAME ...] [--only batch-16 ...] [--of litecache ...]
                               [--in-process] [--rounds 3] [--json FILE] [--quick] [--device cpu]

Cases: batch-16, whose ratios have goals (10 to plain, 2 to static; else exits 1), and batch-1.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bench_common import Report, Row, geometry, parser, summarise
from bench_engine import Ask, InProcess, ThroughRay
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig

from litecache import CacheConfig

# Ray starts actors with niceness 15; on a busy machine that would compare priorities.
os.environ.setdefault("RAY_worker_niceness", "0")

BATCHES = {"batch-16": 16, "batch-1": 1}
CONTESTANTS = {"litecache": "LiteCache", "plain": "HF generate", "static": "HF static, compiled"}
GOALS = {("batch-16", "plain"): 10.0, ("batch-16", "static"): 2.0}
MIN_WARM_UPS, MAX_WARM_UPS = 2, 6


@dataclass(frozen=True)
class Work:
    """What every contestant does in each case; a smoke test has no goals."""

    prompt_tokens: int
    new_tokens: int
    rounds: int
    has_goals: bool


@dataclass(frozen=True)
class Times:
    """Seconds of one call, and until its first token (of the last row)."""

    first_s: float
    total_s: float


class Prompts:
    """Random prompts, never the same twice."""

    def __init__(self, vocab: int, length: int) -> None:
        self._random, self._vocab, self._length = np.random.default_rng(0), vocab, length

    def draw(self, batch: int) -> np.ndarray[Any, Any]:
        """Token ids, `[batch, length]`."""
        return self._random.integers(10, self._vocab - 10, size=(batch, self._length))


class LiteCache:
    """Runs batches through a client of bench_engine."""

    def __init__(self, client: InProcess | ThroughRay, prompts: Prompts, work: Work) -> None:
        self._client, self._prompts, self._work = client, prompts, work

    def measure(self, batch: int) -> list[Times]:
        """One sample a round, after two calls that do not count."""
        return [self._call(batch) for _ in range(-MIN_WARM_UPS, self._work.rounds)][MIN_WARM_UPS:]

    def _call(self, batch: int) -> Times:
        self._client.clear()
        asks = [Ask(row, self._work.new_tokens) for row in self._prompts.draw(batch).tolist()]
        start = time.perf_counter()
        answers = self._client.run(asks)
        total = time.perf_counter() - start
        return Times(max(answer.first_s for answer in answers), total)


class HuggingFace:
    """Stock `generate` of one model, with the dynamic cache or the static one."""

    def __init__(self, config: dict[str, Any], device: str, prompts: Prompts, work: Work) -> None:
        fields = dict(config)
        hf_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                hf_config, dtype=dtype, attn_implementation="sdpa"
            )
        self._model = model.eval().requires_grad_(False)
        self._prompts, self._work = prompts, work
        self._compile = CompileConfig()
        if not device.startswith("cuda"):
            # HF compiles on accelerators only. C++ takes minutes, so the smoke test only traces.
            self._compile = CompileConfig(backend="eager", mode=None)
            self._compile._compile_all_devices = True

    def plain(self, batch: int) -> list[Times]:
        """One sample a round, the dynamic cache."""
        self._seconds(batch, 8)
        return [self._times(batch) for _ in range(self._work.rounds)]

    def static(self, batch: int) -> tuple[list[Times], float, dict[str, int]]:
        """One sample a round, the static cache; seconds of the warm-up; what was compiled.

        The dict counts Dynamo's graphs and breaks, inductor's reasons to do without CUDA graphs,
        and what was compiled or recorded again while the samples were taken.
        """
        # Else the second batch size would be compiled with a symbolic one.
        torch._dynamo.reset()
        before, start = _compiled(), time.perf_counter()
        for turn in range(MAX_WARM_UPS):
            seen = _compiled()
            self._times(batch, static=True)
            if turn + 1 >= MIN_WARM_UPS and _compiled() == seen:
                break
        warm_up_s, warm = time.perf_counter() - start, _compiled()
        if warm["graphs"] == before["graphs"]:
            raise SystemExit("error: transformers did not compile the forward of a static cache")
        samples = [self._times(batch, static=True) for _ in range(self._work.rounds)]
        made = {name: count - before[name] for name, count in warm.items()}
        again = _compiled()
        made["again"] = sum(again[name] - count for name, count in warm.items())
        return samples, warm_up_s, made

    def _times(self, batch: int, *, static: bool = False) -> Times:
        first = self._seconds(batch, 1, static=static)
        return Times(first, self._seconds(batch, self._work.new_tokens, static=static))

    def _seconds(self, batch: int, new_tokens: int, *, static: bool = False) -> float:
        ids = torch.from_numpy(self._prompts.draw(batch)).to(self._model.device)
        cache = {"cache_implementation": "static", "compile_config": self._compile}
        _synchronize()
        start = time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            **(cache if static else {}),
        )
        _synchronize()
        seconds = time.perf_counter() - start
        assert out.shape[1] == ids.shape[1] + new_tokens
        return seconds


def _compiled() -> dict[str, int]:
    """How much Dynamo and inductor have done in this process so far."""
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "skipped_cuda_graphs": counters["inductor"]["cudagraph_skips"],
        "recorded_inputs": counters["inductor"]["cudagraph_recorded_non_static_inputs"],
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _free() -> None:
    """Give back what closed contestants held on the device."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Table:
    """Turns samples into rows; remembers LiteCache's rates for the ratios."""

    def __init__(self, report: Report, name: str, work: Work) -> None:
        self._report, self._name, self._work = report, name, work
        self._own: dict[str, float] = {}
        self.good = True

    def add(self, case: str, contestant: str, samples: Sequence[Times], *more: Row) -> None:
        """The rows of one contestant in one case."""
        batch, new = BATCHES[case], self._work.new_tokens
        label, title = f"{self._name} {case}", CONTESTANTS[contestant]

        def row(metric: str, unit: str, of: Callable[[Times], float]) -> Row:
            figure = summarise([of(sample) for sample in samples])
            return Row(
                *(label, f"{title}: {metric}", figure.median, unit),
                spread=figure.spread, samples=figure.samples,
            )  # fmt: skip

        rate = row("out", "tokens/s", lambda t: batch * new / t.total_s)
        rows = [
            rate,
            row("first token", "ms", lambda t: t.first_s * 1e3),
            row("step", "ms", lambda t: (t.total_s - t.first_s) / (new - 1) * 1e3),
        ]
        if contestant == "litecache":
            self._own[case] = rate.value
        elif case in self._own:
            times = self._own[case] / rate.value
            goal = GOALS.get((case, contestant)) if self._work.has_goals else None
            share = None if goal is None else times / goal
            peer = None if goal is None else "goal"
            rows.append(Row(label, f"LiteCache / {title}", times, "times", goal, share, peer))
            self.good = self.good and (share is None or share >= 1)
        self._report.add(*rows, *more)


def compare(options: Any, name: str, cases: Sequence[str], work: Work, report: Report) -> bool:
    """All contestants over one geometry; returns whether the goals are reached."""
    stem, config = geometry(name)
    config["eos_token_id"] = None
    prompts = Prompts(config["vocab_size"], work.prompt_tokens)
    table = Table(report, stem, work)
    if "litecache" in options.of:
        cache_config = CacheConfig(
            device=options.device,
            dtype=None if options.device.startswith("cuda") else "float32",
            max_model_len=min(config["max_position_embeddings"], 40_960),
            num_blocks=options.num_blocks,
            admission="none",
        )
        client = (InProcess if options.in_process else ThroughRay)(config, cache_config)
        try:
            for case in cases:
                own = LiteCache(client, prompts, work)
                table.add(case, "litecache", own.measure(BATCHES[case]))
        finally:
            client.close()
        del client, own
        _free()
    if {"plain", "static"} & set(options.of):
        hf = HuggingFace(config, options.device, prompts, work)
        for case in cases if "plain" in options.of else ():
            table.add(case, "plain", hf.plain(BATCHES[case]))
        for case in cases if "static" in options.of else ():
            samples, warm_up_s, made = hf.static(BATCHES[case])
            report.extra.setdefault("compiled", {})[f"{stem} {case}"] = made
            metric = f"{CONTESTANTS['static']}: warm-up"
            table.add(case, "static", samples, Row(f"{stem} {case}", metric, warm_up_s, "s"))
        del hf
        _free()
    return table.good


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument(
        "--geometry", nargs="+", help="default: qwen3-0.6b llama-3.1-8b; tiny with --quick"
    )
    made.add_argument("--only", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    made.add_argument("--of", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    made.add_argument("--in-process", action="store_true", help="LiteCache without Ray")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--device", default="cuda")
    made.add_argument("--num-blocks", type=int, default=2048, help="of LiteCache's pool")
    options = made.parse_args()
    quick = options.quick
    work = Work(32, 8, 1, False) if quick else Work(512, 128, options.rounds, True)
    via = "in-process" if options.in_process else "Ray"
    title = f"LiteCache ({via}) and HF, prompt {work.prompt_tokens}, {work.new_tokens} new tokens"
    report = Report(title, options.json)
    geometries = ["tiny"] if quick else ["qwen3-0.6b", "llama-3.1-8b"]
    good = [
        compare(options, name, options.only, work, report)
        for name in options.geometry or geometries
    ]
    report.show()
    if not all(good):
        print("below a goal: 10 times HF generate, twice HF static, at batch 16")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
