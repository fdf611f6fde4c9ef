"""How much of the pool holds nothing while requests run: the last block of each, and no more."""

from __future__ import annotations

import random

import pytest

from litecache.engine.kv_layout import KVLayout, KVSpec
from litecache.engine.scheduling.orders import StepResult
from litecache.engine.scheduling.prefix_cache import PrefixCache
from litecache.engine.scheduling.scheduler import Scheduler
from litecache.hashing import root_key
from litecache.types import Request, SamplingParams

pytestmark = pytest.mark.no_cover


def waste_at_steady_load(
    block_size: int, prompts: tuple[int, int], outputs: tuple[int, int], slots: int = 16_384
) -> float:
    """Mean share of the pool's slots that are taken and hold no token, over a queue that is never
    empty; prompts have nothing in common."""
    rng = random.Random(0)
    layout = KVLayout.from_specs([KVSpec(1, 8, 8, "float32")], block_size)
    scheduler = Scheduler(
        PrefixCache(layout.groups, slots // block_size),
        lambda salt: (root_key({"salt": salt}),),
        max_requests=256,
        max_batch_tokens=2048,
    )
    arrivals = 0
    shares = []
    for step in range(500):
        while scheduler.num_waiting < 4:
            tokens = tuple(rng.choices(range(30_000), k=rng.randint(*prompts)))
            sampling = SamplingParams(rng.randint(*outputs))
            scheduler.add(Request(f"r{arrivals}", "c", tokens, sampling), float(arrivals))
            arrivals += 1
        plan = scheduler.schedule(float(arrivals)).plan
        assert plan is not None
        samples = tuple(rng.randrange(30_000) for row in plan.rows if row.sample)
        scheduler.on_result(StepResult(plan.step, samples), float(arrivals))
        if step >= 250:
            blocks = scheduler.cache.stats()
            taken = (blocks["private"] + blocks["published"]) * block_size
            held = sum(seq.num_computed for seq in scheduler._queues.running)
            shares.append((taken - held) / slots)
    assert scheduler.num_running > 4
    scheduler.check_integrity()
    return sum(shares) / len(shares)


@pytest.mark.parametrize("block_size", [8, 16])
def test_under_four_percent_of_the_pool_is_wasted_on_a_mix_of_usual_lengths(
    block_size: int,
) -> None:
    assert 0 < waste_at_steady_load(block_size, (64, 2048), (16, 512)) < 0.04


def test_short_sequences_waste_about_half_a_block_each() -> None:
    # About 90 tokens: half a block of 16 is 8 % of what they hold, half a block of 8 is 4 %.
    assert 0.02 < waste_at_steady_load(16, (40, 80), (32, 64), slots=4096) < 0.10
