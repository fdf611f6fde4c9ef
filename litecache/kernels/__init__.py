"""Attention over paged KV, cache writes and block copies; see `dispatch` for who computes."""

from litecache.kernels.dispatch import copy_blocks, paged_attention, store_kv
from litecache.kernels.metadata import TRASH_BLOCK, AttentionMetadata

__all__ = ["TRASH_BLOCK", "AttentionMetadata", "copy_blocks", "paged_attention", "store_kv"]
