"""`litecache timeline`: what a group's actors were doing, as a file for a trace viewer.

Ray keeps events of threads that run a task; an engine's threads, and those that load and save, run
none. So actors keep their own (`spans.py`), where Ray was started with `RAY_PROFILING=1`, as for
Ray's.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from litecache.actors.naming import CALL_TIMEOUT_S, check_group_name, role_of
from litecache.checks import check_path
from litecache.cli.options import Address, AsJson, GroupName, check_address, connect, print_json
from litecache.errors import ConfigError, GroupError, GroupUnavailableError, LiteCacheError


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
    events = _trace_events(group)
    try:
        target.write_text(json.dumps(events))
    except OSError as error:
        raise LiteCacheError(f"{target} cannot be written: {error.strerror}") from error
    own = sum(event.get("cat") == "litecache" for event in events)
    if as_json:
        print_json({"file": str(target), "events": len(events), "litecache": own})
        return
    typer.echo(f"{target}: {len(events):,} events, {own:,} of them LiteCache's")


def _trace_events(group: str) -> list[dict[str, Any]]:
    """Ray's events of the cluster and the group's own; open them in chrome://tracing or Perfetto.

    An actor that does not answer is left out.

    Raises:
        GroupUnavailableError: there is no such group.
        GroupError: nothing is recorded.
    """
    import ray

    from litecache.actors.calls import actor_names, find_actor, gather

    actors = {}
    for name in actor_names(group):
        with contextlib.suppress(GroupUnavailableError):
            actors[name] = find_actor(name)
    if not actors:
        raise GroupUnavailableError(f"there is no group {group!r}")
    able = {name: actor for name, actor in actors.items() if not name.endswith(":coordinator")}
    answers = gather(able, lambda actor: actor.timeline.remote(), CALL_TIMEOUT_S, "timeline")
    told = {n: spans for n, spans in answers.items() if not isinstance(spans, LiteCacheError)}
    if all(spans is None for spans in told.values()):
        raise GroupError(
            f"group {group!r} records no timeline: export RAY_PROFILING=1 before `ray start`"
        )
    events: list[dict[str, Any]] = list(ray.timeline() or [])
    for name, spans in told.items():
        events += [
            {
                "cat": "litecache",
                "name": span.name,
                "ph": "X",
                "pid": f"litecache {group}",
                "tid": f"{role_of(name)} {span.thread}",
                "ts": span.begun_s * 1e6,
                "dur": span.seconds * 1e6,
                "args": span.figures,
            }
            for span in spans or ()
        ]
    return events
