"""Commands about this machine: `tune`, `doctor` and `models`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from litecache.checks import check_path
from litecache.cli.options import Address, AsJson, check_address, connect, print_json
from litecache.config import parse_size
from litecache.errors import ConfigError


def tune(
    file: Annotated[Path, typer.Argument(help="JSON file to write; LITECACHE_TUNING uses it")],
    as_json: AsJson = False,
) -> None:
    """Measure the decode kernel's launch configurations on this machine's GPU."""
    check_path("file", file)
    if not file.absolute().parent.is_dir():
        raise ConfigError("file", str(file), "a path in a folder that exists")
    from litecache.kernels.tune import tune_to_file

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
    """Check this machine; exit with 1 when something will not work."""
    if storage_dir is not None:
        check_path("--storage-dir", storage_dir)
    check_address(address)
    from litecache.adapter.doctor import cluster_findings, examine

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
    as_json: AsJson = False,
) -> None:
    """Show the models that were written to $LITECACHE_HOME/models, or remove the unused ones."""
    import dataclasses
    from datetime import datetime

    from litecache.paths import list_models, prune_models

    most_bytes = 0 if keep == "0" else parse_size(keep, "--keep")
    if most_bytes and not prune:
        raise ConfigError("--keep", keep, "given with --prune")
    removed = prune_models(most_bytes) if prune else []
    left = list_models()
    if as_json:
        found = {"models": left, "removed": removed}
        print_json({k: [dataclasses.asdict(m) for m in v] for k, v in found.items()})
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
