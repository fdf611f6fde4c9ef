"""The catalog of metrics, the code that counts and the table in the docs agree."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from litecache.metrics import BY_NAME, METRICS, Metrics

ROOT = Path(__file__).parents[1]
KIND_OF = {"inc": "counter", "count_to": "counter", "set": "gauge", "observe": "histogram"}


@functools.cache
def _trees() -> list[ast.Module]:
    files = sorted((ROOT / "litecache").rglob("*.py"))
    return [ast.parse(f.read_text(), str(f)) for f in files]


def _counted() -> list[tuple[str, str, set[str]]]:
    """(metric, method, labels) of every call that counts under a literal name."""
    found = []
    for node in (node for tree in _trees() for node in ast.walk(tree)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        first = node.args[0] if node.args else None
        if node.func.attr not in KIND_OF or not isinstance(first, ast.Constant):
            continue
        if str(first.value).startswith("litecache_"):
            labels = {word.arg for word in node.keywords if word.arg} - {"times"}
            found.append((first.value, node.func.attr, labels))
    return found


def test_what_is_counted_stands_in_the_catalog_with_its_kind_and_labels() -> None:
    counted = _counted()
    assert len(counted) > 30
    for name, method, labels in counted:
        assert name in BY_NAME, f"{name} is not in the catalog"
        assert BY_NAME[name].kind == KIND_OF[method], f"{name} is no {KIND_OF[method]}"
        assert labels <= set(BY_NAME[name].labels), f"{name} has no label {labels}"


def test_what_stands_in_the_catalog_is_counted() -> None:
    texts = {
        node.value
        for tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not BY_NAME.keys() - texts
    assert len(BY_NAME) == len(METRICS)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: object) -> None:
    info = BY_NAME[metric.name]  # type: ignore[attr-defined]
    assert re.fullmatch(r"litecache_[a-z_]+", info.name)
    assert not info.name.endswith("_total")
    unit = {"seconds": "_seconds", "bytes": "_bytes"}.get(info.unit, "")
    assert info.name.endswith(unit)
    assert not {"salt", "prompt", "request", "request_id", "client"} & set(info.labels)
    assert list(info.bounds) == sorted(set(info.bounds))
    assert info.bounds[0] > 0


def test_the_table_in_the_docs_is_the_catalog() -> None:
    text = (ROOT / "docs" / "dashboard.md").read_text()
    rows = re.findall(
        r"^\| `(ray_litecache_\w+)` \| (\w+) \| (\w+) \| (.*?) \| (.*?) \|$", text, re.M
    )
    told = [
        (name, kind, unit, tuple(re.findall(r"`(\w+)`", labels)), meaning)
        for name, kind, unit, labels, meaning in rows
    ]
    assert told == [(m.exported, m.kind, m.unit, m.labels, m.meaning) for m in METRICS]


def test_a_histogram_has_the_bounds_of_the_catalog_and_counts_repeats() -> None:
    metrics = Metrics()
    metrics.observe("litecache_load_prediction_ratio", 1.05, 3)
    (_, _, histogram), *_ = metrics.snapshot()["histograms"]
    assert isinstance(histogram, dict)
    assert histogram["bounds"] == list(BY_NAME["litecache_load_prediction_ratio"].bounds)
    assert histogram["buckets"][histogram["bounds"].index(1.1)] == 3
    assert histogram["count"] == 3
    assert histogram["sum"] == pytest.approx(3.15)


def test_a_counter_that_somebody_else_counts_never_goes_back() -> None:
    metrics = Metrics()
    for total in (3, 7, 5):
        metrics.count_to("litecache_evictions", total, tier="gpu")
    assert metrics.value("litecache_evictions", tier="gpu") == 7
