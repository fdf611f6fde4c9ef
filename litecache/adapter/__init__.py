"""The driver side: `KVCacheAdapter` and what it needs."""
