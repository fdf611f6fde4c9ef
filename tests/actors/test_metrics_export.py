"""Metrics of a part in Ray's: what fails costs itself alone."""

from __future__ import annotations

import time
from collections import Counter
from typing import ClassVar

import pytest
from ray.util import metrics as ray_metrics

from litecache.actors.metrics_export import MOST_OBSERVATIONS, MetricsExporter
from litecache.metrics import Metrics


class Series:
    """Stands for one of `ray.util.metrics`; keeps what it was told."""

    told: ClassVar[dict[str, float]] = {}
    broken: ClassVar[set[str]] = set()

    def __init__(self, name: str, said: str, tag_keys: tuple[str, ...]) -> None:
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


class Observed:
    """Stands for Ray's histograms and gauges; keeps the values and labels that it was told."""

    told: ClassVar[list[tuple[float, dict[str, str]]]] = []

    def __init__(self, name: str, said: str, **options: object) -> None:
        self.options = options

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self.told.append((value, tags))

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.told.append((value, tags))


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, dict[str, str]]]:
    monkeypatch.setattr(Observed, "told", [])
    for kind in ("Histogram", "Gauge"):
        monkeypatch.setattr(ray_metrics, kind, Observed)
    return Observed.told


def test_of_very_many_observations_the_shares_reach_ray(
    observed: list[tuple[float, dict[str, str]]],
) -> None:
    metrics = Metrics()
    exporter = MetricsExporter(metrics, {"group": "g"}, interval_s=3600)
    for _ in range(20):
        metrics.observe("litecache_inter_token_seconds", 0.004, 99_990)
        metrics.observe("litecache_inter_token_seconds", 4.0, 10)
        metrics.observe("litecache_ttft_seconds", 0.3, 7)
        exporter.export()
    counts = Counter(value for value, _ in observed)
    assert counts[0.5] == 20 * 7
    assert counts[0.005] == pytest.approx(20 * MOST_OBSERVATIONS, rel=0.01)
    assert counts[5] == 1  # a ten thousandth of 10,000, though each export owed a twentieth
    exporter.close()


def test_gauges_are_counted_before_each_export_unless_that_takes_long(
    observed: list[tuple[float, dict[str, str]]],
) -> None:
    metrics, asked = Metrics(), []

    def refresh() -> None:
        asked.append(1)
        metrics.set("litecache_waiting_requests", len(asked))
        time.sleep(0.02)  # of 10 s
        raise ValueError("the part is closing")

    exporter = MetricsExporter(metrics, {"group": "g"}, interval_s=5, refresh=refresh)
    for _ in range(3):
        exporter.export()
    assert [value for value, _ in observed] == [1, 1, 1]
    exporter.close()


def test_series_of_one_name_have_the_same_labels(
    observed: list[tuple[float, dict[str, str]]],
) -> None:
    metrics = Metrics()
    metrics.observe("litecache_io_seconds", 0.1, direction="load", tier="ram")
    metrics.observe("litecache_io_seconds", 0.1, direction="load")
    exporter = MetricsExporter(metrics, {"group": "g"}, interval_s=3600)
    exporter.export()
    assert [set(tags) for _, tags in observed] == [{"group", "direction", "tier"}] * 2
    exporter.close()
