"""Commands about storage folders: `inspect` and `verify`. Both need no Ray and write nothing."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from litecache.checks import check_path
from litecache.cli.options import AsJson, print_json

Folder = Annotated[str, typer.Argument(help="a storage_dir, or one shard's folder in it")]


def inspect(directory: Folder, as_json: AsJson = False) -> None:
    """Show what a storage folder holds; works beside a running group.

    Exit status: 0, or 2 when there is no storage folder or its files cannot be read.
    """
    check_path("dir", directory)
    from litecache.storage import inspect_store

    with _progress() as progress:
        task = progress.add_task("reading shards", total=None)
        reports = inspect_store(
            directory, lambda done, total: progress.update(task, completed=done, total=total)
        )
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

    Exit status: 0 when all is sound, 1 when a block or a record is not, 2 when it could not be
    checked (no storage folder, in use by a live store, or of another format).
    """
    check_path("dir", directory)
    from litecache.storage import verify_store

    with _progress() as progress:
        task = progress.add_task("reading blocks", total=None)
        reports = verify_store(
            directory, lambda done, total: progress.update(task, completed=done, total=total)
        )
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


def _progress() -> Any:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
