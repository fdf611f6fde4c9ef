"""What a group finds of what an earlier one over its folder had, after a clean stop and a kill.

    python scripts/check_restart.py [--prompts 48] [--seed 0] [--json FILE]

Three lives, each a process with a Ray and a group of its own (a tiny random model in float32, two
shards) over one storage folder. The first computes prompts of shared prefixes under three cache
salts (kept for ever, for an hour, for three seconds), asks them again from the shards, and closes.
The second finds what the first had, computes new prompts, and is killed with all its processes at
once, nothing flushed. The third finds what was durable. All whole blocks of a prompt must be found
again in each later life, on disk (or in RAM, where a prompt before it began alike), unless their
time has ended: then none. Tokens must be those that the prompt had. Exits 1 otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench_common import Report, Row, parser
from chaos import MIB, make_prompts, processes_of, start_ray, tiny_model

SALTS = {"kept": None, "for an hour": 3600, "for three seconds": 3}
"""Cache salt -> `cache_ttl_s`."""
LATE = "just before the kill"
LIFE_S = 180.0
BLOCK_SIZE = 16
NEW_TOKENS = 4


class Life:
    """One group from its start to its end; asks, and notes tokens and what was found."""

    def __init__(self, folder: Path, ray_folder: Path) -> None:
        from litecache import CacheConfig, KVCacheAdapter

        start_ray(ray_folder)
        config = CacheConfig(
            num_blocks=512, dtype="float32", ram_bytes=16 * MIB, storage_dir=str(folder),
            storage_bytes=64 * MIB, storage_shards=2,
        )  # fmt: skip
        begun = time.monotonic()
        self.llm = KVCacheAdapter(
            tiny_model(), weights="random", cache_config=config, num_threads=1
        )
        self.told: dict[str, Any] = {"start_s": time.monotonic() - begun}

    def compute(self, prompts: list[list[int]], salt: str, ttl_s: float | None) -> None:
        """Ask, and leave what was computed in the tiers."""
        for prompt in prompts:
            for _ in self.llm.stream(
                prompt, as_tokens=True, max_new_tokens=NEW_TOKENS, cache_salt=salt,
                cache_ttl_s=ttl_s,
            ):  # fmt: skip
                pass

    def look(self, prompts: list[list[int]], salt: str) -> None:
        """Ask again, and leave nothing."""
        found: Counter[str] = Counter()
        tokens = []
        for prompt in prompts:
            stream = self.llm.stream(
                prompt, as_tokens=True, max_new_tokens=NEW_TOKENS, cache_salt=salt,
                cache="no-store",
            )  # fmt: skip
            tokens.append(list(stream))
            found.update(stream.found_tokens)
        self.told[salt] = {"found": dict(found), "tokens": tokens}


def live(number: int, prompts: list[list[int]], folder: Path) -> None:
    """The life of this number, in this process; tells what it saw and waits for its end."""
    os.environ["LITECACHE_LOADS"] = "all"  # whatever is found is loaded, however fast it computes
    life = Life(folder / "store", folder / f"ray{number}")
    half = len(prompts) // 2
    if number == 1:
        for salt, ttl_s in SALTS.items():
            life.compute(prompts[:half], salt, ttl_s)
        life.llm.clear("gpu")
        life.llm.clear("ram")
    for salt in SALTS:
        life.look(prompts[:half], salt)
    if number == 2:
        life.compute(prompts[half:], LATE, None)
    if number > 1:
        life.look(prompts[half:], LATE)
    if number != 2:
        life.llm.close()
    print(json.dumps(life.told), flush=True)
    sys.stdin.read()


def run_life(number: int, options: Any, folder: Path) -> dict[str, Any]:
    """A life in a process of its own; the second one is killed with its whole Ray."""
    (folder / f"ray{number}").mkdir(parents=True)
    command = [sys.executable, __file__, "--life", str(number), "--folder", str(folder)]
    command += ["--prompts", str(options.prompts), "--seed", str(options.seed)]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdout is not None
    assert child.stdin is not None
    line = child.stdout.readline()
    if number == 2:
        for pid in processes_of(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    child.stdin.close()
    child.wait(LIFE_S)
    deadline = time.monotonic() + 30
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    if not line.startswith("{"):
        raise SystemExit(f"error: life {number} ended with {child.returncode}")
    told: dict[str, Any] = json.loads(line)
    return told


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--prompts", type=int, default=48)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--life", type=int, help="one life, here")
    arguments.add_argument("--folder", type=Path)
    options = arguments.parse_args()
    if options.quick:
        options.prompts = 8
    prompts = make_prompts(options.seed)[: options.prompts]
    if options.life is not None:
        live(options.life, prompts, options.folder)
        return 0
    report = Report("Restart", options.json)
    # short, because Ray makes sockets under it
    folder = Path(tempfile.mkdtemp(prefix="lc-re-", dir="/tmp"))
    problems = []
    try:
        (folder / "store").mkdir(mode=0o700)
        lives = {number: run_life(number, options, folder) for number in (1, 2, 3)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    names = {1: "first life", 2: "after a clean stop", 3: "after a kill of all processes"}
    asked = prompts[: len(prompts) // 2]
    whole = sum(len(prompt) // BLOCK_SIZE * BLOCK_SIZE for prompt in asked)
    for number, told in lives.items():
        report.add(Row(names[number], "start", told["start_s"], "s"))
        for salt in SALTS:
            # in the first life three seconds may have passed or not
            moot = number == 1 and salt == "for three seconds"
            wanted = 0 if number > 1 and salt == "for three seconds" else whole
            found = sum(told[salt]["found"].values())
            report.add(Row(names[number], f"found, {salt}", found, "tokens", wanted))
            if found != wanted and not moot:
                problems.append(f"{names[number]}, {salt}: found {found} and not {wanted} tokens")
            if not {*told[salt]["found"]} <= {"disk", "ram"}:
                problems.append(f"{names[number]}, {salt}: found in {told[salt]['found']}")
            if told[salt]["tokens"] != lives[1]["kept"]["tokens"]:
                problems.append(f"{names[number]}, {salt}: other tokens")
    there, were = (sum(lives[number][LATE]["found"].values()) for number in (3, 2))
    report.add(Row(names[3], f"found, computed {LATE}", there, "tokens", were, there / were))
    if lives[3][LATE]["tokens"] != lives[2][LATE]["tokens"]:
        problems.append(f"{names[3]}, {LATE}: other tokens")
    report.add(Row("all", "problems", len(problems), "", 0))
    report.show()
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
