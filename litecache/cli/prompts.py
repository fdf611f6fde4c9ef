"""Commands about prompts: `generate`, and `export`, `import`, `warm`, `delete` of what is cached.

They join a group that runs, whose model they know from it, or start one for themselves with
`--model` and `--set storage_dir=...`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from litecache.checks import check_integer, check_path, check_text
from litecache.cli.options import (
    Address,
    AsJson,
    Chat,
    Model,
    Settings,
    TrustRemoteCode,
    check_model,
    check_prompt,
    connect,
    group_option,
    parse_settings,
    print_json,
)
from litecache.errors import ConfigError

AModel = Annotated[str | None, typer.Option("--model", help="default: that of the group")]
AGroup = Annotated[
    str | None, group_option('to join; default: "default", or with --model one of its own')
]
Salt = Annotated[str | None, typer.Option("--salt", help="cache salt; default: the group's own")]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads it from stdin")],
    group: Annotated[
        str | None, group_option("to join, or to start; default: one that ends with the command")
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
    check_integer("--max-new-tokens", max_new_tokens, 1, 2**31 - 1, "an integer of at least 1")
    sampling: dict[str, Any] = {}
    if temperature is not None:
        if not 0 < temperature < float("inf"):
            raise ConfigError("--temperature", temperature, "a positive finite number")
        sampling = {"do_sample": True, "temperature": temperature}
    if seed is not None:
        check_integer("--seed", seed, 0, 2**63 - 1, "an integer from 0 to 2**63 - 1")
    text = check_prompt(prompt)
    with _adapter(model, group, settings, trust_remote_code, address) as adapter:
        given: Any = text
        if chat:
            given = chat_prompt(adapter.tokenizer, text)
        stream = adapter.stream(given, max_new_tokens=max_new_tokens, seed=seed, **sampling)
        if not as_json:
            for piece in stream:
                typer.echo(piece, nl=False)
            typer.echo()
            return
        result = {"text": "".join(stream), "tokens": len(stream.token_ids)}
        print_json({**result, "reused_tokens": stream.reused_tokens, "ttft_s": stream.ttft_s})


def export(
    prompt: Annotated[str, typer.Argument(help="a text, a file that holds it, or - for stdin")],
    output: Annotated[str, typer.Option("-o", "--output", help="file to write")],
    model: AModel = None,
    group: AGroup = None,
    salt: Salt = None,
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Write the stored KV of a prompt's beginning to one file; nothing is computed.

    Example: litecache export document.txt -o document.kv --group chat
    """
    check_path("--output", output)
    text = prompt_text(prompt)
    with _adapter(model, group, settings, trust_remote_code, address, salt) as adapter:
        report = adapter.export_prefix(text, output, cache_salt=salt)
    if as_json:
        print_json(report._asdict())
        return
    typer.echo(f"{report.tokens:,} of {report.asked:,} tokens, {report.nbytes:,} bytes: {output}")


def import_(
    file: Annotated[str, typer.Argument(help="a file of `litecache export`")],
    model: AModel = None,
    group: AGroup = None,
    salt: Salt = None,
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Store the KV of an exported file, once all of it has been found sound.

    Example: litecache import document.kv --group chat
    """
    if not os.path.isfile(check_path("file", file)):
        raise ConfigError("file", file, "a file of `litecache export`")
    with _adapter(model, group, settings, trust_remote_code, address, salt) as adapter:
        report = adapter.import_prefix(file, cache_salt=salt)
    if as_json:
        print_json(report._asdict())
        return
    typer.echo(f"{report.tokens:,} of {report.asked:,} tokens are stored")


def warm(
    files: Annotated[list[str], typer.Argument(help="each holds one prompt's text")],
    model: AModel = None,
    group: AGroup = None,
    salt: Salt = None,
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Compute and store prefixes without generating.

    Example: litecache warm system.txt document.txt --group chat
    """
    texts = [check_prompt(_read(file)) for file in files]
    with _adapter(model, group, settings, trust_remote_code, address, salt) as adapter:
        counts = adapter.warm(texts, cache_salt=salt, progress=True)
        adapter.flush()
    if as_json:
        print_json([{"file": file, **count} for file, count in zip(files, counts, strict=True)])
        return
    for file, count in zip(files, counts, strict=True):
        found = ", ".join(f"{n:,} {tier}" for tier, n in count.items())
        typer.echo(f"{file}: {sum(count.values()):,} tokens: {found}")


def delete(
    salt: Annotated[str, typer.Option("--salt", help='cache salt; "" = what has none')],
    model: AModel = None,
    group: AGroup = None,
    settings: Settings = None,
    trust_remote_code: TrustRemoteCode = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Delete everything that is cached under a salt, in all tiers.

    Example: litecache delete --salt alice --group chat
    """
    with _adapter(model, group, settings, trust_remote_code, address, salt) as adapter:
        count = adapter.delete(cache_salt=salt)
    if as_json:
        print_json({"blocks": count})
        return
    typer.echo(f"{count:,} blocks deleted")


@contextmanager
def _adapter(
    model: str | None,
    group: str | None,
    settings: list[str] | None,
    trust_remote_code: bool,
    address: str | None,
    salt: str | None = None,
) -> Iterator[Any]:
    config = parse_settings(settings or []) if settings else None
    if salt is not None:
        check_text("--salt", salt)
    if model is not None:
        check_model(model)
        if address is not None:
            connect(address)
    else:
        group = group or "default"
        connect(address)
        from litecache.actors.group import Group

        source = Group.attach(group, timeout_s=10).spec.source
        model = source.path
        if model is None:
            raise ConfigError("--model", None, f"given: group {group!r} has a model without a name")
        check_trust(source, group, trust_remote_code)
    from litecache.adapter import KVCacheAdapter

    with KVCacheAdapter(
        model, cache_config=config, group=group, trust_remote_code=trust_remote_code
    ) as adapter:
        yield adapter


def check_trust(source: Any, group: str, trusted: bool) -> None:
    """Refuse to run code that comes with a group's model, unless that was allowed.

    Raises:
        ConfigError: it was not.
    """
    if source.trust_remote_code and not trusted:
        valid = f"given: the model of group {group!r} brings Python code that would run here"
        raise ConfigError("--trust-remote-code", False, valid)


def chat_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a conversation that begins with this text.

    Raises:
        ConfigError: the tokenizer has no template.
    """
    from litecache.adapter.chat_replies import ChatTemplate

    return ChatTemplate(tokenizer).tokens([{"role": "user", "content": text}])


def prompt_text(given: str) -> str:
    """The prompt: standard input for `-`, a file's text, or the argument itself."""
    is_file = given != "-" and len(given) < 4096 and "\0" not in given and os.path.isfile(given)
    return check_prompt(_read(given) if is_file else given)


def _read(file: str) -> str:
    check_path("file", file)
    try:
        with open(file, encoding="utf-8", newline="") as opened:
            return opened.read()
    except (OSError, UnicodeError) as error:
        raise ConfigError("file", file, "a readable file of UTF-8 text") from error
