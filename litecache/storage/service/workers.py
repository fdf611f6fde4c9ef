"""The threads of a `LocalCacheService`: they carry blocks between the tensor and the engine."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Sequence

from ...errors import told
from ...hashing import BlockKey
from ...threads import start_service
from .engine import Get, Put, StorageEngine
from .pages import BlockLayout
from .task import Task, TaskBlock, TaskState

logger = logging.getLogger(__name__)

_WAIT_FOR_ROOM_S = 60.0
_FINISHED = ("hit", "exists", "dropped")


class Workers:
    """The queue, the threads and what they share.

    It does not know the service, so that a service to which nobody refers is collected and its
    finalizer ends the threads.

    Args:
        layout: the tensor's.
    """

    def __init__(self, layout: BlockLayout) -> None:
        self.layout = layout
        self.engine: StorageEngine | None = None
        self.jobs: queue.SimpleQueue[tuple[Task, list[TaskBlock]] | None] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.lock = threading.Lock()
        self.waiting: dict[BlockKey, list[tuple[Task, TaskBlock]]] = {}
        self.tasks: weakref.WeakSet[Task] = weakref.WeakSet()
        self.active = {"read": 0, "write": 0}
        self.closed = False

    def start(self, count: int) -> None:
        """Start the threads; a second call does nothing."""
        for number in range(count if not self.threads else 0):
            self.threads.append(start_service(self._run, f"worker-{number}"))

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            task, blocks = job
            try:
                self._do(task, blocks)
            except Exception as error:
                # whatever went wrong concerns these blocks alone; the worker lives on
                logger.exception("blocks of a task failed")
                for block in blocks:
                    self._forget(block)
                    task.complete(block, TaskState.Aborted, f"error: {told(error)}")

    def _do(self, task: Task, blocks: list[TaskBlock]) -> None:
        mine = [block for block in blocks if task.begin(block)]
        if not mine or self.engine is None:
            return
        stop: Callable[[], bool] = lambda: task.aborted() or self.closed  # noqa: E731
        if task.mode == "read":
            gets = [Get(block.key, self._taker(task, block)) for block in mine]
            outcomes = self.engine.get(gets, stop, _WAIT_FOR_ROOM_S)
        else:
            for block in mine:
                with self.lock:
                    self.waiting.setdefault(block.key, []).append((task, block))
            puts = [Put(block.key, block.parent, self._filler(task, block)) for block in mine]
            outcomes = self.engine.put(puts, stop, _WAIT_FOR_ROOM_S)
        for block, outcome in zip(mine, outcomes, strict=True):
            if outcome != "pending":
                self._forget(block)
                finished = outcome in _FINISHED
                state = TaskState.Finished if finished else TaskState.Aborted
                task.complete(block, state, outcome)

    def _filler(self, task: Task, block: TaskBlock) -> Callable[[memoryview], bool]:
        def fill(memory: memoryview) -> bool:
            done = task.touch_pages(block, lambda: self.layout.gather(block.pages, memory))
            block.copied = done
            return done

        return fill

    def _taker(self, task: Task, block: TaskBlock) -> Callable[[memoryview], bool]:
        def take(memory: memoryview) -> bool:
            if self.layout.held(memory) < len(block.pages):
                return False
            return task.touch_pages(block, lambda: self.layout.scatter(block.pages, memory))

        return take

    def _forget(self, block: TaskBlock) -> None:
        with self.lock:
            entries = self.waiting.get(block.key, [])
            entries[:] = [entry for entry in entries if entry[1] is not block]
            if not entries:
                self.waiting.pop(block.key, None)

    def count_down(self, mode: str) -> None:
        """A task of a mode is ready."""
        with self.lock:
            self.active[mode] -= 1

    def on_written(self, outcomes: Sequence[tuple[BlockKey, str | None]]) -> None:
        """The engine tells what became of blocks that were `pending`."""
        for key, reason in outcomes:
            with self.lock:
                entries = self.waiting.pop(key, [])
            for task, block in entries:
                if reason is None:
                    task.complete(block, TaskState.Finished, "stored")
                elif reason == "no_room":
                    task.complete(block, TaskState.Finished, "dropped")
                else:
                    task.complete(block, TaskState.Aborted, reason)

    def shutdown(self) -> None:
        """Abort what is running, end the threads, close the engine."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
        for task in list(self.tasks):
            task.abort()
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join()
        if self.engine is not None:
            self.engine.close()
            self.engine = None
