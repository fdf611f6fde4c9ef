"""Checks of a shard store's options, before anything is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..checks import check_integer, check_path, check_seconds
from ..config import CacheConfig, check_setting
from ..errors import ConfigError
from .disk.log import META_FIXED_BYTES, META_SLOT_BYTES
from .protocol import PAGE_BYTES
from .segments import pick_segment_bytes, region_size

# of one namespace, of which the metadata keeps up to three copies
_NAME_BYTES = 1536


def plain_options(
    directory: str | None,
    storage_bytes: int,
    ram_bytes: int,
    fsync: str,
    fsync_interval_s: float,
    ttl_s: float | None,
    write_bytes_per_s: int | None,
    io_threads: int,
    quotas: Mapping[str, Mapping[str, int] | None],
) -> tuple[str | None, int, int]:
    """`directory`, `storage_bytes` and `ram_bytes` as plain values.

    Args:
        directory, storage_bytes, ram_bytes, fsync, fsync_interval_s, ttl_s, write_bytes_per_s,
            io_threads: of a `ShardStore`.
        quotas: its `quotas` and `ram_quotas`, by the field's name.

    Raises:
        ConfigError: one of them is invalid.
    """
    least = 0
    if directory is not None:
        directory, least = check_path("storage_dir", directory), 1 << 20
    valid = "1 MiB to 16 TiB a shard"
    storage_bytes = check_integer("storage_bytes", storage_bytes, least, 16 << 40, valid)
    ram_bytes = check_integer("ram_bytes", ram_bytes, 1 << 20, valid="an integer, at least 1 MiB")
    check_setting("fsync", "fsync", fsync)
    check_seconds("fsync_interval_s", fsync_interval_s)
    check_setting("ttl_s", "ttl_s", ttl_s)
    if write_bytes_per_s is not None:
        valid = "an integer, one or more, or None"
        check_integer("write_bytes_per_s", write_bytes_per_s, 1, valid=valid)
    check_integer("io_threads", io_threads, 0, valid="an integer, zero or more")
    for field, limits in quotas.items():
        for limit in (limits or {}).values():
            check_integer(field, limit, 0)
    return directory, storage_bytes, ram_bytes


def smallest_storage_bytes(*block_bytes: int) -> int:
    """The least that a shard's storage must be to hold a block of each size, metadata included."""
    return _smallest(block_bytes, META_SLOT_BYTES, META_FIXED_BYTES + 3 * _NAME_BYTES)


def smallest_ram_bytes(*block_bytes: int) -> int:
    """The least that a shard's arena must be to hold a block of each size."""
    return _smallest(block_bytes, 0, 0)


def _smallest(block_bytes: Sequence[int], slot_bytes: int, fixed_bytes: int) -> int:
    total = 1 << 20
    while True:
        segment_bytes = pick_segment_bytes(total)
        pages = segment_bytes // PAGE_BYTES
        need = fixed_bytes
        for size in block_bytes:
            region = region_size(pages, -(-size // PAGE_BYTES))
            need += region.segments * segment_bytes + region.slots * slot_bytes
        if need <= total:
            return total
        total += max(1 << 20, need - total)


def check_holds(
    field: str, total: int, shards: int, block_bytes: Sequence[int], least: Callable[..., int]
) -> None:
    """Refuse a bound under which some block is never stored, and so never found.

    Args:
        field: name of the bound.
        total: its value, over all shards.
        shards: how many divide it.
        block_bytes: of each KV group; a hit needs a block of each.
        least: `smallest_ram_bytes` or `smallest_storage_bytes`.

    Raises:
        ConfigError: tells the sizes and what would do.
    """
    together = [tuple(block_bytes)] if shards == 1 else [(size,) for size in block_bytes]
    for sizes in together:
        if (need := least(*sizes)) > total // shards:
            blocks = ", ".join(f"{size:,}" for size in sizes)
            valid = (
                f"at least {need * shards:,}: each of {shards} shard(s) has {total // shards:,} "
                f"bytes, and a block ({blocks} bytes by KV group) takes {need:,} with segments "
                "and metadata"
            )
            raise ConfigError(field, total, valid)


def check_tiers(config: CacheConfig, block_bytes: Sequence[int]) -> None:
    """Refuse bounds of a node's tiers that cannot hold a block of a model.

    Args:
        config: of the group.
        block_bytes: of each KV group.

    Raises:
        ConfigError: names the bound, with the numbers.
    """
    shards = len(config.shard_folders)
    check_holds("ram_bytes", config.ram_bytes, shards, block_bytes, smallest_ram_bytes)
    if config.storage_dir is not None:
        bound = config.storage_bytes
        check_holds("storage_bytes", bound, shards, block_bytes, smallest_storage_bytes)
