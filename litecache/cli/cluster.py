"""Commands about groups of actors: `up`, `down`, `scale`, `drain`.

A group started by `up` is detached: it outlives the command, until `down`. None of them ever starts
or stops Ray.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from litecache.actors.naming import DEFAULT_GROUP, DRAIN_TIMEOUT_S
from litecache.checks import check_seconds, check_threads
from litecache.cli.options import (
    Address,
    AsJson,
    GroupName,
    Settings,
    TrustRemoteCode,
    check_model,
    connect,
    group_option,
    parse_settings,
    print_json,
    split_settings,
)
from litecache.errors import ConfigError


def up(
    model: Annotated[
        str | None, typer.Argument(help="a hub name, a folder or a .gguf file; default the file's")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="a YAML file: model, cache, replicas, nodes")
    ] = None,
    group: Annotated[str | None, group_option("name of the group of actors")] = None,
    settings: Settings = None,
    replicas: Annotated[
        str | None, typer.Option(help='GpuCache actors; "all": one per GPU, or per node without')
    ] = None,
    num_threads: Annotated[int | None, typer.Option(help="torch's threads on a CPU")] = None,
    placement: Annotated[
        str | None, typer.Option(help="SPREAD, PACK, STRICT_SPREAD or STRICT_PACK")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="print all settings as YAML, and start nothing")
    ] = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Start groups of actors that stay, or check that they run with these settings.

    Options go before what the file says. Example: litecache up --config cluster.yaml --replicas all
    """
    overrides: dict[str, Any] = {"cache": split_settings(settings or [])}
    if model is not None:
        overrides["model"] = check_model(model)
    if group is not None:
        overrides["group"] = group
    if replicas is not None:
        overrides["replicas"] = _replicas("--replicas", replicas)
    if num_threads is not None:
        overrides["num_threads"] = check_threads("--num-threads", num_threads)
    if placement is not None:
        overrides["placement"] = placement.upper()
    if trust_remote_code:
        overrides["trust_remote_code"] = True
    if config is None:
        parse_settings(settings or [])  # what is wrong is told before Ray is loaded
    from litecache.actors.operating.cluster_file import (
        dump_cluster_file,
        one_group,
        read_cluster_file,
    )

    if config is None and model is None:
        raise ConfigError("model", None, "given, or --config FILE that names one")
    setups = [one_group(overrides)] if config is None else read_cluster_file(config, overrides)
    for setup in setups:
        check_model(setup.model)
    if print_config:
        typer.echo(dump_cluster_file(setups), nl=False)
        return
    connect(address)
    reports = _start(setups)
    if as_json:
        print_json(reports[0] if len(reports) == 1 else reports)
        return
    for report in reports:
        typer.echo(
            f"group {report['group']}: {report['model']} on {report['device']}, "
            f"{report['num_blocks']} blocks of {report['block_size']} tokens"
        )
        for name in report["actors"]:
            typer.echo(f"  {name}")


def _start(setups: list[Any]) -> list[dict[str, Any]]:
    """Start the groups, or none of those that do not run yet."""
    from litecache.actors.found_groups import exists, stop_group
    from litecache.adapter import KVCacheAdapter

    reports, started = [], list[str]()
    try:
        for setup in setups:
            is_new = not exists(setup.group)
            adapter = KVCacheAdapter(**setup.arguments(), detached=True)
            if is_new:
                started.append(setup.group)
            info, actors = adapter.info, sorted(adapter.group.status())
            adapter.close()
            told = {"group": setup.group, "model": info.model, "device": info.device}
            sizes = {"num_blocks": info.num_blocks, "block_size": info.block_size}
            reports.append({**told, **sizes, "actors": actors})
    except BaseException:
        for name in started:
            stop_group(name)
        raise
    return reports


def down(
    group: GroupName = "default",
    everything: Annotated[bool, typer.Option("--all", help="all groups of the cluster")] = False,
    timeout: Annotated[float, typer.Option(help="seconds for saving what is not saved yet")] = 30.0,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Save what is cached and stop a group's actors; Ray goes on.

    Example: litecache down --group chat --timeout 60
    """
    timeout = check_seconds("--timeout", timeout)
    connect(address)
    from litecache.actors.found_groups import list_groups, stop_group

    reports = {
        name: stop_group(name, timeout) for name in (list_groups() if everything else [group])
    }
    if as_json:
        print_json(reports)
        return
    for name, actors in reports.items():
        written = sum(report.get("written", 0) for report in actors.values())
        complete = all(report.get("complete", True) for report in actors.values())
        rest = "" if complete else "; not all could be saved"
        typer.echo(f"group {name}: stopped, {written} blocks written{rest}")
    if not reports:
        typer.echo("no group is running")


def scale(
    replicas: Annotated[str, typer.Argument(help='how many, or "all": one per GPU, or per node')],
    group: GroupName = DEFAULT_GROUP,
    timeout: Annotated[
        float, typer.Option(help="seconds that requests of replicas that go may take to end")
    ] = DRAIN_TIMEOUT_S,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Give a running group more or fewer replicas; those that go are drained first.

    Example: litecache scale 4 --group chat
    """
    wanted = _replicas("replicas", replicas)
    timeout = check_seconds("--timeout", timeout)
    connect(address)
    from litecache.actors.group import Group
    from litecache.actors.operating.scaling import scale_group

    joined = Group.attach(group, timeout_s=10)
    report = scale_group(joined, wanted, timeout_s=timeout, tell=_telling(as_json))
    if as_json:
        print_json({"group": group, **_plain(report)})
    else:
        typer.echo(f"group {group}: {report.replicas} replica(s)")


def drain(
    node: Annotated[str, typer.Argument(help="a node's id, IP address or host name")],
    timeout: Annotated[
        float, typer.Option(help="seconds that requests of its replicas may take to end")
    ] = DRAIN_TIMEOUT_S,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Take all replicas and shards from a node that is to go, and save what they hold.

    Example: litecache drain 10.0.0.7
    """
    timeout = check_seconds("--timeout", timeout)
    connect(address)
    from litecache.actors.operating.scaling import drain_node

    reports = drain_node(node, timeout_s=timeout, tell=_telling(as_json))
    if as_json:
        print_json({name: _plain(report) for name, report in reports.items()})
        return
    for name, report in reports.items():
        typer.echo(f"group {name}: {report.replicas} replica(s), {len(report.departed)} gone")
    if not reports:
        typer.echo("no group is running")


def _replicas(label: str, text: str) -> Any:
    from litecache.actors.placement import check_replicas

    return check_replicas(label, int(text) if text.isdecimal() and len(text) < 10 else text)


def _plain(report: Any) -> dict[str, Any]:
    return {**report._asdict(), "departed": [gone._asdict() for gone in report.departed]}


def _telling(as_json: bool) -> Any:
    """Tells each step: on stdout, or on stderr where that is JSON."""
    return lambda name, what: typer.echo(f"  {name}: {what}", err=as_json)
