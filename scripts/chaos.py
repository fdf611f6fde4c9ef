"""Chaos: clients of one group while its processes are killed and stopped, links cut, disks filled.

    python scripts/chaos.py [--minutes 10] [--clients 8] [--replicas 2] [--seed 0] [--json FILE]

A group with all tiers runs on a Ray of the script's own, over a tiny random model or the one of
`--model FOLDER`, in float32. As root there are two nodes, with a replica and a shard on each, the
second of them in namespaces of its own (separate_nodes.py); else, or with `--one-node`, there is
one. Client processes (chaos_client.py) send greedy requests over prompts that share prefixes, while
at random instants a replica, a shard, the coordinator or a client is killed with SIGKILL, or
stopped for up to four seconds (a client for up to twelve: by then it has been given up), the device
of a replica breaks, its engine's thread dies, the link between the nodes is cut, or the file system
of a store is filled.

Every request must end with the tokens that stock `generate` gives, or with a `LiteCacheError`, and
99 of 100 with the tokens. At the end everything must be as it was: no process, no shared memory
file, no descriptor, block, lease, slot or attached client is left, and each store is within its
bound. The last line is a summary as JSON. Exits 1 where any of this does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_common import Report, Row, parser
from chaos_client import HUNG_S
from rich.progress import Progress
from separate_nodes import SeparateNodes, ThisMachine, available

MIB = 1 << 20
GROUP = "chaos"
# what is asked for does not fit the pools, the RAM tier or the disk tier: all of them evict
RAM_BYTES = 3 * MIB
STORAGE_BYTES = 4 * MIB
# of the file system below a store
STORE_BYTES = 2 * STORAGE_BYTES
LEAST_RIGHT = 0.99
PROMPTS = 96
# how often each comes; a client takes ten seconds and more to be one
FAULTS = {
    "gpu killed": 6, "gpu stopped": 6, "shard killed": 6, "shard stopped": 6,
    "coordinator killed": 4, "coordinator stopped": 4, "client killed": 2, "client stopped": 3,
    "gpu: device broken": 2, "gpu: engine thread ended": 2, "link cut": 6, "disk full": 5,
}  # fmt: skip


def tiny_model() -> Any:
    """Greedy choices that are no ties, sequences that never end by themselves."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=211, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def make_prompts(seed: int) -> list[list[int]]:
    """Chains of a few conversations: most share a prefix with others."""
    rng = random.Random(f"prompts {seed}")
    heads = [rng.choices(range(3, 200), k=rng.randrange(16, 120)) for _ in range(6)]
    return [
        rng.choice(heads)[: rng.randrange(1, 120)]
        + rng.choices(range(3, 200), k=rng.randrange(1, 60))
        for _ in range(PROMPTS)
    ]


# Shared with chaos_loads.py


def use_token(folder: Path) -> None:
    """Ray's token, LiteCache's home and what else is the run's own, for it and its children."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    os.environ |= {"LITECACHE_HOME": str(folder / "home"), "RAY_worker_niceness": "0"}
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("RAY_ADDRESS", None)


def start_ray(folder: Path) -> str:
    """A Ray of the run's own with its token, home and files under `folder`; its address."""
    import ray

    use_token(folder)
    context = ray.init(
        address="local", num_cpus=8, include_dashboard=False, log_to_driver=False,
        object_store_memory=128 * MIB, _temp_dir=str(folder / "r"), logging_level="error",
    )  # fmt: skip
    return str(context.address_info["address"])


def processes_of(folder: Path) -> list[int]:
    """Other processes whose command line or environment names the folder of a run."""
    mark, found = str(folder).encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                said = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if mark in said and state != "Z":
                    found.append(int(entry.name))
    return found


def end_ray(folder: Path) -> list[str]:
    """The inverse; processes that stay are a problem, and killed."""
    import ray

    ray.shutdown()
    deadline = time.monotonic() + 30
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"processes are left: {left}"] if left else []


# The run


def break_device(cache: Any) -> None:
    """Run in a replica: its next step raises what CUDA raises after a wild write."""
    import torch

    def broken(plan: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    cache._loading.result()._runner.execute = broken


def end_thread(cache: Any) -> None:
    """Run in a replica: its engine's thread meets a bug."""

    def bug() -> None:
        raise ZeroDivisionError("planted in the engine's thread")

    cache._loading.result()._inbox.put(bug)


class Chaos:
    """The group, its clients and what is done to them."""

    def __init__(self, options: argparse.Namespace, folder: Path, report: Report) -> None:
        self.options, self.folder, self.report = options, folder, report
        self.rng = random.Random(options.seed)
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.faults: Counter[str] = Counter()
        self.problems: list[str] = []
        self.refusals: Counter[str] = Counter()
        self.clients: dict[int, subprocess.Popen[str]] = {}
        self.mounted = False
        self.most_bytes = 0
        self.next_client = 0
        self.nodes: SeparateNodes | None = None
        self.places: dict[str, Any] = {}
        self.thread_faults: Counter[str] = Counter()
        self.store = folder / "store"

    def start(self) -> None:
        from litecache.adapter import KVCacheAdapter
        from litecache.config import CacheConfig

        self.store.mkdir(mode=0o700)
        if os.geteuid() == 0:
            size = f"size={STORE_BYTES}"
            mount = ["mount", "-t", "tmpfs", "-o", size + ",mode=700", "chaos", str(self.store)]
            self.mounted = subprocess.run(mount, capture_output=True).returncode == 0
        separate = available() and not self.options.one_node
        address = self.start_nodes() if separate else start_ray(self.folder)
        config = CacheConfig(
            num_blocks=96, dtype="float32", ram_bytes=RAM_BYTES, storage_dir=str(self.store),
            storage_bytes=STORAGE_BYTES, storage_shards=1 if separate else 2, max_requests=16,
        )  # fmt: skip
        model = self.options.model or self.save_model()
        self.length = 24
        self.prompts = make_prompts(self.options.seed)
        self.wanted = self.stock_tokens(model)
        self.llm = KVCacheAdapter(
            model, group=GROUP, cache_config=config, detached=True, num_threads=1,
            replicas=self.options.replicas,
        )  # fmt: skip
        for actor in self.llm.group.status().values():
            node = self.nodes.node_of(actor["node_id"]) if self.nodes is not None else None
            self.places[actor["node_id"]] = node or ThisMachine()
        if self.nodes is not None and len(self.places) < 1 + len(self.nodes.nodes):
            raise SystemExit("the replicas are not spread over the nodes")
        for _ in range(2):
            self.right_answers()
        if self.problems:
            raise SystemExit("without any fault the tokens are not those of stock generate")
        plan = self.folder / "plan.json"
        document = {"prompts": self.prompts, "wanted": self.wanted, "length": self.length}
        document |= {"model": model, "group": GROUP}
        document["node_ip"] = address.rpartition(":")[0] if separate else None
        plan.write_text(json.dumps(document))
        self.client_arguments = ["--plan", str(plan), "--address", address]
        for _ in range(self.options.clients):
            self.add_client()
        deadline = time.monotonic() + 2 * HUNG_S
        while self.counts["joined"] < self.options.clients and time.monotonic() < deadline:
            time.sleep(0.2)

    def start_nodes(self) -> str:
        use_token(self.folder)
        # one of each kind has room on a node: what is restarted comes back where it was
        nodes = max(2, self.options.replicas)
        self.nodes = SeparateNodes(self.folder, nodes - 1, cpus=1, store_bytes=STORE_BYTES)
        self.nodes.connect()
        return self.nodes.address

    def save_model(self) -> str:
        import torch
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        folder = self.folder / "model"
        LlamaForCausalLM(tiny_model()).save_pretrained(folder)
        return str(folder)

    def stock_tokens(self, model: str) -> list[list[int]]:
        import torch
        from transformers import AutoModelForCausalLM

        stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        settings = {"max_new_tokens": self.length, "do_sample": False}
        rows = [stock.generate(torch.tensor([p]), **settings)[0, len(p) :] for p in self.prompts]
        return [row.tolist() for row in rows]

    def add_client(self) -> None:
        number, self.next_client = self.next_client, self.next_client + 1
        script = Path(__file__).with_name("chaos_client.py")
        command = [sys.executable, str(script), "--client", str(number), *self.client_arguments]
        pipe = subprocess.PIPE
        client = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.clients[number] = client
        for work in (self._listen, self._keep_errors):
            threading.Thread(target=work, args=(number, client), daemon=True).start()

    def _listen(self, number: int, client: subprocess.Popen[str]) -> None:
        assert client.stdout is not None
        for line in client.stdout:
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                kind, detail = told["kind"], told["detail"]
                self.counts[kind] += 1
                if kind in ("right", "refused"):
                    self.seconds.append(told["seconds"])
                if kind == "refused":
                    self.refusals[re.sub(r"[0-9a-f]{6,}|\d+", "N", detail)[:160]] += 1
                if kind in ("WRONG", "hung", "raw"):
                    self.problems.append(f"client {number}: {kind}: {detail}")

    def _keep_errors(self, number: int, client: subprocess.Popen[str]) -> None:
        assert client.stderr is not None
        tail = client.stderr.read()[-1500:]
        if client.wait() not in (0, -signal.SIGKILL):
            if self.refused_to_join(tail):
                self.counts["refused to join"] += 1
                if client.stdin is not None and not client.stdin.closed:
                    self.add_client()
                return
            self.problems.append(f"client {number} ended with {client.returncode}: {tail}")

    @staticmethod
    def refused_to_join(tail: str) -> bool:
        """It said that the group did not answer, as whoever joins in the middle of it may."""
        last = tail.strip().rpartition("\n")[2]
        return last.startswith(("litecache.errors.", "litecache.actors.calls."))

    # Faults

    def actors(self, kind: str) -> list[tuple[str, Any, int]]:
        """Name, place and process of the actors of a kind that answer."""
        return [
            (name, self.places[actor["node_id"]], int(actor["pid"]))
            for name, actor in self.llm.group.status().items()
            if f":{kind}" in name and actor.get("node_id") in self.places
        ]

    def fault(self) -> str:
        """One fault, to its end; its name."""
        (kind,) = self.rng.choices(list(FAULTS), list(FAULTS.values()))
        if kind == "disk full":
            return self.fill_disk() if self.mounted else "nothing to fill"
        if kind == "link cut":
            return self.cut_link() if self.nodes is not None else "nothing to cut"
        if kind.startswith("gpu: "):
            return self.harm(kind)
        actor, _, what = kind.partition(" ")
        if actor == "client":
            return self.hit_client(what)
        there = self.actors(actor)
        if not there:
            return "nobody there"
        _, place, pid = self.rng.choice(there)
        if what == "killed":
            place.signal(pid, signal.SIGKILL)
        elif place.signal(pid, signal.SIGSTOP):
            time.sleep(self.rng.uniform(0.2, 4))
            place.signal(pid, signal.SIGCONT)
        return kind

    def hit_client(self, what: str) -> str:
        client = self.rng.choice([c for c in self.clients.values() if c.poll() is None])
        if what == "killed":
            client.kill()
            self.add_client()
        else:
            client.send_signal(signal.SIGSTOP)
            go_on = threading.Timer(self.rng.uniform(0.2, 12), client.send_signal, [signal.SIGCONT])
            go_on.daemon = True
            go_on.start()
        return f"client {what}"

    def harm(self, kind: str) -> str:
        """Have a replica's device fail, or its engine's thread; it ends itself."""
        replica = self.rng.choice(self.llm.group.replicas)
        # four failures within ten minutes are one too many: it would leave the group, as it should
        if self.faults[kind] >= self.options.replicas:
            return "no harm any more"
        replica.__ray_call__.remote(break_device if "device" in kind else end_thread)
        return kind

    def cut_link(self) -> str:
        assert self.nodes is not None
        with self.rng.choice(self.nodes.nodes).is_cut():
            time.sleep(self.rng.uniform(0.3, 6))
        return "link cut"

    def fill_disk(self) -> str:
        place = self.rng.choice(list(self.places.values()))
        filler = place.root / str(self.store / "filler").lstrip("/")
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(MIB)):
                pass
        time.sleep(self.rng.uniform(1, 6))
        filler.unlink(missing_ok=True)
        return "disk full"

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with Progress(console=self.report.console) as progress:
            bar = progress.add_task("chaos", total=seconds)
            while (left := end - time.monotonic()) > 0:
                self.faults[self.fault()] += 1
                self.most_bytes = max(self.most_bytes, self.stored())
                told = f"{sum(self.faults.values())} faults, {self.counts['right']} right"
                told += f", {self.counts['refused']} refused, {len(self.problems)} problems"
                progress.update(bar, completed=seconds - left, description=told)
                time.sleep(self.rng.uniform(0.5, 3))

    def stored(self) -> int:
        """Bytes of the fullest store."""
        most = 0
        for place in self.places.values():
            total = 0
            for path in (place.root / str(self.store).lstrip("/")).rglob("*"):
                with contextlib.suppress(OSError):
                    if path.name != "filler" and path.is_file():
                        total += path.stat().st_blocks * 512
            most = max(most, total)
        return most

    # The end

    def settle(self) -> None:
        """Clients end, everything answers rightly again, and nothing is held."""
        for client in self.clients.values():
            with contextlib.suppress(OSError):
                client.send_signal(signal.SIGCONT)
                if client.stdin is not None:
                    client.stdin.close()
        for number, client in self.clients.items():
            try:
                client.wait(HUNG_S + 30)
            except subprocess.TimeoutExpired:
                self.problems.append(f"client {number} does not end")
                client.kill()
        self.wait_for("all actors answer", self.all_answer)
        for actor in self.llm.group.status().values():
            self.thread_faults.update(actor.get("thread_faults", {}))
        self.wait_for("right answers", self.right_answers)
        self.wait_for("nothing is held", lambda: not self.held())
        if held := self.held():
            self.problems.append(f"still held: {held}")
        before = self.descriptors()
        for _ in range(3):
            self.right_answers()
        self.wait_for("descriptors as before", lambda: not self.grown(before))
        if grown := self.grown(before):
            self.problems.append(f"descriptors grow: {grown}")
        self.most_bytes = max(self.most_bytes, self.stored())
        if self.most_bytes > STORAGE_BYTES:
            self.problems.append(f"a store took {self.most_bytes:,} of {STORAGE_BYTES:,} bytes")
        for place in {id(place): place for place in self.places.values()}.values():
            if left := orphans(place.root):
                self.problems.append(f"left in /dev/shm of {place.name}: {sorted(left)}")

    def wait_for(self, what: str, condition: Callable[[], bool], timeout_s: float = 90) -> None:
        from litecache.errors import LiteCacheError

        deadline, last = time.monotonic() + timeout_s, ""
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except LiteCacheError as error:
                last = str(error)
            time.sleep(0.5)
        self.problems.append(f"not within {timeout_s:g} s after the last fault: {what} {last}")

    def all_answer(self) -> bool:
        return not any("error" in actor for actor in self.llm.group.status().values())

    def right_answers(self) -> bool:
        got = self.llm.generate_batch(self.prompts, max_new_tokens=self.length)
        if got != self.wanted:
            self.problems.append("without a fault: WRONG tokens")
        return True

    def held(self) -> dict[str, Any]:
        from litecache.adapter.stats import CacheStats

        status = self.llm.group.status()
        stats = CacheStats.from_status(status)
        held: dict[str, Any] = {"running": stats.running, "waiting": stats.waiting}
        held |= {
            f"blocks {state}": stats.blocks.get(state, 0)
            for state in ("private", "loading", "published")
        }
        replicas = Counter(a["node_id"] for name, a in status.items() if ":gpu:" in name)
        for name, shard in stats.shards.items():
            held[f"leases {name}"] = shard["leases"]
            here = replicas[status[name]["node_id"]]
            held[f"clients {name}"] = max(0, shard["clients"] - here)
            slots = shard["ram_slots"]
            held |= {
                f"{state} {name}": n
                for state, n in slots.items()
                if state not in ("clean", "dirty")
            }
        if stats.unavailable:
            held["unavailable"] = stats.unavailable
        return {name: value for name, value in held.items() if value}

    def descriptors(self) -> dict[int, int]:
        places = [each for kind in ("gpu", "shard", "coordinator") for each in self.actors(kind)]
        pids = [os.getpid(), *(place.host_pid(pid) for _, place, pid in places)]
        return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in pids if pid}

    def grown(self, before: dict[int, int]) -> dict[int, int]:
        now = self.descriptors()
        return {pid: n - before[pid] for pid, n in now.items() if n > before.get(pid, n) + 2}

    def stop(self) -> None:
        for client in self.clients.values():
            if client.poll() is None:
                client.kill()
        if hasattr(self, "llm"):
            with contextlib.suppress(Exception):
                self.llm.group.stop()
                self.llm.close()
        if self.nodes is not None:
            import ray

            ray.shutdown()
            self.nodes.close()
        self.problems += end_ray(self.folder)
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.store)], check=False)

    # What it was

    def summary(self, seconds: float) -> dict[str, Any]:
        """What the last line tells; problems are what did not hold."""
        ended = sum(self.counts[kind] for kind in ("right", "refused", "WRONG", "raw", "hung"))
        share = self.counts["right"] / ended if ended else 0.0
        if share < LEAST_RIGHT:
            self.problems.append(f"only {share:.4f} of {ended} requests ended with their tokens")
        times = sorted(self.seconds) or [0.0]
        return {
            "seconds": round(seconds), "nodes": len(self.places), "replicas": self.options.replicas,
            "clients": self.options.clients, "requests": ended, "right_share": round(share, 5),
            **{kind: self.counts[kind] for kind in ("right", "refused", "WRONG", "raw", "hung")},
            "request_s": {
                "median": times[len(times) // 2], "p99": times[len(times) * 99 // 100],
                "longest": times[-1],
            },
            "faults": dict(sorted(self.faults.items())), "store_bytes": self.most_bytes,
            "thread_faults": dict(self.thread_faults),
            "joins_refused": self.counts["refused to join"],
            "refusals": dict(self.refusals.most_common(12)), "problems": self.problems[:40],
        }  # fmt: skip


def orphans(root: Path = Path("/")) -> set[str]:
    """Shared memory files of shards that are no more."""
    names = os.listdir(root / "dev/shm")
    found = (re.fullmatch(r"litecache-(\d+)-.*", name) for name in names)
    return {m[0] for m in found if m is not None and not (root / "proc" / m[1]).exists()}


def main() -> int:
    arguments = parser((__doc__ or "").split("\n")[0])
    arguments.add_argument("--minutes", type=float, default=10.0)
    arguments.add_argument("--clients", type=int, default=8)
    arguments.add_argument("--replicas", type=int, default=2)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--model", help="a folder with a saved model; default: a tiny one")
    arguments.add_argument("--one-node", action="store_true", help="no namespaces, no cut links")
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    report = Report("chaos", options.json)
    # short, because Ray makes sockets under it
    folder = Path(tempfile.mkdtemp(prefix="lc-ch-", dir="/tmp"))
    shared, begun = orphans(), time.monotonic()
    chaos = Chaos(options, folder, report)
    try:
        chaos.start()
        chaos.run(20.0 if options.quick else options.minutes * 60)
        chaos.settle()
    finally:
        chaos.stop()
        shutil.rmtree(folder, ignore_errors=True)
    if new := orphans() - shared:
        chaos.problems.append(f"left in /dev/shm: {sorted(new)}")
    summary = chaos.summary(time.monotonic() - begun)
    report.extra["summary"] = summary
    for kind in ("right", "refused", "WRONG", "hung", "raw"):
        report.add(Row("requests", kind, chaos.counts[kind], ""))
    report.add(Row("requests", "right", summary["right_share"], "share", limit=LEAST_RIGHT))
    for name, seconds in summary["request_s"].items():
        report.add(Row("requests", name, seconds, "s"))
    for fault, count in sorted(chaos.faults.items()):
        report.add(Row("faults", fault, count, ""))
    report.add(Row("store", "most bytes", chaos.most_bytes, "B", limit=STORAGE_BYTES, peer="bound"))
    report.add(Row("all", "problems", len(chaos.problems), "", limit=0))
    report.show()
    for problem in chaos.problems[:40]:
        print(problem, file=sys.stderr)
    print(json.dumps(summary))
    return 1 if chaos.problems else 0


if __name__ == "__main__":
    sys.exit(main())
