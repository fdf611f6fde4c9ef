"""The benchmarks' harness: the JSON file is complete after each case, statistics are right."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from bench_common import Report, Row, alternate, parser, summarise
from bench_versions import interval

ROW_FIELDS = {"case", "metric", "value", "unit", "limit", "ratio", "peer"}


def test_the_json_file_is_whole_after_each_case(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    report = Report("title", path)
    report.add(Row("one", "rate", 1.5, "GB/s", 3.0, 0.5, "memcpy"))
    first = json.loads(path.read_text())
    report.extra["identical"] = True
    report.add(Row("two", "rate", 2.5, "GB/s"))
    second = json.loads(path.read_text())
    assert [row["case"] for row in first["rows"]] == ["one"]
    assert [row["case"] for row in second["rows"]] == ["one", "two"]
    assert second["rows"][0].keys() >= ROW_FIELDS
    assert second["rows"][0]["limit"] == 3.0
    assert second["rows"][1]["limit"] is None
    assert second["identical"] is True
    assert {"machine", "date", "command"} <= second.keys()
    assert second["machine"]["cores"] >= 1
    assert not list(tmp_path.glob("*.tmp"))


def test_the_table_shows_value_and_limit(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("title", None)
    report.add(Row("one", "rate", 1234.0, "GB/s", 4000.0, 0.3085, "memcpy", (1.0, 2.0), 7))
    report.show()
    shown = capsys.readouterr().out
    for text in ("1,234 GB/s", "4,000", "0.31", "memcpy", "1 .. 2"):
        assert text in shown


def test_a_summary_is_the_median_with_its_quartiles() -> None:
    summary = summarise([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (summary.median, summary.spread, summary.samples) == (3.0, (2.0, 4.0), 5)
    assert summarise([2.0]).spread == (2.0, 2.0)


def test_contestants_alternate_and_warm_up_is_not_counted() -> None:
    order: list[str] = []

    def contestant(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = alternate(2, {name: lambda name=name: contestant(name) for name in ("a", "b")})
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert samples == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_every_benchmark_takes_json_and_quick(tmp_path: Path) -> None:
    args = parser("doc").parse_args(["--json", str(tmp_path / "x"), "--quick"])
    assert args.quick
    assert args.json == tmp_path / "x"


def test_the_interval_of_paired_ratios_is_students() -> None:
    # logs -0.1, 0, 0.1: mean 0, standard error 0.1 / sqrt(3), t = 4.303 with two degrees
    ratios = [math.exp(-0.1), 1.0, math.exp(0.1)]
    mean, low, high = interval(ratios)
    assert mean == pytest.approx(1.0)
    assert math.log(high) == pytest.approx(0.1 / math.sqrt(3) * 4.303, rel=1e-3)
    assert low == pytest.approx(1 / high)
