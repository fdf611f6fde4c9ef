"""`litecache dashboard`: what is written where, and that Grafana can make sense of it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from litecache.cli import app
from litecache.cli.grafana import FILE_NAME, dashboard_json, panels
from litecache.errors import LiteCacheError
from litecache.metrics import METRICS


def run(*words: str) -> Any:
    """What a command prints; its error is raised."""
    done = CliRunner().invoke(app, ["dashboard", *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_install_writes_a_dashboard_that_anybody_may_read_and_uninstall_removes_it(
    tmp_path: Path,
) -> None:
    for _ in range(2):
        run("install", "--folder", str(tmp_path))
        (file,) = tmp_path.iterdir()
        assert file.name == FILE_NAME
        assert file.stat().st_mode & 0o777 == 0o644
        assert json.loads(file.read_text()) == dashboard_json()
    assert json.loads(run("uninstall", "--folder", str(tmp_path), "--json"))["removed"]
    assert not json.loads(run("uninstall", "--folder", str(tmp_path), "--json"))["removed"]
    assert not list(tmp_path.iterdir())


def test_what_show_prints_is_the_dashboard_or_names_every_panel() -> None:
    assert json.loads(run("show", "--json")) == dashboard_json()
    text = run("show")
    assert all(panel.title in text for panel in panels())


def test_a_folder_that_is_not_there_or_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(LiteCacheError, match=r"--folder=.*missing"):
        run("install", "--folder", str(tmp_path / "missing"))
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(LiteCacheError, match=f"{FILE_NAME} cannot be changed"):
        run("install", "--folder", str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


def test_it_goes_where_rays_own_lie_or_says_where_to_run_it(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LiteCacheError, match=r"metrics/grafana/dashboards is not there.*--head"):
        run("install")
    for name, value in (
        ("RAY_METRICS_OUTPUT_ROOT", tmp_path),
        ("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", tmp_path / "own"),
    ):
        monkeypatch.setenv(name, str(value))
        folder = tmp_path / ("own" if "DIR" in name else "grafana/dashboards")
        folder.mkdir(parents=True)
        assert json.loads(run("install", "--json"))["file"] == str(folder / FILE_NAME)


def test_every_panel_has_a_title_a_unit_and_a_description_and_a_place_of_its_own() -> None:
    made = dashboard_json()
    assert len({panel["id"] for panel in made["panels"]}) == len(made["panels"])
    graphs = [panel for panel in made["panels"] if panel["type"] == "timeseries"]
    assert len({panel["title"] for panel in graphs}) == len(graphs) == len(panels())
    for panel in graphs:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len(panel["description"]) > 20
        assert [target["refId"] for target in panel["targets"]] == list("ABCDE")[
            : len(panel["targets"])
        ]
    places = [panel["gridPos"] for panel in made["panels"]]
    for one, other in itertools.combinations(places, 2):
        apart = [
            one[a] + one[b] <= other[a] or other[a] + other[b] <= one[a]
            for a, b in (("x", "w"), ("y", "h"))
        ]
        assert any(apart), f"{one} covers {other}"
    assert all(place["x"] + place["w"] <= 24 for place in places)


def test_queries_ask_for_metrics_and_labels_of_the_catalog_alone() -> None:
    suffixes = {"histogram": ("_bucket", "_sum", "_count")}
    known = {
        f"{m.exported}{suffix}": {*m.labels, "group", "actor", "model", "le"}
        for m in METRICS
        for suffix in suffixes.get(m.kind, ("",))
    }
    for query in (query for panel in panels() for query in panel.queries):
        asked = re.findall(r"ray_litecache_\w+", query.expr)
        assert asked
        assert set(asked) <= known.keys()
        labels = re.findall(r"\w+", " ".join(re.findall(r"sum by \((.*?)\)", query.expr)))
        labels += re.findall(r"\{\{(\w+)\}\}", query.legend)
        assert set(labels) <= known[asked[0]], query
        assert query.expr.count('group=~"$group"') == len(asked)


def test_beside_rays_prometheus_configuration_goes_a_page_with_the_same_panels(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "grafana" / "dashboards"
    folder.mkdir(parents=True)
    (tmp_path / "prometheus").mkdir()
    (tmp_path / "grafana" / "grafana.ini").touch()
    steps = json.loads(run("install", "--folder", str(folder), "--json"))
    page = tmp_path / "prometheus" / "consoles" / "litecache.html"
    assert f"--web.console.templates={page.parent}" in steps["Prometheus"]
    text = page.read_text()
    assert "{{" not in text  # to Prometheus that would be an action of the template
    (rows,) = re.findall(r'<script id="rows" type="application/json">(.*?)</script>', text, re.S)
    shown = [panel for row in json.loads(rows) for panel in row["panels"]]
    assert [panel["title"] for panel in shown] == [panel.title for panel in panels()]
    exprs = [query["expr"] for panel in shown for query in panel["queries"]]
    assert exprs == [query.expr for panel in panels() for query in panel.queries]
    run("uninstall", "--folder", str(folder))
    assert not page.exists()
