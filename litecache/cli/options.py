"""Options that several commands share, and what is done with them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from litecache.actors.naming import check_group_name
from litecache.checks import check_path
from litecache.errors import ConfigError, outline


def group_names(incomplete: str) -> list[str]:
    """Groups of the cluster whose names begin so, for the shell's completion.

    Whoever presses a key must be shown nothing else, whatever is wrong, and not wait for long.
    """
    import io
    import logging

    names: list[str] = []
    with (
        contextlib.ExitStack() as restored,
        contextlib.suppress(Exception),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        restored.callback(logging.disable, logging.root.manager.disable)
        logging.disable()
        connect(None)
        from litecache.actors.found_groups import list_groups

        names = [name for name in list_groups() if name.startswith(incomplete)]
    return names


def _checked_group(group: str | None) -> str | None:
    return None if group is None else check_group_name(group)


def _checked_address(address: str | None) -> str | None:
    form = r"auto|(ray://)?(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}"
    if address is not None and not re.fullmatch(form, address):
        raise ConfigError("--address", address, '"auto", HOST:PORT or ray://HOST:PORT')
    return address


def group_option(about: str) -> Any:
    """`--group`, completed by the shell and checked before the command runs."""
    return typer.Option("--group", help=about, autocompletion=group_names, callback=_checked_group)


Model = Annotated[str, typer.Argument(help="a hub name, a folder or a .gguf file")]
GroupName = Annotated[str, group_option("name of the group of actors")]
Address = Annotated[
    str | None,
    typer.Option(help="Ray's address; default RAY_ADDRESS or auto", callback=_checked_address),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Chat = Annotated[bool, typer.Option("--chat", help="apply the tokenizer's chat template")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="let Python code that comes with the model run"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="a field of CacheConfig, as in --set ram_bytes=4GB; repeatable"),
]


def parse_settings(settings: list[str]) -> Any:
    """`["block_size=32", "storage_dir=/data"]` as a `CacheConfig`.

    Raises:
        ConfigError: not NAME=VALUE, no such field, or an invalid value.
    """
    from litecache.config import CacheConfig

    return CacheConfig(**split_settings(settings))


def split_settings(settings: list[str]) -> dict[str, Any]:
    """The same as values by name.

    Raises:
        ConfigError: not NAME=VALUE, or no such field.
    """
    import dataclasses

    from litecache.config import CacheConfig, parse_setting

    fields = {field.name for field in dataclasses.fields(CacheConfig)}
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in fields:
            valid = f"NAME=VALUE with one of {', '.join(sorted(fields))}"
            raise ConfigError("--set", setting, valid)
        values[name] = parse_setting(f"--set {name}", name, text)
    return values


def check_model(model: str) -> str:
    """What can be said of a model's name without loading anything.

    Raises:
        ConfigError: no folder, no file, and no name of a hub's model.
    """
    valid = "a folder with a saved model, a .gguf file, or a name of the Hugging Face hub"
    path = os.path.expanduser(check_path("model", model, valid))
    if not os.path.exists(path) and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        raise ConfigError("model", model, valid)
    if path.endswith(".gguf") and not os.path.isfile(path):
        raise ConfigError("model", model, valid)
    return model


def check_prompt(given: str) -> str:
    """The text itself, or standard input for `-`.

    Raises:
        ConfigError: no text, or an empty one.
    """
    try:
        text = sys.stdin.read() if given == "-" else given
        text.encode()
    except (OSError, UnicodeError) as error:
        raise ConfigError("prompt", outline(given), "UTF-8 text") from error
    if not text:
        raise ConfigError("prompt", outline(text), "a text, not empty")
    return text


def connect(address: str | None) -> None:
    """Join the cluster that is running; a group must outlive this command.

    Raises:
        GroupUnavailableError: there is none.
    """
    from litecache.actors.cluster import open_ray

    open_ray(address or "auto", logging_level="warning")


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what is in it as Ctrl-C does, so that it leaves all as it was."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread: whoever runs it has signals of its own
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar on stderr, where that is a terminal: takes what is done, and how much of how much."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task("", total=None)

        def progress(what: str, done: int, total: int | None) -> None:
            shown.update(task, description=what, completed=done, total=total)

        yield progress


def size_text(nbytes: float) -> str:
    """Bytes for people, in decimal units as the settings take them."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"


def seconds_text(seconds: float | None) -> str:
    """A time for people; "-" where there is none."""
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def print_json(value: object) -> None:
    """What `--json` prints: one line."""
    typer.echo(json.dumps(value, default=str))
