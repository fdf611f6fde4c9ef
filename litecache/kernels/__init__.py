"""Attention over paged KV, cache writes and block copies; see `dispatch` for who computes."""

from litecache.kernels.dispatch import copy_blocks, paged_attention, plan_attention, store_kv
from litecache.kernels.metadata import (
    TRASH_BLOCK,
    Attention,
    AttentionMetadata,
    AttentionPlan,
    Geometry,
)

__all__ = [
    "TRASH_BLOCK",
    "Attention",
    "AttentionMetadata",
    "AttentionPlan",
    "Geometry",
    "copy_blocks",
    "paged_attention",
    "plan_attention",
    "store_kv",
]
