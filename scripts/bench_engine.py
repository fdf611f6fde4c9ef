"""The engine on a GPU: milliseconds a step, time to the first token, throughput.

Random weights of the geometries in scripts/geometries, through the public API: adapter, Ray actor
and back. `--in-process` runs the same engine in this process without Ray, so the difference is what
the hop costs. Times are what the client sees; every case is warmed up once and then measured
`--rounds` times. The limits are those of issue 5's promise on an H200 (docs/engine.md).

    python scripts/bench_engine.py [--geometry NAME ...] [--only CASE ...] [--in-process]
                                   [--rounds 5] [--json FILE] [--quick] [--device cpu]

Cases: decode-1, decode-16, decode-64 (prompt 512, 512, 1,024; ms a step of a full batch), cold and
hit (first token of 2,000 to 32,768 tokens), throughput (64 requests, 512 in, 128 out; with
`bench-256`: 256 requests, in and out uniform from 100 to 1,024, temperature 0.6).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import GEOMETRIES, Report, Row, own_ray, parser, summarise

from litecache import CacheConfig
from litecache.types import Request, SamplingParams, TokenDelta

Prompt = list[int]


@dataclass
class Ask:
    """One request of a benchmark."""

    prompt: Prompt
    new_tokens: int
    temperature: float = 0.0


@dataclass
class Answer:
    """When its tokens came, in seconds after the whole batch was handed over."""

    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0


class InProcess:
    """The engine without Ray."""

    def __init__(self, config: dict[str, Any], cache_config: CacheConfig) -> None:
        from litecache.engine.engine import Engine
        from litecache.engine.loading.model_source import ModelSource

        source = ModelSource(config=config, weights="random")
        self._engine = Engine(source, cache_config, sink=self._receive)
        self._answers: dict[str, Answer] = {}
        self._done = threading.Event()
        self._open = 0
        self._started = 0.0
        self._number = 0

    def _receive(self, deltas: list[tuple[str, TokenDelta]]) -> None:
        now = time.perf_counter() - self._started
        for _, delta in deltas:
            answer = self._answers[delta.request_id]
            if delta.token_ids:
                answer.first_s = answer.first_s or now
                answer.last_s = now
                answer.tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                self._open -= 1
                if not self._open:
                    self._done.set()

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answer all at once."""
        requests = []
        for ask in asks:
            self._number += 1
            sampling = SamplingParams(
                ask.new_tokens, ask.new_tokens, ask.temperature, seed=self._number
            )
            requests.append(Request(f"{self._number}", "bench", tuple(ask.prompt), sampling))
        self._answers = {request.request_id: Answer() for request in requests}
        self._open = len(requests)
        self._done.clear()
        self._started = time.perf_counter()
        self._engine.submit(requests)
        self._done.wait()
        return list(self._answers.values())

    def clear(self) -> None:
        """Forget all cached blocks."""
        self._engine.clear_pool()

    def close(self) -> None:
        self._engine.close()


class ThroughRay:
    """The public API."""

    def __init__(self, config: dict[str, Any], cache_config: CacheConfig) -> None:
        from transformers import AutoConfig

        from litecache import KVCacheAdapter

        fields = dict(config)
        hf_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        own_ray()
        self._llm = KVCacheAdapter(hf_config, cache_config=cache_config, weights="random")

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answer all at once, in one call."""
        settings = {(len(ask.prompt), ask.new_tokens, ask.temperature) for ask in asks}
        if len(settings) > 1:
            return self._each_its_own(asks)
        import torch

        out = self._llm.generate(
            input_ids=torch.tensor([ask.prompt for ask in asks]),
            return_dict_in_generate=True,
            **_settings(asks[0]),
        )
        report = out.litecache
        return [
            Answer(first, last, asks[0].new_tokens)
            for first, last in zip(report.ttft_s, report.total_s, strict=True)
        ]

    def _each_its_own(self, asks: Sequence[Ask]) -> list[Answer]:
        from transformers import GenerationConfig

        configs = [GenerationConfig(**_settings(ask)) for ask in asks]
        started = time.perf_counter()
        rows = self._llm.generate_batch([ask.prompt for ask in asks], configs)
        elapsed = time.perf_counter() - started
        return [Answer(0.0, elapsed, len(row)) for row in rows]

    def clear(self) -> None:
        """Forget all cached blocks."""
        self._llm.clear("all")

    def close(self) -> None:
        self._llm.close()


def _settings(ask: Ask) -> dict[str, Any]:
    sampling = {"do_sample": True, "temperature": ask.temperature, "top_k": 0, "top_p": 1.0}
    return {
        "max_new_tokens": ask.new_tokens,
        "min_new_tokens": ask.new_tokens,
        **(sampling if ask.temperature else {"do_sample": False}),
    }


@dataclass(frozen=True)
class Case:
    """A case of the table: name, what the H200 has to reach, and how to measure it."""

    name: str
    limit: dict[str, float]
    measure: Callable[[Bench], list[float]]
    metric: str
    unit: str


class Bench:
    """A client and random prompts."""

    def __init__(self, client: InProcess | ThroughRay, vocab: int, rounds: int, scale: int) -> None:
        self.client, self.rounds, self.scale = client, rounds, scale
        self._vocab = vocab
        self._random = np.random.default_rng(0)

    def prompt(self, length: int) -> Prompt:
        ids: Prompt = self._random.integers(10, self._vocab - 10, size=length).tolist()
        return ids

    def decode(self, batch: int, length: int) -> list[float]:
        """ms a step; the prompts are in the pool, so that all rows decode from the first step."""
        steps = max(8, 128 // self.scale)
        asks = [Ask(self.prompt(length // self.scale), steps) for _ in range(batch)]
        samples = []
        for turn in range(-2, self.rounds):
            answers = self.client.run(asks)
            first = max(answer.first_s for answer in answers)
            last = max(answer.last_s for answer in answers)
            if turn >= 0:
                samples.append((last - first) / (steps - 1) * 1e3)
        return samples

    def first_token(self, length: int, *, hit: bool) -> list[float]:
        """ms to the first token of a prompt that was never seen, or just before."""
        samples = []
        for turn in range(-1, self.rounds):
            self.client.clear()
            ask = Ask(self.prompt(length // self.scale), 1)
            if hit:
                self.client.run([ask])
            (answer,) = self.client.run([ask])
            if turn >= 0:
                samples.append(answer.first_s * 1e3)
        return samples

    def throughput(self, asks: Sequence[tuple[int, int]], temperature: float) -> list[float]:
        """Output tokens per second of requests with these lengths in and out."""
        samples = []
        for turn in range(-1, self.rounds):
            self.client.clear()
            batch = []
            for given, new in asks:
                prompt = self.prompt(max(1, given // self.scale))
                batch.append(Ask(prompt, max(2, new // self.scale), temperature))
            answers = self.client.run(batch)
            if turn >= 0:
                last = max(answer.last_s for answer in answers)
                samples.append(sum(answer.tokens for answer in answers) / last)
        return samples


def _lengths_256() -> list[tuple[int, int]]:
    lengths = np.random.default_rng(0).integers(100, 1025, size=(256, 2))
    return [(int(given), int(new)) for given, new in lengths]


def cases() -> list[Case]:
    """All cases; limits by geometry."""
    big, small = "llama-3.1-8b", "qwen3-0.6b"
    made = [
        Case("decode-1", {big: 4.45, small: 1.3}, lambda b: b.decode(1, 512), "step", "ms"),
        Case("decode-16", {big: 4.9, small: 1.5}, lambda b: b.decode(16, 512), "step", "ms"),
        Case("decode-64", {big: 7.0, small: 3.2}, lambda b: b.decode(64, 1024), "step", "ms"),
    ]
    for length, cold, hit in (
        (2000, 46.0, 7.4), (8192, 205.0, 9.0), (32768, 1150.0, 14.0),
    ):  # fmt: skip
        made += [
            Case(
                f"cold-{length}", {big: cold},
                lambda b, n=length: b.first_token(n, hit=False), "first token", "ms",
            ),
            Case(
                f"hit-{length}", {big: hit},
                lambda b, n=length: b.first_token(n, hit=True), "first token", "ms",
            ),
        ]  # fmt: skip
    made += [
        Case(
            "throughput-64", {},
            lambda b: b.throughput([(512, 128)] * 64, 0.0), "out", "tokens/s",
        ),
        Case(
            "bench-256", {small: 26_000.0},
            lambda b: b.throughput(_lengths_256(), 0.6), "out", "tokens/s",
        ),
    ]  # fmt: skip
    return made


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument("--geometry", nargs="+", default=["qwen3-0.6b", "llama-3.1-8b"])
    made.add_argument("--only", nargs="+", default=[], help="names of cases, or their beginnings")
    made.add_argument("--in-process", action="store_true", help="without Ray")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--device", default="cuda")
    made.add_argument("--num-blocks", type=int, default=None)
    made.add_argument("--max-batch-tokens", type=int, default=2048)
    made.add_argument("--admission", default="none", help="what the lower tiers save meanwhile")
    options = made.parse_args()
    rounds, scale = (2, 16) if options.quick else (options.rounds, 1)
    via = "in-process" if options.in_process else "Ray"
    report = Report(f"Engine, {via}", options.json)
    chosen = [
        case for case in cases()
        if not options.only or any(case.name.startswith(name) for name in options.only)
    ]  # fmt: skip
    for geometry in options.geometry:
        file = Path(geometry) if geometry.endswith(".json") else GEOMETRIES / f"{geometry}.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        geometry = file.stem
        cache_config = CacheConfig(
            device=options.device,
            max_model_len=min(config["max_position_embeddings"], 40_960),
            num_blocks=options.num_blocks,
            admission=options.admission,
            max_batch_tokens=options.max_batch_tokens,
        )
        started = time.perf_counter()
        client = (InProcess if options.in_process else ThroughRay)(config, cache_config)
        report.add(Row(geometry, f"start ({via})", time.perf_counter() - started, "s"))
        try:
            bench = Bench(client, config["vocab_size"], rounds, scale)
            for case in chosen:
                figure = summarise(case.measure(bench))
                limit = None if options.quick else case.limit.get(geometry)
                ratio = None if limit is None else figure.median / limit
                report.add(
                    Row(
                        f"{geometry} {case.name}", f"{case.metric} ({via})", figure.median,
                        case.unit, limit, ratio, None if limit is None else "promise",
                        figure.spread, figure.samples,
                    )
                )  # fmt: skip
        finally:
            client.close()
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
