"""What an engine shows of its work: counters, log lines, a bar for what takes long."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from litecache.engine.scheduling.cost_model import CostModel
from litecache.engine.scheduling.orders import Schedule
from litecache.engine.scheduling.scheduler import Scheduler
from litecache.errors import shorten
from litecache.metrics import Metrics
from litecache.types import TokenDelta

MOST_LOGGED = 80
"""Characters of a request's id in a log."""


def count_deltas(metrics: Metrics, schedule: Schedule, costs: CostModel | None) -> None:
    """Count what a schedule tells the clients, and what was predicted of it."""
    generated = 0
    for gap_s, times in schedule.token_gaps.items():
        metrics.observe("litecache_inter_token_seconds", gap_s, times)
    for _, delta in schedule.deltas:
        generated += len(delta.token_ids)
        if delta.ttft_s is not None:
            metrics.observe("litecache_ttft_seconds", delta.ttft_s)
            for tier, tokens in (delta.reused_tokens or {}).items():
                metrics.inc("litecache_reused_tokens", tokens, tier=tier)
            for tier, tokens in (delta.found_tokens or {}).items():
                metrics.inc("litecache_found_tokens", tokens, tier=tier)
            for predicted_s, actual_s in costs.take_judged() if costs is not None else ():
                metrics.inc("litecache_predicted_first_token_seconds", predicted_s)
                metrics.inc("litecache_planned_first_token_seconds", actual_s)
                metrics.observe("litecache_load_prediction_ratio", actual_s / predicted_s)
        if delta.finish_reason is not None:
            metrics.inc("litecache_requests", outcome=delta.finish_reason.value)
    metrics.inc("litecache_generated_tokens", generated)


def log_deltas(logger: logging.Logger, deltas: Sequence[tuple[str, TokenDelta]]) -> None:
    """One line for a request's first token and one for its end: sizes and times, no text."""
    if not logger.isEnabledFor(logging.INFO):
        return
    for _, delta in deltas:
        name = shorten(delta.request_id, MOST_LOGGED)
        if delta.ttft_s is not None:
            reused, found = dict(delta.reused_tokens or {}), dict(delta.found_tokens or {})
            said = ", ".join(f"{tokens} {tier}" for tier, tokens in reused.items()) or "none"
            ttft_s = round(delta.ttft_s, 6)
            figures = {"ttft_s": ttft_s, "reused_tokens": reused, "found_tokens": found}
            extra = {"request_id": name, **figures}
            what = "request %s: first token after %.4f s, tokens reused: %s"
            logger.info(what, name, ttft_s, said, extra=extra)
        if delta.finish_reason is not None:
            outcome = delta.finish_reason.value
            ended = {"request_id": name, "outcome": outcome, "error_type": delta.error_type}
            logger.info("request %s: ended, %s", name, outcome, extra=ended)


def set_gauges(metrics: Metrics, scheduler: Scheduler) -> None:
    """What is there now: blocks by state, requests, tokens that wait."""
    for state, count in scheduler.cache.stats().items():
        metrics.set("litecache_pool_blocks", count, state=state)
    metrics.set("litecache_running_requests", scheduler.num_running)
    metrics.set("litecache_waiting_requests", scheduler.num_waiting)
    metrics.set("litecache_queued_tokens", scheduler.num_queued_tokens)
    metrics.count_to("litecache_evictions", scheduler.cache.num_evictions, tier="gpu")
    metrics.count_to("litecache_preemptions", scheduler.preemptions)


def progress_bar(description: str) -> Callable[[int, int], None]:
    """A function that takes how much of how much is done, and draws it to stderr.

    `transformers.utils.logging.disable_progress_bar()` silences it, too.
    """
    bars: list[Any] = []

    def show(done: int, total: int) -> None:
        from transformers.utils import logging

        if not bars:
            bars.append(logging.tqdm(total=total, desc=description))
        bars[0].update(1)
        if done == total:
            bars[0].close()

    return show
