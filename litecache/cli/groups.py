"""Commands about groups of actors: `down`, `generate`. Neither stops Ray."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from litecache.actors.naming import check_group_name
from litecache.checks import check_integer, check_seconds
from litecache.cli.options import (
    Address,
    AsJson,
    Chat,
    GroupName,
    Model,
    Settings,
    TrustRemoteCode,
    check_address,
    check_model,
    check_prompt,
    connect,
    group_names,
    parse_settings,
    print_json,
)
from litecache.errors import ConfigError


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
    check_group_name(group)
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


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads it from stdin")],
    group: Annotated[
        str | None,
        typer.Option(
            help="to join, or to start; default: one that ends with the command",
            autocompletion=group_names,
        ),
    ] = None,
    settings: Settings = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 64,
    temperature: Annotated[float | None, typer.Option(help="sample at this temperature")] = None,
    seed: Annotated[int | None, typer.Option(help="of sampling")] = None,
    chat: Chat = False,
    trust_remote_code: TrustRemoteCode = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text, printing it as it comes.

    Example: litecache generate HuggingFaceTB/SmolLM2-135M-Instruct "Why is the sky blue?" --chat
    """
    config = parse_settings(settings or [])
    check_model(model)
    if group is not None:
        check_group_name(group)
    check_integer("--max-new-tokens", max_new_tokens, 1, 2**31 - 1, "an integer of at least 1")
    sampling: dict[str, Any] = {}
    if temperature is not None:
        if not 0 < temperature < float("inf"):
            raise ConfigError("--temperature", temperature, "a positive finite number")
        sampling = {"do_sample": True, "temperature": temperature}
    if seed is not None:
        check_integer("--seed", seed, 0, 2**63 - 1, "an integer from 0 to 2**63 - 1")
    check_address(address)
    text = check_prompt(prompt)
    if address is not None:
        connect(address)
    from litecache.adapter import KVCacheAdapter

    with KVCacheAdapter(
        model,
        cache_config=config if settings else None,
        group=group,
        trust_remote_code=trust_remote_code,
    ) as adapter:
        given: Any = text
        if chat:
            message = [{"role": "user", "content": text}]
            given = adapter.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        stream = adapter.stream(given, max_new_tokens=max_new_tokens, seed=seed, **sampling)
        if not as_json:
            for piece in stream:
                typer.echo(piece, nl=False)
            typer.echo()
            return
        result = {"text": "".join(stream), "tokens": len(stream.token_ids)}
        print_json({**result, "reused_tokens": stream.reused_tokens, "ttft_s": stream.ttft_s})
