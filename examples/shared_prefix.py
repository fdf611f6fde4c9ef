"""Several questions about one document, before and after everything was stopped and started again.

SmolLM2-135M-Instruct answers the same questions in two separate driver processes. The first starts
on an empty store: its first question computes the KV of the document, the others find it in the
pool. Then all actors and Ray itself are stopped; the example checks that no process of the first
run is alive. The second driver starts everything anew: its first question takes the document's KV
from disk. Answers must be identical.

    python examples/shared_prefix.py [--json FILE] [--no-cache]

With RAY_ADDRESS set (a running cluster, or a job) the cluster stays up and only the actors restart.
Exits 1 when an answer differs, when the first question after the restart takes less than 95 % of
the document from disk, or when something of the first run survives.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

DOCUMENT = Path(__file__).resolve().with_name("document.txt")
WARM_UP = "Write one sentence about the colour of the sky in the desert."
QUESTIONS = {
    "power": "Explain step by step how a tide mill gets its power from the sea.",
    "dam": "What is the dam made of, and how long and wide is it?",
    "gate": "How does the sea gate work, and what is its most common fault?",
    "scouring": "What is the scouring, and when is it done?",
    "storm": "What must the keeper do when a storm from the west is expected?",
    "winter": "Describe the work of the keeper in winter when the pond freezes.",
}
SHOWN_ANSWERS = ("dam", "storm")
MIN_NEW_TOKENS, MAX_NEW_TOKENS = 48, 64
MIN_DISK_SHARE = 0.95
TIERS = ("gpu", "ram", "disk")
MARK = "LITECACHE_DEMO_RUN"  # in the environment of every process that a phase starts
console = Console(width=None if sys.stdout.isatty() else 120)


class FirstTokenClock:
    """A streamer that notes when tokens arrive; `generate` first hands it the prompt."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter() - self.started)
        self._prompt_seen = True

    def end(self) -> None:
        pass


def prompts(tokenizer: Any) -> tuple[dict[str, list[int]], int, int]:
    """Token ids per question, and where in all of them the document begins and ends."""
    document = DOCUMENT.read_text(encoding="utf-8")
    chats = {
        name: [{"role": "user", "content": f"{document}\n\nQuestion: {question}"}]
        for name, question in QUESTIONS.items()
    }
    texts = {
        name: tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for name, chat in chats.items()
    }
    ids = {
        name: tokenizer(text, add_special_tokens=False).input_ids for name, text in texts.items()
    }
    first = next(iter(texts.values()))
    begin = len(tokenizer(first[: first.index(document[:80])], add_special_tokens=False).input_ids)
    same = (len(set(column)) == 1 for column in zip(*ids.values(), strict=False))
    end = sum(1 for _ in itertools.takewhile(bool, same))
    return ids, begin, end


def hf_prefill_s(model_dir: str, prompt: list[int], rounds: int = 3) -> float:
    """Seconds that stock `transformers` takes to the first token of the prompt (the best round)."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device)
    input_ids = torch.tensor([prompt], device=device)
    model.generate(input_ids[:, :64], max_new_tokens=1, do_sample=False)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        model.generate(input_ids, max_new_tokens=1, do_sample=False)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def run_phase(phase: str, model_dir: str, store: str, result_file: Path) -> None:
    """One driver's life: start the actors, warm up, ask all questions, stop the actors."""
    import ray
    import torch
    from transformers import AutoTokenizer

    from litecache import CacheConfig, KVCacheAdapter

    if not os.environ.get("RAY_ADDRESS"):
        # Ends with this process. Ray gives actors niceness 15; HF's prefill here runs with 0.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(
            address="local", include_dashboard=False, log_to_driver=False, logging_level="warning"
        )
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    questions, doc_begin, doc_end = prompts(tokenizer)
    result: dict[str, Any] = {"phase": phase, "document": [doc_begin, doc_end], "questions": []}
    if phase == "cold":
        result["hf_prefill_s"] = hf_prefill_s(model_dir, next(iter(questions.values())))
    cached = phase != "no_cache"
    config = CacheConfig(
        block_size=16,
        num_blocks=512,
        dtype="float32",
        ram_bytes="512MB",
        storage_dir=store if cached else None,
        storage_bytes="2GB",
        admission="all" if cached else "none",
        max_model_len=4096,
    )

    def ask(llm: KVCacheAdapter, ids: list[int], new_tokens: int) -> tuple[list[int], Any, Any]:
        clock = FirstTokenClock()
        out = llm.generate(
            input_ids=torch.tensor([ids]),
            max_new_tokens=new_tokens,
            min_new_tokens=min(new_tokens, MIN_NEW_TOKENS),
            do_sample=False,
            streamer=clock,
            return_dict_in_generate=True,
        )
        return out.sequences[0, len(ids) :].tolist(), clock, out.litecache

    group = f"shared-prefix-{phase}-{os.getpid()}"
    with KVCacheAdapter(model_dir, cache_config=config, tokenizer=tokenizer, group=group) as llm:
        warm_up = tokenizer.apply_chat_template(
            [{"role": "user", "content": WARM_UP}], tokenize=False, add_generation_prompt=True
        )
        ask(llm, tokenizer(warm_up, add_special_tokens=False).input_ids, 8)
        for name, ids in questions.items():
            if not cached:
                llm.clear("all")
            answer, clock, reuse = ask(llm, ids, MAX_NEW_TOKENS)
            decode_s = clock.times[-1] - clock.times[0]
            result["questions"].append(
                {
                    "id": name,
                    "ttft_s": clock.times[0],
                    "prompt_tokens": len(ids),
                    "reused": {t: reuse.reused_tokens[0].get(t, 0) for t in TIERS},
                    "found": {t: reuse.found_tokens[0].get(t, 0) for t in TIERS},
                    "tokens_per_s": (len(answer) - 1) / decode_s,
                    "answer_sha256": hashlib.sha256(str(answer).encode()).hexdigest(),
                    "answer": tokenizer.decode(answer, skip_special_tokens=True),
                }
            )
        if cached:
            llm.flush()
    await_no_actors(group)
    result_file.write_text(json.dumps(result), encoding="utf-8")


def await_no_actors(group: str, timeout_s: float = 20.0) -> None:
    """See that the group's actors are gone, also from a cluster that goes on running."""
    import ray

    deadline = time.monotonic() + timeout_s
    while names := [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith(f"litecache:{group}:")
    ]:
        if time.monotonic() > deadline:
            sys.exit(f"error: these actors are still alive: {', '.join(names)}")
        time.sleep(0.1)


def survivors(mark: str) -> list[str]:
    """Processes whose environment carries the phase's mark: `pid name`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(f"{process.name} {(process / 'comm').read_text().strip()}")
        except OSError:  # gone in the meantime, or another user's
            continue
    return found


def spawn(phase: str, model_dir: str, folder: Path) -> dict[str, Any]:
    """Run one phase in a driver process of its own and see that nothing of it stays behind."""
    result_file, mark = folder / f"{phase}.json", f"{phase}-{uuid.uuid4()}"
    command = [sys.executable, __file__, "--phase", phase, "--model", model_dir]
    command += ["--folder", str(folder)]
    console.print(f"[bold]{phase}[/]: a new driver process", highlight=False)
    started = time.perf_counter()
    status = subprocess.run(command, env={**os.environ, MARK: mark}, check=False).returncode
    if status:
        sys.exit(f"error: phase {phase} has failed, with exit status {status}")
    seconds = time.perf_counter() - started
    deadline = time.monotonic() + 30
    while (alive := survivors(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if alive:
        sys.exit(f"error: of phase {phase} these processes are still alive: {', '.join(alive)}")
    console.print(f"  {seconds:.0f} s; none of its processes is alive", highlight=False)
    result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
    return result


def show(phases: list[dict[str, Any]], same: dict[str, bool]) -> None:
    """The table: a section per phase, a row per question."""
    table = Table(title="SmolLM2-135M-Instruct, float32: several questions about one document")
    table.add_column("phase")
    table.add_column("question")
    for column in ("prompt", "first token", "found on GPU", "in RAM", "on disk", "tokens/s"):
        table.add_column(column, justify="right")
    table.add_column("same answer")
    for phase in phases:
        for row in phase["questions"]:
            cells = [phase["phase"], row["id"], str(row["prompt_tokens"])]
            cells.append(f"{row['ttft_s'] * 1e3:,.0f} ms")
            cells += [str(row["found"][tier]) for tier in TIERS]
            table.add_row(*cells, f"{row['tokens_per_s']:.1f}", "yes" if same[row["id"]] else "NO")
        table.add_section()
    console.print(table)


def figures(cold: dict[str, Any], warm: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the JSON file; each compares with a figure of the same run."""
    first, again = cold["questions"][0], warm["questions"][0]
    begin, end = cold["document"]
    # Where a prompt's tokens were found is in this order: in the pool, in RAM, on disk.
    above = again["found"]["gpu"] + again["found"]["ram"]
    from_disk = max(0, min(end, above + again["found"]["disk"]) - max(begin, above))
    hf = cold["hf_prefill_s"]

    def row(case: str, metric: str, value: float, unit: str, **rest: Any) -> dict[str, Any]:
        base = {"case": case, "metric": metric, "value": value, "unit": unit}
        return {**base, "limit": None, "ratio": None, "peer": None, **rest}

    ratio_cold, ratio_warm = first["ttft_s"] / hf, again["ttft_s"] / first["ttft_s"]
    return [
        row("cold", "ttft", first["ttft_s"], "s", limit=hf, ratio=ratio_cold, peer="HF prefill"),
        row("after_restart", "ttft", again["ttft_s"], "s", ratio=ratio_warm, peer="cold ttft"),
        row(
            *("after_restart", "document_from_disk", from_disk, "tokens"),
            limit=end - begin,
            ratio=from_disk / (end - begin),
        ),
    ]


def orchestrate(args: argparse.Namespace) -> int:
    """Run the phases, compare, report; returns the exit code."""
    from litecache.adapter.gguf import convert_gguf, packaged_gguf

    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    console.print("the model: SmolLM2, converted from its GGUF file the first time")
    model_dir = str(convert_gguf(packaged_gguf()))
    folder = Path(tempfile.mkdtemp(prefix="litecache-demo-"))
    names = ["cold", "after_restart"] + (["no_cache"] if args.no_cache else [])
    try:
        phases = [spawn(name, model_dir, folder) for name in names]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    answers = [{q["id"]: q["answer_sha256"] for q in phase["questions"]} for phase in phases]
    same = {name: all(a[name] == answers[0][name] for a in answers) for name in QUESTIONS}
    rows = figures(phases[0], phases[1])
    show(phases, same)
    for name in SHOWN_ANSWERS:
        answer = next(q["answer"] for q in phases[1]["questions"] if q["id"] == name)
        console.print(f"[bold]{QUESTIONS[name]}[/]\n{answer} ...", highlight=False)
    cold, warm, disk = rows
    console.print(
        f"first token, cold: {cold['value']:.2f} s ({cold['ratio']:.2f} of HF's own prefill, "
        f"{cold['limit']:.2f} s); after the restart: {warm['value']:.3f} s "
        f"({1 / warm['ratio']:.0f} times sooner); {disk['ratio']:.1%} of the document from disk",
        highlight=False,
    )
    if args.json:
        document = {
            "machine": {"system": platform.platform(), "cores": os.cpu_count()},
            "date": started,
            "command": "python examples/shared_prefix.py",
            "rows": rows,
            "phases": [{"phase": p["phase"], "questions": p["questions"]} for p in phases],
            "identical": all(same.values()),
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    failures = []
    if not all(same.values()):
        failures.append(f"answers differ: {', '.join(n for n, ok in same.items() if not ok)}")
    if disk["ratio"] < MIN_DISK_SHARE:
        failures.append(f"only {disk['ratio']:.1%} of the document came from disk")
    for failure in failures:
        console.print(f"[red]FAILED[/]: {failure}")
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--no-cache", action="store_true", help="a third phase that reuses nothing")
    for internal in ("--phase", "--model", "--folder"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        folder = Path(args.folder)
        run_phase(args.phase, args.model, str(folder / "store"), folder / f"{args.phase}.json")
        return 0
    return orchestrate(args)


if __name__ == "__main__":
    sys.exit(main())
