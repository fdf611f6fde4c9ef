"""The harness that all scripts/bench_*.py share.

A benchmark adds rows (case, metric, value, unit, the limit measured in the same run) to a `Report`.
After each case the table grows on the terminal and `--json FILE` is written again, whole and by a
rename, so a run that is cut short keeps what it has measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
GEOMETRIES = Path(__file__).resolve().parent / "geometries"
TINY: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        limit: what the machine or the peer allows, in the same unit, from the same run.
        ratio: `value` against `limit` (or against the peer), as the benchmark defines it.
        peer: what `limit` or `ratio` compares with.
        spread: quartiles of the samples behind a median, in the same unit.
        samples: how many there were.
    """

    case: str
    metric: str
    value: float
    unit: str
    limit: float | None = None
    ratio: float | None = None
    peer: str | None = None
    spread: tuple[float, float] | None = None
    samples: int = 1


@dataclass(frozen=True)
class Summary:
    """A median with its quartiles."""

    median: float
    spread: tuple[float, float]
    samples: int


def summarise(samples: Sequence[float]) -> Summary:
    """The median and the quartiles of one or more samples."""
    if len(samples) == 1:
        return Summary(samples[0], (samples[0], samples[0]), 1)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(statistics.median(samples), (low, high), len(samples))


def alternate(
    rounds: int, contestants: dict[str, Callable[[], float]], warm_up: int = 1
) -> dict[str, list[float]]:
    """Run the contestants in turn, so that drift of the machine hits all of them alike.

    Args:
        rounds: samples of each; every second round runs them in reverse order.
        contestants: name to a function that returns one sample.
        warm_up: rounds that are not counted.

    Returns:
        The samples, in order, one list per contestant: index i of each is of one round.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-warm_up, rounds):
        names = list(contestants) if turn % 2 == 0 else list(reversed(contestants))
        for name in names:
            value = contestants[name]()
            if turn >= 0:
                samples[name].append(value)
    return samples


def rate_against(
    case: str,
    metric: str,
    amount: float,
    own_s: Sequence[float],
    peer_s: Sequence[float],
    peer: str,
) -> tuple[Row, float]:
    """Tokens a second beside a peer's, which is the limit, and the median ratio over the rounds.

    Args:
        amount: tokens of a sample.
        own_s, peer_s: seconds, sample by sample of the same round.
    """
    rate, limit = (summarise([amount / each for each in seconds]) for seconds in (own_s, peer_s))
    ratio = summarise([b / a for a, b in zip(own_s, peer_s, strict=True)]).median
    figures = (rate.median, "tokens/s", limit.median, ratio, peer, rate.spread, rate.samples)
    return Row(case, metric, *figures), ratio


def own_ray() -> None:
    """A Ray that ends with this process, unless RAY_ADDRESS names another.

    Ray by itself joins whatever `ray start` last recorded on the machine, alive or not.
    """
    import ray

    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        ray.init(
            address="local", include_dashboard=False, log_to_driver=False, logging_level="warning"
        )


def machine_info() -> dict[str, Any]:
    """What a reader needs to judge the figures; no host name."""
    info: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_1min_at_start": os.getloadavg()[0],
    }
    for name in ("torch", "transformers", "ray", "triton", "litecache"):
        try:
            from importlib.metadata import version

            info[name] = version(name)
        except ModuleNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        info["cuda"] = torch.version.cuda
    return info


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def geometry(name: str) -> tuple[str, dict[str, Any]]:
    """Name and config of a model: "tiny", a file of scripts/geometries or a path to a JSON file."""
    if name == "tiny":
        return name, dict(TINY)
    file = Path(name) if name.endswith(".json") else GEOMETRIES / f"{name}.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return file.stem, config


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the two options every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    made.add_argument("--quick", action="store_true", help="a smoke test, within a minute")
    return made


class Report:
    """Collects rows, shows them and keeps the JSON file up to date.

    Args:
        title: heads the table.
        json_file: where to write, or None.
        extra: further top-level fields of the JSON file; may be changed until `write`.
    """

    def __init__(
        self, title: str, json_file: Path | None, extra: dict[str, Any] | None = None
    ) -> None:
        self.title, self.json_file = title, json_file
        self.extra: dict[str, Any] = extra if extra is not None else {}
        self.rows: list[Row] = []
        self.console = Console(width=None if sys.stdout.isatty() else 140)
        self._machine = machine_info()
        self._date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")

    def add(self, *rows: Row) -> None:
        """Add the rows of one finished case: shown at once and written at once."""
        for row in rows:
            self.console.print("  " + _line(row), highlight=False)
        self.rows.extend(rows)
        self.write()

    def write(self) -> None:
        """Write the JSON file, whole, through a rename."""
        if self.json_file is None:
            return
        command = shlex.join(["python", *(_relative(word) for word in sys.argv)])
        document = {
            "machine": self._machine,
            "date": self._date,
            "command": command,
            "rows": [asdict(row) for row in self.rows],
            **self.extra,
        }
        temporary = self.json_file.with_name(self.json_file.name + ".tmp")
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.json_file)

    def show(self) -> None:
        """Print the whole table, the limit beside every figure."""
        table = Table(title=self.title)
        for name in ("case", "metric"):
            table.add_column(name)
        for name in ("value", "quartiles", "n", "limit", "ratio"):
            table.add_column(name, justify="right")
        table.add_column("limit is")
        for row in self.rows:
            spread = "" if row.spread is None else " .. ".join(map(_number, row.spread))
            limit = "" if row.limit is None else _number(row.limit)
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            value = f"{_number(row.value)} {row.unit}"
            cells = (value, spread, str(row.samples), limit, ratio, row.peer or "")
            table.add_row(row.case, row.metric, *cells)
        self.console.print(table)


def _relative(word: str) -> str:
    path = Path(word)
    if path.is_absolute() and path.is_relative_to(REPOSITORY):
        return str(path.relative_to(REPOSITORY))
    return word


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.2e}"


def _line(row: Row) -> str:
    text = f"{row.case}: {row.metric} {_number(row.value)} {row.unit}"
    if row.limit is not None:
        text += f" (limit {_number(row.limit)})"
    if row.ratio is not None:
        text += f" ratio {row.ratio:.2f}"
    return text
