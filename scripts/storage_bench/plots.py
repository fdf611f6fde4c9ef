"""Bars of all rates beside their limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from bench_common import Report


def plot(report: Report, path: Path) -> None:
    """Write a PNG; only this needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report.rows if row.unit == "GB/s" and row.ratio is not None]
    metrics = list(dict.fromkeys(row.metric for row in rows))
    figure, axes = pyplot.subplots(1, len(metrics), figsize=(3 * len(metrics), 3.4))
    for axis, metric in zip(np.atleast_1d(axes), metrics, strict=True):
        mine = [row for row in rows if row.metric == metric]
        at = np.arange(len(mine))
        who = "bare, checked" if metric.startswith("bare") else "shard"
        axis.bar(at - 0.2, [row.value for row in mine], 0.4, label=who)
        axis.bar(at + 0.2, [row.limit or 0 for row in mine], 0.4, label=mine[0].peer)
        for x, row in zip(at, mine, strict=True):
            axis.text(x, row.value, f"{row.ratio:.2f}", ha="center", va="bottom", fontsize=8)
        axis.set_xticks(at, [row.case for row in mine], fontsize=8)
        axis.set_title(metric, fontsize=9)
        axis.set_ylabel("GB/s")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
