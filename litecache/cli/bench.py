"""`litecache bench`: what RAM and disk are worth to one's own model, on one's own machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from litecache.checks import check_integer, check_path, check_real
from litecache.cli.options import (
    AsJson,
    Model,
    Settings,
    TrustRemoteCode,
    check_model,
    ended_by_sigterm,
    parse_settings,
    print_json,
    progress_bar,
    size_text,
)
from litecache.config import parse_size
from litecache.errors import ConfigError, StorageFullError

if TYPE_CHECKING:
    from litecache.engine.worth import TierWorth

_LONGEST_S = 86_400.0
_MOST_TOKENS = 1 << 24


def bench(
    model: Model,
    directory: Annotated[
        str | None,
        typer.Option(
            "--dir",
            help="on the disk to be measured; default storage_dir, or the temporary folder",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="to measure in, once the model is loaded")] = 120.0,
    disk_bytes: Annotated[str, typer.Option(help="taken of the disk at most, as 4GB")] = "2GB",
    lengths: Annotated[
        list[int] | None,
        typer.Option("--length", help="of a prefix, in tokens; repeatable; default doubling"),
    ] = None,
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure what RAM and disk are worth to a model here: first tokens, rates, break-even lengths.

    The model runs in this process, without Ray, over a folder of its own that is removed at the
    end. Longer prefixes are measured as long as the time and the disk allow.

    Example: litecache bench HuggingFaceTB/SmolLM2-135M-Instruct --dir /data --seconds 60
    """
    config = parse_settings(settings or [])
    check_model(model)
    seconds = check_real("--seconds", seconds, 1, _LONGEST_S)
    most_bytes = parse_size(disk_bytes, "--disk-bytes")
    for length in lengths or ():
        check_integer("--length", length, 1, _MOST_TOKENS, f"from 1 to {_MOST_TOKENS:,} tokens")
    parent = directory or (config.storage_dir or (tempfile.gettempdir(),))[0]
    check_path("--dir", parent)
    with ended_by_sigterm(), _scratch(parent, most_bytes) as folder, progress_bar() as progress:
        from litecache.adapter.gguf import without_bars
        from litecache.adapter.sources import resolve_model
        from litecache.engine.worth import measure_worth

        resolved = resolve_model(model, trust_remote_code=trust_remote_code)
        with without_bars():
            worth = measure_worth(
                resolved.source,
                config,
                folder,
                disk_bytes=most_bytes,
                seconds=seconds,
                lengths=lengths or (),
                progress=progress,
            )
    if as_json:
        print_json({"dir": parent, **worth.to_dict()})
        return
    _print(parent, worth)


@contextmanager
def _scratch(parent: str, nbytes: int) -> Iterator[str]:
    """An own folder on a disk that has so much room, removed afterwards."""
    try:
        free = shutil.disk_usage(parent).free
        if free < nbytes:
            raise StorageFullError(
                f"{parent} has {size_text(free)} free, less than --disk-bytes {size_text(nbytes)}"
            )
        folder = tempfile.mkdtemp(prefix="litecache-bench-", dir=parent)
    except OSError as error:
        valid = f"a folder that may be written to ({error.strerror})"
        raise ConfigError("--dir", parent, valid) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _print(folder: str, worth: TierWorth) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{worth.model} on {worth.device}, loaded in {worth.load_s:.1f} s; {worth.form} blocks of "
        f"{worth.block_size} tokens, {size_text(worth.token_bytes)} a token"
    )
    disk = "O_DIRECT is refused there"
    if worth.disk_read_gbps is not None:
        disk = f"reads {worth.disk_read_gbps:.2f} GB/s, writes {worth.disk_write_gbps:.2f} GB/s"
    console.print(f"disk in {folder}: {disk}; RAM to {worth.device}: {worth.copy_gbps:.1f} GB/s")
    title = "first token in ms, and times sooner than computed; share of it that was loaded"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", padding=(0, 1, 0, 0))
    columns = ("prefix", "computed", "tokens", "pool", "RAM", "loaded", "disk", "loaded")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in worth.times:
        table.add_row(
            f"{row.tokens:,}",
            _figure(row.cold_ms),
            f"{row.tokens / row.cold_ms * 1e3:,.0f}/s",
            _against(row.pool_ms, row.cold_ms),
            _against(row.ram_ms, row.cold_ms),
            f"{row.ram_loaded / row.tokens:.0%}",
            _against(row.disk_ms, row.cold_ms),
            f"{row.disk_loaded / row.tokens:.0%}",
        )
    console.print(table)
    for tier, where in (("ram", "RAM"), ("disk", "disk")):
        console.print(_verdict(where, worth.break_even[tier], worth))
    if worth.stopped:
        console.print(f"No longer prefix was measured: {worth.stopped}.")


def _against(ms: float, cold_ms: float) -> str:
    """A time, and how many times sooner that is than computing."""
    return f"{_figure(ms)} ({_figure(cold_ms / ms, 10)}x)"


def _figure(value: float, whole: float = 100) -> str:
    return f"{value:,.0f}" if value >= whole else f"{value:.1f}"


def _verdict(where: str, tokens: int | None, worth: TierWorth) -> str:
    longest = f"{worth.times[-1].tokens:,}"
    if where == "disk" and worth.disk_read_gbps is None:
        return "From disk: the bare disk could not be measured; the table tells."
    if tokens is None:
        return f"From {where}, computing is sooner than loading for all prefixes up to {longest}."
    return f"From {where}, loading a whole prefix is sooner than computing it from {tokens:,} on."
