"""Checks of a shard store's options, before anything is made."""

from __future__ import annotations

from ..errors import ConfigError

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
