"""Commands about the dashboard: `litecache dashboard install`, `uninstall`, `show`.

Ray's dashboard writes a configuration of Prometheus and of Grafana into its session's folder, and
dashboards beside it, which a Grafana with that configuration shows. LiteCache's is one file more;
a second one has the same panels for the Prometheus alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from litecache.checks import check_path
from litecache.cli.options import Address, AsJson, connect, print_json
from litecache.errors import ConfigError, GroupUnavailableError, LiteCacheError

app = typer.Typer(
    help="The Grafana dashboard: install it beside Ray's, remove it, or print it.",
    epilog="Example: litecache dashboard install; each command takes --json",
)

CONSOLE = "litecache.html"
Folder = Annotated[
    str | None, typer.Option(help="of dashboards; default: where this machine's Ray has its own")
]


@app.command(epilog="Example: litecache dashboard install")
def install(folder: Folder = None, address: Address = None, as_json: AsJson = False) -> None:
    """Write LiteCache's dashboard where Ray's own lie, and say how to start what shows it.

    Run it where `ray start --head` runs, after each start: every start of Ray has a new folder.
    """
    from litecache.cli.grafana import FILE_NAME, console_html, dashboard_json

    target = _folder(folder, address) / FILE_NAME
    _write(target, json.dumps(dashboard_json(), indent=1))
    console = _console(target.parent)
    if console is not None:
        with _errors_of(console):
            console.parent.mkdir(exist_ok=True)
        _write(console, console_html())
    steps = _next_steps(target.parent)
    if as_json:
        print_json({"file": str(target), **steps})
        return
    typer.echo(f"{target}: written")
    for name, command in steps.items():
        typer.echo(f"  {name:10} {command}")


@app.command(epilog="Example: litecache dashboard uninstall")
def uninstall(folder: Folder = None, address: Address = None, as_json: AsJson = False) -> None:
    """Remove LiteCache's dashboard from where `install` has written it."""
    from litecache.cli.grafana import FILE_NAME

    target = _folder(folder, address) / FILE_NAME
    there = target.is_file()
    console = _console(target.parent)
    with _errors_of(target):
        target.unlink(missing_ok=True)
        if console is not None:
            console.unlink(missing_ok=True)
    if as_json:
        print_json({"file": str(target), "removed": there})
        return
    typer.echo(f"{target}: {'removed' if there else 'was not there'}")


@app.command(epilog="Example: litecache dashboard show --json > litecache.json")
def show(as_json: AsJson = False) -> None:
    """List the panels and their queries; with --json the dashboard, to be imported anywhere."""
    from litecache.cli.grafana import ROWS, dashboard_json

    if as_json:
        typer.echo(json.dumps(dashboard_json(), indent=1))
        return
    for row, its in ROWS.items():
        typer.echo(row)
        for panel in its:
            typer.echo(f"  {panel.title} [{panel.unit}]: {panel.about}")
            for query in panel.queries:
                typer.echo(f"    {query.expr}")


def _folder(given: str | None, address: str | None) -> Path:
    """The folder of dashboards.

    Raises:
        ConfigError: --folder is no folder.
        GroupUnavailableError: there is no Ray, or its dashboard does not run on this machine.
    """
    if given is not None:
        folder = Path(check_path("--folder", given)).expanduser()
        if not folder.is_dir():
            raise ConfigError("--folder", given, "a folder that exists, of a Grafana's dashboards")
        return folder.absolute()
    connect(address)
    from litecache.actors.cluster import dashboards_folder

    folder = dashboards_folder()
    if not folder.is_dir():
        raise GroupUnavailableError(
            f"{folder} is not there: Ray's dashboard does not run on this machine; run this where "
            "`ray start --head --include-dashboard=true` runs, or name a folder with --folder"
        )
    return folder


def _write(target: Path, text: str) -> None:
    """Put a file in place as a whole: Grafana may look at any time."""
    with _errors_of(target):
        descriptor, scratch = tempfile.mkstemp(dir=target.parent, prefix=".litecache-")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                os.fchmod(file.fileno(), 0o644)  # Grafana may run as another user
            Path(scratch).rename(target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise


@contextlib.contextmanager
def _errors_of(target: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise LiteCacheError(f"{target} cannot be changed: {error.strerror}") from error


def _console(folder: Path) -> Path | None:
    """Where the page for Prometheus goes, beside the configuration that Ray has written for it."""
    prometheus = folder.parent.parent / "prometheus"
    return prometheus / "consoles" / CONSOLE if prometheus.is_dir() else None


def _next_steps(folder: Path) -> dict[str, str]:
    """Commands that start what shows the dashboard, where Ray has written their configuration."""
    console, grafana = _console(folder), folder.parent / "grafana.ini"
    if console is None or not grafana.is_file():
        return {"Grafana": "shows it once its provisioning looks into this folder"}
    own = console.parent.parent
    options = {
        "config.file": own / "prometheus.yml",
        "storage.tsdb.path": own / "data",
        "web.console.templates": console.parent,
    }
    return {
        "Prometheus": " ".join(["prometheus", *(f"--{k}={v}" for k, v in options.items())]),
        "panels": f"http://localhost:9090/consoles/{CONSOLE}",
        "Grafana": f"grafana server --homepath=/usr/share/grafana --config={grafana}",
    }
