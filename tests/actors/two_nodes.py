"""Two replicas and two shards on a cluster of two "nodes"; prints what happened as JSON.

Run by test_two_nodes.py in a process of its own, because it needs a Ray of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "adapter"))

from tiny_config import small_llama

from litecache.actors.calls import result
from litecache.actors.naming import coordinator_name
from litecache.actors.router import Placement
from litecache.adapter import KVCacheAdapter
from litecache.config import CacheConfig
from litecache.errors import LiteCacheError

# Whatever is found is loaded, however fast so small a model computes it.
os.environ["LITECACHE_LOADS"] = "all"

TINY = small_llama(eos_token_id=210)

STORE = 128 << 20


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if value := condition():
                return value
        except LiteCacheError:
            pass
        if time.monotonic() > deadline:
            raise AssertionError(f"it did not happen: {what}")
        time.sleep(0.05)


def ask(
    llm: KVCacheAdapter, replica: int, ids: torch.Tensor, cache: str = "default"
) -> tuple[list[int], dict[str, int]]:
    llm._replicas.route = lambda requests: [replica] * len(requests)  # type: ignore[method-assign]
    out = llm.generate(ids, max_new_tokens=8, return_dict_in_generate=True, cache=cache)
    del llm._replicas.route
    return out.sequences[0].tolist(), out.litecache.reused_tokens[0]


def ask_and_move(llm: KVCacheAdapter, ids: torch.Tensor) -> tuple[list[int], dict[str, int]]:
    """On replica 1, whose router knows that replica 0 holds all of it."""
    place = Placement(1, 0, ids.shape[1] // 16, False)
    coordinator: Any = llm.group.coordinator
    coordinator.route = lambda prompts, silent: [place] * len(prompts)
    out = llm.generate(ids, max_new_tokens=8, return_dict_in_generate=True)
    del coordinator.route
    return out.sequences[0].tolist(), out.litecache.reused_tokens[0]


def counter(actor: dict[str, Any], name: str) -> float:
    return sum(value for found, _, value in actor["metrics"]["counters"] if found == name)


def run(folder: str) -> dict[str, Any]:
    config = CacheConfig(
        num_blocks=64,
        dtype="float32",
        ram_bytes="16MB",
        storage_dir=folder,
        storage_bytes="64MB",
    )
    llm = KVCacheAdapter(TINY, weights="random", cache_config=config, replicas=2, num_threads=1)
    group = llm.group
    coordinator = group.actors[coordinator_name(group.spec.group)]
    gpus = [f"litecache:{group.spec.group}:gpu:{i}" for i in range(2)]
    status = group.status()
    nodes = [status[gpu]["node_id"] for gpu in gpus]
    shard_of = {a["node_id"]: name for name, a in status.items() if ":shard:" in name}
    wait_for(lambda: all(group.status()[g]["remote_shards"] == 1 for g in gpus), "nodes known")

    def located(replica: int) -> bytes:
        name = shard_of[nodes[replica]].split(":shard:")[1]
        return bytes(result(coordinator.keys_of.remote(name), 10))

    def held(replica: int) -> bytes:
        return bytes(result(group.shards[shard_of[nodes[replica]]].keys.remote(), 10))

    ids = torch.randint(3, 210, (1, 100), generator=torch.Generator().manual_seed(0))
    first, cold = ask(llm, 0, ids)
    llm.flush()
    wait_for(lambda: len(located(0)) >= 16 * 6, "blocks of replica 0 located")
    before = counter(group.status()[gpus[1]], "litecache_remote_blocks")
    second, warm = ask(llm, 1, ids)
    after = counter(group.status()[gpus[1]], "litecache_remote_blocks")
    out = llm.generate(ids, max_new_tokens=8, return_dict_in_generate=True)
    hot = torch.randint(3, 210, (1, 100), generator=torch.Generator().manual_seed(2))
    unsaved, _ = ask(llm, 0, hot, cache="read-only")
    there, moved = ask_and_move(llm, hot)
    other = torch.randint(3, 210, (1, 60), generator=torch.Generator().manual_seed(1))
    ask(llm, 1, other)
    llm.flush()

    told = result(coordinator.info.remote(), 10)
    os.kill(told["pid"], signal.SIGKILL)
    without, _ = ask(llm, 0, ids)
    routed = llm.generate(ids, max_new_tokens=8)[0].tolist()
    wait_for(lambda: result(coordinator.info.remote(), 10)["epoch"] != told["epoch"], "restart")
    wait_for(lambda: all(located(i) == held(i) for i in range(2)), "the map is filled again")
    report = {
        "nodes": len(set(nodes)),
        "cold": cold,
        "warm": warm,
        "same": first == second == without == routed,
        "remote_blocks": after - before,
        "moved": moved,
        "same_moved": unsaved == there,
        "routed_reuse": out.litecache.reused_tokens[0],
        "held_bytes": [len(held(i)) for i in range(2)],
        "stored": [a["store"]["disk_blocks"] for a in group.status().values() if "store" in a],
    }
    llm.close()
    return report


def in_cluster(run: Callable[[Cluster, Any], dict[str, Any]]) -> None:
    """Print what `run` reports of a Ray of two nodes, given the cluster and its second node.

    Ray's own folder is this program's last argument.
    """
    torch.set_num_threads(1)
    head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "temp_dir": sys.argv[-1]})
    try:
        second = cluster.add_node(num_cpus=1, object_store_memory=STORE, resources={"second": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        print(json.dumps(run(cluster, second)))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    in_cluster(lambda cluster, second: run(sys.argv[1]))
