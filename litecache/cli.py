"""The command line: `litecache up`, `down`, `status`, `generate`, `inspect`, `verify`, `tune`,
`doctor`.

A group started by `up` is detached: it outlives the command, until `down`. Neither ever starts or
stops Ray. Every command takes `--json` for machines; errors go to stderr and exit with 1
(`verify`: with 2, because 1 means that something is damaged).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from litecache.errors import ConfigError, GroupUnavailableError, LiteCacheError

app = typer.Typer(
    help="A paged, tiered and persistent KV cache for Hugging Face models on Ray.",
    no_args_is_help=True,
    add_completion=False,
)

Model = Annotated[str, typer.Argument(help="a hub name, a folder or a .gguf file")]
GroupName = Annotated[str, typer.Option(help="name of the group of actors")]
Address = Annotated[str | None, typer.Option(help="Ray's address; default RAY_ADDRESS or auto")]
Folder = Annotated[str, typer.Argument(help="a storage_dir, or one shard's folder in it")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="a field of CacheConfig, as in --set ram_bytes=4GB; repeatable"),
]


@app.command()
def up(
    model: Model,
    group: GroupName = "default",
    settings: Settings = None,
    replicas: Annotated[int, typer.Option(help="number of GpuCache actors")] = 1,
    num_threads: Annotated[int | None, typer.Option(help="torch's threads on a CPU")] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Start a group of actors that stays, or check that it runs with these settings."""
    from litecache.adapter import KVCacheAdapter

    config = parse_settings(settings or [])
    _connect(address)
    adapter = KVCacheAdapter(
        model,
        cache_config=config,
        group=group,
        detached=True,
        replicas=replicas,
        num_threads=num_threads,
    )
    info, actors = adapter.info, sorted(adapter.group.status())
    adapter.close()
    if as_json:
        _print_json({"group": group, "model": info.model, "device": info.device, "actors": actors})
        return
    typer.echo(
        f"group {group}: {info.model} on {info.device}, {info.num_blocks} blocks of "
        f"{info.block_size} tokens"
    )
    for name in actors:
        typer.echo(f"  {name}")


@app.command()
def down(
    group: GroupName = "default",
    everything: Annotated[bool, typer.Option("--all", help="all groups of the cluster")] = False,
    timeout: Annotated[float, typer.Option(help="seconds for saving what is not saved yet")] = 30.0,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Save what is cached and stop a group's actors; Ray goes on."""
    from litecache.actors.group import list_groups, stop_group

    _connect(address)
    reports = {
        name: stop_group(name, timeout) for name in (list_groups() if everything else [group])
    }
    if as_json:
        _print_json(reports)
        return
    for name, actors in reports.items():
        written = sum(report.get("written", 0) for report in actors.values())
        complete = all(report.get("complete", True) for report in actors.values())
        rest = "" if complete else "; not all could be saved"
        typer.echo(f"group {name}: stopped, {written} blocks written{rest}")
    if not reports:
        typer.echo("no group is running")


@app.command()
def status(group: GroupName = "default", address: Address = None, as_json: AsJson = False) -> None:
    """Show a group's actors and counters."""
    from litecache.actors.group import Group
    from litecache.adapter.stats import CacheStats

    _connect(address)
    actors = Group.attach(group, timeout_s=10).status()
    stats = CacheStats.from_status(actors)
    if as_json:
        _print_json({"group": group, "actors": actors, "stats": stats.to_dict()})
        return
    _print_status(group, actors, stats)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads it from stdin")],
    group: Annotated[str | None, typer.Option(help="join or name a group; default private")] = None,
    settings: Settings = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 64,
    temperature: Annotated[float | None, typer.Option(help="sample at this temperature")] = None,
    seed: Annotated[int | None, typer.Option(help="of sampling")] = None,
    chat: Annotated[bool, typer.Option(help="apply the tokenizer's chat template")] = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text, printing it as it comes."""
    from litecache.adapter import KVCacheAdapter

    config = parse_settings(settings or []) if settings else None
    if address is not None:
        _connect(address)
    text = sys.stdin.read() if prompt == "-" else prompt
    sampling: dict[str, Any] = (
        {} if temperature is None else {"do_sample": True, "temperature": temperature}
    )
    with KVCacheAdapter(model, cache_config=config, group=group) as adapter:
        given: Any = text
        if chat:
            message = [{"role": "user", "content": text}]
            given = adapter.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        stream = adapter.stream(given, max_new_tokens=max_new_tokens, seed=seed, **sampling)
        pieces = []
        for piece in stream:
            pieces.append(piece)
            if not as_json:
                typer.echo(piece, nl=False)
        if as_json:
            _print_json(
                {
                    "text": "".join(pieces),
                    "tokens": len(stream.token_ids),
                    "reused_tokens": stream.reused_tokens,
                    "ttft_s": stream.ttft_s,
                }
            )
        else:
            typer.echo()


@app.command()
def inspect(directory: Folder, as_json: AsJson = False) -> None:
    """Show what a storage folder holds; works beside a running group.

    Exit status: 0, or 1 when there is no storage folder or its files cannot be read.
    """
    from litecache.storage import inspect_store

    with _progress() as progress:
        task = progress.add_task("reading shards", total=None)
        reports = inspect_store(
            directory, lambda done, total: progress.update(task, completed=done, total=total)
        )
    if as_json:
        _print_json([report.to_dict() for report in reports])
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


@app.command()
def verify(directory: Folder, as_json: AsJson = False) -> None:
    """Read every block of a storage folder and check it.

    Exit status: 0 when all is sound, 1 when a block or a record is not, 2 when it could not be
    checked (no storage folder, in use by a live store, or of another format).
    """
    from litecache.storage import verify_store

    try:
        with _progress() as progress:
            task = progress.add_task("reading blocks", total=None)
            reports = verify_store(
                directory, lambda done, total: progress.update(task, completed=done, total=total)
            )
    except LiteCacheError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        _print_json([report.to_dict() for report in reports])
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


@app.command()
def tune(
    file: Annotated[Path, typer.Argument(help="JSON file to write; LITECACHE_TUNING uses it")],
    as_json: AsJson = False,
) -> None:
    """Measure the decode kernel's launch configurations on this machine's GPU."""
    from litecache.kernels.tune import tune_to_file

    if not file.absolute().parent.is_dir():
        raise ConfigError("file", str(file), "a path in a folder that exists")
    document = tune_to_file(file, None if as_json else typer.echo)
    if as_json:
        _print_json(document)
        return
    typer.echo(f"{document['gpu']}: written; export LITECACHE_TUNING={file.absolute()}")


@app.command()
def doctor(
    storage_dir: Annotated[str | None, typer.Option(help="a folder for the disk tier")] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine; exit with 1 when something will not work."""
    from litecache.adapter.doctor import cluster_findings, examine

    findings = examine(storage_dir)
    if address is not None:
        _connect(address)
        findings += cluster_findings()
    if as_json:
        _print_json([finding.to_dict() for finding in findings])
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            typer.echo(f"{finding.status:5} {finding.name:{width}}  {finding.detail}")
    if any(finding.status == "bad" for finding in findings):
        raise typer.Exit(1)


def parse_settings(settings: list[str]) -> Any:
    """`["block_size=32", "storage_dir=/data"]` as a `CacheConfig`.

    Raises:
        ConfigError: not NAME=VALUE, no such field, or an invalid value.
    """
    import dataclasses

    from litecache.config import CacheConfig

    fields = {field.name for field in dataclasses.fields(CacheConfig)}
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in fields:
            raise ConfigError(
                "--set", setting, f"NAME=VALUE with one of {', '.join(sorted(fields))}"
            )
        values[name] = _parse_value(text)
    return CacheConfig(**values)


def _parse_value(text: str) -> Any:
    """Numbers, true, false and null as in JSON; anything else is text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, (list, dict)) else value


def _connect(address: str | None) -> None:
    """Join the cluster that is running; a group must outlive this command.

    Raises:
        GroupUnavailableError: there is none.
    """
    import ray

    if ray.is_initialized():
        return
    try:
        ray.init(address or "auto", log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GroupUnavailableError(
            f"no Ray cluster to join ({first}): start one with `ray start --head`, and export the "
            "same RAY_AUTH_MODE and token for both"
        ) from error


def _progress() -> Any:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, default=str))


def _print_status(group: str, actors: dict[str, Any], stats: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"group {group}", title_justify="left")
    for column in ("actor", "pid", "state"):
        table.add_column(column)
    for name, actor in sorted(actors.items()):
        table.add_row(name, str(actor.get("pid", "")), _state(actor))
    console = Console()
    console.print(table)
    reused = ", ".join(f"{tier} {count:,}" for tier, count in sorted(stats.reused_tokens.items()))
    console.print(
        f"{stats.prompt_tokens:,} prompt tokens, {stats.hit_rate:.0%} reused ({reused or 'none'}), "
        f"{stats.generated_tokens:,} generated"
    )


def _state(actor: dict[str, Any]) -> str:
    if "error" in actor:
        return f"no answer: {actor['error']}"
    if "engine" in actor:
        engine = actor["engine"]
        blocks = ", ".join(f"{count} {state}" for state, count in engine["blocks"].items() if count)
        return f"{engine['running']} running, {engine['waiting']} waiting; blocks: {blocks}"
    if "store" in actor:
        store = actor["store"]
        return f"{store['blocks']:,} blocks, {store['disk_blocks']:,} on disk"
    return f"{actor.get('keys', 0):,} keys"


def main() -> None:
    """Entry point: errors that a user can act on are one line."""
    try:
        app()
    except LiteCacheError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
