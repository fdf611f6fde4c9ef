"""Exports a part's counters through `ray.util.metrics`, for Ray's Prometheus endpoint.

The part counts into its own `Metrics`; a thread copies what changed every few seconds, after the
part has brought its gauges up to date. Every gauge is set each time: Ray forgets those that are
not. Ray has no way to set a histogram, so new observations are repeated at the upper bound of their
bucket. Where there are very many, as of tokens, each bucket is repeated in proportion: the shares
of the buckets are right, the count is a sample's. (Ray itself makes a histogram's sum from the
middles of the buckets.) Where Ray's metrics are missing everything else works on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from litecache.errors import told
from litecache.metrics import BY_NAME, Labels, Metrics
from litecache.threads import start_service

logger = logging.getLogger(__name__)

EXPORT_INTERVAL_S = 5.0
# Ray takes 2.6 us for each, and 256 rows have 30,000 tokens a second.
MOST_OBSERVATIONS = 500
"""Of one histogram series in one export."""
REFRESH_SHARE = 0.002
"""Gauges that take long to count are counted less often: of a core's time this share at most."""


class MetricsExporter:
    """Copies one `Metrics` to Ray.

    Args:
        metrics: what is copied.
        tags: labels of every series (group, actor).
        interval_s: between two exports.
        refresh: sets the gauges; called on the exporter's thread before an export.
    """

    def __init__(
        self,
        metrics: Metrics,
        tags: dict[str, str],
        interval_s: float = EXPORT_INTERVAL_S,
        refresh: Callable[[], object] | None = None,
    ) -> None:
        self._metrics, self._tags, self._interval_s = metrics, tags, interval_s
        self._refresh, self._refresh_at = refresh, 0.0
        self._series: dict[str, Any] = {}
        self._refused: set[str] = set()
        self._exported: dict[tuple[str, Labels], Any] = {}
        self._owed: dict[tuple[str, Labels], list[float]] = {}
        self._stopped = threading.Event()
        self._thread = start_service(self._run, "metrics-export")

    def close(self) -> None:
        """Export once more and stop."""
        self._stopped.set()
        self._thread.join()

    def export(self) -> int:
        """Copy what changed since the last time, and all gauges; the number of series copied."""
        self._bring_up_to_date()
        copied = 0
        for kind, values in self._metrics.snapshot().items():
            for name, labels, value in values:
                key = (name, tuple(sorted(labels.items())))
                if kind != "gauges" and self._exported.get(key) == value:
                    continue
                try:
                    self._copy(kind, key, labels, value)
                except Exception as error:
                    # Whatever Ray's metrics raise (no agent, a clash of names) concerns this
                    # series alone; it is said once and tried again with the next export.
                    self._refuse(name, error)
                    continue
                self._exported[key] = value
                copied += 1
        return copied

    def _bring_up_to_date(self) -> None:
        started = time.monotonic()
        if self._refresh is None or started < self._refresh_at:
            return
        try:
            self._refresh()
        except Exception as error:  # the part is closing, or fails: its counters go on
            self._refuse("refreshing the gauges", error)
        now = time.monotonic()
        self._refresh_at = now + (now - started) / REFRESH_SHARE - self._interval_s

    def _refuse(self, name: str, error: BaseException) -> None:
        if name not in self._refused:
            self._refused.add(name)
            logger.warning("%s is not exported: %s", name, told(error))

    def _copy(self, kind: str, key: tuple[str, Labels], labels: dict[str, str], new: Any) -> None:
        from ray.util import metrics

        name, old = key[0], self._exported.get(key)
        info = BY_NAME.get(name)
        # Of one name all series have the same labels.
        tags = {**dict.fromkeys(info.labels if info else (), ""), **self._tags, **labels}

        def series(made: Any, **options: Any) -> Any:
            if name not in self._series:
                said = f"{info.unit}: {info.meaning}" if info else ""
                self._series[name] = made(name, said, tag_keys=tuple(sorted(tags)), **options)
            return self._series[name]

        if kind == "counters":
            if new > (old or 0):
                series(metrics.Counter).inc(new - (old or 0), tags=tags)
        elif kind == "gauges":
            series(metrics.Gauge).set(new, tags=tags)
        else:
            histogram = series(metrics.Histogram, boundaries=list(new["bounds"]))
            before = old["buckets"] if old else [0] * len(new["buckets"])
            counts = [count - seen for count, seen in zip(new["buckets"], before, strict=True)]
            inside = [*new["bounds"], new["bounds"][-1] * 2]  # a value in each bucket
            for value, times in zip(inside, self._sample(key, counts), strict=True):
                for _ in range(times):
                    histogram.observe(value, tags=tags)

    def _sample(self, key: tuple[str, Labels], counts: list[int]) -> list[int]:
        """How often each bucket is told: all of few; of many in proportion, fractions kept."""
        share = min(1.0, MOST_OBSERVATIONS / max(1, sum(counts)))
        if share == 1:
            return counts
        owed = self._owed.setdefault(key, [0.0] * len(counts))
        for place, count in enumerate(counts):
            owed[place] += count * share
        times = [int(part) for part in owed]
        self._owed[key] = [part - whole for part, whole in zip(owed, times, strict=True)]
        return times

    def _run(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stopped.wait(self._interval_s)
            self.export()
