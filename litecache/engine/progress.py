"""A bar for long work at a start, shown where transformers shows its bars of loading weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def progress_bar(description: str) -> Callable[[int, int], None]:
    """A function that takes how much of how much is done, and draws it to stderr.

    `transformers.utils.logging.disable_progress_bar()` silences it, too.
    """
    bars: list[Any] = []

    def show(done: int, total: int) -> None:
        from transformers.utils import logging

        if not bars:
            bars.append(logging.tqdm(total=total, desc=description))
        bars[0].update(1)
        if done == total:
            bars[0].close()

    return show
