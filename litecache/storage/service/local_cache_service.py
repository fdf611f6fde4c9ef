"""`LocalCacheService`: a disk cache for an engine that brings its own paged KV tensor.

The caller names blocks by hash values and pages of its tensor; worker threads copy between those
pages and the store. A block that is Finished in a write is on disk; a block that is Finished in a
read is in the tensor; everything else is Aborted with a reason in `Task.results()`. The service
keeps the tensor alive. It ends with `close()`, or when it is collected.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...checks import check_integer, check_list, check_path, check_seconds
from ...config import parse_size
from ...errors import ConfigError, StorageError, StorageLockedError
from ...hashing import BlockKey
from ...machine_memory import available_memory_bytes
from ..shard_options import check_holds, smallest_ram_bytes, smallest_storage_bytes
from .engine import EngineOptions, StorageEngine, get_engine
from .geometry import note_geometry, set_aside_others
from .pages import BlockLayout, page_numbers, pages_per_block, split, tensor_rows
from .task import Task, TaskBlock
from .workers import Workers

MODES = {"r": "read", "read": "read", "w": "write", "write": "write"}
_CHUNK_BYTES = 16 << 20
_MOST = 256
_ROOT = bytes(16)


def as_key(value: int | str | bytes) -> BlockKey:
    """A hash value as a block key: an integer under 2**128, 32 hex digits, or 16 bytes.

    Raises:
        ConfigError: none of these.
    """
    if type(value) is bytes and len(value) == 16:
        return value
    if type(value) is str and re.fullmatch("[0-9a-fA-F]{32}", value):
        return bytes.fromhex(value)
    valid = "an integer from 0 to 2**128 - 1, 32 hex digits, or 16 bytes"
    return check_integer("hash", value, 0, (1 << 128) - 1, valid).to_bytes(16, "big")


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
        made = get_engine(engine)
        path = os.path.abspath(check_path("file", file, "the prefix of the folders, a path"))
        storage_size = parse_size(storage_size, "storage_size")
        valid = f"one or more, at most {_MOST}"
        num_of_shard = check_integer("num_of_shard", num_of_shard, 1, _MOST, valid)
        num_workers = check_integer("num_workers", num_workers, 1, _MOST, valid)
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
        if ram_bytes is None:
            ram_bytes = _default_ram_bytes(layout.block_bytes, storage_size, num_of_shard)
        ram_bytes = parse_size(ram_bytes, "ram_bytes")
        check_holds("ram_bytes", ram_bytes, num_of_shard, [layout.block_bytes], smallest_ram_bytes)
        self._core = Workers(layout)
        self._tensor = kvcache
        self._num_workers = num_workers
        options = EngineOptions(
            path=path,
            block_bytes=layout.block_bytes,
            storage_bytes=storage_size,
            shards=num_of_shard,
            ram_bytes=ram_bytes,
            io_threads=max(2, min(4, num_workers)),
            on_written=self._core.on_written,
        )
        geometry = {"page_bytes": layout.page_bytes, "pages_per_block": layout.pages_per_block}
        self._core.engine = _open(made, options, geometry)
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
        keys = [as_key(value) for value in check_list("hashes", hashes)]
        return self._engine().contains(keys)

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
        mode = one_of("mode", mode, {"read": "read", "write": "write"})
        engine = self._engine()
        layout = self._core.layout
        keys = [as_key(value) for value in check_list("hash_values", hash_values)]
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
        if not issubclass(type(task), Task):
            raise ConfigError("task", task, "a task of this service")
        task.abort()

    def active_threads(self, mode: str) -> int:
        """Tasks of a mode (`read` or `write`) that are not ready."""
        mode = one_of("mode", mode, MODES)
        with self._core.lock:
            return self._core.active[mode]

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Make all finished writes durable."""
        return self._engine().flush(check_seconds("timeout_s", timeout_s))

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


def _default_ram_bytes(block_bytes: int, storage_size: int, shards: int) -> int:
    """Shared memory over all shards: some blocks each, at most a quarter of what is free."""
    per_shard = max(16 * block_bytes, (256 << 20) // shards)
    room = min(available_memory_bytes() // 4, storage_size // 2)
    bound = max(4 * block_bytes, room // shards)
    return max(1 << 20, min(per_shard, bound)) * shards


def one_of(name: str, value: Any, choices: Mapping[str, str]) -> str:
    """What a text stands for.

    Raises:
        ConfigError: no text, or none of the choices.
    """
    if not issubclass(type(value), str) or value not in choices:
        raise ConfigError(name, value, f"one of {', '.join(choices)}")
    return choices[value]


def _open(
    made: type[StorageEngine], options: EngineOptions, geometry: dict[str, int]
) -> StorageEngine:
    """An engine on its prefix; when it cannot be opened, no folder is left that was not there."""
    folders = [os.path.dirname(options.path)]
    while not os.path.lexists(folders[-1]):
        folders.append(os.path.dirname(folders[-1]))
    try:
        os.makedirs(folders[0], exist_ok=True)
        if made.keeps_folders:
            _with_retry(lambda: set_aside_others(options.path, geometry))
        engine: StorageEngine = _with_retry(lambda: made(options))
        try:
            if made.keeps_folders:
                note_geometry(options.path, geometry)
        except BaseException:
            engine.close()
            raise
        return engine
    except BaseException as error:
        for folder in folders[:-1]:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        if isinstance(error, OSError):
            raise StorageError(f"{options.path} cannot be opened: {error}") from error
        raise


def _with_retry(attempt: Callable[[], Any]) -> Any:
    """Once more after a collection: a service that nobody refers to must not hold its prefix."""
    try:
        return attempt()
    except StorageLockedError:
        gc.collect()
        return attempt()
