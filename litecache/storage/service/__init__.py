"""Caches for engines that bring their own KV tensor: `LocalCacheService` and its older form."""

from __future__ import annotations

from .engine import EngineOptions, Get, LocalEngine, MemoryEngine, Put, StorageEngine, get_engine
from .local_cache_service import LocalCacheService
from .py_service import PyLocalCacheService, PyTask
from .task import PyState, Task, TaskState

__all__ = [
    "EngineOptions",
    "Get",
    "LocalCacheService",
    "LocalEngine",
    "MemoryEngine",
    "Put",
    "PyLocalCacheService",
    "PyState",
    "PyTask",
    "StorageEngine",
    "Task",
    "TaskState",
    "get_engine",
]
