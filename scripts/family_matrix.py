"""Every decoder family of the installed transformers through an engine, against stock `generate`.

A small random model of each family and case (those of sweep_families.py) is served by an engine in
this process over a shard with RAM and disk: one prompt in one step and one in chunks, found in the
pool, in RAM and on disk, ragged rows in one batch, and rows of a left-padded batch. Tokens must be
those of stock transformers, row by row, and the logits of the answers' positions too, in float32.
What the gate refuses must really be wrong, and right up to the length that the refusal accepts.
Exits 1 when a configuration is silently wrong or is refused without need.

    python scripts/family_matrix.py --docs    # rewrites the package's table and docs/models.md
    python scripts/family_matrix.py --only mistral
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "engine"))

from engine_harness import Harness
from sweep_families import (
    CASES,
    DEFAULTS,
    OWN_CASES,
    Case,
    Made,
    Stock,
    _not_made,
    _refused,
    families,
)

from litecache.adapter.prompts import split_rows
from litecache.engine.loading import model_loader
from litecache.engine.loading.families import FILE, Trial, Trials, notes, read_trials, write_trials
from litecache.engine.loading.model_checks import check_config
from litecache.engine.loading.model_source import ModelSource
from litecache.errors import ModelNotSupportedError

DOCS = Path(__file__).resolve().parents[1] / "docs" / "models.md"
TOLERANCE = 2e-4
NEW = 12
LENGTHS = (110, 37, 70, 5, 33)
"""Of the prompts: beyond all lengths of the cases, and below them."""
STEP = 48
LIMIT = 160
_SHORT = (20, 19, 18, 2, 17)
"""Where no more than `_SHORT_LIMIT` tokens are accepted."""
_SHORT_LIMIT = LENGTHS[0] + NEW

ROPES = ("yarn from 40", "llama3 from 40", "linear", "dynamic", "longrope from 40")
ROPE_FAMILIES = ("cohere2", "falcon", "gemma2", "gpt_neox", "llama", "phi3", "qwen2", "stablelm")
WINDOWS = ("window 8", "window 32", "window 8 everywhere", "window 8 unused")
WINDOW_FAMILIES = ("gemma3_text", "mistral", "qwen2_moe", "qwen3", "starcoder2")
EXTRA: dict[str, dict[str, dict[str, Any]]] = {
    "falcon": {
        "alibi": {"alibi": True},
        "multi-query": {"multi_query": True, "new_decoder_architecture": False},
        "new decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "sequential": {"parallel_attn": False},
    },
    "gpt_neo": {"window 20": {"window_size": 20}},
    "gpt_bigcode": {"multi-head": {"multi_query": False}},
    "gptj": {"whole rotation": {"rotary_dim": None}},
    "mpt": {"clipped": {"attn_config": {"clip_qkv": 0.5}}},
    "opt": {"norm last": {"do_layer_norm_before": False}},
}
"""Fields of families that have no case of sweep_families.py."""


def chosen_cases(family: str) -> dict[str, Case]:
    """The cases of a family by name: "plain" first, all its lengths at once, and its own."""
    names = ["plain", "known lengths", "query scale from 40"]
    names += ROPES if family in ROPE_FAMILIES else ()
    names += WINDOWS if family in WINDOW_FAMILIES else ()
    extra = {name: Case(fields) for name, fields in EXTRA.get(family, {}).items()}
    return {**{name: CASES[name] for name in names}, **OWN_CASES.get(family, {}), **extra}


class Answers:
    """What stock transformers makes of prompts.

    Args:
        model: of the family, with its own attention.
        prompts: their ids.

    Attributes:
        tokens: `NEW` greedy tokens of each.
        logits: float32 `[NEW, vocab]` of each, those the tokens were drawn from.
    """

    def __init__(self, model: Any, prompts: Sequence[list[int]]) -> None:
        self.tokens: list[list[int]] = []
        self.logits: list[torch.Tensor] = []
        self.prompts = prompts
        model.generation_config.eos_token_id = None
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            self.tokens.append(out.sequences[0, len(prompt) :].tolist())
            self.logits.append(torch.cat(out.logits).float())


def scenarios(harness: Harness, stock: Answers) -> Iterator[tuple[str, float]]:
    """The ways to an answer, and the largest relative error of the logits in each.

    Infinite where tokens differ, or where a prefix was not found that should have been.
    """

    def asked(*which: int, tier: str | None = None, rows: Sequence[Any] | None = None) -> float:
        prompts = [stock.prompts[i] for i in which]
        if harness.run(rows or prompts, NEW) != [stock.tokens[i] for i in which]:
            return float("inf")
        if tier is not None and harness.reused[0].get(tier, 0) < 16:
            return float("inf")
        whole = [p + stock.tokens[i][:-1] for p, i in zip(prompts, which, strict=True)]
        found = harness.forward(whole, [NEW] * len(whole))
        return max(
            float(((got - stock.logits[i]).norm(dim=1) / stock.logits[i].norm(dim=1)).max())
            for got, i in zip(found, which, strict=True)
        )

    yield "cold", asked(1)
    yield "chunked", asked(0)
    yield "warm in the pool", asked(0, tier="gpu")
    harness.empty("gpu")
    yield "warm in RAM", asked(0, tier="ram")
    harness.empty("gpu", "ram")
    yield "warm on disk", asked(0, tier="disk")
    yield "ragged batch", asked(2, 3, 4)
    harness.empty("gpu")
    width = max(map(len, stock.prompts))
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in stock.prompts])
    padded = torch.tensor([[0] * (width - len(p)) + p for p in stock.prompts])
    yield "left padding", asked(*range(len(LENGTHS)), rows=split_rows(padded, mask, None))


def trial(family: str, name: str, case: Case) -> tuple[Trial, str] | None:
    """Try a family in a case; None where the case does not concern it.

    Returns:
        The outcome, and what is wrong with it ("" = nothing).
    """
    try:
        made = Made(family, case)
        made.build()
    except Exception as error:
        if isinstance(error, LookupError) and name != "plain":
            return None
        result = _not_made(family, name, error)
        if result.outcome == "refused":
            return Trial(family, name, "refused", result.detail), ""
        return Trial(family, name, "not made", result.detail), ""
    try:
        return _serve(family, name, made, LENGTHS, LIMIT)
    except ModelNotSupportedError as error:
        refused = Trial(family, name, "refused", error.reason, error.right_to)
        if error.right_to and error.right_to >= _SHORT[0] + NEW:
            lengths = LENGTHS if error.right_to >= _SHORT_LIMIT else _SHORT
            try:
                _, fault = _serve(family, name, made, lengths, min(error.right_to, LIMIT))
            except ModelNotSupportedError as second:
                fault = f"refused below {error.right_to}, too: {second.reason}"
            return refused, fault
        try:
            model = made.build()
            stock = Stock(model)
        except Exception:
            return refused, ""  # stock has no answer either
        result = _refused(family, name, made, stock, error)
        return refused, result.detail if result.fault else ""


def _serve(
    family: str, name: str, made: Made, lengths: Sequence[int], limit: int
) -> tuple[Trial, str]:
    vocab = made.config.get_text_config(decoder=True).vocab_size
    prompts = [random.Random(n).choices(range(3, vocab), k=n) for n in lengths]
    source = ModelSource(config=made.config.to_dict(), weights="random")
    with (
        tempfile.TemporaryDirectory() as folder,
        # Weights as the sweep draws them: wide, so that attention matters.
        mock.patch.object(model_loader, "random_model", return_value=made.build()),
        mock.patch.object(model_loader, "read_config", return_value=made.config),
        mock.patch.object(
            model_loader, "check_config", side_effect=lambda _: check_config(made.checked)
        ),
        Harness(
            source,
            folders=[Path(folder)],
            max_model_len=limit,
            max_batch_tokens=STEP,
            max_prefill_tokens=STEP,
            num_blocks=64,
        ) as harness,
    ):
        verdict = harness.engine.info.attention
        stock = Answers(made.build(), prompts)
        errors = dict(scenarios(harness, stock))
    worst = max(errors.values())
    wrong = [f"{way} by {error:.1e}" for way, error in errors.items() if not error <= TOLERANCE]
    return Trial(
        family, name, verdict, f"{worst:.0e}"
    ), f"WRONG: {', '.join(wrong)}" if wrong else ""


def tried(family: str) -> list[tuple[Trial, str, float]]:
    """All cases of a family: outcome, fault and seconds."""
    found = []
    for name, case in chosen_cases(family).items():
        begun = time.perf_counter()
        try:
            outcome = trial(family, name, case)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            outcome = Trial(family, name, "failed", text), f"FAILED: {text}"
        if outcome is not None and (name == "plain" or outcome[0].verdict != "not made"):
            found.append((*outcome, time.perf_counter() - begun))
            row = outcome[0]
            if name == "plain" and row.verdict in ("refused", "not made") and not row.right_to:
                break  # so it is in every case
    return found


def render(trials: Trials) -> str:
    """docs/models.md."""
    counts = Counter(rows[0].verdict for _, rows in trials.by_family())
    right = sum(row.verdict in ("paged", "gathered") for row in trials.rows)
    lines = [
        "# Which models run",
        "",
        "Written by `python scripts/family_matrix.py --docs`; `litecache models --families` prints"
        " the same table.",
        "",
        f"Every decoder family of transformers {trials.transformers}, as a small random model in"
        f" float32, {right} configurations in all that run: each answers cold, in chunks, found in"
        " the pool, in RAM and on disk, in a ragged batch and from a left-padded batch,"
        " with the tokens of stock `generate` and logits within 2e-4 of its own.",
        "",
        "- **paged**: its attention runs over the blocks as they lie.",
        "- **gathered**: its own attention code is given the keys and values of whole contexts out"
        " of the same blocks ([engine.md](engine.md#families-with-attention-code-of-their-own)):"
        " right, reused and tiered as the others, about as fast as with stock's dynamic cache.",
        "- **refused**: with the reason, before anything is started. Where a length is named, a"
        " `max_model_len` up to it is accepted: rotations that change with the length of the"
        " sequence (longrope beyond its original length, dynamic rope beyond the model's positions)"
        " would make cached keys those of another length.",
        "- **not made**: its default configuration gives no small model. The gate decides on the"
        " real one.",
        "",
        "Beside its defaults a family is tried with its *known lengths*: windows, chunks and"
        " original lengths of 8 to 40 tokens, so that the prompts of up to 110 go far beyond each"
        " of them."
        " The other cases are named by what they set. *Up to that length*: beyond it stock's own"
        " answers depend on what follows or on its cache, and the gate refuses a longer"
        " `max_model_len`.",
        "",
        "The table informs, the gate decides: whatever a family's line says, each model is probed"
        " as it is loaded, and code that comes with a model is probed like any other. Of a model"
        " that states no number of positions (ALiBi), `max_model_len` is 2,048 unless it is set.",
        "",
        ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) + ".",
        "",
        "| family | verdict | |",
        "|---|---|---|",
    ]
    for family, rows in trials.by_family():
        note = notes(rows).replace("|", "\\|")
        lines.append(f"| {family} | {rows[0].verdict} | {note} |")
    return "\n".join(lines) + "\n"


def _work(family: str) -> list[tuple[Trial, str, float]]:
    import logging

    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    return tried(family)


def main() -> int:
    """Try, print, write."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--only", action="append", metavar="FAMILY", help="a model type")
    options.add_argument("--docs", action="store_true", help="write the table and docs/models.md")
    options.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    arguments = options.parse_args()
    chosen = arguments.only or families()
    unknown = sorted(set(chosen) - set(families()) - set(DEFAULTS))
    if unknown:
        options.error(f"no such family: {', '.join(unknown)}")
    console, begun = Console(), time.perf_counter()
    rows: list[Trial] = []
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as home:
        os.environ.update(LITECACHE_HOME=home, HF_HUB_OFFLINE="1")
        # Engines have threads: each family gets a process that has forked from none.
        with multiprocessing.get_context("fork").Pool(arguments.jobs, maxtasksperchild=12) as pool:
            for part in track(pool.imap(_work, chosen), "families", total=len(chosen)):
                for row, fault, seconds in part:
                    rows.append(row)
                    place = f"{row.family}, {row.case}"
                    if fault:
                        faults.append(f"{place}: {fault}")
                    length = f" (up to {row.right_to})" if row.right_to else ""
                    console.print(
                        f"{place}: {row.verdict}{length} {row.detail[:120]} {seconds:.1f} s",
                        highlight=False,
                    )
    counts = Counter(row.verdict for row in rows)
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    console.print(f"{len(rows)} configurations in {time.perf_counter() - begun:.0f} s: {told}")
    for fault in faults:
        console.print(f"[red]{fault}[/]")
    if arguments.docs:
        import transformers

        # With --only the other families' lines stay.
        others = (
            [row for row in read_trials().rows if row.family not in chosen] if FILE.exists() else []
        )
        place = {family: n for n, family in enumerate(families())}
        kept = sorted((*others, *rows), key=lambda row: place[row.family])
        trials = Trials(transformers.__version__, tuple(kept))
        write_trials(trials)
        DOCS.write_text(render(trials), encoding="utf-8")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
