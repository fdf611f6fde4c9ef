"""LiteCache against stock `transformers` generate on the CPU, in alternating rounds.

SmolLM2-135M in float32, prompts of 512 random tokens, 64 new tokens, batch 1 and 8, the same
number of threads, an empty cache before each round. Prefill ends with the last row's first token,
decode is the rest of the call. Ratios are rates (HF's seconds over LiteCache's), the median over
the rounds. Then the time to the first token of 1,024 tokens that lie in the pool, against
computing them.

    python scripts/bench_cpu.py [--rounds 7] [--json FILE] [--quick]
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np
import torch
from bench_common import Report, Row, alternate, own_ray, parser, rate_against, summarise
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from litecache import CacheConfig, KVCacheAdapter
from litecache.adapter.gguf import convert_gguf, packaged_gguf

# Ray starts actors with niceness 15; on a busy machine that would compare priorities.
os.environ.setdefault("RAY_worker_niceness", "0")

PROMPT_TOKENS, NEW_TOKENS = 512, 64
SHARED_TOKENS, TAIL_TOKENS = 1024, 8
MIN_RATIO, MIN_SPEEDUP = 0.8, 8.0


class FirstToken(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; notes when `generate` has chosen the first token of all rows."""

    at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Bench:
    """Both contestants and the random prompts."""

    def __init__(self, model_dir: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.random = np.random.default_rng(0)
        self.hf = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        config = CacheConfig(
            num_blocks=640, dtype="float32", device="cpu", ram_bytes="512MB", max_model_len=2048
        )
        own_ray()
        self.llm = KVCacheAdapter(model_dir, cache_config=config)

    def prompt(self, batch: int, length: int) -> torch.Tensor:
        return torch.from_numpy(self.random.integers(10, 49_000, size=(batch, length)))

    def hf_seconds(self, batch: int, new_tokens: int) -> tuple[float, float]:
        """Prefill and decode seconds of stock generate."""
        clock, prompt = FirstToken(), self.prompt(batch, PROMPT_TOKENS)
        start = time.perf_counter()
        self.hf.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        end = time.perf_counter()
        assert clock.at is not None
        return clock.at - start, end - clock.at

    def litecache_seconds(self, batch: int, new_tokens: int) -> tuple[float, float]:
        """Prefill and decode seconds; what the driver and Ray cost is counted as decode."""
        self.llm.clear("all")
        prompt = self.prompt(batch, PROMPT_TOKENS)
        start = time.perf_counter()
        out = self.llm.generate(
            input_ids=prompt,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        seconds = time.perf_counter() - start
        prefill = max(out.litecache.ttft_s)
        return prefill, seconds - prefill

    def first_token_s(self, prompt: torch.Tensor) -> tuple[float, int]:
        """Seconds of a call for one token, and how many tokens came from the pool."""
        start = time.perf_counter()
        out = self.llm.generate(
            input_ids=prompt, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
        )
        return time.perf_counter() - start, out.litecache.reused_tokens[0].get("gpu", 0)


def against_hf(bench: Bench, report: Report, batch: int, rounds: int, new_tokens: int) -> bool:
    """One batch size; returns whether both ratios hold."""
    parts: dict[str, list[tuple[float, float]]] = {"hf": [], "litecache": []}

    def contestant(name: str) -> float:
        run = bench.hf_seconds if name == "hf" else bench.litecache_seconds
        parts[name].append(run(batch, new_tokens))
        return sum(parts[name][-1])

    alternate(rounds, {name: lambda name=name: contestant(name) for name in parts})
    tokens = {"prefill": batch * PROMPT_TOKENS, "decode": batch * (new_tokens - 1)}
    hf, own = (zip(*parts[name][-rounds:], strict=True) for name in ("hf", "litecache"))
    good = True
    for metric, own_s, hf_s in zip(tokens, own, hf, strict=True):
        case, amount = f"batch {batch}", tokens[metric]
        row, ratio = rate_against(case, metric, amount, own_s, hf_s, "HF generate")
        report.add(row)
        good = good and ratio >= MIN_RATIO
    return good


def pool_hit(bench: Bench, report: Report, rounds: int) -> bool:
    """Time to the first token of a shared prefix: computed, then found in the pool."""
    cold_s, hit_s = [], []
    for _ in range(rounds + 1):
        bench.llm.clear("all")
        shared = bench.prompt(1, SHARED_TOKENS)
        tails = [bench.prompt(1, TAIL_TOKENS) for _ in range(2)]
        cold, _ = bench.first_token_s(torch.cat([shared, tails[0]], dim=1))
        hit, reused = bench.first_token_s(torch.cat([shared, tails[1]], dim=1))
        if reused < SHARED_TOKENS:
            sys.exit(f"error: only {reused} of {SHARED_TOKENS} tokens were found in the pool")
        cold_s.append(cold)
        hit_s.append(hit)
    cold, hit = summarise(cold_s[1:]), summarise(hit_s[1:])
    speedup = summarise([c / h for c, h in zip(cold_s[1:], hit_s[1:], strict=True)]).median
    case = f"{SHARED_TOKENS} tokens in the pool"
    report.add(
        Row(case, "first token, computed", cold.median, "s", None, None, None, cold.spread, rounds),
        Row(
            *(case, "first token, pool hit", hit.median, "s"),
            *(cold.median, speedup, "computed; ratio = times sooner", hit.spread, rounds),
        ),
    )
    return speedup >= MIN_SPEEDUP


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = arguments.parse_args()
    rounds, new_tokens = (1, 16) if args.quick else (args.rounds, NEW_TOKENS)
    batches = (1,) if args.quick else (1, 8)

    bench = Bench(str(convert_gguf(packaged_gguf())), args.threads)
    title = f"SmolLM2-135M float32, {args.threads} threads, prompt {PROMPT_TOKENS}"
    report = Report(f"{title}, {new_tokens} new tokens, {rounds} rounds", args.json)
    with bench.llm:
        good = [against_hf(bench, report, batch, rounds, new_tokens) for batch in batches]
        good.append(pool_hit(bench, report, rounds))
    report.show()
    if not all(good):
        print(f"below the promise: ratio {MIN_RATIO} to HF, {MIN_SPEEDUP} times sooner on a hit")
    return 0 if all(good) or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
