"""Commands about this machine and its folders: `inspect`, `verify`, `tune`, `doctor`, `models`,
`bench`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from litecache.checks import check_integer, check_path, check_real
from litecache.cli.options import (
    Address,
    AsJson,
    Model,
    Settings,
    TrustRemoteCode,
    check_model,
    connect,
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

T = TypeVar("T")
_LONGEST_S = 86_400.0
_MOST_TOKENS = 1 << 24
Folder = Annotated[str, typer.Argument(help="a storage_dir, or one shard's folder in it")]


def inspect(directory: Folder, as_json: AsJson = False) -> None:
    """Show what a storage folder holds; works beside a running group.

    Example: litecache inspect /data/litecache

    Exit status: 0, or 2 when there is no storage folder or its files cannot be read.
    """
    check_path("dir", directory)
    from litecache.storage import inspect_store

    reports = _read("shards", inspect_store, directory)
    if as_json:
        print_json([report.to_dict() for report in reports])
        return
    for report in reports:
        typer.echo(
            f"{report.path}: {report.blocks:,} blocks, {size_text(report.bytes)} "
            f"({size_text(report.disk_bytes)} on disk), {report.hits:,} hits, "
            f"{report.pinned:,} pinned, {report.damaged_records} damaged records"
        )
        sizes = [f"{count:,} of {size:,} bytes" for size, count in report.block_sizes.items()]
        ages = [f"{count:,} under {age}" for age, count in report.ages.items() if count]
        if report.blocks:
            typer.echo(f"  blocks: {', '.join(sizes)}")
            typer.echo(f"  age: {', '.join(ages).replace('under older', 'older')}")
        for name in report.namespaces:
            typer.echo(
                f"  {name.name}: {name.blocks:,} blocks, {size_text(name.bytes)}, "
                f"{name.hits:,} hits, oldest written {name.age_s:,} s ago, "
                f"last used {name.idle_s:,} s ago"
            )


def verify(directory: Folder, as_json: AsJson = False) -> None:
    """Read every block of a storage folder and check it.

    Example: litecache verify /data/litecache

    Exit status: 0 when all is sound, 1 when a block or a record is not, 2 when it could not be
    checked (no storage folder, in use by a live store, or of another format).
    """
    check_path("dir", directory)
    from litecache.storage import verify_store

    reports = _read("blocks", verify_store, directory)
    if as_json:
        print_json([report.to_dict() for report in reports])
    else:
        for report in reports:
            outcome = "sound" if report.ok else f"{len(report.bad)} bad"
            typer.echo(
                f"{report.path}: {report.checked:,} blocks, {size_text(report.bytes)}: {outcome}, "
                f"{report.damaged_records} damaged records"
            )
            for key, reason in report.bad:
                typer.echo(f"  {key}: {reason}")
    if not all(report.ok for report in reports):
        raise typer.Exit(1)


def _read(what: str, read: Callable[[str, Callable[[int, int], None]], T], directory: str) -> T:
    """Call `read` behind a bar on stderr, where that is a terminal."""
    with progress_bar() as progress:
        progress(f"reading {what}", 0, None)
        return read(directory, lambda done, total: progress(f"reading {what}", done, total))


def tune(
    file: Annotated[Path, typer.Argument(help="JSON file to write; LITECACHE_TUNING uses it")],
    as_json: AsJson = False,
) -> None:
    """Measure the decode kernel's launch configurations on this machine's GPU.

    Example: litecache tune ~/tuning.json
    """
    check_path("file", file)
    if not file.absolute().parent.is_dir():
        raise ConfigError("file", str(file), "a path in a folder that exists")
    from litecache.kernels.tuning import tune_to_file

    document = tune_to_file(file, None if as_json else typer.echo)
    if as_json:
        print_json(document)
        return
    typer.echo(f"{document['gpu']}: written; export LITECACHE_TUNING={file.absolute()}")


def doctor(
    storage_dir: Annotated[str | None, typer.Option(help="a folder for the disk tier")] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine; exit with 1 when something will not work.

    Example: litecache doctor --storage-dir /data/litecache
    """
    if storage_dir is not None:
        check_path("--storage-dir", storage_dir)
    from litecache.adapter.inspection.doctor import cluster_findings, examine

    findings = examine(storage_dir)
    if address is not None:
        connect(address)
        findings += cluster_findings()
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            typer.echo(f"{finding.status:5} {finding.name:{width}}  {finding.detail}")
    if any(finding.status == "bad" for finding in findings):
        raise typer.Exit(1)


def models(
    prune: Annotated[bool, typer.Option("--prune", help="remove those that nobody uses")] = False,
    keep: Annotated[str, typer.Option(help="with --prune: bytes that may stay, as 20GB")] = "0",
    families: Annotated[
        bool, typer.Option("--families", help="show which model families run, and how")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the models that were written to $LITECACHE_HOME/models, or remove the unused ones.

    With --families: which decoder families of transformers run, as tried with small models of them.

    Example: litecache models --prune --keep 20GB
    """
    from datetime import datetime

    from litecache.paths import list_models, prune_models

    if families:
        if prune:
            raise ConfigError("--families", True, "given without --prune")
        _show_families(as_json)
        return
    most_bytes = 0 if keep == "0" else parse_size(keep, "--keep")
    if most_bytes and not prune:
        raise ConfigError("--keep", keep, "given with --prune")
    removed = prune_models(most_bytes) if prune else []
    left = list_models()
    if as_json:
        found = {"models": left, "removed": removed}
        print_json({k: [m._asdict() for m in v] for k, v in found.items()})
        return
    for model in left:
        used = datetime.fromtimestamp(model.used_s).isoformat(" ", "minutes")
        state = "in use" if model.in_use else f"last used {used}"
        typer.echo(f"{model.name}: {model.bytes / 1e6:,.1f} MB, {state} ({model.path})")
    if prune:
        size = sum(model.bytes for model in removed) / 1e6
        typer.echo(f"removed {len(removed)} of {len(removed) + len(left)} models, {size:,.1f} MB")
    elif not left:
        typer.echo("no models")


def _show_families(as_json: bool) -> None:
    from litecache.engine.loading.families import notes, read_trials

    trials = read_trials()
    if as_json:
        made = [row._asdict() for row in trials.rows]
        print_json({"transformers": trials.transformers, "trials": made})
        return
    by_family = list(trials.by_family())
    width = max(len(family) for family, _ in by_family)
    for family, rows in by_family:
        typer.echo(f"{family:{width}}  {rows[0].verdict:8}  {notes(rows)}".rstrip())


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
    _print_worth(parent, worth)


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


def _print_worth(folder: str, worth: TierWorth) -> None:
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
