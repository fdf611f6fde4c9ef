"""The driver side: `KVCacheAdapter` and what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litecache.adapter.kv_cache_adapter import KVCacheAdapter
    from litecache.adapter.stats import CacheStats

__all__ = ["CacheStats", "KVCacheAdapter"]

_HOMES = {
    "KVCacheAdapter": "litecache.adapter.kv_cache_adapter",
    "CacheStats": "litecache.adapter.stats",
}


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562): `litecache.adapter.gguf` alone needs neither ray nor torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
