"""Pins: prefixes that the disk tier keeps until they are let go, over restarts too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litecache.actors.group import Group
from litecache.hashing import chain_keys


def set_pinned(
    group: Group, info: Any, tokens: Sequence[int], cache_salt: str, pinned: bool
) -> int:
    """Pin or unpin the blocks of a prefix on every shard that holds them.

    Args:
        group: the actors.
        info: the engine's `EngineInfo`.
        tokens: the prefix; a trailing part of a block is left out.
        cache_salt: whose blocks.
        pinned: pin, or let go.

    Returns:
        Tokens of the leading blocks that some shard holds in every KV group.
    """
    chains = [chain_keys(root, tokens, info.block_size) for root in info.roots(cache_salt)]
    keys = [key for chain in chains for key in chain]
    held = dict(zip(keys, group.set_pinned(keys, pinned), strict=True))
    blocks = 0
    for index in range(len(chains[0])):
        if not all(held[chain[index]] for chain in chains):
            break
        blocks += 1
    return blocks * int(info.block_size)
