"""`litecache timeline`: what a group's actors were doing, as a file for a trace viewer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from litecache.actors.naming import check_group_name
from litecache.checks import check_path
from litecache.cli.options import Address, AsJson, GroupName, check_address, connect, print_json
from litecache.errors import ConfigError, LiteCacheError


def timeline(
    file: Annotated[str, typer.Argument(help="JSON file to write")],
    group: GroupName = "default",
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Write loads, prefills, saves, reads and writes of a group, with Ray's own timeline.

    Open the file in chrome://tracing or https://ui.perfetto.dev. Ray must have been started with
    RAY_PROFILING=1 in its environment.

    Example: litecache timeline trace.json
    """
    target = Path(check_path("file", file)).expanduser().absolute()
    if not target.parent.is_dir():
        raise ConfigError("file", file, "a path in a folder that exists")
    check_group_name(group)
    check_address(address)
    connect(address)
    from litecache.actors.timeline import trace_events

    events = trace_events(group)
    try:
        target.write_text(json.dumps(events))
    except OSError as error:
        raise LiteCacheError(f"{target} cannot be written: {error.strerror}") from error
    own = sum(event.get("cat") == "litecache" for event in events)
    if as_json:
        print_json({"file": str(target), "events": len(events), "litecache": own})
        return
    typer.echo(f"{target}: {len(events):,} events, {own:,} of them LiteCache's")
