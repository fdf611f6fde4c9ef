"""`litecache status`: a group's actors and counters at one moment, whoever of them answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from litecache.actors.naming import CALL_TIMEOUT_S, check_group_name
from litecache.checks import check_seconds
from litecache.cli.options import Address, AsJson, GroupName, connect, print_json, size_text


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
    check_group_name(group)
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
        now = now_of(figures) if view.stats is not None else view.error
        cells = short_name(name), str(figures.get("pid", "")), Text(view.state, good), Text(now)
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


def short_name(name: str) -> str:
    """An actor's name where its group is told already."""
    return name.split(":", 2)[-1]


def now_of(actor: Mapping[str, Any]) -> str:
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
