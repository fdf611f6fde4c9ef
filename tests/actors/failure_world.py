"""Two replicas on two nodes, and what fails there; prints what happened as JSON.

    python failure_world.py namespaces | cluster FOLDER

Run by test_failure_rows.py in a process of its own. With "namespaces", as root, the second node has
namespaces of its own (scripts/separate_nodes.py); with "cluster" both are processes of this machine
(`ray.cluster_utils.Cluster`). Each failure comes in the middle of a stream whose tokens are known,
from stock `generate`. Figures of time are printed with them.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "adapter"))

import ray
from ray.cluster_utils import Cluster
from separate_nodes import SeparateNode, SeparateNodes, ThisMachine
from tiny_config import small_llama

from litecache.actors.calls import result
from litecache.actors.naming import coordinator_name, replica_name
from litecache.actors.outbox import HEARTBEAT_TIMEOUT_S
from litecache.adapter import KVCacheAdapter
from litecache.config import CacheConfig
from litecache.errors import LiteCacheError

TINY = small_llama(bos_token_id=None, eos_token_id=None)
NEW_TOKENS = 40
STEP_S = 0.03
ROWS = 6
MIB = 1 << 20


def slow_down(cache: Any) -> None:
    """Run in a replica: there is time to break something in the middle of a request."""
    runner = cache._loading.result()._runner
    if "execute" not in vars(runner):
        execute = runner.execute
        runner.execute = lambda plan: (time.sleep(STEP_S), execute(plan))[1]


def break_the_device(cache: Any) -> None:
    """Run in a replica: its next step raises what CUDA raises after a wild write."""

    def broken(plan: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    cache._loading.result()._runner.execute = broken


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 90) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        with suppress(LiteCacheError):
            if value := condition():
                return value
        if time.monotonic() > deadline:
            raise AssertionError(f"it did not happen: {what}")
        time.sleep(0.05)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(4)
    return LlamaForCausalLM(TINY).eval()


def start_driver(address: str, group: str, ip: str | None) -> None:
    """Another driver: joins, and when told to, streams until it is killed."""
    ray.init(address, log_to_driver=False, **({"_node_ip_address": ip} if ip else {}))
    llm = KVCacheAdapter(tiny_model(), group=group)
    print("joined", flush=True)
    sys.stdin.readline()
    stream = llm.stream(list(range(3, 90)), as_tokens=True, max_new_tokens=400)
    next(stream)
    print("streaming", flush=True)
    time.sleep(600)


class ClusterNode(ThisMachine):
    """The second node of a `Cluster`."""

    def __init__(self, cluster: Cluster, node: Any) -> None:
        self._cluster, self._node = cluster, node

    def die(self) -> None:
        """Its processes end at once."""
        self._cluster.remove_node(self._node, allow_graceful=False)


class World:
    """The group, its undisturbed answers, and one method for each failure."""

    def __init__(self, node: SeparateNode | ClusterNode, store: Path, ip: str | None) -> None:
        self.node, self.store = node, node.root / str(store).lstrip("/")
        model = tiny_model()
        config = CacheConfig(
            num_blocks=128, dtype="float32", ram_bytes="8MB", storage_dir=str(store),
            storage_bytes="16MB",
        )  # fmt: skip
        self.llm = KVCacheAdapter(
            model, cache_config=config, replicas=2, num_threads=1,
            actor_options={"coordinator": {"resources": {"head": 0.01}}},
        )  # fmt: skip
        self.name = self.llm.group.spec.group
        address = ray.get_runtime_context().gcs_address
        command = [sys.executable, __file__, "driver", address, self.name, *([ip] if ip else [])]
        pipe = subprocess.PIPE
        self.driver = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 210, (ROWS + 2, 60), generator=generator)
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        self.wanted = model.generate(self.ids, **settings)[:, 60:].tolist()
        status = self.llm.group.status()
        self.gpus = [replica_name(self.name, index) for index in range(2)]
        here = ray.get_runtime_context().get_node_id()
        (self.far,) = (i for i, name in enumerate(self.gpus) if status[name]["node_id"] != here)
        self.slow_down()
        self.report: dict[str, Any] = {}

    @property
    def pollers(self) -> list[Any]:
        return self.llm._replicas.pollers

    def slow_down(self) -> None:
        for replica in self.llm.group.replicas:
            result(replica.__ray_call__.remote(slow_down), 30)

    def pid(self, name: str) -> int:
        return int(self.llm.group.status()[name]["pid"])

    def far_shard(self) -> str:
        status = self.llm.group.status()
        far = status[self.gpus[self.far]]["node_id"]
        return next(n for n in self.llm.group.shards if n.split(":shard:")[1].startswith(far[:8]))

    # What is asked

    def all_rows(self) -> tuple[bool, float]:
        """All prompts, routed as usual: whether they are right, and the seconds they took."""
        began = time.monotonic()
        got = self.llm.generate_batch(self.ids[:ROWS].tolist(), max_new_tokens=12)
        return got == [row[:12] for row in self.wanted[:ROWS]], round(time.monotonic() - began, 2)

    def stream(self, break_it: Callable[[], None], row: int = 0) -> dict[str, Any]:
        """A stream on the far replica, broken after some tokens."""
        route = self.llm._replicas.route
        self.llm._replicas.route = lambda requests: [self.far] * len(requests)  # type: ignore[method-assign]
        try:
            stream = self.llm.stream(
                input_ids=self.ids[row : row + 1], as_tokens=True, max_new_tokens=NEW_TOKENS
            )
            tokens = [next(stream) for _ in range(8)]
        finally:
            self.llm._replicas.route = route  # type: ignore[method-assign]
        break_it()
        last, longest = time.monotonic(), 0.0
        for token in stream:
            tokens.append(token)
            now = time.monotonic()
            last, longest = now, max(longest, now - last)
        return {"same": tokens == self.wanted[row], "longest_gap_s": round(longest, 2)}

    def check(self, what: str, break_it: Callable[[], None]) -> dict[str, Any]:
        """Break it in the middle of a stream; then ask for all rows, twice."""
        found = self.stream(break_it)
        found["back"] = self.pollers[self.far].silent_since is None
        found["rows"] = [self.all_rows() for _ in range(2)]
        self.report[what] = found
        return found

    def until_whole(self) -> None:
        """Both replicas answer, and both take requests again."""
        wait_for(lambda: all(p.silent_since is None for p in self.pollers), "both are there")
        wait_for(
            lambda: not any("error" in a for a in self.llm.group.status().values()), "all answer"
        )
        self.slow_down()

    # What fails

    def run(self) -> None:
        separate = isinstance(self.node, SeparateNode)
        self.check("undisturbed", lambda: None)
        self.check("replica killed", lambda: self.signal(self.gpus[self.far]))
        self.until_whole()
        self.check("device broken", self.break_far_device)
        self.until_whole()
        self.hung("replica hung", self.gpus[self.far])
        self.shard_killed()
        self.hung("shard hung", self.far_shard())
        self.coordinator_fails("coordinator hung", signal.SIGSTOP)
        self.coordinator_fails("coordinator killed", signal.SIGKILL)
        self.disk_lies()
        if separate:
            self.disk_full()
        self.driver_dies()
        if separate:
            self.link_cut()
        self.node_dies()

    def must(self, pid: int, number: signal.Signals) -> None:
        assert self.node.signal(pid, number), f"no process {pid}"

    def signal(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        self.must(self.pid(name), number)

    def hung(self, what: str, name: str) -> None:
        pid = self.pid(name)
        self.check(what, lambda: self.must(pid, signal.SIGSTOP))
        self.must(pid, signal.SIGCONT)
        self.until_whole()

    def break_far_device(self) -> None:
        self.llm.group.replicas[self.far].__ray_call__.remote(break_the_device)

    def clear(self, *tiers: str) -> None:
        for tier in tiers:
            self.llm.clear(tier)

    def shard_killed(self) -> None:
        self.llm.flush()
        self.clear("ram", "gpu")
        found = self.check("shard killed", lambda: self.signal(self.far_shard()))
        self.until_whole()
        # what it had on disk is there again
        wait_for(lambda: self.found_below(), "blocks of before the kill are found")
        found["found again"] = True

    def found_below(self) -> bool:
        self.clear("gpu")
        route = self.llm._replicas.route
        self.llm._replicas.route = lambda requests: [self.far] * len(requests)  # type: ignore[method-assign]
        try:
            out = self.llm.generate(self.ids[:1], max_new_tokens=2, return_dict_in_generate=True)
        finally:
            self.llm._replicas.route = route  # type: ignore[method-assign]
        assert out.sequences[0, 60:].tolist() == self.wanted[0][:2]
        return any(out.litecache.reused_tokens[0].get(tier) for tier in ("ram", "disk"))

    def coordinator_fails(self, what: str, number: signal.Signals) -> None:
        handle = self.llm.group.actors[coordinator_name(self.name)]
        pid = result(handle.info.remote(), 10)["pid"]
        try:
            self.check(what, lambda: os.kill(pid, number))
        finally:
            if number == signal.SIGSTOP:
                os.kill(pid, signal.SIGCONT)
        self.until_whole()

    def disk_lies(self) -> None:
        """Every byte of the slabs is another one."""
        self.llm.flush()
        self.clear("ram", "gpu")
        slabs = list(self.store.rglob("slab"))
        for slab in slabs:
            data = np.fromfile(slab, dtype=np.uint8)
            with slab.open("r+b") as file:
                file.write((data ^ 0x55).tobytes())
                os.fsync(file.fileno())
        found = self.check("disk lies", lambda: None)
        found["slabs"] = len(slabs)

    def disk_full(self) -> None:
        filler = self.store / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(MIB)):
                pass
        found = self.stream(lambda: None, row=ROWS)
        self.llm.flush()
        self.clear("gpu")
        found["rows"] = [self.all_rows()]
        filler.unlink()
        found["same"] = found["same"] and self.stream(lambda: None, row=ROWS + 1)["same"]
        self.report["disk full"] = found

    def driver_dies(self) -> None:
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        assert self.driver.stdout.readline() == "joined\n"
        self.driver.stdin.write("\n")
        self.driver.stdin.flush()
        assert self.driver.stdout.readline() == "streaming\n"
        before = self.llm.stats().requests.get("abort", 0)
        running = self.llm.stats().running
        self.driver.kill()
        self.driver.wait()
        found = self.check("driver dies", lambda: None)
        began = time.monotonic()
        wait_for(lambda: not self.llm.stats().running, "its request ends", HEARTBEAT_TIMEOUT_S + 6)
        stats = self.llm.stats()
        found |= {"ran": running, "aborted": stats.requests.get("abort", 0) - before}
        found |= {"private": stats.blocks["private"], "freed_s": time.monotonic() - began}

    def link_cut(self) -> None:
        assert isinstance(self.node, SeparateNode)
        found = self.check("link cut", self.node.cut)
        began = time.monotonic()
        found["unavailable"] = len(self.llm.stats().unavailable)
        found["stats_s"] = round(time.monotonic() - began, 2)
        self.node.mend()
        began = time.monotonic()
        self.until_whole()
        found["mended_s"] = round(time.monotonic() - began, 2)
        found["again"] = self.stream(lambda: None)["same"]

    def node_dies(self) -> None:
        found = self.check("node dies", self.node.die)
        began = time.monotonic()
        report = self.llm.flush()
        found |= {"flush_s": round(time.monotonic() - began, 2), "complete": report["complete"]}


def run(node: SeparateNode | ClusterNode, store: Path, ip: str | None = None) -> None:
    """All failures, told on standard output."""
    world = World(node, store, ip)
    try:
        world.run()
    finally:
        print(json.dumps(world.report), flush=True)
        world.driver.kill()
    world.llm.close()


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "driver":
        start_driver(sys.argv[2], sys.argv[3], *(sys.argv[4:] or [None]))
        return
    folder = Path(sys.argv[2])
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    os.environ |= {"LITECACHE_HOME": str(folder / "home"), "RAY_worker_niceness": "0"}
    os.environ["LITECACHE_LOADS"] = "all"
    # one CPU: a replica on each, and nowhere else
    if sys.argv[1] == "namespaces":
        nodes = SeparateNodes(folder, cpus=1)
        try:
            nodes.connect()
            run(nodes.nodes[0], nodes.store, f"{nodes.network}.1")
        finally:
            ray.shutdown()
            nodes.close()
        return
    common = {"num_cpus": 1, "object_store_memory": 128 * MIB}
    head = {"include_dashboard": False, "temp_dir": str(folder / "r"), "resources": {"head": 1}}
    cluster = Cluster(initialize_head=True, head_node_args={**common, **head})
    try:
        second = cluster.add_node(**common)
        ray.init(cluster.address, log_to_driver=False)
        run(ClusterNode(cluster, second), folder / "store")
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
