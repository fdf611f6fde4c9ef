"""Commands that show what a group does: `status`, `top`, `timeline`.

None of them waits for an actor that does not answer: it is named, and the others are shown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from litecache.actors.naming import CALL_TIMEOUT_S, role_of
from litecache.checks import check_path, check_real, check_seconds
from litecache.cli.options import (
    Address,
    AsJson,
    GroupName,
    connect,
    ended_by_sigterm,
    print_json,
    size_text,
)
from litecache.errors import ConfigError, GroupError, GroupUnavailableError, LiteCacheError

if TYPE_CHECKING:
    from litecache.adapter.stats import GroupRates

_SHORTEST_S, _LONGEST_S = 0.1, 3600.0
# The first look has nothing to compare with: nobody looks at that for long.
_FIRST_GAP_S = 1.0
_PLAIN_WIDTH = 120


def status(
    group: GroupName = "default",
    timeout: Annotated[
        float, typer.Option(help="seconds to wait for actors that do not answer")
    ] = CALL_TIMEOUT_S,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Show a group's actors and counters, and which actors do not answer.

    Example: litecache status --group chat --timeout 5
    """
    timeout = check_seconds("--timeout", timeout)
    connect(address)
    from litecache.actors.operating.watch import GroupWatch, statuses
    from litecache.adapter.stats import CacheStats

    watch = GroupWatch(group)
    views = watch.look(timeout)
    model = watch.model(views)
    actors = statuses(views)
    stats = CacheStats.from_status(actors)
    if as_json:
        shown = {
            "group": group,
            "model": model,
            "actors": actors,
            "states": {name: view.state for name, view in views.items()},
            "stats": stats.to_dict(),
        }
        print_json(shown)
        return
    print_status(f"group {group}: {model}" if model else f"group {group}", views, stats)


def print_status(title: str, views: Mapping[str, Any], stats: Any) -> None:
    """The table of `ActorView`s by name, and what `CacheStats` adds up."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD)
    for column in ("actor", "pid", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("now", overflow="fold")
    for name, view in views.items():
        figures = view.stats or {}
        good = "green" if view.state == "up" else "yellow" if view.state == "busy" else "red"
        now = _now(figures) if view.stats is not None else view.error
        cells = role_of(name), str(figures.get("pid", "")), Text(view.state, good), Text(now)
        table.add_row(*cells)
    console = Console()
    console.print(table)
    reused = ", ".join(f"{tier} {count:,}" for tier, count in sorted(stats.reused_tokens.items()))
    lines = [
        f"{stats.prompt_tokens:,} prompt tokens, {stats.hit_rate:.0%} reused ({reused or 'none'}), "
        f"{stats.generated_tokens:,} generated"
    ]
    if stats.drops:
        drops = ", ".join(f"{count:,} {reason}" for reason, count in sorted(stats.drops.items()))
        lines.append(f"not saved, by reason: {drops}")
    if stats.unavailable:
        lines.append(f"without figures: {', '.join(stats.unavailable)}; none of theirs is above")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _now(actor: Mapping[str, Any]) -> str:
    """What an actor holds and does, of its figures."""
    if "engine" in actor:
        engine = actor["engine"]
        blocks = ", ".join(f"{count} {state}" for state, count in engine["blocks"].items() if count)
        now = f"{engine['running']} running, {engine['waiting']} waiting"
        form = engine["kv_dtype"] + (f", {codec} below" if (codec := engine["tier_codec"]) else "")
        return f"{now}; {form} blocks: {blocks}"
    if "store" in actor:
        store = actor["store"]
        now = f"{store['blocks']:,} blocks, {store['disk_blocks']:,} on disk"
        now += f"; RAM {size_text(store['ram_bytes_used'])} of {size_text(store['ram_bytes'])}"
        if store.get("storage_bytes"):
            used, most = store["disk_bytes_used"], store["storage_bytes"]
            now += f", disk {size_text(used)} of {size_text(most)}"
        lost = f"; the disk tier is out: {store['disk_lost']}" if store.get("disk_lost") else ""
        return now + lost
    return f"{actor.get('keys', 0):,} keys"


def top(
    group: GroupName = "default",
    interval: Annotated[float, typer.Option(help="seconds between two looks")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="show one interval and end")] = False,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="print a line of JSON a look")] = False,
) -> None:
    """Watch a group: hits by tier, tokens a second, times, fill and traffic, replicas and shards.

    Ctrl-C ends it. Where the output is no terminal, it prints one text after the other.

    Example: litecache top --group chat --interval 1
    """
    interval = check_real("--interval", interval, _SHORTEST_S, _LONGEST_S)
    connect(address)
    frames = _frames(group, interval)
    if once:
        next(frames)
        frames = iter([next(frames)])
    with contextlib.suppress(KeyboardInterrupt), ended_by_sigterm():
        if as_json:
            _print_lines(frames)
        elif sys.stdout.isatty() and not once:
            _draw(frames, group, interval)
        else:
            _print_texts(frames, group, interval)


class _Frame(NamedTuple):
    """One look: the rates, the model's name where it is known, and what is wrong with the group."""

    rates: GroupRates
    model: str | None
    message: str


def _frames(group: str, interval_s: float) -> Iterator[_Frame]:
    """A look every `interval_s`, for ever; a group that has gone is waited for.

    Raises:
        GroupUnavailableError: there is no such group, at the first look.
    """
    from litecache.actors.operating.watch import GroupWatch
    from litecache.adapter.stats import GroupRates, RateMeter

    watch, meter = GroupWatch(group), RateMeter()
    model: str | None = None
    due_s = time.monotonic() - interval_s + min(interval_s, _FIRST_GAP_S)
    first = True
    while True:
        timeout_s = min(CALL_TIMEOUT_S, max(0.5, interval_s))
        try:
            views = watch.look(timeout_s)
            model = model or watch.model(views)
            frame = _Frame(meter.take(views, time.monotonic()), model, "")
        except GroupUnavailableError as error:
            if first:
                raise
            model = None
            frame = _Frame(GroupRates(), model, str(error))
        except LiteCacheError as error:
            if first:
                raise
            frame = _Frame(GroupRates(), model, str(error))
        first = False
        yield frame
        due_s = max(due_s + interval_s, time.monotonic())
        time.sleep(max(0.0, due_s - time.monotonic()))


def _draw(frames: Iterator[_Frame], group: str, interval_s: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from litecache.cli.top_screen import Screen

    with Live(console=Console(), screen=True, auto_refresh=False) as live:
        for frame in frames:
            picture = Screen(group, frame.model, frame.rates, interval_s, frame.message)
            live.update(picture, refresh=True)


def _print_texts(frames: Iterator[_Frame], group: str, interval_s: float) -> None:
    from rich.console import Console

    from litecache.cli.top_screen import Screen

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(_PLAIN_WIDTH, console.width))
    with _reader_may_leave():
        for frame in frames:
            console.print(Screen(group, frame.model, frame.rates, interval_s, frame.message))
            sys.stdout.flush()


def _print_lines(frames: Iterator[_Frame]) -> None:
    with _reader_may_leave():
        for frame in frames:
            line: dict[str, Any] = {
                "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
                "model": frame.model,
                "error": frame.message or None,
                **dataclasses.asdict(frame.rates),
            }
            typer.echo(json.dumps(line))


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """`litecache top --json | head -1` ends without a word."""
    try:
        yield
    except BrokenPipeError:
        # Python would fail once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    """Ray's events of the cluster and the group's own, but for actors that do not answer.

    Ray keeps events of threads that run a task; an engine's threads, and those that load and save,
    run none. So actors keep their own (`spans.py`), where Ray was started with `RAY_PROFILING=1`,
    as for Ray's.

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
