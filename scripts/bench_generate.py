"""What only transformers' own loops do, over the adapter and with stock `generate`, on the CPU.

SmolLM2-135M in float32, the same number of threads, alternating rounds, an empty cache before each.
Every case compares the tokens of both sides and fails where they differ.

    beams     4 beams for 4 prompts of 512 random tokens, 64 new tokens, against stock
    lookup    prompt lookup in the driver loop, on a text to be copied with small edits, against
              plain decoding here, in either loop, and against stock prompt lookup
    samples   8 samples of one prompt of 512 tokens, against stock
    scores    greedy, with the scores of each step handed out, against stock

    python scripts/bench_generate.py [--only CASE ...] [--rounds 3] [--json FILE] [--quick]

Ratios are seconds of the other side over LiteCache's: above 1, LiteCache is faster. On a machine
that others use, too, `--cpu-time` counts what this process and the replica's spend on the CPU; with
`--threads 1`, since threads that wait for each other count as well.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from bench_common import Report, Row, alternate, own_ray, parser, summarise
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from litecache import CacheConfig, KVCacheAdapter
from litecache.adapter.gguf import convert_gguf, packaged_gguf

# Ray starts actors with niceness 15; on a busy machine that would compare priorities.
os.environ.setdefault("RAY_worker_niceness", "0")

CASES = ("beams", "lookup", "samples", "scores")
MIN_BEAMS, MIN_LOOKUP = 1.0, 1.5
NOTE = (
    "The ferry leaves the north pier at seven in the morning and returns at nine in the evening. "
    "Tickets are sold in the small green hut beside the pier, and childen travel for half the "
    "price. Bicycles are welcome on the lower deck, but dogs have to stay on the upper deck. In "
    "winter the ferry does not sail when the wind is stronger than forty knots, and the captan "
    "decides about that one hour before the ferry leaves."
)
EDITING_TASK = "Correct the spelling in this text and change nothing else:"


class Bench:
    """Both sides, and the prompts."""

    def __init__(self, model_dir: str, threads: int, cpu_time: bool) -> None:
        torch.set_num_threads(threads)
        logging.set_verbosity_error()
        self.random = np.random.default_rng(0)
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.hf = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        config = CacheConfig(
            num_blocks=768, dtype="float32", device="cpu", ram_bytes="512MB", max_model_len=2048
        )
        own_ray()
        self.llm = KVCacheAdapter(model_dir, cache_config=config, num_threads=threads)
        pids = [actor["pid"] for actor in self.llm.group.status().values() if "engine" in actor]
        processes = [psutil.Process(pid) for pid in (os.getpid(), *pids)] if cpu_time else []
        self.clock = partial(cpu_seconds, processes) if cpu_time else time.perf_counter

    def prompt(self, batch: int, length: int) -> torch.Tensor:
        return torch.from_numpy(self.random.integers(10, 49_000, size=(batch, length)))

    def editing_prompt(self) -> torch.Tensor:
        """A note to be written again with its misspellings mended."""
        messages = [{"role": "user", "content": f"{EDITING_TASK}\n\n{NOTE}"}]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids: torch.Tensor = self.tokenizer(
            text, add_special_tokens=False, return_tensors="pt"
        ).input_ids
        return ids

    def stock(self, prompt: torch.Tensor, **settings: Any) -> tuple[float, Any]:
        """Seconds and output of stock generate."""
        start = self.clock()
        with torch.no_grad():
            out = self.hf.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        return self.clock() - start, out

    def own(self, prompt: torch.Tensor, **settings: Any) -> tuple[float, Any]:
        """Seconds and output of the adapter, from an empty cache."""
        self.llm.clear("all")
        start = self.clock()
        out = self.llm.generate(prompt, **settings)
        return self.clock() - start, out


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """What processes have spent on the CPU so far."""
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def compare(
    report: Report,
    case: str,
    rounds: int,
    sides: dict[str, Callable[[], tuple[float, Any]]],
    same: Callable[[Any, Any], bool],
) -> dict[str, float]:
    """Alternate the sides, the first of which is the one that is judged.

    Returns:
        The median over the rounds of each other side's seconds over the first one's.
    """
    own = next(iter(sides))
    outputs: dict[str, Any] = {}

    def run(name: str) -> float:
        seconds, outputs[name] = sides[name]()
        return seconds

    seconds = alternate(
        rounds, {name: lambda name=name: run(name) for name in sides}, warm_up=min(1, rounds - 1)
    )
    ratios = {}
    for name in list(sides)[1:]:
        if not same(outputs[own], outputs[name]):
            sys.exit(f"error: {case}: {own} and {name} give different outputs")
        ratio = summarise([a / b for a, b in zip(seconds[name], seconds[own], strict=True)])
        mine, peer = summarise(seconds[own]), summarise(seconds[name])
        report.add(
            Row(
                *(case, own, mine.median, "s"),
                *(peer.median, ratio.median, f"{name}; ratio = times faster"),
                *(mine.spread, mine.samples),
            )
        )
        ratios[name] = ratio.median
    return ratios


def beams(bench: Bench, report: Report, rounds: int, quick: bool) -> bool:
    batch, length, new = (2, 64, 4) if quick else (4, 512, 64)
    prompt = bench.prompt(batch, length)
    settings = {
        "num_beams": 4, "do_sample": False, "max_new_tokens": new, "min_new_tokens": new,
    }  # fmt: skip
    ratios = compare(
        report,
        f"4 beams, batch {batch}, prompt {length}, {new} new",
        rounds,
        {
            "LiteCache": lambda: bench.own(prompt, **settings),
            "stock": lambda: bench.stock(prompt, **settings),
        },
        torch.equal,
    )
    return ratios["stock"] >= MIN_BEAMS


def lookup(bench: Bench, report: Report, rounds: int, quick: bool) -> bool:
    prompt = bench.editing_prompt()
    settings = {"do_sample": False, "max_new_tokens": 16 if quick else 96}
    guess = {"prompt_lookup_num_tokens": 10}
    ratios = compare(
        report,
        f"editing, prompt {prompt.shape[1]}, {settings['max_new_tokens']} new",
        rounds,
        {
            "prompt lookup": lambda: bench.own(prompt, **settings, **guess),
            "plain, driver loop": lambda: bench.own(prompt, loop="driver", **settings),
            "plain, engine loop": lambda: bench.own(prompt, loop="engine", **settings),
            "stock prompt lookup": lambda: bench.stock(prompt, **settings, **guess),
        },
        torch.equal,
    )
    return ratios["plain, engine loop"] >= MIN_LOOKUP


def samples(bench: Bench, report: Report, rounds: int, quick: bool) -> bool:
    length, new = (64, 4) if quick else (512, 64)
    prompt = bench.prompt(1, length)
    settings = {
        "num_return_sequences": 8, "do_sample": True, "max_new_tokens": new, "min_new_tokens": new,
    }  # fmt: skip
    compare(
        report,
        f"8 samples, prompt {length}, {new} new",
        rounds,
        {
            "LiteCache": lambda: bench.own(prompt, **settings),
            "stock": lambda: bench.stock(prompt, **settings),
        },
        lambda own, stock: own.shape == stock.shape,  # the engine draws numbers of its own
    )
    return True


def scores(bench: Bench, report: Report, rounds: int, quick: bool) -> bool:
    batch, length, new = (1, 64, 4) if quick else (4, 512, 64)
    prompt = bench.prompt(batch, length)
    settings = {
        "do_sample": False, "max_new_tokens": new, "min_new_tokens": new,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip

    def same(own: Any, stock: Any) -> bool:
        pairs = zip(own.scores, stock.scores, strict=True)
        return torch.equal(own.sequences, stock.sequences) and all(
            torch.allclose(a, b, rtol=0, atol=1e-3) for a, b in pairs
        )

    compare(
        report,
        f"scores, batch {batch}, prompt {length}, {new} new",
        rounds,
        {
            "LiteCache": lambda: bench.own(prompt, **settings),
            "stock": lambda: bench.stock(prompt, **settings),
        },
        same,
    )
    return True


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument("--cpu-time", action="store_true", help="seconds on the CPU")
    args = arguments.parse_args()
    bench = Bench(str(convert_gguf(packaged_gguf())), args.threads, args.cpu_time)
    seconds = "seconds on the CPU" if args.cpu_time else "seconds"
    report = Report(f"SmolLM2-135M float32, {args.threads} threads, {seconds}", args.json)
    runs = {"beams": beams, "lookup": lookup, "samples": samples, "scores": scores}
    with bench.llm:
        good = [
            runs[name](bench, report, 1 if args.quick else args.rounds, args.quick)
            for name in args.only
        ]
    report.show()
    if not all(good) and not args.quick:
        print(f"below the promise: beams {MIN_BEAMS} of stock, lookup {MIN_LOOKUP} of plain")
    return 0 if all(good) or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
