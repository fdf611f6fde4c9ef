"""`litecache top`: a group's rates, drawn anew every few seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from litecache.actors.naming import CALL_TIMEOUT_S, check_group_name
from litecache.checks import check_real
from litecache.cli.options import Address, GroupName, connect, ended_by_sigterm
from litecache.errors import GroupUnavailableError, LiteCacheError

if TYPE_CHECKING:
    from litecache.adapter.inspection.rates import GroupRates

_SHORTEST_S, _LONGEST_S = 0.1, 3600.0
# The first look has nothing to compare with: nobody looks at that for long.
_FIRST_GAP_S = 1.0
_PLAIN_WIDTH = 120


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
    check_group_name(group)
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
    from litecache.adapter.inspection.rates import GroupRates, RateMeter

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
