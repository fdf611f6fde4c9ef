"""Spans of time for a timeline: what a process was doing, from when to when, in which thread.

Nothing is kept until `record_spans`, which actors call where `RAY_PROFILING` is set; till then a
span costs one comparison. The last ones of a process are kept, `litecache timeline` fetches them:
Ray's own events belong to the thread of a task, and an engine's threads run none.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import NamedTuple

MOST_SPANS = 20_000


class Span(NamedTuple):
    """Attributes:
    name: what was done: "load", "prefill", "save", "read", "write".
    thread: name of the thread that told.
    begun_s: Unix time.
    seconds: how long.
    figures: counts and bytes that belong to it.
    """

    name: str
    thread: str
    begun_s: float
    seconds: float
    figures: dict[str, int | str]


_spans: deque[Span] | None = None


def record_spans() -> None:
    """Keep spans from here on."""
    global _spans
    if _spans is None:
        _spans = deque(maxlen=MOST_SPANS)


def note_span(name: str, started: float, **figures: int | str) -> None:
    """Something that began at `started`, by `time.perf_counter`, has ended now."""
    if _spans is not None:
        seconds = time.perf_counter() - started
        thread = threading.current_thread().name
        _spans.append(Span(name, thread, time.time() - seconds, seconds, figures))


def recorded_spans() -> list[Span] | None:
    """The last spans, oldest first; None: nothing is recorded."""
    return None if _spans is None else list(_spans)
