"""The storage tier: blocks in shared memory and on disk, shared by processes, kept over restarts.

`ShardStore` is one shard; `LocalShardClient` uses it in-process. Nothing here imports torch, ray or
transformers.
"""

from __future__ import annotations

from .arena.view import ArenaView
from .client import LocalShardClient, ShardClient
from .disk.inspect import inspect_store, verify_store
from .protocol import (
    PAGE_BYTES,
    PROTOCOL_VERSION,
    Attachment,
    CommitItem,
    CommitStatus,
    Deltas,
    FlushReport,
    SlotRef,
    SlotState,
    StageResult,
    StageStatus,
)
from .service import (
    LocalCacheService,
    PyLocalCacheService,
    PyState,
    PyTask,
    StorageEngine,
    Task,
    TaskState,
)
from .shard_store import ShardStore

__all__ = [
    "PAGE_BYTES",
    "PROTOCOL_VERSION",
    "ArenaView",
    "Attachment",
    "CommitItem",
    "CommitStatus",
    "Deltas",
    "FlushReport",
    "LocalCacheService",
    "LocalShardClient",
    "PyLocalCacheService",
    "PyState",
    "PyTask",
    "ShardClient",
    "ShardStore",
    "SlotRef",
    "SlotState",
    "StageResult",
    "StageStatus",
    "StorageEngine",
    "Task",
    "TaskState",
    "inspect_store",
    "verify_store",
]
