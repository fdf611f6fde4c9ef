"""The dashboard of LiteCache: its panels, as Prometheus queries over the metrics' catalog.

`console_html` draws them in a page that Prometheus itself serves, where there is no Grafana;
`dashboard_json` is what `litecache dashboard install` writes; `scripts/check_dashboard.py` runs
every query against a Prometheus. Each query keeps to the groups chosen at the top (`$group`). A
panel that is empty while all is well draws a line at zero instead.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any, NamedTuple

from litecache.metrics import BY_NAME

UID = "litecache"
FILE_NAME = "litecache_grafana_dashboard.json"
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT, _ACROSS = 8, 8, 3
_EXPORT_LAG_S = 30


class Query(NamedTuple):
    """A PromQL expression, and how its series are called (Grafana's `{{label}}`)."""

    expr: str
    legend: str


class Panel(NamedTuple):
    """One graph over time.

    Attributes:
        title: unique.
        unit: a unit's name in Grafana, or any text.
        about: what it shows, and what to look for.
        queries: whose series it draws.
        stacked: on top of each other: they add up.
    """

    title: str
    unit: str
    about: str
    queries: tuple[Query, ...]
    stacked: bool = False


def _series(name: str, suffix: str = "", **where: str) -> str:
    matchers = ['group=~"$group"', *(f'{label}="{value}"' for label, value in where.items())]
    return f"{BY_NAME['litecache_' + name].exported}{suffix}{{{', '.join(matchers)}}}"


def _sum(vector: str, by: tuple[str, ...]) -> str:
    return f"sum by ({', '.join(by)}) ({vector})" if by else f"sum({vector})"


def _rate(name: str, *by: str, suffix: str = "", **where: str) -> str:
    return _sum(f"rate({_series(name, suffix, **where)}[$__rate_interval])", by)


def _now(name: str, *by: str) -> str:
    return _sum(_series(name), by)


def _quantile(share: float, name: str, *by: str, **where: str) -> str:
    return f"histogram_quantile({share}, {_rate(name, 'le', *by, suffix='_bucket', **where)})"


def _quantiles(
    name: str, *by: str, shares: tuple[float, ...] = (0.5, 0.9, 0.99)
) -> tuple[Query, ...]:
    told = "".join(f" {{{{{label}}}}}" for label in by)
    return tuple(Query(_quantile(q, name, *by), f"p{100 * q:g}{told}") for q in shares)


def _or_zero(expr: str) -> str:
    return f"{expr} or on() vector(0)"


def _mean_s(total: str) -> str:
    return _or_zero(f"{_rate(total)} / {_rate('load_prediction_ratio', suffix='_count')}")


def _panel(
    title: str, unit: str, about: str, *queries: tuple[str, str], stacked: bool = False
) -> Panel:
    return Panel(title, unit, about, tuple(Query(*query) for query in queries), stacked)


# A line of each panel's words, then its queries with the names of their series.
# fmt: off
ROWS: dict[str, tuple[Panel, ...]] = {
    "Requests": (
        _panel("Prompt tokens reused", "percentunit",
               "Share of what was done for prompts that was found and not computed, by the tier"
               " that it was in. Stacked: the sum is the hit rate.",
               (f"{_rate('reused_tokens', 'tier')} / scalar({_rate('computed_tokens')} +"
                f" ({_rate('reused_tokens')} or vector(0)))", "{{tier}}"),
               stacked=True),
        _panel("Prompt tokens", "tokens/s",
               "Prompt tokens a second: computed, and reused by tier.",
               (_rate("computed_tokens"), "computed"),
               (_rate("reused_tokens", "tier"), "reused: {{tier}}"),
               stacked=True),
        _panel("Generated tokens", "tokens/s",
               "Tokens drawn a second, by replica. Uneven while all have requests: look at"
               " routing.",
               (_rate("generated_tokens", "actor", "model"), "{{actor}} {{model}}"),
               stacked=True),
        _panel("Requests in the engines", "short",
               "Requests that have a row of a batch, and those that wait for one or for blocks.",
               (_now("running_requests"), "running"),
               (_now("waiting_requests"), "waiting")),
        _panel("Tokens to compute", "tokens",
               "Prompt tokens that are queued, by replica: what a new request waits for.",
               (_now("queued_tokens", "actor"), "{{actor}}")),
        _panel("Ended requests", "reqps",
               "Requests that ended a second: by a stop token, at their length, aborted, failed.",
               (_rate("requests", "outcome"), "{{outcome}}"),
               stacked=True),
        _panel("Time to the first token", "s",
               "From submission to the first token, in the engine, without the way to the client.",
               *_quantiles("ttft_seconds")),
        _panel("Time between tokens", "s",
               "Between two tokens of a request. Peaks: long prefill chunks beside decodes, or"
               " preemptions.",
               *_quantiles("inter_token_seconds")),
        _panel("Step time", "s",
               "Median of a step: host is the engine thread's own time, wait is for the device"
               " after it. On a CPU the forward pass is part of host.",
               *_quantiles("step_seconds", "kind", shares=(0.5,))),
    ),
    "Blocks": (
        _panel("Pool blocks by state", "short",
               "Blocks of the pools: free, private (being filled), loading, published (full and in"
               " use), idle (cached, evictable).",
               (_now("pool_blocks", "state"), "{{state}}"),
               stacked=True),
        _panel("Stored blocks", "short",
               "Blocks that shards hold in RAM and on disk; many are in both.",
               (_now("stored_blocks", "tier"), "{{tier}}")),
        _panel("RAM slots by state", "short",
               "Slots of the arenas. Dirty ones wait for the disk: a growing band means that the"
               " disk is too slow for what is saved.",
               (_now("arena_slots", "state"), "{{state}}"),
               stacked=True),
        _panel("Bytes on disk", "bytes",
               "Size of the slab of each shard, at most its part of storage_bytes.",
               (_or_zero(_now("slab_bytes", "actor")), "{{actor}}"),
               stacked=True),
        _panel("Evictions", "blocks/s",
               "Blocks that left a tier to make room, or because their time was over (expired).",
               (_or_zero(_rate("evictions", "tier")), "{{tier}}")),
        _panel("Between RAM and disk", "blocks/s",
               "Promotions: read from disk into RAM. Demotions: left RAM and are on disk.",
               (_or_zero(_rate("promotions")), "promotions"),
               (_or_zero(_rate("demotions")), "demotions")),
        _panel("Gap between uses of a block", "s",
               "From a stored block's last use to its next hit in RAM or on disk: how long blocks"
               " must stay to be of use. Compare with how long the tiers keep them.",
               *_quantiles("block_use_gap_seconds", shares=(0.5, 0.9))),
    ),
    "Tiers": (
        _panel("Bytes moved", "Bps",
               "Between pools and tiers (load, save), and from and to disks (read, write).",
               (_rate("copied_bytes", "direction", "tier"), "{{direction}} {{tier}}"),
               (_or_zero(_rate("storage_bytes", "direction", "tier")), "{{direction}} {{tier}}")),
        _panel("Latency by tier, median", "s",
               "Of a batch: stage (lookup), load into the pool, save to RAM, read and write of"
               " disks.",
               (_quantile(0.5, "io_seconds", "direction", "tier"), "{{direction}} {{tier}}")),
        _panel("Latency by tier, 99 of 100", "s",
               "The same, for the slowest of a hundred batches.",
               (_quantile(0.99, "io_seconds", "direction", "tier"), "{{direction}} {{tier}}")),
        _panel("Lookups in shards", "blocks/s",
               "Blocks that shards were asked for: hits by tier, and misses.",
               (_or_zero(_rate("hits", "tier")), "hit: {{tier}}"),
               (_or_zero(_rate("misses")), "miss")),
        _panel("First tokens behind loads", "s",
               "Mean time from a plan to its first token: as the cost model predicted it, and as it"
               " was. Zero while nothing is loaded.",
               (_mean_s("predicted_first_token_seconds"), "predicted"),
               (_mean_s("planned_first_token_seconds"), "actual")),
        _panel("Actual over predicted", "short",
               "The same for each first token, as a ratio: 1 is exact, 2 twice as long as"
               " predicted.",
               *((_or_zero(query), legend) for query, legend in
                 _quantiles("load_prediction_ratio", shares=(0.1, 0.5, 0.9)))),
    ),
    "What went wrong": (
        _panel("Misses by reason", "blocks/s",
               "absent is a block that nobody has; all else is one that could not be had: busy (no"
               " slot), timeout, changed, corrupt, shard_lost, coordinator_unavailable and others.",
               (_or_zero(_rate("misses", "tier", "reason")), "{{tier}}: {{reason}}")),
        _panel("Drops by reason", "blocks/s",
               "Blocks that were not saved: no_slot (RAM is dirty or leased), queue_full, disk_full"
               " and others. Requests go on; the cache keeps less.",
               (_or_zero(_rate("drops", "reason")), "{{reason}}")),
        _panel("Failures", "ops",
               "Steps that raised, calls of shards that failed, requests that were preempted.",
               (_or_zero(_rate("failed_steps", "kind")), "step: {{kind}}"),
               (_or_zero(_rate("shard_errors", "call")), "shard call: {{call}}"),
               (_or_zero(_rate("preemptions")), "preemptions")),
    ),
}
# fmt: on


def panels() -> list[Panel]:
    """All panels, in order."""
    return [panel for row in ROWS.values() for panel in row]


def dashboard_json() -> dict[str, Any]:
    """The dashboard as Grafana reads it (10 or later)."""
    drawn: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": top, "w": 24, "h": 1}
        drawn.append(
            {"id": len(drawn) + 1, "type": "row", "title": title, "collapsed": False, "panels": []}
            | {"gridPos": place}
        )
        for number, panel in enumerate(row):
            down, right = divmod(number, _ACROSS)
            place = {"x": right * _WIDTH, "y": top + 1 + down * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            drawn.append({"id": len(drawn) + 1, "gridPos": place, **_drawn(panel)})
        top += 1 + -(-len(row) // _ACROSS) * _HEIGHT
    return {
        "uid": UID,
        "title": "LiteCache",
        "description": "A paged, tiered and persistent KV cache for Hugging Face models on Ray.",
        "tags": ["litecache", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": f"now-{_EXPORT_LAG_S}s"},
        "timezone": "",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": [_datasource_variable(), _group_variable()]},
        "panels": drawn,
    }


def console_html() -> str:
    """The panels as a console template of Prometheus: a page of its own that asks its API."""
    rows = [
        {
            "title": title,
            "panels": [
                {**panel._asdict(), "queries": [query._asdict() for query in panel.queries]}
                for panel in row
            ],
        }
        for title, row in ROWS.items()
    ]
    # Prometheus reads the page as a template of Go, the browser the rows as a part of HTML.
    text = json.dumps(rows).replace("{{", "<<").replace("}}", ">>")
    text = text.replace("<", "\\u003c")
    page = resources.files("litecache.cli").joinpath("console.html").read_text(encoding="utf-8")
    return page.replace("__ROWS__", text)


def _drawn(panel: Panel) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": _DATASOURCE,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": {
                    "drawStyle": "line",
                    "lineWidth": 1,
                    "fillOpacity": 30 if panel.stacked else 5,
                    "showPoints": "never",
                    "stacking": stacking,
                },
            },
            "overrides": [],
        },
        "options": {
            "legend": {
                "displayMode": "table",
                "placement": "bottom",
                "showLegend": True,
                "calcs": ["lastNotNull", "max"],
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "editorMode": "code",
                "range": True,
            }
            for number, query in enumerate(panel.queries)
        ],
    }


def _datasource_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "current": {},
        "options": [],
        "regex": "",
    }


def _group_variable() -> dict[str, Any]:
    query = f"label_values({BY_NAME['litecache_running_requests'].exported}, group)"
    return {
        "name": "group",
        "label": "Group",
        "description": "Groups of actors.",
        "type": "query",
        "datasource": _DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "groups"},
        "refresh": 2,
        "hide": 0,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "options": [],
        "regex": "",
        "sort": 1,
    }
