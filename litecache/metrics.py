"""Every metric of LiteCache, and who counts it: plain counters, gauges and histograms.

Every stateful part has one `Metrics`; nothing here knows Ray. The actors read snapshots and export
them with the descriptions given here (`actors/metrics_export.py`). docs/dashboard.md has the same
table, and a test holds the two and the code together. Names follow Prometheus' conventions as far
as Ray leaves room: it writes `ray_` in front of all and `_total` behind counters, so no name ends
in that. The values of a label are few and known: no prompt, salt, request or client ever is one.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]

LATENCY_BOUNDS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
GAP_BOUNDS_S = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600, 7 * 24 * 3600)
RATIO_BOUNDS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4, 10)


class MetricInfo(NamedTuple):
    """What one metric means.

    Attributes:
        name: as the parts count it; Prometheus sees `exported`.
        kind: of Prometheus' types.
        unit: of the value.
        labels: beside those that every series has (`group`, `actor`, and `model` of a replica).
        meaning: one line.
        bounds: upper bounds of a histogram's buckets, in its unit.
    """

    name: str
    kind: Kind
    unit: str
    labels: tuple[str, ...]
    meaning: str
    bounds: tuple[float, ...] = LATENCY_BOUNDS_S

    @property
    def exported(self) -> str:
        """The name in Prometheus; of a histogram without `_bucket`, `_sum` or `_count`."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


def _counter(name: str, unit: str, meaning: str, *labels: str) -> MetricInfo:
    return MetricInfo(f"litecache_{name}", "counter", unit, labels, meaning)


def _gauge(name: str, unit: str, meaning: str, *labels: str) -> MetricInfo:
    return MetricInfo(f"litecache_{name}", "gauge", unit, labels, meaning)


def _histogram(
    name: str,
    meaning: str,
    *labels: str,
    unit: str = "seconds",
    bounds: tuple[float, ...] = LATENCY_BOUNDS_S,
) -> MetricInfo:
    return MetricInfo(f"litecache_{name}", "histogram", unit, labels, meaning, bounds)


METRICS = (
    _counter("prompt_tokens", "tokens", "of prompts that came in"),
    _counter("found_tokens", "tokens", "of prompts whose KV was found, by the tier", "tier"),
    _counter(
        "reused_tokens",
        "tokens",
        "of those, not computed again; the others were computed by plan, since that was sooner",
        "tier",
    ),
    _counter("computed_tokens", "tokens", "of prompts that steps computed"),
    _counter("generated_tokens", "tokens", "drawn"),
    _counter("requests", "requests", "ended, by how", "outcome"),
    _gauge("running_requests", "requests", "that have a row of the batch now"),
    _gauge("waiting_requests", "requests", "that wait for a row now"),
    _gauge("queued_tokens", "tokens", "of prompts that are still to be computed now"),
    _gauge("pool_blocks", "blocks", "of the pool now, by state", "state"),
    _counter("preemptions", "requests", "that gave their blocks to an older one and began anew"),
    _histogram("ttft_seconds", "from a request's submission to its first token, in the engine"),
    _histogram("inter_token_seconds", "between two tokens of a request, in the engine"),
    _histogram(
        "step_seconds",
        "of a step: the engine thread's own (`host`; on a CPU the forward is part of it), and what"
        " it then waited for the device (`wait`)",
        "kind",
    ),
    _counter("failed_steps", "steps", "that raised; their requests ran again", "kind"),
    _counter("failed_messages", "messages", "to the engine that raised"),
    _counter(
        "predicted_first_token_seconds",
        "seconds",
        "that plans with loads predicted until first tokens, summed up",
    ),
    _counter(
        "planned_first_token_seconds", "seconds", "that the same first tokens took from their plans"
    ),
    _histogram(
        "load_prediction_ratio",
        "what a first token behind loads took, over what its plan predicted",
        unit="ratio",
        bounds=RATIO_BOUNDS,
    ),
    _counter("hits", "blocks", "that a shard had when it was asked, by where", "tier"),
    _counter("misses", "blocks", "looked up or wanted and not got, by why", "tier", "reason"),
    _counter("drops", "blocks", "not stored, or stored no more, by why", "reason"),
    _counter("promotions", "blocks", "copied from disk to RAM"),
    _counter("demotions", "blocks", "that left RAM and are on disk"),
    _counter("evictions", "blocks", "that left a tier (`expired`: their time was over)", "tier"),
    _histogram(
        "block_use_gap_seconds",
        "from a stored block's last use (or its arrival) to a hit in RAM or on disk, in whole"
        " seconds",
        bounds=GAP_BOUNDS_S,
    ),
    _counter(
        "copied_bytes",
        "bytes",
        "copied between pool and shards: loaded from a tier, or saved to RAM",
        "direction",
        "tier",
    ),
    _counter("storage_bytes", "bytes", "read from and written to disks", "direction", "tier"),
    _histogram(
        "io_seconds",
        "of a batch: `stage` (looking up), `load` (into the pool, from that tier at slowest),"
        " `save` (into RAM), `read` and `write` (of disks)",
        "direction",
        "tier",
    ),
    _counter("remote_blocks", "blocks", "fetched from shards of other nodes", "shard"),
    _counter("shard_errors", "calls", "of shards that failed", "call", "kind"),
    _gauge("stored_blocks", "blocks", "that a shard holds now, by where", "tier"),
    _gauge("arena_slots", "slots", "of a shard's RAM now, by state", "state"),
    _gauge("slab_bytes", "bytes", "that a shard's file has on disk now"),
)

BY_NAME = {metric.name: metric for metric in METRICS}


Labels = tuple[tuple[str, str], ...]


@dataclass
class Histogram:
    """Counts of observations by upper bound, in seconds unless the name says otherwise."""

    bounds: tuple[float, ...] = LATENCY_BOUNDS_S
    buckets: list[int] = field(default_factory=list)
    count: int = 0
    total: float = 0.0

    def __post_init__(self) -> None:
        self.buckets = self.buckets or [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Add an observation that was made so many times."""
        self.buckets[bisect.bisect_left(self.bounds, value)] += times
        self.count += times
        self.total += value * times

    def to_dict(self) -> dict[str, object]:
        """A msgpack-able copy."""
        mean = self.total / self.count if self.count else 0.0
        return {
            "count": self.count,
            "sum": self.total,
            "mean": mean,
            "bounds": list(self.bounds),
            "buckets": list(self.buckets),
        }


def _labels(labels: Mapping[str, str]) -> Labels:
    return tuple(sorted(labels.items())) if len(labels) > 1 else tuple(labels.items())


class Metrics:
    """A thread-safe set of counters, gauges and histograms, addressed by name and labels."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[tuple[str, Labels], float] = {}
        self._gauges: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[tuple[str, Labels], Histogram] = {}

    def inc(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = (name, _labels(labels))
        with self._lock:
            self._counters[key] = self._counters.get(key, 0) + amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._gauges[(name, _labels(labels))] = value

    def observe(self, name: str, value: float, times: int = 1, **labels: str) -> None:
        """Add an observation, made so many times, to a histogram of the catalog's bounds."""
        key = (name, _labels(labels))
        with self._lock:
            histogram = self._histograms.get(key)
            if histogram is None:
                info = BY_NAME.get(name)
                histogram = Histogram(LATENCY_BOUNDS_S if info is None else info.bounds)
                self._histograms[key] = histogram
            histogram.observe(value, times)

    def count_to(self, name: str, total: float, **labels: str) -> None:
        """Bring a counter up to what somebody else has counted."""
        key = (name, _labels(labels))
        with self._lock:
            if total > self._counters.get(key, 0):
                self._counters[key] = total

    def value(self, name: str, **labels: str) -> float:
        """A counter's or gauge's value; 0 when it was never touched."""
        key = (name, _labels(labels))
        with self._lock:
            return self._counters.get(key, self._gauges.get(key, 0))

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """Sum a counter over all labels but one: `by_label("litecache_misses", "reason")`."""
        sums: dict[str, float] = {}
        with self._lock:
            for (counter, labels), value in self._counters.items():
                if counter == name:
                    key = dict(labels).get(label, "")
                    sums[key] = sums.get(key, 0) + value
        return sums

    def snapshot(self) -> dict[str, list[tuple[str, dict[str, str], object]]]:
        """Everything: kind ("counters", "gauges", "histograms") -> [(name, labels, value)]."""
        with self._lock:
            return {
                "counters": [(n, dict(lb), v) for (n, lb), v in self._counters.items()],
                "gauges": [(n, dict(lb), v) for (n, lb), v in self._gauges.items()],
                "histograms": [
                    (n, dict(lb), h.to_dict()) for (n, lb), h in self._histograms.items()
                ],
            }
