"""The older import path: `from litecache.models import KVCacheAdapter`."""

from __future__ import annotations

from litecache.adapter import KVCacheAdapter

__all__ = ["KVCacheAdapter"]
