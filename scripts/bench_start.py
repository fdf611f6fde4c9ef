"""How long a new engine takes to its first token: the first start on a machine, and later ones.

Random weights of the geometries in scripts/geometries, drawn on the device. Every start is a new
process with a Ray of its own. The first one finds the folders of compiled kernels empty (Triton's,
inductor's and the driver's, all in a temporary folder), the second finds them filled. A third,
without Ray, tells what the engine's part consists of: drawing the weights, the probe, the passes,
and the capture of CUDA graphs; a model from files would read its weights instead.

    python scripts/bench_start.py [--geometry NAME ...] [--json FILE] [--quick] [--device cpu]

The clock runs from the construction of the client to the first token of 512; what the driver
imports and the start of Ray are told apart (an actor's own imports are part of its start). Goal for
llama-3.1-8b with the folders filled: from weights in memory to the first token below 15 s (else
exits 1).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_common import Report, Row, geometry, parser

GOALS_S = {"llama-3.1-8b": 15.0}
CACHE_FOLDERS = {
    "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda",
}  # fmt: skip
START_TIMEOUT_S = 500.0
AFTER_WEIGHTS = "weights in memory to first token"


class Clock:
    """Seconds of the parts of a start, in the order in which they ended, and when that was."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.ended: dict[str, float] = {}

    def time(self, part: str, call: Callable[[], Any]) -> Any:
        """Run `call` and add its seconds to `part`."""
        import torch

        start = time.perf_counter()
        try:
            return call()
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.ended[part] = time.perf_counter()
            self.seconds[part] = self.seconds.get(part, 0.0) + self.ended[part] - start

    def wrap(self, part: str, owner: Any, name: str) -> None:
        """Count the calls of a function of the engine as `part`."""
        inner = getattr(owner, name)
        setattr(owner, name, lambda *args, **kw: self.time(part, lambda: inner(*args, **kw)))


def start(name: str, device: str, num_blocks: int | None, *, in_process: bool) -> dict[str, float]:
    """One start in this process: seconds by part; "client" and "first token" add up."""
    began = time.perf_counter()
    from bench_engine import Ask, InProcess, ThroughRay
    from transformers import AutoConfig

    from litecache import CacheConfig
    from litecache.engine.loading import model_loader
    from litecache.engine.running.model_runner import ModelRunner

    _, config = geometry(name)
    fields = dict(config)
    AutoConfig.for_model(fields.pop("model_type"), **fields)
    clock = Clock()
    clock.seconds["imports"] = time.perf_counter() - began
    cache_config = CacheConfig(
        device=device,
        max_model_len=min(config["max_position_embeddings"], 40_960),
        num_blocks=num_blocks,
        admission="none",
    )
    if in_process:
        clock.wrap("weights", model_loader, "random_model")
        clock.wrap("probe", model_loader, "probe_model")
        clock.wrap("passes", model_loader, "apply_passes")
        clock.wrap("graphs", ModelRunner, "warm_up")
    else:
        import ray

        clock.time("Ray", lambda: ray.init(address="local", log_to_driver=False))
    kind = InProcess if in_process else ThroughRay
    client = clock.time("client", lambda: kind(config, cache_config))
    try:
        ask = Ask([10 + i * 7919 % (config["vocab_size"] - 20) for i in range(512)], 1)
        clock.time("first token", lambda: client.run([ask]))
        if in_process:
            spent = clock.ended["first token"] - clock.ended["weights"]
            clock.seconds[AFTER_WEIGHTS] = spent
    finally:
        client.close()
    return clock.seconds


def started(name: str, options: Any, folder: Path, *, in_process: bool) -> dict[str, float]:
    """The same in a new process whose compiled kernels are kept in `folder`."""
    environment = {**os.environ, **{key: str(folder / n) for key, n in CACHE_FOLDERS.items()}}
    environment.pop("RAY_ADDRESS", None)
    # Ray starts actors with niceness 15.
    environment.setdefault("RAY_worker_niceness", "0")
    command = [sys.executable, __file__, "--child", "--geometry", name, "--device", options.device]
    if options.num_blocks is not None:
        command += ["--num-blocks", str(options.num_blocks)]
    if in_process:
        command.append("--in-process")
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, timeout=START_TIMEOUT_S
    )
    if done.returncode:
        raise SystemExit(f"error: a start of {name} failed with exit code {done.returncode}")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def measure(name: str, options: Any, report: Report) -> bool:
    """The three starts of one geometry; returns whether the goal is reached."""
    stem, _ = geometry(name)
    with tempfile.TemporaryDirectory(prefix="litecache-start-") as temporary:
        folder = Path(temporary)
        for case in ("first start", "later start"):
            seconds = started(name, options, folder, in_process=False)
            total = seconds["client"] + seconds["first token"]
            report.add(
                *(Row(f"{stem} {case}", part, value, "s") for part, value in seconds.items()),
                Row(f"{stem} {case}", "client to first token", total, "s"),
            )
            kept = sum(1 for file in folder.rglob("*") if file.is_file())
            if options.device.startswith("cuda") and not kept:
                raise SystemExit(f"error: no compiled kernel was put into {folder}")
            report.add(Row(f"{stem} {case}", "compiled files in the folder", kept, ""))
        parts = started(name, options, folder, in_process=True)
        case = f"{stem} later start, in-process"
        spent, goal = parts.pop(AFTER_WEIGHTS), GOALS_S.get(stem)
        share = None if goal is None else spent / goal
        report.add(
            *(Row(case, part, value, "s") for part, value in parts.items()),
            Row(case, AFTER_WEIGHTS, spent, "s", goal, share, None if goal is None else "goal"),
        )
    return share is None or share <= 1


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument(
        "--geometry", nargs="+", help="default: qwen3-0.6b llama-3.1-8b; tiny with --quick"
    )
    made.add_argument("--device", default="cuda")
    made.add_argument("--num-blocks", type=int, help="of the pool; default: what memory allows")
    made.add_argument("--in-process", action="store_true", help="with --child: without Ray")
    made.add_argument("--child", action="store_true", help="one start, here; prints its seconds")
    options = made.parse_args()
    names = options.geometry or (["tiny"] if options.quick else ["qwen3-0.6b", "llama-3.1-8b"])
    if options.child:
        parts = start(names[0], options.device, options.num_blocks, in_process=options.in_process)
        print(json.dumps(parts))
        return 0
    import torch  # noqa: F401  (for the machine's description)

    report = Report("Start of an engine", options.json)
    good = [measure(name, options, report) for name in names]
    report.show()
    return 0 if all(good) or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
