from __future__ import annotations

from litecache.adapter.stats import CacheStats
from litecache.metrics import Metrics


def test_figures_of_all_actors_are_added_up() -> None:
    gpu, shard = Metrics(), Metrics()
    gpu.inc("litecache_prompt_tokens", 100)
    gpu.inc("litecache_reused_tokens", 30, tier="gpu")
    gpu.inc("litecache_reused_tokens", 20, tier="disk")
    gpu.inc("litecache_found_tokens", 45, tier="disk")
    gpu.inc("litecache_requests", outcome="stop")
    gpu.inc("litecache_misses", 4, tier="shard", reason="absent")
    gpu.observe("litecache_ttft_seconds", 0.5)
    gpu.observe("litecache_ttft_seconds", 1.5)
    shard.inc("litecache_storage_bytes", 4096, direction="write", tier="disk")
    engine = {"blocks": {"free": 7, "idle": 1, "private": 0}, "running": 1, "waiting": 2}
    stats = CacheStats.from_status(
        {
            "gpu:0": {"engine": engine, "metrics": gpu.snapshot()},
            "gpu:1": {"engine": engine, "metrics": gpu.snapshot()},
            "shard": {"store": {"blocks": 3}, "metrics": shard.snapshot()},
            "coordinator": {"error": "took longer than 2 s"},
        }
    )
    assert stats.prompt_tokens == 200
    assert stats.reused_tokens == {"gpu": 60, "disk": 40}
    assert stats.found_tokens == {"disk": 90}
    assert stats.hit_rate == 0.5
    assert stats.requests == {"stop": 2}
    assert stats.misses == {"shard: absent": 8}
    assert stats.blocks == {"free": 14, "idle": 2, "private": 0}
    assert (stats.running, stats.waiting) == (2, 4)
    assert stats.io_bytes == {"write disk": 4096}
    assert stats.latencies == {"ttft_seconds": {"count": 4, "mean": 1.0}}
    assert stats.shards == {"shard": {"blocks": 3}}
    assert stats.unavailable == ("coordinator",)
    assert stats.to_dict()["hit_rate"] == 0.5


def test_without_requests_the_hit_rate_is_zero() -> None:
    assert CacheStats().hit_rate == 0.0
