"""What LiteCache's actors cost while nobody asks for anything.

Starts a group on a local Ray, serves one request, and then measures over the same seconds the CPU
time of every actor of the group and of an empty async actor, which is what Ray itself costs. The
promise: each actor within 0.5 % of a core of the empty one.

    python scripts/bench_idle.py [--seconds 60] [--json FILE] [--quick]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from bench_common import GEOMETRIES, Report, Row, own_ray, parser

MAX_EXTRA_PERCENT = 0.5
SETTLE_S = 10.0


@ray.remote(num_cpus=0)
class Empty:
    """An async actor without a job: the cost of being an actor."""

    async def ping(self) -> None:
        return None


def process_of(actor: Any) -> int:
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=30))


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def litecache_actors() -> dict[str, Any]:
    named = ray.util.list_named_actors(all_namespaces=True)
    names = sorted(actor["name"] for actor in named if actor["namespace"] == "litecache")
    return {name: ray.get_actor(name, namespace="litecache") for name in names}


def role(name: str) -> str:
    """`gpu:0` of `litecache:<group>:gpu:0`."""
    return name.split(":", 2)[2]


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--seconds", type=float, default=60.0)
    args = arguments.parse_args()
    seconds = min(args.seconds, 15.0) if args.quick else args.seconds

    from transformers import AutoConfig

    from litecache import CacheConfig, KVCacheAdapter

    report = Report(f"Idle actors over {seconds:.0f} s", args.json)
    model = AutoConfig.from_pretrained(GEOMETRIES / "smollm2-135m.json")
    with tempfile.TemporaryDirectory(prefix="litecache-idle-") as store:
        config = CacheConfig(
            num_blocks=128, ram_bytes="128MB", storage_dir=store, storage_bytes="1GB", device="cpu"
        )
        own_ray()
        with KVCacheAdapter(model, cache_config=config, weights="random") as llm:
            llm.generate_batch([list(range(100, 400))], max_new_tokens=8)
            llm.flush()
            empty = Empty.remote()
            pids = {"empty async actor": process_of(empty)}
            pids |= {role(name): process_of(actor) for name, actor in litecache_actors().items()}
            time.sleep(SETTLE_S)
            before = {name: cpu_seconds(pid) for name, pid in pids.items()}
            start = time.monotonic()
            time.sleep(seconds)
            elapsed = time.monotonic() - start
            used = {n: 100 * (cpu_seconds(pid) - before[n]) / elapsed for n, pid in pids.items()}
    base = used.pop("empty async actor")
    report.add(Row("empty async actor", "cpu", base, "% of a core"))
    worst = 0.0
    for name, percent in used.items():
        limit = base + MAX_EXTRA_PERCENT
        report.add(
            Row(name, "cpu", percent, "% of a core", limit, percent / limit, "empty actor + 0.5")
        )
        worst = max(worst, percent - base)
    report.show()
    print(f"largest difference to the empty actor: {worst:+.2f} % of a core")
    return 0 if used and worst <= MAX_EXTRA_PERCENT else 1


if __name__ == "__main__":
    sys.exit(main())
