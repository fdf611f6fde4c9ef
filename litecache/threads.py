"""The one way to start a thread: none ends by an exception unseen.

A thread that serves for as long as its owner lives is restarted: its function is called again,
after a pause that doubles while it goes on failing. A thread with one job reports its fault to
whoever started it, if that cannot go on without: an actor then ends its process, and Ray makes a
new one. Every fault is logged with its traceback and counted (`fault_counts`).

A forked child has none of its parent's threads: what needs them stays the parent's
(`let_go_in_child`).
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from .errors import CapacityError

logger = logging.getLogger(__name__)

_PREFIX = "litecache-"
_PAUSE_S = (0.05, 5.0)
# A service that ran so long before it failed has recovered from the fault before.
_RECOVERED_S = 30.0
_counts: Counter[str] = Counter()
_lock = threading.Lock()


def take_short_turns() -> None:
    """Let this process's threads take turns each 0.5 ms, for as long as it lives.

    With Python's 5 ms an engine's step would wait so long behind a message or a copy.
    """
    sys.setswitchinterval(0.0005)


def start_service(run: Callable[[], None], name: str) -> threading.Thread:
    """Start a thread that serves until `run` returns, and call `run` again when it raises.

    Args:
        run: must be fit to be called again after it raised anywhere.
        name: of the thread.

    Raises:
        CapacityError: the system has no room for another thread.
    """

    def serve() -> None:
        pause_s = _PAUSE_S[0]
        while True:
            began = time.monotonic()
            try:
                return run()
            except BaseException as error:
                if sys.is_finalizing():
                    return  # what it uses is going away under it
                _note(name, error, f"it goes on in {pause_s:g} s")
            if time.monotonic() - began > _RECOVERED_S:
                pause_s = _PAUSE_S[0]
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S[1])

    return _start(serve, name)


def start_job(
    run: Callable[[], None], name: str, failed: Callable[[BaseException], None] | None = None
) -> threading.Thread:
    """Start a thread with one job.

    Args:
        run: the job.
        name: of the thread.
        failed: called in the thread with what the job raised, once that is logged and counted.

    Raises:
        CapacityError: the system has no room for another thread.
    """

    def work() -> None:
        try:
            run()
        except BaseException as error:
            _note(name, error, "it has ended")
            if failed is not None:
                failed(error)

    return _start(work, name)


def run_outside(run: Callable[[], None]) -> None:
    """Call what may wait for the product's threads, or for their locks: not in one of them.

    The garbage collector calls finalizers in any thread.
    """
    if threading.current_thread().name.startswith(_PREFIX):
        start_job(run, "finalizer")
    else:
        run()


def fault_counts() -> dict[str, int]:
    """By a thread's name, how often one of that name has failed in this process."""
    with _lock:
        return dict(_counts)


def _note(name: str, error: BaseException, then: str) -> None:
    with _lock:
        _counts[name] += 1
    logger.error("thread %s failed, %s: %s", name, then, type(error).__name__, exc_info=error)


def _start(target: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=f"{_PREFIX}{name}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise CapacityError(f"there is no room for the thread {name}: {error}") from error
    return thread


class _HasThreads(Protocol):
    def let_go(self) -> None: ...


_owners: weakref.WeakSet[_HasThreads] = weakref.WeakSet()


def let_go_in_child(owner: _HasThreads) -> None:
    """Call `owner.let_go()` in each process forked from this one.

    It ends the owner there and leaves alone what the parent goes on with. Locks may be held by
    threads that are not there, so it makes them anew.
    """
    _owners.add(owner)


def _let_all_go() -> None:
    for owner in list(_owners):
        owner.let_go()


os.register_at_fork(after_in_child=_let_all_go)
