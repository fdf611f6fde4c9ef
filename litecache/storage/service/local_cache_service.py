"""`LocalCacheService`: a disk cache for an engine that brings its own paged KV tensor.

The caller names blocks by hash values and pages of its tensor; worker threads copy between those
pages and the store. A block that is Finished in a write is on disk; a block that is Finished in a
read is in the tensor; everything else is Aborted with a reason in `Task.results()`. The service
keeps the tensor alive. It ends with `close()`, or when it is collected.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import ConfigError, StorageError, StorageLockedError
from ...hashing import BlockKey
from .engine import EngineOptions, StorageEngine, get_engine
from .geometry import adopt_geometry
from .pages import BlockLayout, page_numbers, split, tensor_rows
from .sizing import default_ram_bytes, pages_per_block, smallest_storage_bytes
from .task import Task, TaskBlock
from .workers import Workers

_CHUNK_BYTES = 16 << 20
_ROOT = bytes(16)


def as_key(value: int | str | bytes) -> BlockKey:
    """A hash value as a block key: an integer under 2**128, 32 hex digits, or 16 bytes.

    Raises:
        ConfigError: none of these.
    """
    if isinstance(value, bytes) and len(value) == 16:
        return value
    if isinstance(value, str) and len(value) == 32:
        try:
            return bytes.fromhex(value)
        except ValueError:
            pass
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if whole and 0 <= int(value) < 1 << 128:
        return int(value).to_bytes(16, "big")
    raise ConfigError("hash", value, "an integer from 0 to 2**128 - 1, 32 hex digits, or 16 bytes")


class LocalCacheService:
    """Stores blocks of pages of a tensor in `<file>_0`, `<file>_1`, ...

    Args:
        file: prefix of the folders; may carry a directory, made when it is missing.
        storage_size: bound in bytes over all shards.
        num_of_shard: number of shards.
        kvcache: 2-D contiguous CPU tensor `[pages, page size]`, torch or numpy.
        num_workers: threads that copy.
        ram_bytes: shared memory over all shards; None picks by block size.
        engine: `local` (this process), `ray` (shard actors), `memory`, the name of a registered
            `StorageEngine`, or such a class.

    Raises:
        ConfigError: a field is invalid, or the shards are too many for `storage_size`.
        StorageFullError: too little disk or memory.
        StorageLockedError: another live service holds the prefix.
    """

    def __init__(
        self,
        file: str,
        storage_size: int,
        num_of_shard: int,
        kvcache: Any,
        num_workers: int,
        *,
        ram_bytes: int | None = None,
        engine: str | type[StorageEngine] = "local",
    ) -> None:
        for name, value in (("num_of_shard", num_of_shard), ("num_workers", num_workers)):
            if value < 1:
                raise ConfigError(name, value, "one or more")
        rows = tensor_rows(kvcache)
        layout = BlockLayout(rows, pages_per_block(rows.shape[1]))
        least = smallest_storage_bytes(layout.block_bytes)
        if storage_size // num_of_shard < least:
            most = storage_size // least
            raise ConfigError(
                "num_of_shard", num_of_shard,
                f"at most {most} for storage_size={storage_size} and blocks of "
                f"{layout.block_bytes} bytes" if most else f"none: storage_size is under {least}",
            )  # fmt: skip
        self._core = Workers(layout)
        self._tensor = kvcache
        self._num_workers = num_workers
        path = os.path.abspath(file)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        options = EngineOptions(
            path=path,
            block_bytes=layout.block_bytes,
            storage_bytes=storage_size,
            shards=num_of_shard,
            ram_bytes=ram_bytes
            or default_ram_bytes(layout.block_bytes, storage_size, num_of_shard),
            io_threads=max(2, min(4, num_workers)),
            on_written=self._core.on_written,
        )
        made = get_engine(engine)
        if made.keeps_folders:
            _with_retry(lambda: adopt_geometry(path, layout.page_bytes, layout.pages_per_block))
        self._core.engine = _with_retry(lambda: made(options))
        self._finalizer = weakref.finalize(self, Workers.shutdown, self._core)

    def run(self) -> None:
        """Start the workers; a second call does nothing."""
        self._core.start(self._num_workers)

    def block_size(self) -> int:
        """Bytes of the pages of a full block."""
        return self._core.layout.page_bytes * self._core.layout.pages_per_block

    def page_size(self) -> int:
        """Bytes of a page."""
        return self._core.layout.page_bytes

    def query(self, hash: int | str | bytes) -> bool:
        """Whether a block is there; asking keeps it from being evicted for a while."""
        return self._engine().contains([as_key(hash)])[0]

    def query_many(self, hashes: Sequence[int | str | bytes]) -> list[bool]:
        """`query` for many."""
        return self._engine().contains([as_key(value) for value in hashes])

    def create(
        self,
        mode: str,
        hash_values: Sequence[int | str | bytes],
        page_indices: Any,
    ) -> Task:
        """Begin to write pages to the store or to read them from it.

        Args:
            mode: `write` or `read`.
            hash_values: one per block, used as keys as they are: equal values mean equal contents,
                so they should cover everything before the block too.
            page_indices: rows of the tensor, `pages_per_block` for each hash, fewer for the last.

        Raises:
            ConfigError: unknown mode, pages out of range or of a wrong type, counts that differ.
            StorageError: the service is closed.
        """
        if mode not in ("read", "write"):
            raise ConfigError("mode", mode, "read or write")
        engine = self._engine()
        layout = self._core.layout
        keys = [as_key(value) for value in hash_values]
        pages = page_numbers(page_indices, len(layout.rows))
        pieces = split(pages, layout.pages_per_block)
        if len(pieces) != len(keys):
            raise ConfigError(
                "page_indices", f"{len(pages)} pages",
                f"{layout.pages_per_block} pages for each of {len(keys)} hash values, "
                "fewer for the last",
            )  # fmt: skip
        parents = [_ROOT, *keys][: len(keys)]
        blocks = [TaskBlock(*each) for each in zip(keys, parents, pieces, strict=True)]
        already: list[int] = []
        if mode == "write" and keys:
            present = engine.contains(keys)
            for piece, there in zip(pieces, present, strict=True):
                already += piece.tolist() if there else []
        return self._start(mode, blocks, already)

    def _start(self, mode: str, blocks: list[TaskBlock], already: list[int]) -> Task:
        core = self._core
        with core.lock:
            core.active[mode] += 1
        task = Task(mode, blocks, already, lambda: core.count_down(mode))
        core.tasks.add(task)
        size = max(1, _CHUNK_BYTES // core.layout.block_bytes)
        # a small task is still spread over the workers
        size = max(1, min(size, -(-len(blocks) // self._num_workers)))
        for start in range(0, len(blocks), size):
            core.jobs.put((task, blocks[start : start + size]))
        if core.closed:
            task.abort()
        return task

    def abort(self, task: Task) -> None:
        """End a task now and for good: it is ready, and its pages are not touched any more."""
        task.abort()

    def active_threads(self, mode: str) -> int:
        """Tasks of a mode (`read` or `write`) that are not ready."""
        with self._core.lock:
            return self._core.active[{"r": "read", "w": "write"}.get(mode, mode)]

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Make all finished writes durable."""
        return self._engine().flush(timeout_s)

    def _engine(self) -> StorageEngine:
        engine = self._core.engine
        if engine is None or self._core.closed:
            raise StorageError("the cache service is closed")
        return engine

    def close(self) -> None:
        """Abort what is running, write out, sync, and give the prefix up."""
        self._finalizer()

    def __enter__(self) -> LocalCacheService:
        self.run()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _with_retry(attempt: Callable[[], Any]) -> Any:
    """Once more after a collection: a service that nobody refers to must not hold its prefix."""
    try:
        return attempt()
    except StorageLockedError:
        gc.collect()
        return attempt()
