"""LiteCache: a paged, tiered and persistent KV cache for Hugging Face models on Ray.

Names are imported when they are first used (PEP 562), so that a storage process never loads torch
and a driver loads only what it touches.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litecache.actors.placement import NodeStorage
    from litecache.adapter.kv_cache_adapter import KVCacheAdapter
    from litecache.adapter.stats import CacheStats
    from litecache.config import CacheConfig
    from litecache.engine.paged_cache import PagedAttentionCache
    from litecache.errors import LiteCacheError
    from litecache.storage import LocalCacheService

__version__ = "0.1.0"

_HOMES = {
    "CacheConfig": "litecache.config",
    "CacheStats": "litecache.adapter.stats",
    "KVCacheAdapter": "litecache.adapter.kv_cache_adapter",
    "LiteCacheError": "litecache.errors",
    "LocalCacheService": "litecache.storage",
    "NodeStorage": "litecache.actors.placement",
    "PagedAttentionCache": "litecache.engine.paged_cache",
}

__all__ = [
    "CacheConfig",
    "CacheStats",
    "KVCacheAdapter",
    "LiteCacheError",
    "LocalCacheService",
    "NodeStorage",
    "PagedAttentionCache",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
