"""The bar of a call's `progress`: how far its rows have come, drawn to stderr by rich.

The call waits as it does without one; a thread of rich looks at the rows a few times a second.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from litecache.adapter.pending import PendingRequest
from litecache.checks import is_a
from litecache.errors import ConfigError

_TIMES_PER_SECOND = 4


class Progress(NamedTuple):
    """How far something has come, and the same in words."""

    completed: int
    total: int
    words: str


def check_progress(value: Any) -> bool | str:
    """False: no bar. True: one where stderr is a terminal or a notebook. "always": everywhere.

    Raises:
        ConfigError: anything else.
    """
    if is_a(value, bool):
        return bool(value)
    if not is_a(value, str) or value != "always":
        raise ConfigError("progress", value, 'True, False or "always"')
    return "always"


@contextlib.contextmanager
def show_progress(
    shown: bool | str, description: str, progress: Callable[[], Progress]
) -> Iterator[None]:
    """A bar while the body runs; its last state stays.

    Where stderr is no terminal, "always" writes that last state alone.

    Args:
        shown: what `check_progress` returned.
        description: in front of the bar.
        progress: called from another thread, and at the end.
    """
    if not shown:
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    class Bar(Bars):
        """Asks how far it is whenever it is drawn, so that nobody has to tell it."""

        def get_renderables(self) -> Any:
            now = progress()
            for task in self.task_ids:
                self.update(task, completed=now.completed, total=now.total, words=now.words)
            return super().get_renderables()

    console = Console(stderr=True)
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[words]}"),
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=_TIMES_PER_SECOND,
        disable=shown != "always" and not (console.is_terminal or console.is_jupyter),
        # what a streamer writes meanwhile goes where it would have gone
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.add_task(description, total=None, words="")
    with bar:
        yield


def progress_of(rows: Sequence[PendingRequest]) -> Callable[[], Progress]:
    """Of requests that generate: in tokens, those that a row did not need once it has ended."""
    total = sum(row.request.sampling.max_new_tokens for row in rows)
    begun = time.perf_counter()

    def progress() -> Progress:
        ended = tokens = spared = 0
        for row in rows:
            count = len(row.tokens)
            tokens += count
            if row.done:
                ended += 1
                spared += row.request.sampling.max_new_tokens - count
        rate = tokens / max(time.perf_counter() - begun, 1e-9)
        words = f"{ended:,}/{len(rows):,} rows, {tokens:,} tokens, {rate:,.0f}/s"
        return Progress(tokens + spared, total, words)

    return progress
