"""The command line: `litecache up`, `down`, `status`, `generate`, `inspect`, `verify`, `tune`,
`doctor`.

Every command takes `--json` for machines; errors go to stderr and exit with 1 (`verify`: with 2,
because 1 means that something is damaged). Commands import what they need when they run, so that
`--help` is there at once.
"""

from __future__ import annotations

import typer

from litecache.cli.folders import inspect, verify
from litecache.cli.groups import down, generate, status, up
from litecache.cli.machine import doctor, tune
from litecache.errors import LiteCacheError

app = typer.Typer(
    help="A paged, tiered and persistent KV cache for Hugging Face models on Ray.",
    no_args_is_help=True,
    add_completion=False,
)
for command in (up, down, status, generate, inspect, verify, tune, doctor):
    app.command()(command)


def main() -> None:
    """Entry point: errors that a user can act on are one line."""
    try:
        app()
    except LiteCacheError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from error
