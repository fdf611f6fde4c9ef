"""Tasks of `LocalCacheService`, and the threads that carry their blocks between tensor and engine.

A block's state only moves forward, and what is Finished or Aborted stays so. `abort` waits for
copies that are under way, and none begins after it, so when it returns nobody touches the caller's
pages any more.
"""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import numpy as np
import numpy.typing as npt

from ...checks import check_seconds
from ...errors import StorageError, told
from ...hashing import BlockKey
from ...threads import let_go_in_child, start_service
from .engine import Get, Put, StorageEngine
from .pages import BlockLayout

logger = logging.getLogger(__name__)

_WAIT_FOR_ROOM_S = 60.0
_CHUNK_BYTES = 16 << 20
_GOOD_RESULTS = ("hit", "stored", "exists", "dropped")


class TaskState(IntEnum):
    """State of one block of a task."""

    Initial = 0
    Working = 1
    Finished = 2
    Aborted = 3


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
    """

    def __init__(self, mode: str, blocks: Sequence[TaskBlock], already: Sequence[int]) -> None:
        self.mode = mode
        self.blocks = list(blocks)
        self._already = list(already)
        self._open = len(self.blocks)
        self._aborted = False
        self._touching = 0
        self._lock = threading.Condition(threading.Lock())
        self._done = threading.Event()
        if not self.blocks:
            self._done.set()

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
                self._lock.notify_all()
        return True

    def complete(self, block: TaskBlock, result: str) -> None:
        """Make a block final, once."""
        with self._lock:
            if block.state not in _FINAL:
                good = result in _GOOD_RESULTS
                block.state = TaskState.Finished if good else TaskState.Aborted
                block.result = result
                self._open -= 1
                if not self._open:
                    self._done.set()

    def abort(self) -> None:
        """Make everything final now; no access to the pages happens after this returns."""
        with self._lock:
            if self._done.is_set():
                return
            self._aborted = True
            for block in self.blocks:
                if block.state not in _FINAL:
                    block.state, block.result = TaskState.Aborted, "aborted"
            # copies under way are milliseconds long; after them nobody touches the pages again
            while self._touching:
                self._lock.wait()
            self._done.set()

    def let_go(self) -> None:
        """In a forked child, where no worker is: it ends, whatever the parent's threads held."""
        self._lock = threading.Condition(threading.Lock())
        self._touching = 0
        self._done._at_fork_reinit()  # type: ignore[attr-defined]
        self.abort()


PyState, PyTask = TaskState, Task
"""Their names in the older form."""


class Workers:
    """The queue of a service, its threads and what they share.

    It does not know the service, so that a service to which nobody refers is collected and its
    finalizer ends the threads.

    Args:
        layout: the tensor's.
        count: of threads.
    """

    def __init__(self, layout: BlockLayout, count: int) -> None:
        self.layout = layout
        self._count = count
        self.engine: StorageEngine | None = None
        self.closed = False
        self.waiting: dict[BlockKey, list[tuple[Task, TaskBlock]]] = {}
        self._jobs: queue.SimpleQueue[tuple[Task, list[TaskBlock]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._tasks: weakref.WeakSet[Task] = weakref.WeakSet()
        self._lock = threading.Lock()
        let_go_in_child(self)

    def let_go(self) -> None:
        """In a forked child it is closed: the engine is the parent's."""
        self._lock = threading.Lock()
        self.closed, self.engine = True, None
        for task in list(self._tasks):
            task.let_go()

    def start(self) -> None:
        """Start the threads; a second call does nothing.

        Raises:
            StorageError: the service is closed.
        """
        with self._lock:
            if self.closed:
                raise StorageError("the cache service is closed")
            for number in range(len(self._threads), self._count):
                self._threads.append(start_service(self._run, f"worker-{number}"))

    def submit(self, task: Task) -> None:
        """Queue a task's blocks in pieces; a small task is still spread over the workers."""
        with self._lock:
            self._tasks.add(task)
        share = -(-len(task.blocks) // self._count)
        size = min(_CHUNK_BYTES // self.layout.block_bytes, share) or 1
        for start in range(0, len(task.blocks), size):
            self._jobs.put((task, task.blocks[start : start + size]))
        if self.closed:
            task.abort()

    def active(self, mode: str) -> int:
        """Tasks of a mode that are not ready."""
        with self._lock:
            return sum(task.mode == mode and not task.ready() for task in self._tasks)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            task, blocks = job
            try:
                self._do(task, blocks)
            except Exception as error:
                # whatever went wrong concerns these blocks alone; the worker lives on
                logger.exception("blocks of a task failed")
                self._complete(task, blocks, [f"error: {told(error)}"] * len(blocks))

    def _do(self, task: Task, blocks: list[TaskBlock]) -> None:
        mine = [block for block in blocks if task.begin(block)]
        if not mine or self.engine is None:
            return

        def stop() -> bool:
            return task.aborted() or self.closed

        if task.mode == "read":
            gets = [Get(b.key, partial(self._take, task, b)) for b in mine]
            outcomes = self.engine.get(gets, stop, _WAIT_FOR_ROOM_S)
        else:
            with self._lock:
                for block in mine:
                    self.waiting.setdefault(block.key, []).append((task, block))
            puts = [
                Put(block.key, block.parent, partial(self._fill, task, block)) for block in mine
            ]
            outcomes = self.engine.put(puts, stop, _WAIT_FOR_ROOM_S)
        self._complete(task, mine, outcomes)

    def _fill(self, task: Task, block: TaskBlock, memory: memoryview) -> bool:
        block.copied = task.touch_pages(block, lambda: self.layout.gather(block.pages, memory))
        return block.copied

    def _take(self, task: Task, block: TaskBlock, memory: memoryview) -> bool:
        if self.layout.held(memory) < len(block.pages):
            return False
        return task.touch_pages(block, lambda: self.layout.scatter(block.pages, memory))

    def _complete(self, task: Task, blocks: Sequence[TaskBlock], outcomes: Sequence[str]) -> None:
        for block, outcome in zip(blocks, outcomes, strict=True):
            if outcome == "pending":  # `on_written` will tell
                continue
            with self._lock:
                entries = self.waiting.pop(block.key, [])
                if left := [entry for entry in entries if entry[1] is not block]:
                    self.waiting[block.key] = left
            task.complete(block, outcome)

    def on_written(self, outcomes: Sequence[tuple[BlockKey, str | None]]) -> None:
        """The engine tells what became of blocks that were `pending`."""
        for key, reason in outcomes:
            with self._lock:
                entries = self.waiting.pop(key, [])
            result = "dropped" if reason == "no_room" else reason or "stored"
            for task, block in entries:
                task.complete(block, result)

    def shutdown(self) -> None:
        """Abort what is running, end the threads, close the engine."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            tasks = list(self._tasks)
        for task in tasks:
            task.abort()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        if self.engine is not None:
            self.engine.close()
            self.engine = None
