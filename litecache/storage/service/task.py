"""Tasks of `LocalCacheService`: a list of blocks on their way between a tensor and the store.

A block's state only moves forward, and what is Finished or Aborted stays so. `abort` waits for
copies that are under way, and none begins after it, so when it returns nobody touches the caller's
pages any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from ...checks import check_seconds
from ...hashing import BlockKey


class TaskState(IntEnum):
    """State of one block of a task."""

    Initial = 0
    Working = 1
    Finished = 2
    Aborted = 3


PyState = TaskState
_FINAL = (TaskState.Finished, TaskState.Aborted)


@dataclass(slots=True, eq=False)
class TaskBlock:
    """One block of a task.

    Attributes:
        key, parent: of the block.
        pages: int64 `[n]`, rows of the tensor.
        state: see `TaskState`.
        copied: the tensor's rows are no longer needed.
        result: empty until final, then `stored`, `exists`, `dropped`, `hit`, `miss`, `busy`,
            `aborted`, `disk_full`, `io_error`.
    """

    key: BlockKey
    parent: BlockKey
    pages: npt.NDArray[np.int64]
    state: TaskState = TaskState.Initial
    copied: bool = False
    result: str = ""


class Task:
    """What `LocalCacheService.create` returns.

    Args:
        mode: `write` or `read`.
        blocks: in order.
        already: pages of blocks that were stored before (writes only).
        on_done: called once, when all blocks are final.
    """

    def __init__(
        self,
        mode: str,
        blocks: Sequence[TaskBlock],
        already: Sequence[int],
        on_done: Callable[[], None],
    ) -> None:
        self.mode = mode
        self.blocks = list(blocks)
        self._already = list(already)
        self._on_done = on_done
        self._open = len(self.blocks)
        self._aborted = False
        self._touching = 0
        self._lock = threading.Lock()
        self._untouched = threading.Condition(self._lock)
        self._done = threading.Event()
        if not self.blocks:
            self._done.set()
            on_done()

    def ready(self) -> bool:
        """All blocks are Finished or Aborted; once true, always true."""
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Sleep until `ready()`, or until the time is over; whether it is ready."""
        return self._done.wait(None if timeout_s is None else check_seconds("timeout_s", timeout_s))

    def data_safe(self) -> bool:
        """The caller may reuse the pages: a write has copied them, a read has filled them."""
        if self.ready() or self.mode == "read":
            return self.ready()
        with self._lock:
            return all(block.copied or block.state in _FINAL for block in self.blocks)

    def state(self) -> list[TaskState]:
        """One state per block."""
        with self._lock:
            return [block.state for block in self.blocks]

    def results(self) -> list[str]:
        """One result per block; see `TaskBlock.result`."""
        with self._lock:
            return [block.result for block in self.blocks]

    @property
    def page_already_list(self) -> list[int]:
        """Pages of blocks that were in the store when the task was created."""
        return list(self._already)

    def get_page_already_list(self) -> list[int]:
        """`page_already_list`."""
        return self.page_already_list

    def aborted(self) -> bool:
        """`abort` was called before it was ready."""
        return self._aborted

    def begin(self, block: TaskBlock) -> bool:
        """A worker takes a block up; False when it is final already."""
        with self._lock:
            if block.state is not TaskState.Initial:
                return False
            block.state = TaskState.Working
            return True

    def touch_pages(self, block: TaskBlock, access: Callable[[], None]) -> bool:
        """Run `access` to the caller's pages unless the block is final; whether it ran."""
        with self._lock:
            if block.state in _FINAL:
                return False
            self._touching += 1
        try:
            access()
        finally:
            with self._lock:
                self._touching -= 1
                self._untouched.notify_all()
        return True

    def complete(self, block: TaskBlock, state: TaskState, result: str) -> None:
        """Make a block final, once."""
        with self._lock:
            if block.state in _FINAL:
                return
            block.state, block.result = state, result
            self._open -= 1
            last = self._open == 0
            if last:
                self._done.set()
        if last:
            self._on_done()

    def abort(self) -> None:
        """Make everything final now; no access to the pages happens after this returns."""
        with self._lock:
            if self._done.is_set():
                return
            self._aborted = True
            for block in self.blocks:
                if block.state not in _FINAL:
                    block.state, block.result = TaskState.Aborted, "aborted"
            self._open = 0
            # copies under way are milliseconds long; after them nobody touches the pages again
            while self._touching:
                self._untouched.wait()
            last = not self._done.is_set()  # another thread may abort, too, and has waited as well
            self._done.set()
        if last:
            self._on_done()
