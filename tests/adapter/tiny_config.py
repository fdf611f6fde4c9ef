"""Settings of a cache for a tiny model, with all tiers."""

from __future__ import annotations

from pathlib import Path

from litecache.config import CacheConfig


def tiny_config(folder: Path) -> CacheConfig:
    return CacheConfig(
        num_blocks=96,
        dtype="float32",
        ram_bytes="16MB",
        storage_dir=str(folder),
        storage_bytes="64MB",
    )
