"""Caches for engines that bring their own KV tensor: `LocalCacheService` and its older form."""

from __future__ import annotations

from .cache_service import LocalCacheService, PyLocalCacheService
from .engine import EngineOptions, Get, LocalEngine, MemoryEngine, Put, StorageEngine, get_engine
from .tasks import PyState, PyTask, Task, TaskState

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
