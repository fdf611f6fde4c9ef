"""A node of a cluster of two is drained in the middle of a request; prints what happened as JSON.

Run by test_two_nodes.py in a process of its own, because it needs a Ray of its own.
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from ray.cluster_utils import Cluster
from two_nodes import STORE, TINY, ask, in_cluster, wait_for

from litecache.actors.calls import actor_names, result
from litecache.actors.group import Group
from litecache.actors.operating.scaling import drain_node, scale_group
from litecache.actors.placement import NodeStorage
from litecache.adapter import KVCacheAdapter
from litecache.config import CacheConfig
from litecache.errors import GroupError, GroupUnavailableError


def slow(actor: Any) -> None:
    runner = actor._loading.result()._runner
    execute = runner.execute
    runner.execute = lambda plan: (time.sleep(0.05), execute(plan))[1]


def run(folder: Path, cluster: Cluster, second: Any) -> dict[str, Any]:
    config = CacheConfig(
        num_blocks=64,
        dtype="float32",
        ram_bytes="16MB",
        storage_dir=str(folder / "first"),
        storage_bytes="64MB",
    )
    own = NodeStorage(resource="second", settings={"storage_dir": str(folder / "second")})
    llm = KVCacheAdapter(
        TINY,
        weights="random",
        cache_config=config,
        group="wide",
        detached=True,
        replicas="all",
        num_threads=1,
        nodes=[own],
    )
    report: dict[str, Any] = {}
    places = {
        index: result(replica.where.remote(), 30)["node_id"]
        for index, replica in llm.group.replicas_by_index.items()
    }
    report["nodes"] = len(set(places.values()))
    (going,) = (index for index, node in places.items() if node == second.node_id)
    report["folders"] = sorted(path.name for path in folder.glob("*/shard-*"))
    ids = torch.randint(3, 210, (1, 100), generator=torch.Generator().manual_seed(0))
    # saved by nobody: the node that is to go has to compute it, and saves it
    first, _ = ask(llm, 1 - going, ids, cache="read-only")

    result(llm.group.replicas_by_index[going].__ray_call__.remote(slow), 30)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, llm, going, ids)
        wait_for(lambda: llm._replicas.by_index[going].load, "it runs")
        told: list[str] = []
        left = drain_node(second.node_id[:12], timeout_s=0, tell=lambda _, what: told.append(what))
        report["moved"] = asked.result()[0] == first
    report["replicas"] = left["wide"].replicas
    report["complete"] = [gone.complete for gone in left["wide"].departed]
    report["told"] = told
    report["left"] = [name for name in actor_names("wide") if second.node_id[:8] in name]
    try:
        drain_node(next(node for node in places.values() if node != second.node_id))
    except GroupError as error:
        report["refused"] = str(error)
    cluster.remove_node(second)
    report["after"] = ask_any(llm, ids) == first
    wait_for(lambda: ask_any(llm, ids) == first and len(llm._replicas.by_index) == 1, "it has left")
    try:
        scale_group(Group.attach("wide"), 3)
    except GroupUnavailableError as error:
        report["no_room"] = str(error)
    third = cluster.add_node(num_cpus=1, object_store_memory=STORE, resources={"second": 1})
    grown = scale_group(Group.attach("wide"), "all")
    report["grown"] = [grown.replicas, grown.added]
    report["new_shards"] = len([n for n in actor_names("wide") if f":{third.node_id[:8]}:" in n])
    short = ids[:, :8]  # less than a block: nothing of it helps the new replica
    wait_for(lambda: ask_any(llm, short) and len(llm._replicas.by_index) == 2, "it is known")
    # what the node had saved before it was drained is found on its disk again
    group = llm.group
    (new,) = (i for i, r in group.replicas_by_index.items()
              if result(r.where.remote(), 30)["node_id"] == third.node_id)  # fmt: skip
    again, reused = ask(llm, new, ids)
    report["again"], report["reused"] = again == first, reused
    # Ray itself is told that the node is to go
    command = ["ray", "drain-node", "--address", cluster.address, "--node-id", third.node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    subprocess.run([*command, "--deadline-remaining-seconds", "300"], check=True, timeout=60)
    wait_for(lambda: group.coordinator.call("members").keys() == {1 - new}, "others take over")
    report["ray_drained"] = ask_any(llm, ids) == first and ask(llm, new, ids)[0] == first
    llm.close()
    group.stop()
    return report


def ask_any(llm: KVCacheAdapter, ids: torch.Tensor) -> list[int]:
    tokens: list[int] = llm.generate(ids, max_new_tokens=8)[0].tolist()
    return tokens


if __name__ == "__main__":
    in_cluster(lambda cluster, second: run(Path(sys.argv[1]), cluster, second))
