"""Decoding over gathered KV against stock `generate` with its dynamic cache, on the CPU.

Random models of families with attention code of their own (8 layers of 512, float32), prompts of
512 random tokens, 64 new tokens, batch 1 and 8, one engine in this process without Ray, the same
number of threads. Decode is a call of 65 new tokens less one of a single token; ratios are rates,
the median over alternating rounds. `--cpu-time` counts the process's seconds on the CPU instead of
the wall's, for a machine that does other things, too (take one thread).

    python scripts/bench_gathered.py [--rounds 5] [--family bloom] [--json FILE] [--quick]
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import Report, alternate, parser, rate_against

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "engine"))

from engine_harness import Harness

from litecache.engine.loading.model_checks import read_config
from litecache.engine.loading.model_loader import random_model
from litecache.engine.loading.model_source import ModelSource

LEAST_RATIO = 0.9
PROMPT_TOKENS, NEW_TOKENS = 512, 65
VOCAB = 8_000
_SIZES = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
_OF_GPT = {"n_embd": 512, "n_layer": 8, "n_head": 8, "rotary_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 512, "n_layer": 8, "n_head": 8},
    "codegen": _OF_GPT,
    "falcon": _SIZES,
    "gpt_neo": {
        **{"hidden_size": 512, "num_layers": 8, "num_heads": 8},
        "attention_types": [[["global", "local"], 4]],
    },
    "gptj": _OF_GPT,
    "mpt": {"d_model": 512, "n_layers": 8, "n_heads": 8},
    "xglm": {"d_model": 512, "num_layers": 8, "attention_heads": 8, "ffn_dim": 2048},
}


class Bench:
    """Both contestants over equal weights."""

    def __init__(self, family: str, threads: int, clock: Callable[[], float]) -> None:
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        fields = {**FAMILIES[family], **ends, "vocab_size": VOCAB, "model_type": family}
        source = ModelSource(config=fields, weights="random", seed=0)
        self.hf = random_model(read_config(source), 0, torch.device("cpu"), torch.float32).eval()
        self.harness = Harness(source, num_blocks=400, max_model_len=1024)
        torch.set_num_threads(threads)
        self._random, self._clock = random.Random(0), clock

    def _prompts(self, batch: int) -> list[list[int]]:
        return [self._random.choices(range(VOCAB), k=PROMPT_TOKENS) for _ in range(batch)]

    def hf_seconds(self, batch: int, new_tokens: int) -> float:
        """Of a call of stock `generate`."""
        ids = torch.tensor(self._prompts(batch))
        begun = self._clock()
        self.hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return self._clock() - begun

    def own_seconds(self, batch: int, new_tokens: int) -> float:
        """Of an engine's answer to prompts that it has not seen."""
        prompts = self._prompts(batch)
        begun = self._clock()
        self.harness.run(prompts, new_tokens)
        return self._clock() - begun


def decode(bench: Bench, report: Report, family: str, batch: int, rounds: int) -> bool:
    """One family and batch size; returns whether the ratio holds."""

    def contestant(run: Callable[[int, int], float]) -> Callable[[], float]:
        return lambda: -run(batch, 1) + run(batch, NEW_TOKENS)

    contestants = {"hf": contestant(bench.hf_seconds), "own": contestant(bench.own_seconds)}
    samples = alternate(rounds, contestants)
    hf, own = samples["hf"], samples["own"]
    told = (f"{family}, batch {batch}", "decode", batch * (NEW_TOKENS - 1), own, hf)
    row, ratio = rate_against(*told, "HF generate, dynamic cache")
    report.add(row)
    return ratio >= LEAST_RATIO


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument("--cpu-time", action="store_true")
    arguments.add_argument("--family", action="append", choices=sorted(FAMILIES))
    args = arguments.parse_args()
    families = args.family or (["bloom"] if args.quick else sorted(FAMILIES))
    rounds = 1 if args.quick else args.rounds
    report = Report(f"Gathered KV, float32, {args.threads} threads, {rounds} rounds", args.json)
    good = []
    for family in families:
        clock = time.process_time if args.cpu_time else time.perf_counter
        bench = Bench(family, args.threads, clock)
        try:
            good += [decode(bench, report, family, batch, rounds) for batch in (1, 8)]
        finally:
            bench.harness.close()
    report.show()
    if not all(good):
        print(f"below the promise of {LEAST_RATIO} of HF's rate")
    return 0 if all(good) or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
