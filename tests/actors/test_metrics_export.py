"""Metrics of a part in Ray's: what fails costs itself alone."""

from __future__ import annotations

from typing import ClassVar

import pytest
from ray.util import metrics as ray_metrics

from litecache.actors.metrics_export import MetricsExporter
from litecache.metrics import Metrics


class Series:
    """Stands for one of `ray.util.metrics`; keeps what it was told."""

    told: ClassVar[dict[str, float]] = {}
    broken: ClassVar[set[str]] = set()

    def __init__(self, name: str, tag_keys: tuple[str, ...]) -> None:
        if name == "clashing":
            raise ValueError("there is a gauge of this name")
        self.name = name

    def inc(self, amount: float, tags: dict[str, str]) -> None:
        if self.name in self.broken:
            raise ConnectionError("no agent")
        self.told[self.name] = self.told.get(self.name, 0) + amount


def test_one_failing_series_ends_neither_the_others_nor_its_own_later_exports(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_metrics, "Counter", Series)
    metrics = Metrics()
    exporter = MetricsExporter(metrics, {"group": "g"}, interval_s=0.01)
    Series.broken.add("frail")
    for name in ("clashing", "frail", "good"):
        metrics.inc(name, 2)
    for _ in range(3):
        exporter.export()
    assert Series.told == {"good": 2}
    assert caplog.text.count("frail is not exported: ConnectionError: no agent") == 1
    Series.broken.clear()
    metrics.inc("frail", 1)
    exporter.close()
    assert Series.told == {"good": 2, "frail": 3}
