"""Plain counters, gauges and histograms, owned by the part that counts.

Every stateful part has one `Metrics`; nothing here knows Ray. The actors read snapshots and
export them (`actors/metrics_export.py`). `metric_catalog.py` lists the names.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from litecache.metric_catalog import BY_NAME, LATENCY_BOUNDS_S

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
