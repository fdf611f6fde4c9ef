"""Chaos: clients of one group while its processes are killed and stopped and its disk fills.

    python scripts/chaos.py [--minutes 5] [--clients 3] [--seed 0] [--model FOLDER] [--json FILE]

A group of two replicas with all tiers runs on a Ray of the script's own, over a tiny random model
or the model of FOLDER in float32. Client processes send greedy requests (`generate`,
`generate_batch`, `stream`, some closed early) over prompts that share prefixes, while at random
instants a replica, a shard, the coordinator or a client is killed with SIGKILL or stopped for up
to four seconds, and, as root, the file system of the store (a tmpfs) is filled. Every request must
end with the tokens that it gave undisturbed, or with a `LiteCacheError`. At the end everything must
be as it was: no process, no shared memory file, no descriptor, block, lease or slot is left, and
the store is within its bound. Exits 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
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
from rich.progress import Progress

MIB = 1 << 20
GROUP = "chaos"
HUNG_S = 120.0
# what is asked for does not fit the pools, the RAM tier or the disk tier: all of them evict
RAM_BYTES = 3 * MIB
STORAGE_BYTES = 4 * MIB
KINDS = ("gpu", "shard", "coordinator", "client")
# a client takes ten seconds and more to be one
WEIGHTS = (3, 3, 2, 1)
PROMPTS = 48


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


def join(model: str | None, **settings: Any) -> Any:
    """An adapter on the group."""
    from litecache.adapter import KVCacheAdapter

    if model is None:
        return KVCacheAdapter(tiny_model(), weights="random", group=GROUP, **settings)
    return KVCacheAdapter(model, group=GROUP, **settings)


# A client process


class Client:
    """Sends requests until its input closes; tells of each on standard output, a line of JSON."""

    def __init__(self, options: argparse.Namespace) -> None:
        import ray

        self.rng = random.Random(options.client)
        plan = json.loads(Path(options.plan).read_text())
        self.prompts, self.wanted, self.length = plan["prompts"], plan["wanted"], plan["length"]
        ray.init(address=options.address, log_to_driver=False, logging_level="error")
        self.llm = join(options.model)
        self.begun = 0.0
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(1)
            if self.begun and time.monotonic() - self.begun > HUNG_S:
                self.tell("hung", f"for {HUNG_S:g} s")
                faulthandler.dump_traceback()
                os._exit(3)

    @staticmethod
    def tell(kind: str, detail: str = "") -> None:
        print(json.dumps({"kind": kind, "detail": detail[:400]}), flush=True)

    def run(self) -> None:
        from litecache.errors import LiteCacheError

        self.tell("joined")
        over = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
        while not over.is_set():
            self.begun = time.monotonic()
            try:
                right, tokens = self.one()
                self.tell("right" if right else "WRONG", "" if right else tokens)
            except LiteCacheError as error:
                self.tell("refused", f"{type(error).__name__}: {error}")
                time.sleep(0.05)
            except Exception as error:
                self.tell("raw", f"{type(error).__name__}: {error}")
            self.begun = 0.0
        self.begun = time.monotonic()
        self.llm.close()
        self.tell("closed")

    def one(self) -> tuple[bool, str]:
        import torch

        rng = self.rng
        number = rng.randrange(PROMPTS)
        prompt, wanted, length = self.prompts[number], self.wanted[number], self.length
        kind = rng.randrange(4)
        if kind == 0:
            out = self.llm.generate(torch.tensor([prompt]), max_new_tokens=length)
            got, expected = out[0, len(prompt) :].tolist(), wanted
        elif kind == 1:
            numbers = rng.sample(range(PROMPTS), 4)
            got = self.llm.generate_batch([self.prompts[n] for n in numbers], max_new_tokens=length)
            expected = [self.wanted[n] for n in numbers]
        else:
            stop = rng.randrange(1, length + 1) if kind == 3 else length
            stream = self.llm.stream(prompt, as_tokens=True, max_new_tokens=length)
            got = []
            for token in stream:
                got.append(token)
                if len(got) >= stop:
                    break
            stream.close()
            expected = wanted[:stop]
        return got == expected, f"prompt {number}: {got} instead of {expected}"


# Shared with chaos_loads.py


def start_ray(folder: Path) -> str:
    """A Ray of the run's own with its token, home and files under `folder`; its address."""
    import ray

    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    os.environ |= {"LITECACHE_HOME": str(folder / "home"), "RAY_worker_niceness": "0"}
    os.environ.pop("RAY_ADDRESS", None)
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


class Chaos:
    """The group, its clients and what is done to them."""

    def __init__(self, options: argparse.Namespace, folder: Path, report: Report) -> None:
        self.options, self.folder, self.report = options, folder, report
        self.rng = random.Random(options.seed)
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.problems: list[str] = []
        self.refusals: Counter[str] = Counter()
        self.clients: dict[int, subprocess.Popen[str]] = {}
        self.readers: list[threading.Thread] = []
        self.expected_ends: set[int] = set()
        self.mounted = False
        self.most_bytes = 0
        self.next_client = 0
        self.store = folder / "store"

    def start(self) -> None:
        from litecache.config import CacheConfig

        self.store.mkdir(mode=0o700)
        if os.geteuid() == 0:
            size = f"size={2 * STORAGE_BYTES}"
            mount = ["mount", "-t", "tmpfs", "-o", size + ",mode=700", "chaos", str(self.store)]
            self.mounted = subprocess.run(mount, capture_output=True).returncode == 0
        self.address = start_ray(self.folder)
        config = CacheConfig(
            num_blocks=96, dtype="float32", ram_bytes=RAM_BYTES, storage_dir=str(self.store),
            storage_bytes=STORAGE_BYTES, storage_shards=2, max_requests=16,
        )  # fmt: skip
        self.llm = join(
            self.options.model, cache_config=config, detached=True, replicas=2, num_threads=1
        )
        self.length = 24
        self.prompts = make_prompts(self.options.seed)
        self.wanted = [
            self.llm.generate_batch([p], max_new_tokens=self.length)[0] for p in self.prompts
        ]
        again = self.llm.generate_batch(self.prompts, max_new_tokens=self.length)
        if again != self.wanted:
            raise SystemExit(
                "the model answers otherwise in a batch: no undisturbed answer to compare"
            )
        self.plan = self.folder / "plan.json"
        document = {"prompts": self.prompts, "wanted": self.wanted, "length": self.length}
        self.plan.write_text(json.dumps(document))
        for _ in range(self.options.clients):
            self.add_client()
        deadline = time.monotonic() + HUNG_S
        while self.counts["joined"] < self.options.clients and time.monotonic() < deadline:
            time.sleep(0.2)

    def add_client(self) -> None:
        number, self.next_client = self.next_client, self.next_client + 1
        command = [sys.executable, __file__, "--client", str(number), "--plan", str(self.plan)]
        command += ["--address", self.address]
        command += ["--model", self.options.model] if self.options.model else []
        client = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.clients[number] = client
        for work in (self._listen, self._keep_errors):
            reader = threading.Thread(target=work, args=(number, client), daemon=True)
            reader.start()
            self.readers.append(reader)

    def _listen(self, number: int, client: subprocess.Popen[str]) -> None:
        assert client.stdout is not None
        for line in client.stdout:
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                kind, detail = told["kind"], told["detail"]
                self.counts[kind] += 1
                if kind == "refused":
                    self.refusals[re.sub(r"[0-9a-f]{6,}|\d+", "N", detail)[:160]] += 1
                if kind in ("WRONG", "hung", "raw"):
                    self.problems.append(f"client {number}: {kind}: {detail}")

    def _keep_errors(self, number: int, client: subprocess.Popen[str]) -> None:
        assert client.stderr is not None
        tail = client.stderr.read()[-1500:]
        if client.wait() not in (0, -signal.SIGKILL):
            self.problems.append(f"client {number} ended with {client.returncode}: {tail}")

    # Faults

    def pids(self, kind: str) -> list[int]:
        if kind == "client":
            return [client.pid for client in self.clients.values() if client.poll() is None]
        found = []
        for name, actor in self.llm.group.status().items():
            if f":{kind}" in name and "pid" in actor:
                found.append(int(actor["pid"]))
        return found

    def fault(self) -> str:
        """One fault, to its end; its name."""
        rng = self.rng
        if self.mounted and rng.random() < 0.12:
            self.fill_disk(rng.uniform(1, 6))
            return "disk full"
        (kind,) = rng.choices(KINDS, WEIGHTS)
        pids = self.pids(kind)
        if not pids:
            return "nobody there"
        pid = rng.choice(pids)
        if rng.random() < 0.5:
            self.expected_ends.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            if kind == "client":
                self.add_client()
            return f"{kind} killed"
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(rng.uniform(0.2, 4))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        return f"{kind} stopped"

    def fill_disk(self, seconds: float) -> None:
        filler = self.store / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(MIB)):
                pass
        time.sleep(seconds)
        filler.unlink(missing_ok=True)

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
        total = 0
        for path in self.store.rglob("*"):
            with contextlib.suppress(OSError):
                if path.name != "filler" and path.is_file():
                    total += path.stat().st_blocks * 512
        return total

    # The end

    def settle(self) -> None:
        """Clients end, everything answers rightly again, and nothing is held."""
        for client in self.clients.values():
            with contextlib.suppress(OSError):
                if client.stdin is not None:
                    client.stdin.close()
        for number, client in self.clients.items():
            try:
                client.wait(HUNG_S + 30)
            except subprocess.TimeoutExpired:
                self.problems.append(f"client {number} does not end")
                client.kill()
        self.wait_for("all actors answer", self.all_answer)
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
            self.problems.append(f"the store took {self.most_bytes:,} of {STORAGE_BYTES:,} bytes")

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
            self.problems.append("after the last fault: WRONG tokens")
        return True

    def held(self) -> dict[str, Any]:
        stats = self.llm.stats()
        held: dict[str, Any] = {"running": stats.running, "waiting": stats.waiting}
        held |= {
            f"blocks {state}": stats.blocks.get(state, 0)
            for state in ("private", "loading", "published")
        }
        for name, shard in stats.shards.items():
            held[f"leases {name}"] = shard["leases"]
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
        pids = [os.getpid(), *(pid for kind in KINDS[:3] for pid in self.pids(kind))]
        return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in pids}

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
        self.problems += end_ray(self.folder)
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.store)], check=False)


def orphans() -> set[str]:
    """Shared memory files of shards that are no more."""
    names = (re.fullmatch(r"litecache-(\d+)-.*", name) for name in os.listdir("/dev/shm"))
    return {m[0] for m in names if m is not None and not os.path.exists(f"/proc/{m[1]}")}


def main() -> int:
    arguments = parser("Chaos: kills, stops and full disks under several clients.")
    arguments.add_argument("--minutes", type=float, default=5.0)
    arguments.add_argument("--clients", type=int, default=3)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--model", help="a folder with a saved model; default: a tiny one")
    for hidden in ("--client", "--plan", "--address"):
        arguments.add_argument(hidden, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    if options.client is not None:
        Client(options).run()
        return 0
    report = Report("chaos", options.json)
    # short, because Ray makes sockets under it
    folder = Path(tempfile.mkdtemp(prefix="lc-ch-", dir="/tmp"))
    shared = orphans()
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
    report.extra["problems"] = chaos.problems
    report.extra["refusals"] = dict(chaos.refusals.most_common(30))
    for kind in ("joined", "right", "refused", "WRONG", "hung", "raw"):
        report.add(Row("requests" if kind != "joined" else "clients", kind, chaos.counts[kind], ""))
    for fault, count in sorted(chaos.faults.items()):
        report.add(Row("faults", fault, count, ""))
    report.add(Row("store", "most bytes", chaos.most_bytes, "B", limit=STORAGE_BYTES, peer="bound"))
    report.add(Row("all", "problems", len(chaos.problems), ""))
    report.show()
    for text, count in chaos.refusals.most_common(12):
        print(f"refused {count} times: {text}")
    for problem in chaos.problems[:40]:
        print(problem, file=sys.stderr)
    return 1 if chaos.problems else 0


if __name__ == "__main__":
    sys.exit(main())
