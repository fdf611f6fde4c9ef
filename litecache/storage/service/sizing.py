"""Sizes of a service: pages per block, the least storage of a shard, memory by default."""

from __future__ import annotations

import os

from ...errors import ConfigError
from ...machine_memory import available_memory_bytes

MAX_BLOCK_VARIABLE = "LIGHTMEM_MAX_BLOCK_SIZE_MB"
_MAX_PAGES = 64


def pages_per_block(page_bytes: int) -> int:
    """Pages in a block: as many as fit `LIGHTMEM_MAX_BLOCK_SIZE_MB` (64 MiB), from 1 to 64.

    Raises:
        ConfigError: the variable is no positive number.
    """
    text = os.environ.get(MAX_BLOCK_VARIABLE, "64")
    try:
        limit = int(text)
    except ValueError:
        limit = 0
    if limit <= 0:
        raise ConfigError(MAX_BLOCK_VARIABLE, text, "a positive whole number of MiB")
    return max(1, min(_MAX_PAGES, limit * 2**20 // page_bytes))


def default_ram_bytes(block_bytes: int, storage_size: int, shards: int) -> int:
    """Shared memory over all shards: some blocks each, at most a quarter of what is free."""
    per_shard = max(16 * block_bytes, (256 << 20) // shards)
    room = min(available_memory_bytes() // 4, storage_size // 2)
    bound = max(4 * block_bytes, room // shards)
    return max(1 << 20, min(per_shard, bound)) * shards
