"""Commands about this machine and its folders: `inspect`, `verify`, `tune`, `doctor`, `models`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from litecache.checks import check_path
from litecache.cli.options import Address, AsJson, connect, print_json, progress_bar
from litecache.config import parse_size
from litecache.errors import ConfigError

T = TypeVar("T")
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
            f"{report.path}: {report.blocks:,} blocks, {_size(report.bytes)} "
            f"({_size(report.disk_bytes)} on disk), {report.hits:,} hits, "
            f"{report.pinned:,} pinned, {report.damaged_records} damaged records"
        )
        sizes = [f"{count:,} of {size:,} bytes" for size, count in report.block_sizes.items()]
        ages = [f"{count:,} under {age}" for age, count in report.ages.items() if count]
        if report.blocks:
            typer.echo(f"  blocks: {', '.join(sizes)}")
            typer.echo(f"  age: {', '.join(ages).replace('under older', 'older')}")
        for name in report.namespaces:
            typer.echo(
                f"  {name.name}: {name.blocks:,} blocks, {_size(name.bytes)}, {name.hits:,} hits, "
                f"oldest written {name.age_s:,} s ago, last used {name.idle_s:,} s ago"
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
                f"{report.path}: {report.checked:,} blocks, {_size(report.bytes)}: {outcome}, "
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


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


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
