"""Checks of a shard store's options, before anything is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import ConfigError
from .disk_tier import META_FIXED_BYTES, META_SLOT_BYTES
from .protocol import PAGE_BYTES
from .segment_sizes import pick_segment_bytes, region_size

FSYNC_POLICIES = ("always", "interval", "never")


def validate_options(
    directory: str | None,
    storage_bytes: int,
    ram_bytes: int,
    fsync: str,
    io_threads: int,
    ttl_s: float | None,
) -> None:
    """Raise ConfigError for the first field that is invalid."""
    if fsync not in FSYNC_POLICIES:
        raise ConfigError("fsync", fsync, "one of " + ", ".join(FSYNC_POLICIES))
    if ram_bytes < 1 << 20:
        raise ConfigError("ram_bytes", ram_bytes, "at least 1 MiB")
    if directory is not None and not 1 << 20 <= storage_bytes <= 16 << 40:
        raise ConfigError("storage_bytes", storage_bytes, "1 MiB to 16 TiB a shard")
    if io_threads < 0:
        raise ConfigError("io_threads", io_threads, "zero or more")
    if ttl_s is not None and ttl_s <= 0:
        raise ConfigError("ttl_s", ttl_s, "more than zero, or None")


def smallest_storage_bytes(block_bytes: int) -> int:
    """The least that a shard's storage must be to hold one block, with what belongs to it."""
    return _smallest(block_bytes, META_SLOT_BYTES, META_FIXED_BYTES)


def smallest_ram_bytes(block_bytes: int) -> int:
    """The least that a shard's arena must be to hold one block."""
    return _smallest(block_bytes, 0, 0)


def _smallest(block_bytes: int, slot_bytes: int, fixed_bytes: int) -> int:
    total = 1 << 20
    while True:
        segment_bytes = pick_segment_bytes(total)
        size = region_size(segment_bytes // PAGE_BYTES, -(-block_bytes // PAGE_BYTES))
        need = size.segments * segment_bytes + size.slots * slot_bytes + fixed_bytes
        if need <= total:
            return total
        total += max(1 << 20, need - total)


def check_holds(
    field: str, total: int, shards: int, block_bytes: Sequence[int], least: Callable[[int], int]
) -> None:
    """Refuse a bound under which some block is never stored, and so never found.

    Args:
        field: name of the bound.
        total: its value, over all shards.
        shards: how many divide it.
        block_bytes: of each KV group.
        least: `smallest_ram_bytes` or `smallest_storage_bytes`.

    Raises:
        ConfigError: tells the group, the size of its blocks, and what would do.
    """
    for group, size in enumerate(block_bytes):
        if (need := least(size)) > total // shards:
            of = f" of KV group {group}" if len(block_bytes) > 1 else ""
            valid = (
                f"at least {need * shards:,}: each of {shards} shard(s) has {total // shards:,} "
                f"bytes, and to hold a block{of}, {size:,} bytes, takes {need:,} with segments "
                "and metadata"
            )
            raise ConfigError(field, total, valid)
