"""Exports a part's counters through `ray.util.metrics`, for Ray's Prometheus endpoint.

The part counts into its own `Metrics`; a thread copies what changed every few seconds. Ray has no
way to set a histogram, so each new observation is repeated at the upper bound of its bucket: the
exported buckets are exact, the exported sum is an upper bound. Where Ray's metrics are missing
everything else works on.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from litecache.errors import told
from litecache.metrics import Labels, Metrics
from litecache.threads import start_service

logger = logging.getLogger(__name__)

EXPORT_INTERVAL_S = 5.0


class MetricsExporter:
    """Copies one `Metrics` to Ray, with `tags` (group, actor) added to every series' labels."""

    def __init__(
        self, metrics: Metrics, tags: dict[str, str], interval_s: float = EXPORT_INTERVAL_S
    ) -> None:
        self._metrics, self._tags, self._interval_s = metrics, tags, interval_s
        self._series: dict[str, Any] = {}
        self._refused: set[str] = set()
        self._exported: dict[tuple[str, Labels], Any] = {}
        self._stopped = threading.Event()
        self._thread = start_service(self._run, "metrics-export")

    def close(self) -> None:
        """Export once more and stop."""
        self._stopped.set()
        self._thread.join()

    def export(self) -> int:
        """Copy what changed since the last time; the number of series that did."""
        changed = 0
        for kind, values in self._metrics.snapshot().items():
            for name, labels, value in values:
                tags = {**self._tags, **labels}
                key = (name, tuple(sorted(tags.items())))
                if self._exported.get(key) == value:
                    continue
                try:
                    self._copy(kind, name, tags, self._exported.get(key), value)
                except Exception as error:
                    # Whatever Ray's metrics raise (no agent, a clash of names) concerns this
                    # series alone; it is said once and tried again with the next export.
                    if name not in self._refused:
                        self._refused.add(name)
                        logger.warning("%s is not exported: %s", name, told(error))
                    continue
                self._exported[key] = value
                changed += 1
        return changed

    def _copy(self, kind: str, name: str, tags: dict[str, str], old: Any, new: Any) -> None:
        from ray.util import metrics

        def series(made: Any, **options: Any) -> Any:
            if name not in self._series:
                self._series[name] = made(name, tag_keys=tuple(sorted(tags)), **options)
            return self._series[name]

        if kind == "counters":
            series(metrics.Counter).inc(new - (old or 0), tags=tags)
        elif kind == "gauges":
            series(metrics.Gauge).set(new, tags=tags)
        else:
            histogram = series(metrics.Histogram, boundaries=list(new["bounds"]))
            before = old["buckets"] if old else [0] * len(new["buckets"])
            bounds = [*new["bounds"], new["bounds"][-1] * 2]
            for bound, count, seen in zip(bounds, new["buckets"], before, strict=True):
                for _ in range(count - seen):
                    histogram.observe(bound, tags=tags)

    def _run(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stopped.wait(self._interval_s)
            self.export()
