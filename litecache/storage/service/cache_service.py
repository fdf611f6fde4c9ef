"""`LocalCacheService`: a disk cache for an engine that brings its own paged KV tensor.

The caller names blocks by hash values and pages of its tensor; worker threads copy between those
pages and the store. A block that is Finished in a write is on disk; a block that is Finished in a
read is in the tensor; everything else is Aborted with a reason in `Task.results()`. The service
keeps the tensor alive. It ends with `close()`, or when it is collected.

`PyLocalCacheService` is the form that LightLLM calls, by token lists instead of hash values. Its
`hash()` keeps its documented value, xxh3_128 of each block's tokens alone; the keys inside are
chained over everything before a block, because the same tokens after another prefix have other KV.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import glob
import json
import logging
import os
import re
import shutil
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ...checks import check_integer, check_list, check_path, check_seconds
from ...config import parse_size
from ...errors import ConfigError, StorageError, StorageLockedError, outline
from ...hashing import BlockKey, block_key, root_key
from ...machine_memory import available_memory_bytes
from ...threads import run_outside
from ..shard_options import check_holds, smallest_ram_bytes, smallest_storage_bytes
from .engine import EngineOptions, StorageEngine, get_engine
from .pages import BlockLayout, integers, page_numbers, pages_per_block, split, tensor_rows
from .tasks import Task, TaskBlock, Workers

logger = logging.getLogger(__name__)

_MODES = {"r": "read", "read": "read", "w": "write", "write": "write"}
_MOST = 256
_ROOT = bytes(16)
_GEOMETRY_SUFFIX = ".geometry.json"
# with what stands behind it in names of files, as ".geometry.json.new"
_LONGEST_NAME = 255 - 32

Hash = int | str | bytes


def _as_key(value: Hash) -> BlockKey:
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
        if len(os.path.basename(path).encode()) > _LONGEST_NAME:
            valid = f"a prefix of the folders with a name of at most {_LONGEST_NAME} bytes"
            raise ConfigError("file", path, valid)
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
        self._core = Workers(layout, num_workers)
        self._tensor = kvcache
        options = EngineOptions(
            path=path,
            block_bytes=layout.block_bytes,
            storage_bytes=storage_size,
            shards=num_of_shard,
            ram_bytes=ram_bytes,
            io_threads=max(2, min(4, num_workers)),
            on_written=self._core.on_written,
        )
        self._core.engine = _open(made, options, layout)
        self._finalizer = weakref.finalize(self, run_outside, self._core.shutdown)

    def run(self) -> None:
        """Start the workers; a second call does nothing."""
        self._core.start()

    def block_size(self) -> int:
        """Bytes of the pages of a full block."""
        return self._core.layout.page_bytes * self._core.layout.pages_per_block

    def page_size(self) -> int:
        """Bytes of a page."""
        return self._core.layout.page_bytes

    def query(self, hash: Hash) -> bool:
        """Whether a block is there; asking keeps it from being evicted for a while."""
        return self._engine().contains([_as_key(hash)])[0]

    def query_many(self, hashes: Sequence[Hash]) -> list[bool]:
        """`query` for many."""
        keys = [_as_key(value) for value in check_list("hashes", hashes)]
        return self._engine().contains(keys)

    def create(
        self,
        mode: str,
        hash_values: Sequence[Hash],
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
        mode = _one_of("mode", mode, {"read": "read", "write": "write"})
        engine = self._engine()
        layout = self._core.layout
        keys = [_as_key(value) for value in check_list("hash_values", hash_values)]
        pages = page_numbers(page_indices, len(layout.rows))
        per_block = layout.pages_per_block
        pieces = split(pages, per_block)
        if len(pieces) != len(keys):
            raise ConfigError(
                "page_indices", f"{len(pages)} pages",
                f"{per_block} pages for each of {len(keys)} hash values, fewer for the last",
            )  # fmt: skip
        blocks = list(map(TaskBlock, keys, [_ROOT, *keys], pieces))
        already: list[int] = []
        if mode == "write" and keys:
            for piece, there in zip(pieces, engine.contains(keys), strict=True):
                already += piece.tolist() if there else []
        task = Task(mode, blocks, already)
        self._core.submit(task)
        return task

    def abort(self, task: Task) -> None:
        """End a task now and for good: it is ready, and its pages are not touched any more."""
        if not issubclass(type(task), Task):
            raise ConfigError("task", task, "a task of this service")
        task.abort()

    def active_threads(self, mode: str) -> int:
        """Tasks of a mode (`read` or `write`) that are not ready."""
        return self._core.active(_one_of("mode", mode, _MODES))

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


def _one_of(name: str, value: Any, choices: Mapping[str, str]) -> str:
    """What a text stands for.

    Raises:
        ConfigError: no text, or none of the choices.
    """
    if not issubclass(type(value), str) or value not in choices:
        raise ConfigError(name, value, f"one of {', '.join(choices)}")
    return choices[value]


def _open(made: type[StorageEngine], options: EngineOptions, layout: BlockLayout) -> StorageEngine:
    """An engine on its prefix; when it cannot be opened, no folder is left that was not there."""
    missing = [os.path.dirname(options.path)]
    while not os.path.lexists(missing[-1]):
        missing.append(os.path.dirname(missing[-1]))
    try:
        os.makedirs(missing[0], exist_ok=True)
        try:
            return _open_in_folder(made, options, layout)
        except StorageLockedError:
            gc.collect()  # a service that nobody refers to must not hold its prefix
            return _open_in_folder(made, options, layout)
    except BaseException as error:
        for folder in missing[:-1]:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        if isinstance(error, OSError):
            raise StorageError(f"{options.path} cannot be opened: {error}") from error
        raise


def _open_in_folder(
    made: type[StorageEngine], options: EngineOptions, layout: BlockLayout
) -> StorageEngine:
    """An engine; a store of another page size on its prefix is kept aside, not misread."""
    if not made.keeps_folders:
        return made(options)
    geometry = {"page_bytes": layout.page_bytes, "pages_per_block": layout.pages_per_block}
    note = options.path + _GEOMETRY_SUFFIX
    found = _read_geometry(note)
    if found != geometry:
        page_bytes = found.get("page_bytes", 0)
        for folder in glob.glob(glob.escape(options.path) + "_*"):
            if folder[len(options.path) + 1 :].isdigit() and os.path.isdir(folder):
                _set_aside(folder, f"{folder}.pages-{page_bytes}")
    engine = made(options)
    try:
        if found != geometry:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with os.fdopen(os.open(note + ".new", flags, 0o600), "w") as file:
                json.dump(geometry, file)
            os.replace(note + ".new", note)
    except BaseException:
        engine.close()
        raise
    return engine


def _read_geometry(note: str) -> dict[str, int]:
    """What an earlier service has noted; nothing where that is damaged or no file."""

    def opener(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # whatever has the name

    with contextlib.suppress(OSError, ValueError, RecursionError):
        with open(note, opener=opener) as file:
            found = json.load(file)
        if isinstance(found, dict) and {*map(type, found.values())} <= {int}:
            return found
    return {}


def _set_aside(folder: str, target: str) -> None:
    for path in (folder, f"{folder}/lock"):  # some file systems lock no folders
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageLockedError(f"{folder} is in use by another service") from None
            finally:
                os.close(fd)
    # one store aside per page size: a third geometry in turn must not fill the disk
    shutil.rmtree(target, ignore_errors=True)
    os.rename(folder, target)
    logger.info("%s holds pages of another size: kept as %s", folder, target)


class PyLocalCacheService(LocalCacheService):
    """A `LocalCacheService` that is asked by token lists; it runs at once.

    Args:
        kvcache_tensor: 2-D contiguous CPU uint8 tensor `[pages, page bytes]`.
        file: prefix of the folders.
        storage_size: bound in bytes.
        num_shard: number of shards.
        num_worker: threads that copy.

    Raises:
        ConfigError, StorageFullError, StorageLockedError: see `LocalCacheService`.
    """

    def __init__(
        self,
        kvcache_tensor: Any,
        file: str,
        storage_size: int = 32 * 2**30,
        num_shard: int = 32,
        num_worker: int = 16,
    ) -> None:
        tensor_rows(kvcache_tensor)
        if str(kvcache_tensor.dtype).rpartition(".")[2] != "uint8":
            raise ConfigError("kvcache_tensor", outline(kvcache_tensor), "a tensor of uint8")
        super().__init__(file, storage_size, num_shard, kvcache_tensor, num_worker)
        # callers of the older form read these
        self._block_size, self._page_size = self.block_size(), self.page_size()
        self._n = self._block_size // self._page_size
        self._root = root_key({"page_bytes": self._page_size, "pages_per_block": self._n})
        try:
            self.run()
        except BaseException:
            self.close()
            raise

    def hash(self, tokens: Sequence[int]) -> list[str]:
        """xxh3_128 of each block's tokens as uint64, in hex; not the keys used inside."""
        return [xxhash.xxh3_128(words.tobytes()).hexdigest() for words in self._pieces(tokens)]

    def _keys(
        self, tokens: Sequence[int] | None, hash_128s: Sequence[int] | None
    ) -> list[BlockKey]:
        if (tokens is None) == (hash_128s is None):
            raise ConfigError("tokens", "both or none", "either tokens or hash_128s")
        if hash_128s is not None:
            return [_as_key(value) for value in check_list("hash_128s", hash_128s)]
        keys = [self._root]
        for words in self._pieces(tokens):
            keys.append(block_key(keys[-1], words.view(np.int64)))
        return keys[1:]

    def _pieces(self, tokens: Sequence[int] | None) -> list[npt.NDArray[np.uint64]]:
        """Token ids of each block.

        Raises:
            ConfigError: no flat list of integers, or one of them is negative.
        """
        array = integers("tokens", tokens)
        if array.size and array.min() < 0:
            raise ConfigError("tokens", int(array.min()), "integers from 0 to 2**64 - 1")
        return split(array.astype(np.uint64), self._n)

    def query(  # type: ignore[override]
        self, tokens: Sequence[int] | None = None, *, hash_128s: Sequence[int] | None = None
    ) -> list[bool]:
        """Which blocks are stored; a block counts only with everything before it equal."""
        return self.query_many(self._keys(tokens, hash_128s))

    def create(  # type: ignore[override]
        self,
        tokens: Sequence[int] | None = None,
        kv_page_indexer: Any = (),
        mode: str = "r",
        start_pos: int = 0,
        *,
        hash_128s: Sequence[int] | None = None,
    ) -> Task:
        """Begin to write (`w`) or read (`r`) the blocks of a token list.

        Args:
            tokens: all tokens from the start of the sequence.
            kv_page_indexer: the page of each token.
            mode: `r` or `w`.
            start_pos: skip the blocks before this token.
            hash_128s: keys instead of tokens, one per block.

        Raises:
            ConfigError: unknown mode, pages out of range, counts that differ.
        """
        mode = _one_of("mode", mode, _MODES)
        keys = self._keys(tokens, hash_128s)
        pages = integers("kv_page_indexer", kv_page_indexer)
        if tokens is not None and len(pages) != len(tokens):
            raise ConfigError("kv_page_indexer", f"{len(pages)} pages", f"{len(tokens)}, as tokens")
        last = len(keys) * self._n
        start_pos = check_integer("start_pos", start_pos, 0, last, f"0 to {last}")
        first = start_pos // self._n
        return super().create(mode, keys[first:], pages[first * self._n :])
