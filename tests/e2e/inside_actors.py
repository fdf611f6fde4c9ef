"""Adapters inside Ray tasks, actors and a placement group, on a cluster of two CPUs.

Run by test_jobs.py as a driver; prints what it found as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

PROMPT = [5 + i % 200 for i in range(100)]


def ask(model: str, group: str | None) -> tuple[list[int], int]:
    """Tokens, and how many of the prompt were found."""
    import torch

    from litecache import CacheConfig, KVCacheAdapter

    config = CacheConfig(num_blocks=64, dtype="float32", ram_bytes="8MB", device="cpu")
    with KVCacheAdapter(
        model,
        cache_config=config,
        group=group,
        num_threads=1,
        detached=group is not None,
    ) as llm:
        out = llm.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
        )
        return out.sequences[0].tolist(), sum(out.litecache.reused_tokens[0].values())


@ray.remote
def task(model: str, group: str | None) -> tuple[list[int], int]:
    return ask(model, group)


@ray.remote
class User:
    def ask(self, model: str, group: str) -> tuple[list[int], int]:
        return ask(model, group)


def main() -> None:
    model = sys.argv[1]
    ray.init("auto", log_to_driver=False)
    found: dict[str, Any] = {}
    # Each task holds one of the two CPUs, and its private group wants one: Ray lends those of a
    # task that waits.
    found["tasks"] = ray.get([task.remote(model, None) for _ in range(2)], timeout=300)
    # A reserved CPU, which captures what is made inside: the group must not end with it.
    reserved = placement_group([{"CPU": 1}])
    ray.get(reserved.ready(), timeout=300)
    inside = PlacementGroupSchedulingStrategy(reserved, placement_group_capture_child_tasks=True)
    user = User.options(num_cpus=1, scheduling_strategy=inside).remote()
    found["placed"] = ray.get(user.ask.remote(model, "users"), timeout=300)
    ray.kill(user)
    remove_placement_group(reserved)
    # Several at once: one holds the CPU that is left, one none.
    users = [User.options(num_cpus=n).remote() for n in (1, 0)]
    found["actors"] = ray.get([user.ask.remote(model, "users") for user in users], timeout=300)
    found["driver"] = ask(model, "users")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
