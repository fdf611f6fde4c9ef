"""What `litecache top` draws: one screen of a group's rates, as a rich renderable."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from litecache.actors.naming import role_of
from litecache.adapter.stats import GroupRates, ReplicaRates, ShardRates
from litecache.cli.options import seconds_text, size_text

STATE_STYLES = {"up": "green", "busy": "yellow", "loading": "yellow", "restarting": "red"}
# A block's states, in the order of the bar; what is in use is what nobody else can have.
BLOCK_STYLES = {
    "private": "magenta",
    "published": "blue",
    "loading": "cyan",
    "idle": "green",
    "free": "bright_black",
}
TIER_STYLES = {"gpu": "green", "ram": "cyan", "disk": "blue", "remote": "magenta"}
WIDE = 112
_FULL, _EMPTY = "█", "░"


class Screen:
    """All of it; parts that have nothing to show are left out, columns that find no room too.

    Args:
        group, model: names; the model's None = not known.
        rates: since the last look.
        interval_s: between looks, as asked for.
        message: shown at the top, of what is wrong with the group as a whole.
    """

    def __init__(
        self,
        group: str,
        model: str | None,
        rates: GroupRates,
        interval_s: float,
        message: str = "",
    ) -> None:
        self._group, self._model, self._rates = group, model, rates
        self._interval_s, self._message = interval_s, message

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rates, wide = self._rates, options.max_width >= WIDE
        parts: list[RenderableType] = [_now(rates), _tiers(rates, wide)]
        if rates.replicas:
            parts.append(_replicas(rates.replicas, wide))
        if rates.shards:
            parts.append(_shards(rates.shards, wide))
        yield self._head()
        if self._message:
            yield Text(self._message, "bold red")
        for part in parts:
            yield Text()
            yield part
        yield Text()
        yield from _notes(rates)

    def _head(self) -> Text:
        rates = self._rates
        head = Text("litecache top", "bold", no_wrap=True, overflow="ellipsis")
        head.append(f"  group {self._group}", "bold cyan")
        if self._model:
            head.append(f"  {self._model}", "cyan")
        when = f"  {datetime.now():%H:%M:%S}, every {self._interval_s:g} s"
        head.append(f"{when}  coordinator ", "bright_black")
        head.append(rates.coordinator, STATE_STYLES.get(rates.coordinator, "red"))
        head.append(f", {rates.keys:,} keys", "bright_black")
        return head


def _now(rates: GroupRates) -> Table:
    table = _table()
    shown = {
        "prefill": f"{rates.prefill_tokens_s:,.0f} tok/s",
        "decode": f"{rates.decode_tokens_s:,.0f} tok/s",
        "first token": seconds_text(rates.ttft_s),
        "between": seconds_text(rates.inter_token_s),
        "requests": f"{rates.requests_s:,.1f}/s",
        "running": f"{rates.running:,}",
        "waiting": f"{rates.waiting:,}",
        "hits": _share(rates.hit_share),
        "ever": _share(rates.hit_share_ever),
    }
    if rates.failed_s:
        shown["failed"] = f"{rates.failed_s:,.1f}/s"
    for name in shown:
        table.add_column(name, justify="right", style="bold")
    table.add_row(*shown.values())
    return table


def _tiers(rates: GroupRates, wide: bool) -> Table:
    table = _table()
    table.add_column("tier")
    table.add_column("hits")
    for name in ("", "reused ever", "in", "out", *(("evicted",) if wide else ())):
        table.add_column(name, justify="right")
    table.add_column("filled")
    if wide:
        table.add_column("", justify="right")
    width = 16 if wide else 8
    for tier in rates.tiers:
        style = TIER_STYLES[tier.name]
        filled = tier.used_bytes / tier.total_bytes if tier.total_bytes else 0.0
        there = bool(tier.total_bytes)
        cells: list[RenderableType] = [
            Text(tier.name, style),
            bar([(tier.hit_share, style)], width),
            f"{tier.hit_share:.0%}",
            f"{tier.reused_tokens:,}",
            _rate(tier.in_bytes_s),
            _rate(tier.out_bytes_s),
        ]
        if wide:
            cells.append(f"{tier.evictions_s:,.0f}/s" if tier.evictions_s else "")
        cells.append(bar([(filled, style)], 12 if wide else 8) if there else "")
        if wide and there:
            cells.append(f"{size_text(tier.used_bytes)} of {size_text(tier.total_bytes)}")
        table.add_row(*cells)
    computed = 0.0 if rates.hit_share is None else 1 - rates.hit_share
    share = "" if rates.hit_share is None else f"{computed:.0%}"
    table.add_row(Text("computed", "yellow"), bar([(computed, "yellow")], width), share)
    return table


def _replicas(replicas: Sequence[ReplicaRates], wide: bool) -> Table:
    table = _table()
    table.add_column("replica")
    table.add_column("state")
    for name in ("running", "waiting", "queued", "prefill", "decode"):
        table.add_column(name, justify="right")
    table.add_column(_legend() if wide else "blocks")
    for replica in replicas:
        there = bool(replica.blocks)
        figures = (
            f"{replica.running:,}",
            f"{replica.waiting:,}",
            f"{replica.queued_tokens:,} tok",
            f"{replica.prefill_tokens_s:,.0f}/s",
            f"{replica.decode_tokens_s:,.0f}/s",
        )
        total = sum(replica.blocks.values()) or 1
        states = [*BLOCK_STYLES, *(state for state in replica.blocks if state not in BLOCK_STYLES)]
        shares = [
            (replica.blocks.get(state, 0) / total, BLOCK_STYLES.get(state, "white"))
            for state in states
        ]
        table.add_row(
            role_of(replica.name),
            _state(replica.state),
            *(figures if there else ("",) * len(figures)),
            bar(shares, 46 if wide else 12) if there else "",
        )
    return table


def _shards(shards: Sequence[ShardRates], wide: bool) -> Table:
    table = _table()
    table.add_column("shard")
    table.add_column("state")
    more = ("blocks",) if wide else ()
    rates = ("",) if wide else ()
    for name in (*more, "queued", "answers", "read", *rates, "write", *rates):
        table.add_column(name, justify="right")
    table.add_column("RAM")
    table.add_column("disk")
    for shard in shards:
        ram = shard.ram_bytes_used / shard.ram_bytes if shard.ram_bytes else 0.0
        disk = shard.disk_bytes_used / shard.storage_bytes if shard.storage_bytes else 0.0
        figures: list[RenderableType] = [
            *((f"{shard.blocks:,}",) if wide else ()),
            f"{shard.queued_reads:,}",
            seconds_text(shard.answer_s),
            seconds_text(shard.read_s),
            *((_rate(shard.read_bytes_s),) if wide else ()),
            seconds_text(shard.write_s),
            *((_rate(shard.write_bytes_s),) if wide else ()),
            bar([(ram, "cyan")], 8),
            bar([(disk, "blue")], 8) if shard.storage_bytes else "",
        ]
        cells = figures if shard.ram_bytes else [""] * len(figures)
        table.add_row(role_of(shard.name), _state(shard.state), *cells)
    return table


def _notes(rates: GroupRates) -> list[RenderableType]:
    notes = [
        Text(f"{role_of(name)}: {reason}", "red" if reason else "", overflow="ellipsis")
        for name, reason in rates.without_figures.items()
    ]
    notes += [
        Text(f"{role_of(shard.name)}: {shard.error}", "red", overflow="ellipsis")
        for shard in rates.shards
        if shard.error and shard.name not in rates.without_figures
    ]
    if rates.drops_s:
        drops = ", ".join(f"{rate:,.1f}/s {reason}" for reason, rate in rates.drops_s.items())
        notes.append(Text(f"blocks not saved: {drops}", "yellow"))
    for note in notes:
        note.no_wrap = True
    return [*notes]


def bar(shares: Sequence[tuple[float, str]], width: int) -> Text:
    """Shares of a whole as colours one after the other; what is left of it stays empty."""
    text = Text(no_wrap=True)
    drawn, total = 0, 0.0
    for share, style in shares:
        total = min(1.0, total + max(0.0, share))
        # something is never shown as nothing
        end = max(round(total * width), drawn + int(share > 0 and drawn < width))
        text.append(_FULL * (end - drawn), style)
        drawn = end
    text.append(_EMPTY * (width - drawn), "bright_black")
    return text


def _legend() -> Text:
    text = Text()
    for state, style in BLOCK_STYLES.items():
        text.append(f"{_FULL}{state} ", style)
    return text


class _Table(Table):
    """Every column on one line, whatever the width."""

    def add_column(self, *args: Any, **options: Any) -> None:
        super().add_column(*args, **{"no_wrap": True, **options})


def _table() -> Table:
    return _Table(box=None, pad_edge=False, padding=(0, 1), header_style="bright_black")


def _state(state: str) -> Text:
    return Text(state, STATE_STYLES.get(state, "red"))


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _rate(bytes_s: float) -> str:
    return f"{size_text(bytes_s)}/s" if bytes_s else ""
