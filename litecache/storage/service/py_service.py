"""`PyLocalCacheService`, `PyTask`, `PyState`: the form that LightLLM calls.

Token lists instead of hash values. `hash()` keeps its documented value, xxh3_128 of each block's
tokens alone; the keys inside are chained over everything before a block, because the same tokens
after another prefix have other KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ...checks import check_integer, check_list
from ...errors import ConfigError, outline
from ...hashing import BlockKey, block_key, root_key
from .local_cache_service import MODES, LocalCacheService, as_key, one_of
from .pages import integers, tensor_rows
from .task import Task

PyTask = Task


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
        self.run()

    def hash(self, tokens: Sequence[int]) -> list[str]:
        """xxh3_128 of each block's tokens as uint64, in hex; not the keys used inside."""
        words = _words(tokens)
        return [
            xxhash.xxh3_128(words[i : i + self._n].tobytes()).hexdigest()
            for i in range(0, len(words), self._n)
        ]

    def _keys(self, tokens: Sequence[int] | None) -> list[BlockKey]:
        words = _words(tokens).view(np.int64)
        keys: list[BlockKey] = []
        parent = self._root
        for i in range(0, len(words), self._n):
            parent = block_key(parent, words[i : i + self._n])
            keys.append(parent)
        return keys

    def _keys_of(
        self, tokens: Sequence[int] | None, hash_128s: Sequence[int] | None
    ) -> list[bytes]:
        if (tokens is None) == (hash_128s is None):
            raise ConfigError("tokens", "both or none", "either tokens or hash_128s")
        if hash_128s is not None:
            return [as_key(value) for value in check_list("hash_128s", hash_128s)]
        return self._keys(tokens)

    def query(  # type: ignore[override]
        self, tokens: Sequence[int] | None = None, *, hash_128s: Sequence[int] | None = None
    ) -> list[bool]:
        """Which blocks are stored; a block counts only with everything before it equal."""
        return self.query_many(self._keys_of(tokens, hash_128s))

    def create(  # type: ignore[override]
        self,
        tokens: Sequence[int] | None = None,
        kv_page_indexer: Any = (),
        mode: str = "r",
        start_pos: int = 0,
        *,
        hash_128s: Sequence[int] | None = None,
    ) -> PyTask:
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
        mode = one_of("mode", mode, MODES)
        keys = self._keys_of(tokens, hash_128s)
        pages = integers("kv_page_indexer", kv_page_indexer)
        if tokens is not None and len(pages) != len(tokens):
            raise ConfigError("kv_page_indexer", f"{len(pages)} pages", f"{len(tokens)}, as tokens")
        last = len(keys) * self._n
        start_pos = check_integer("start_pos", start_pos, 0, last, f"0 to {last}")
        first = start_pos // self._n
        return super().create(mode, keys[first:], pages[first * self._n :])


def _words(tokens: Sequence[int] | None) -> npt.NDArray[np.uint64]:
    """Token ids as uint64 `[n]`.

    Raises:
        ConfigError: no flat list of integers, or one of them is negative.
    """
    array = integers("tokens", tokens)
    if array.size and array.min() < 0:
        raise ConfigError("tokens", int(array.min()), "integers from 0 to 2**64 - 1")
    return array.astype(np.uint64)
