from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from litecache.actors.operating.watch import ActorView
from litecache.adapter.stats import GroupRates, RateMeter
from litecache.cli.top_screen import Screen, bar
from litecache.metrics import Metrics

GPU, SHARD, COORDINATOR = "litecache:g:gpu:0", "litecache:g:shard:ab12cd34:0", "x:coordinator"


def replica(metrics: Metrics, running: int = 1) -> ActorView:
    blocks = {"free": 6, "private": 1, "published": 1, "idle": 2, "loading": 0}
    engine = {"blocks": blocks, "running": running, "waiting": 0, "pool_bytes": 1000}
    return ActorView("up", {"pid": 1, "engine": engine, "metrics": metrics.snapshot()}, 0.001)


def shard(metrics: Metrics) -> ActorView:
    store: dict[str, Any] = {
        "blocks": 3, "disk_blocks": 2, "ram_bytes_used": 10, "ram_bytes": 100,
        "disk_bytes_used": 40, "storage_bytes": 400, "queued_reads": 5,
    }  # fmt: skip
    return ActorView("up", {"pid": 2, "store": store, "metrics": metrics.snapshot()}, 0.002)


def counted(computed: int, reused: int, drawn: int, prompts: int) -> Metrics:
    metrics = Metrics()
    metrics.inc("litecache_computed_tokens", computed)
    metrics.inc("litecache_reused_tokens", reused, tier="ram")
    metrics.inc("litecache_generated_tokens", drawn)
    metrics.inc("litecache_prompt_tokens", prompts)
    return metrics


def test_rates_are_what_was_counted_between_two_looks() -> None:
    meter, metrics, stored = RateMeter(), counted(100, 50, 10, 150), Metrics()
    stored.observe("litecache_io_seconds", 1.0, direction="read")
    first = meter.take({GPU: replica(metrics), SHARD: shard(stored)}, 10.0)
    assert (first.seconds, first.prefill_tokens_s, first.ttft_s) == (0.0, 0.0, None)
    assert first.hit_share_ever == pytest.approx(1 / 3)
    metrics.inc("litecache_computed_tokens", 20)
    metrics.inc("litecache_reused_tokens", 60, tier="ram")
    metrics.inc("litecache_generated_tokens", 8)
    metrics.observe("litecache_ttft_seconds", 0.5)
    metrics.observe("litecache_ttft_seconds", 1.5)
    for seconds in (0.1, 0.3):
        stored.observe("litecache_io_seconds", seconds, direction="read")
    stored.inc("litecache_storage_bytes", 4000, direction="read", tier="disk")
    stored.inc("litecache_drops", 6, reason="queue_full")
    rates = meter.take({GPU: replica(metrics), SHARD: shard(stored)}, 12.0)
    assert (rates.seconds, rates.prefill_tokens_s, rates.decode_tokens_s) == (2.0, 10.0, 4.0)
    assert (rates.hit_share, rates.ttft_s) == (0.75, 1.0)
    assert rates.drops_s == {"queue_full": 3.0}
    tiers = {tier.name: tier for tier in rates.tiers}
    assert (tiers["ram"].hit_share, tiers["ram"].reused_tokens) == (0.75, 110)
    assert (tiers["gpu"].used_bytes, tiers["gpu"].total_bytes) == (400, 1000)
    assert (tiers["disk"].used_bytes, tiers["disk"].out_bytes_s) == (40, 2000.0)
    (seen,) = rates.shards
    assert seen.read_s == pytest.approx(0.2)
    assert (seen.queued_reads, seen.answer_s, seen.write_s) == (5, 0.002, None)


def test_a_restarted_process_counts_from_zero_and_gives_no_negative_rate() -> None:
    meter = RateMeter()
    meter.take({GPU: replica(counted(1000, 0, 500, 1000))}, 0.0)
    gone = meter.take({GPU: ActorView("restarting", error="its process is gone")}, 1.0)
    assert (gone.decode_tokens_s, gone.replicas[0].blocks) == (0.0, {})
    assert gone.without_figures == {GPU: "its process is gone"}
    back = meter.take({GPU: replica(counted(30, 0, 12, 30))}, 3.0)
    assert (back.prefill_tokens_s, back.decode_tokens_s) == (10.0, 4.0)


def test_a_busy_actor_keeps_its_rates_until_it_tells_the_next_figures() -> None:
    meter = RateMeter()
    meter.take({GPU: replica(counted(0, 0, 0, 0))}, 0.0)
    assert meter.take({GPU: replica(counted(0, 0, 20, 0))}, 2.0).decode_tokens_s == 10.0
    busy = meter.take({GPU: ActorView("busy", None, 0.001, "in a step")}, 4.0)
    assert busy.decode_tokens_s == 10.0
    assert meter.take({GPU: replica(counted(0, 0, 60, 0))}, 10.0).decode_tokens_s == 5.0
    assert meter.take({GPU: ActorView("silent")}, 12.0).decode_tokens_s == 0.0


@pytest.mark.parametrize("width", [80, 124])
def test_a_screen_of_two_replicas_and_a_shard_fits_a_terminal(width: int) -> None:
    meter = RateMeter()
    views = {
        GPU: replica(counted(10, 20, 30, 40)),
        "litecache:g:gpu:1": ActorView("restarting", error="its process is gone, " * 9),
        SHARD: shard(Metrics()),
        "litecache:g:coordinator": ActorView("up", {"keys": 7, "replicas": {}}),
    }
    rates = meter.take(views, 1.0)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(Screen("g", "SmolLM2", rates, 2.0, "the cluster is slow"))
    lines = console.export_text().rstrip().split("\n")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for word in ("SmolLM2", "gpu:0", "gpu:1", "restarting", "shard:ab12cd34:0", "the cluster is"):
        assert word in text


def test_a_screen_of_nothing_is_drawn() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(Screen("g", None, GroupRates(), 2.0, "there is no group 'g'"))
    assert "there is no group 'g'" in console.export_text()


@pytest.mark.parametrize(
    ("shares", "drawn"), [([], 0), ([0.5], 4), ([0.001], 1), ([0.5, 0.001], 5), ([2.0, 0.3], 8)]
)
def test_a_bar_shows_shares_of_its_width_and_something_never_as_nothing(
    shares: list[float], drawn: int
) -> None:
    text = bar([(share, "red") for share in shares], 8).plain
    assert (len(text), text.count("█")) == (8, drawn)
