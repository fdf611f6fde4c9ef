"""The simulation of routing: its books add up, and the product's router does what it is to show."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from bench_routing import BLOCK_TOKENS, Held, Sizes, hot_prefix, replay
from trace_model import Turn


def conversations(count: int, turns: int) -> list[Turn]:
    """Each turn is the one before and some blocks more; all begin with one common block."""
    rng, ids = random.Random(0), iter(range(1, 1 << 20))
    made = []
    for _ in range(count):
        prompt, at = [0], rng.uniform(0, 100)
        for _ in range(turns):
            prompt = [*prompt, *(next(ids) for _ in range(rng.randint(1, 6)))]
            length = len(prompt) * BLOCK_TOKENS - rng.randint(0, BLOCK_TOKENS - 1)
            made.append(Turn(at, length, rng.randint(1, 300), tuple(prompt)))
            at += rng.uniform(5, 20)
    return sorted(made, key=lambda turn: turn.time_s)


def test_a_prompt_is_found_or_computed_and_the_router_keeps_conversations_together() -> None:
    turns = conversations(60, 5)
    sizes = Sizes(replicas=4, per_node=1, pool=400, node=0)
    for shared in (True, False):
        found = replay(turns, sizes, 0.7, shared=shared)
        for name in ("router", "round robin"):
            cluster, first = found[name]
            hits = sum(replica.hits for replica in cluster.replicas)
            computed = [replica.computed for replica in cluster.replicas]
            assert hits + sum(computed) == sum(turn.length for turn in turns)
            assert np.all(first > 0)
            if not shared:
                assert hits == 0
            elif name == "router":
                assert hits >= 0.95 * found["hits"]
                assert max(computed) <= 1.2 * np.mean(computed)
        ours, base = (np.percentile(found[name][1], 90) for name in ("router", "round robin"))
        assert ours <= base


def test_what_is_held_forgets_the_tail_of_the_oldest_prompt_first() -> None:
    held = Held(4)
    a, b = [bytes([i]) for i in range(3)], [bytes([i]) for i in (9, 8)]
    assert held.add(a) == (a, [])
    assert held.add(b) == (b, [a[2]])
    assert [held.prefix(a), held.prefix(b)] == [2, 2]
    assert held.add([bytes([i]) for i in range(20, 26)])[1][-1] == bytes([24])


def test_a_hot_prefix_is_moved_to_the_second_replica_and_nobody_waits_as_long_as_for_one() -> None:
    _, alone, _ = hot_prefix(1, count=150)
    two, routed, least = hot_prefix(2, count=150)
    assert sum(replica.computed for replica in two.replicas) <= 1.01 * least
    assert min(replica.computed for replica in two.replicas) > 0.3 * least
    assert routed < 0.5 * alone
