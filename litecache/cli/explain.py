"""`litecache explain`: why a prompt would be a hit or a miss in a group, tier by tier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from litecache.checks import check_text
from litecache.cli.options import (
    Address,
    AsJson,
    Chat,
    TrustRemoteCode,
    check_model,
    connect,
    group_option,
    print_json,
    seconds_text,
)
from litecache.cli.prompts import Salt, chat_prompt, check_trust, prompt_text
from litecache.errors import ConfigError, GroupUnavailableError

if TYPE_CHECKING:
    from litecache.adapter.inspection.prefix_explanation import BlockRun, Explanation, ReplicaPlan

_WHERE = {
    "gpu": "in its pool",
    "pending": "being computed",
    "ram": "in RAM",
    "disk": "on disk",
    "remote": "on another node",
}


def explain(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="a text, a file that holds it, or - for stdin; in front of it the model, "
            "whose group is looked for",
            show_default=False,
        ),
    ],
    group: Annotated[
        str | None, group_option("the group to ask; default: the model's, or default")
    ] = None,
    salt: Salt = None,
    chat: Chat = False,
    trust_remote_code: TrustRemoteCode = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Tell why a prompt would be a hit or a miss: what each tier holds of it, and what it costs.

    Nothing is computed, loaded or changed, and nothing of the prompt or a salt is printed.

    Example: litecache explain --group chat document.txt
    """
    if len(words) > 2:
        raise ConfigError("words", f"{len(words)} of them", "[MODEL] PROMPT, quoted where needed")
    model = check_model(words[0]) if len(words) == 2 else None
    if salt is not None:
        check_text("--salt", salt)
    text = prompt_text(words[-1])
    connect(address)
    from litecache.actors.operating.watch import GroupWatch
    from litecache.adapter.inspection.prefix_explanation import explain_prefix
    from litecache.adapter.sources import load_tokenizer

    name = _group_of(model, group, trust_remote_code)
    joined, missing = GroupWatch(name).join()
    source = joined.spec.source
    check_trust(source, name, trust_remote_code)
    tokenizer = load_tokenizer(source)
    tokens, offsets = _encode(tokenizer, text, chat)
    own = joined.spec.config.cache_salt
    found = explain_prefix(joined, tokens, own if salt is None else salt, missing)
    parts = 0 < found.known_tokens < len(offsets)
    character = offsets[found.known_tokens] if parts else None
    if as_json:
        given = {"group": joined.spec.group, "differs_at_character": character}
        print_json({**given, **found.to_dict()})
        return
    _print(joined.spec.group, found, character)


def _group_of(model: str | None, group: str | None, trust_remote_code: bool) -> str:
    """The group to ask: by name, or the one that runs the model.

    Raises:
        GroupUnavailableError: the model runs in no group, or not in that one.
    """
    if model is None:
        return group or "default"
    from litecache.actors.found_groups import list_groups
    from litecache.actors.operating.watch import GroupWatch
    from litecache.adapter.sources import resolve_model

    specs = {name: GroupWatch(name).spec() for name in ([group] if group else list_groups())}
    running = {name: spec.source for name, spec in specs.items() if spec is not None}
    for name, source in running.items():  # nothing has to be read for that
        if model in (source.path, source.label, source.short_name):
            return name
    asked = resolve_model(model, trust_remote_code=trust_remote_code).source
    for name, source in running.items():
        if source == asked:
            return name
    name = asked.short_name
    shown = ", ".join(f"{group}: {source.short_name}" for group, source in running.items())
    raise GroupUnavailableError(
        f"{name} runs in no such group (running: {shown or 'none'}), so nothing can be known of "
        f"it: `litecache up {name} --group NAME` starts one"
    )


def _encode(tokenizer: Any, text: str, chat: bool) -> tuple[Any, list[int]]:
    """Token ids as a request would have them, and where each begins in the text, if that is known.

    Raises:
        ConfigError: the tokenizer takes no such text, or has no template.
    """
    from litecache.token_ids import TokenIds

    if chat:
        return TokenIds(chat_prompt(tokenizer, text)), []
    try:
        given = tokenizer(text, return_offsets_mapping=bool(tokenizer.is_fast))
        return TokenIds(given["input_ids"]), [a for a, _ in given.get("offset_mapping", [])]
    except Exception as error:  # tokenizers raise what they like
        valid = f"a text that the tokenizer takes ({type(error).__name__})"
        raise ConfigError("prompt", f"<{len(text):,} characters>", valid) from error


def _print(group: str, found: Explanation, character: int | None) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    rest = found.tokens - found.blocks * found.block_size
    console.print(f"group {group}: {found.model}, {found.form} blocks of {found.block_size} tokens")
    known = f"known up to token {found.known_tokens:,}" if found.known_tokens else "nothing known"
    where = f" (character {character:,})" if character is not None else ""
    console.print(
        f"prompt: {found.tokens:,} tokens, {found.blocks:,} whole blocks and {rest} tokens; "
        f"{known}{where}",
        soft_wrap=True,
    )
    if found.runs:
        console.print(_table(found.runs, found.block_size))
    for replica in found.replicas:
        console.print(_plan_text(replica), soft_wrap=True)
    for reason in found.reasons:
        console.print(f"- {reason}", soft_wrap=True)
    for name, error in found.unavailable.items():
        console.print(f"without {name}: {error}", soft_wrap=True)


def _table(runs: Sequence[BlockRun], size: int) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("blocks", "tokens", "in the pool of", "in RAM of", "on disk of"):
        table.add_column(column)
    for run in runs:
        table.add_row(
            f"{run.first:,} - {run.end - 1:,}",
            f"{run.first * size:,} - {run.end * size - 1:,}",
            *(", ".join(names) or "-" for names in (run.pools, run.ram, run.disks)),
        )
    return table


def _plan_text(replica: ReplicaPlan) -> str:
    if replica.error:
        return f"{replica.name}: {replica.error}"
    held = [f"{count:,} blocks {_WHERE[tier]}" for tier, count in replica.blocks.items()]
    if replica.copied_tokens:
        held.append(f"{replica.copied_tokens} tokens copied from a block that begins alike")
    text = f"{replica.name}: {', '.join(held) or 'nothing of it'}"
    if replica.first_token_s is None:
        return text + "; it has no lower tiers"
    loads = f"load blocks {replica.load_from:,} - {replica.load_end - 1:,}, compute the rest"
    plan = loads if replica.load_from < replica.load_end else "load nothing, compute the rest"
    text += f"; would {plan}: first token in {seconds_text(replica.first_token_s)}"
    others = [("computing all behind its pool", replica.compute_s), ("loading all", replica.load_s)]
    told_others = [
        f"{what} {seconds_text(seconds)}" for what, seconds in others if seconds is not None
    ]
    guess = "" if replica.measured else ", guessed: no step of it has been measured yet"
    busy = f", behind {replica.queued_tokens:,} tokens" if replica.queued_tokens else ""
    busy += f", beside {replica.decodes} decodes" if replica.decodes else ""
    return f"{text} ({'; '.join(told_others)}{busy}{guess})"
