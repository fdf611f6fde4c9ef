"""Random calls of `generate` in the driver loop, beside stock `generate` of the same weights.

Each call draws some of transformers' settings and objects at once, with their values, over a ragged
batch, and runs in the driver loop over an engine in this process and on the stock model from the
same state of torch's generator. Both give the same sequences, scores and logits (to 1e-4) and leave
the generator in the same state, or both refuse; the engine's books are in order at the end. Call N
of a seed is the same in every run. Exits 1 when a call differs.

    python scripts/fuzz_generate.py --count 2000 --json generate.json
"""

from __future__ import annotations

import logging
import random
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from bench_common import Report, Row, parser
from rich.progress import track
from transformers import (
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation import SuppressTokensLogitsProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "engine"))

from engine_harness import EngineForward, Harness, family_source
from plan_driver import VOCAB, stock_model

from litecache.adapter.driver_loop import generate_in_driver
from litecache.adapter.proxy import ModelProxy
from litecache.errors import LiteCacheError

FAMILIES = ("llama", "gemma2", "gpt2", "mistral")
LEAST_RESULTS = 0.5


class EndsAtMultiples(StoppingCriteria):  # type: ignore[misc]
    """A row ends with a token that five divides."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % 5 == 0


def settings_of(rng: random.Random, family: str) -> dict[str, Any]:
    """Some settings, each with a value of its own."""

    def tokens(count: int) -> list[int]:
        return rng.sample(range(3, VOCAB), count)

    pool: dict[str, Any] = {
        "do_sample": lambda: True,
        "num_beams": lambda: rng.choice([2, 3, 4]),
        "num_return_sequences": lambda: rng.choice([1, 2, 3]),
        "temperature": lambda: rng.uniform(0.3, 2.0),
        "top_k": lambda: rng.choice([0, 1, 5, 50]),
        "top_p": lambda: rng.uniform(0.1, 1.0),
        "min_p": lambda: rng.uniform(0.0, 0.3),
        "typical_p": lambda: rng.uniform(0.2, 0.9),
        "epsilon_cutoff": lambda: rng.uniform(0.0, 0.01),
        "eta_cutoff": lambda: rng.uniform(0.0, 0.01),
        "repetition_penalty": lambda: rng.uniform(0.7, 1.8),
        "encoder_repetition_penalty": lambda: rng.uniform(0.7, 1.8),
        "no_repeat_ngram_size": lambda: rng.choice([1, 2, 3]),
        "encoder_no_repeat_ngram_size": lambda: rng.choice([1, 2]),
        "length_penalty": lambda: rng.uniform(-1.0, 2.0),
        "early_stopping": lambda: rng.choice([True, False, "never"]),
        "renormalize_logits": lambda: True,
        "remove_invalid_values": lambda: True,
        "forced_bos_token_id": lambda: tokens(1)[0],
        "forced_eos_token_id": lambda: tokens(1)[0],
        "suppress_tokens": lambda: tokens(5),
        "begin_suppress_tokens": lambda: tokens(5),
        "bad_words_ids": lambda: [tokens(1), tokens(2)],
        "sequence_bias": lambda: [[tokens(1), rng.uniform(-5, 5)], [tokens(2), 3.0]],
        "exponential_decay_length_penalty": lambda: (rng.randrange(1, 6), rng.uniform(1.0, 1.5)),
        "eos_token_id": lambda: tokens(rng.choice([1, 20])),
        "min_new_tokens": lambda: rng.randrange(6),
        "guidance_scale": lambda: rng.uniform(1.1, 3.0),
        "prompt_lookup_num_tokens": lambda: rng.choice([1, 3]),
        "use_cache": lambda: rng.choice([True, False]),
        "output_scores": lambda: True,
        "output_logits": lambda: True,
        "prefix_allowed_tokens_fn": lambda: (
            lambda batch, ids: list(range((int(ids[-1]) + batch) % 7, VOCAB, 3))
        ),
        "logits_processor": lambda: LogitsProcessorList(
            [SuppressTokensLogitsProcessor(tokens(30), device="cpu")]
        ),
        "stopping_criteria": lambda: StoppingCriteriaList([EndsAtMultiples()]),
        "watermarking_config": lambda: rng.choice(
            [
                WatermarkingConfig(bias=2.0, seeding_scheme="selfhash"),
                SynthIDTextWatermarkingConfig([654, 400, 836], 3),
            ]
        ),
    }
    names = rng.sample(sorted(pool), rng.choice([0, 1, 2, 3, 5]))
    names += rng.choice([[], ["do_sample"], ["num_beams"], ["num_beams", "do_sample"]])
    given = {name: pool[name]() for name in names}
    given["max_new_tokens"] = rng.randrange(1, 12)
    given["return_dict_in_generate"] = True
    return given


def inputs_of(rng: random.Random) -> dict[str, torch.Tensor]:
    """A left-padded batch; some share a beginning with earlier ones."""
    lengths = [rng.choice([1, 3, 8, 16, 17, 33]) for _ in range(rng.choice([1, 1, 2, 3]))]
    width = max(lengths)
    first = rng.randrange(4)
    ids = torch.zeros((len(lengths), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        common = [3 + (first * 31 + i * i * 7) % (VOCAB - 3) for i in range(length)]
        own = rng.randrange(length + 1)
        text = common[:own] + [rng.randrange(3, VOCAB) for _ in range(length - own)]
        ids[row, width - length :] = torch.tensor(text)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def differs(ours: Any, stocks: Any) -> str | None:
    """The first thing that two results disagree on."""
    if ours.sequences.shape != stocks.sequences.shape:
        return f"shapes {list(ours.sequences.shape)} and {list(stocks.sequences.shape)}"
    for name in ("scores", "logits"):
        mine, theirs = getattr(ours, name, None), getattr(stocks, name, None)
        if (mine is None) != (theirs is None) or (mine and len(mine) != len(theirs)):
            return f"{name} of other steps"
        for step, (one, other) in enumerate(zip(mine or (), theirs or (), strict=True)):
            if not torch.allclose(one, other, atol=1e-4, rtol=1e-4, equal_nan=True):
                return f"{name} of step {step}"
    if not torch.equal(ours.sequences, stocks.sequences):
        return "tokens"
    return None


class Fuzz:
    """Engines and stock models of all families, and what became of the calls."""

    def __init__(self) -> None:
        self.harnesses = {
            family: Harness(family_source(family), num_blocks=96) for family in FAMILIES
        }
        self.outcomes: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.failures: list[str] = []

    def round(self, number: int, seed: int) -> None:
        """One call."""
        rng = random.Random(seed * 1_000_003 + number)
        family = rng.choice(FAMILIES)
        model, harness = stock_model(family, 0, "cpu"), self.harnesses[family]
        given, inputs = settings_of(rng, family), inputs_of(rng)
        arguments = {"pad_token_id": 0, **inputs, **given}
        torch.manual_seed(number)
        stocks = self._outcome(lambda: model.generate(**arguments))
        state = torch.get_rng_state()
        torch.manual_seed(number)
        proxy = ModelProxy(model.config, model.generation_config, EngineForward(harness))
        rest = dict(arguments)
        ids = rest.pop("input_ids")
        ours = self._outcome(lambda: generate_in_driver(proxy, ids, None, rest))
        told = f"call {number} ({family}, {sorted(given)})"
        if isinstance(ours, Exception) or isinstance(stocks, Exception):
            self._compare_errors(told, ours, stocks)
            return
        self.outcomes["results"] += 1
        self.asked.update(given.keys())
        fault = differs(ours, stocks)
        if fault is None and not torch.equal(state, torch.get_rng_state()):
            fault = "the generator's state"
        if fault is not None:
            self.failures.append(f"{told}: {fault} differ")

    def _outcome(self, call: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return call()
            except Exception as error:  # whatever transformers raises
                return error

    def _compare_errors(self, told: str, ours: Any, stocks: Any) -> None:
        if isinstance(ours, LiteCacheError) and isinstance(stocks, Exception):
            self.outcomes["refused by both"] += 1
        else:
            shown = [each if isinstance(each, Exception) else "a result" for each in (ours, stocks)]
            self.failures.append(f"{told}: {shown[0]!r} here, {shown[1]!r} in stock")

    def close(self) -> None:
        """Check the engines' books and stop them."""
        for harness in self.harnesses.values():
            harness.check()
            harness.close()


def main() -> int:
    """Fuzz, report."""
    arguments = parser(__doc__)
    arguments.add_argument("--count", type=int, default=2_000, help="calls")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    count = 60 if options.quick else options.count
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    report = Report("Random calls of generate in the driver loop", options.json)
    fuzz, begun = Fuzz(), time.monotonic()
    for number in track(range(count), description="calls", disable=not sys.stderr.isatty()):
        fuzz.round(number, options.seed)
    fuzz.close()
    report.add(Row("all", "calls", count, "calls"))
    report.add(Row("all", "time", time.monotonic() - begun, "s"))
    for outcome, times in sorted(fuzz.outcomes.items()):
        report.add(Row("all", outcome, times, "calls"))
    report.add(Row("all", "different", len(fuzz.failures), "calls", limit=0))
    for name, times in sorted(fuzz.asked.items()):
        report.add(Row(name, "in results", times, "calls"))
    if fuzz.outcomes["results"] < LEAST_RESULTS * count:
        fuzz.failures.append(f"only {fuzz.outcomes['results']} of {count} calls gave a result")
    for failure in fuzz.failures[:50]:
        sys.stderr.write(f"{failure}\n")
    return 1 if fuzz.failures else 0


if __name__ == "__main__":
    sys.exit(main())
