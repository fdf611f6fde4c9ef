"""The command line: `litecache up`, `scale`, `drain`, `down`, `status`, `top`, `explain`,
`generate`, `serve`, `export`, `import`, `warm`, `delete`, `bench`, `inspect`, `verify`, `tune`,
`doctor`, `models`, `dashboard`, `timeline`.

Every command takes `--json` for machines; errors are one line on stderr and exit with 2 (1 is a
finding of `verify` or `doctor`, 141 a closed pipe). Commands import what they need when they run,
so that `--help` is there at once.
"""

from __future__ import annotations

import io
import logging
import signal
import sys
from typing import Annotated, Any

import typer

import litecache
from litecache.cli.cluster import down, drain, scale, up
from litecache.cli.dashboard import app as dashboard
from litecache.cli.explain import explain as explain_prompt
from litecache.cli.machine import bench, doctor, inspect, models, tune, verify
from litecache.cli.prompts import delete, export, generate, import_, warm
from litecache.cli.serve import serve as serve_model
from litecache.cli.watch import status, timeline, top
from litecache.errors import LiteCacheError, told

logger = logging.getLogger(__name__)

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
# As the README groups them.
_panels: dict[str, dict[str, Any]] = {
    "Groups of actors": {"up": up, "down": down, "scale": scale, "drain": drain},
    "What a group does": {
        "status": status,
        "top": top,
        "explain": explain_prompt,
        "timeline": timeline,
    },
    "Texts": {"generate": generate, "serve": serve_model},
    "Prefixes": {"warm": warm, "export": export, "import": import_, "delete": delete},
    "This machine": {
        "doctor": doctor,
        "bench": bench,
        "tune": tune,
        "models": models,
        "inspect": inspect,
        "verify": verify,
    },
}
for panel, commands in _panels.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)
app.add_typer(dashboard, name="dashboard", rich_help_panel="What a group does")


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"litecache {litecache.__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Tell it and end."),
    ] = False,
) -> None:
    """A paged, tiered and persistent KV cache for Hugging Face models on Ray."""


def main() -> None:
    """Entry point: whatever goes wrong is one line on stderr, and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if len(sys.argv) < 2:
        app(["--help"], standalone_mode=False)
        raise SystemExit(2)
    try:
        status = app(standalone_mode=False)
    except SystemExit:  # of typer, and only where nobody reads what is printed
        status = 128 + signal.SIGPIPE
    except (KeyboardInterrupt, typer.Abort):
        status = _fail("interrupted", 130)
    except LiteCacheError as error:
        status = _fail(str(error))
    except Exception as error:
        # of typer, whose classes are those of click or its own: a command used wrongly
        usage: Any = getattr(error, "format_message", None)
        text = told(error) if usage is None else _usage(usage())
        logger.debug("%s", text, exc_info=usage is None)
        status = _fail(str(LiteCacheError(text)))
    raise SystemExit(status or 0)


def _usage(message: str) -> str:
    # words that are too many may be a prompt without quotes: they are not repeated
    message = message.partition(" (")[0] if "unexpected extra argument" in message else message
    return f"{message.rstrip('.')} (see litecache --help, and litecache COMMAND --help)"


def _fail(text: str, status: int = 2) -> int:
    typer.echo(f"error: {' '.join(text.split())}", err=True)
    return status
