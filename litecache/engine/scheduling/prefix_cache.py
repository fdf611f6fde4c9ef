"""The pools and prefix indexes of all KV groups of a model, matched together.

A prefix of a sequence is reusable when every full-attention group holds all of its blocks and
every sliding-window group the trailing blocks that its window can touch. This class answers
"how much of this sequence do we have", takes references, and publishes.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from litecache.engine.kv_layout import TRASH_BLOCK, KVGroup
from litecache.engine.scheduling.block_pool import BlockPool
from litecache.engine.scheduling.prefix_index import PartialMatch, PrefixIndex, TokenArray
from litecache.hashing import BlockKey, chain_keys

BlockRef = tuple[int, int]
"""(group, index of the block in its sequence)."""


@dataclass
class KeyChain:
    """The block keys of one sequence in every group, extended as its tokens become known.

    Attributes:
        roots: namespace key of each group.
        keys: per group, the keys of the sequence's full blocks.
    """

    roots: tuple[BlockKey, ...]
    block_size: int
    keys: list[list[BlockKey]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = self.keys or [[] for _ in self.roots]

    def extend(self, tokens: TokenArray) -> None:
        """Add the keys of blocks that `tokens`, the whole sequence so far, has filled."""
        known = len(self.keys[0])
        if len(tokens) < (known + 1) * self.block_size:
            return
        for group, keys in enumerate(self.keys):
            parent = keys[-1] if keys else self.roots[group]
            keys.extend(chain_keys(parent, tokens[known * self.block_size :], self.block_size))

    def parent(self, group: int, index: int) -> BlockKey:
        """Key of the block before block `index`."""
        return self.keys[group][index - 1] if index else self.roots[group]


class PrefixMatch(NamedTuple):
    """What the pools hold of a sequence.

    Attributes:
        num_blocks: full blocks of the reusable prefix.
        blocks: per group, the block of each of them (the trash block where a sliding window no
            longer reaches).
        partials: per group, a block whose first tokens continue the prefix; empty if none.
        num_tokens: reusable tokens, those of the partial block included.
        pending_owner: who is computing or loading the next block, if somebody is.
    """

    num_blocks: int
    blocks: list[list[int]]
    partials: list[PartialMatch]
    num_tokens: int
    pending_owner: str | None


class PrefixCache:
    """Pools and indexes of all groups.

    Args:
        groups: the model's KV groups.
        num_blocks: blocks per group, the trash block not counted.

    Attributes:
        unsaved: per group, published keys that no lower tier is known to hold.
    """

    def __init__(self, groups: Sequence[KVGroup], num_blocks: int) -> None:
        self.groups = tuple(groups)
        self.block_size = groups[0].block_size
        self.indexes = [PrefixIndex() for _ in groups]
        self.unsaved: list[set[BlockKey]] = [set() for _ in groups]
        self.pools = [
            BlockPool(num_blocks, functools.partial(self._forget, group))
            for group in range(len(groups))
        ]

    def reusable_blocks(self, chain: KeyChain, limit: int, extra: Collection[BlockRef] = ()) -> int:
        """Length in blocks of the longest reusable prefix of at most `limit` blocks.

        Args:
            chain: the sequence's keys.
            limit: consider this many blocks.
            extra: blocks that are not in the pools but count as present (found in lower tiers).
        """
        for group, index in zip(self.groups, self.indexes, strict=True):
            if group.window_blocks is None:
                keys = chain.keys[group.index][:limit]
                limit = index.match_run(keys)
                while limit < len(keys) and (keys[limit] in index or (group.index, limit) in extra):
                    limit += 1
        if all(group.window_blocks is None for group in self.groups):
            return limit
        runs = [self._runs(group, chain, limit, extra) for group in self.groups]
        for length in range(limit, 0, -1):
            if all(
                group.window_blocks is None or run[length] >= min(length, group.window_blocks)
                for group, run in zip(self.groups, runs, strict=True)
            ):
                return length
        return 0

    def first_needed(self, group: KVGroup, length: int) -> int:
        """Index of the first block that a prefix of `length` blocks needs in `group`."""
        return 0 if group.window_blocks is None else max(0, length - group.window_blocks)

    def match(self, chain: KeyChain, tokens: TokenArray) -> PrefixMatch:
        """Find what the pools hold of a sequence; takes no references.

        The match covers all tokens only if they end with a full block: of a partial block at
        least the last token is left to compute.
        """
        full_blocks = len(tokens) // self.block_size
        length = self.reusable_blocks(chain, full_blocks)
        blocks = []
        for group, index in zip(self.groups, self.indexes, strict=True):
            first = self.first_needed(group, length)
            held = [index.block(key) for key in chain.keys[group.index][first:length]]
            blocks.append([TRASH_BLOCK] * first + [b for b in held if b is not None])
        rest = tokens[length * self.block_size : len(tokens) - 1][: self.block_size]
        partials: list[PartialMatch] = []
        for group, index in zip(self.groups, self.indexes, strict=True):
            partial = index.match_partial(chain.parent(group.index, length), rest)
            if partial is None:
                partials = []
                break
            partials.append(partial)
        shared = min((partial.num_tokens for partial in partials), default=0)
        owner = None
        if length < full_blocks:
            owners = (
                index.pending_owner(chain.keys[g][length]) for g, index in enumerate(self.indexes)
            )
            owner = next((o for o in owners if o is not None), None)
        return PrefixMatch(length, blocks, partials, length * self.block_size + shared, owner)

    def publish(
        self, group: int, block: int, key: BlockKey, parent: BlockKey, tokens: TokenArray
    ) -> bool:
        """Publish a computed or loaded block; False if the key is published already."""
        if not self.indexes[group].insert(key, block, parent, tokens.copy()):
            return False
        self.pools[group].publish(block, key)
        return True

    def _forget(self, group: int, key: BlockKey) -> None:
        self.indexes[group].remove(key)
        self.unsaved[group].discard(key)

    def evict_idle(self) -> int:
        """Drop all blocks nobody uses; returns how many."""
        return sum(pool.evict_idle() for pool in self.pools)

    @property
    def num_evictions(self) -> int:
        """Published blocks dropped so far, over all groups."""
        return sum(pool.evictions for pool in self.pools)

    def stats(self) -> dict[str, int]:
        """Blocks by state over all groups."""
        total: dict[str, int] = {}
        for pool in self.pools:
            for state, count in pool.stats().items():
                total[state] = total.get(state, 0) + count
        return total

    def check_integrity(self) -> None:
        """Assert that pools and indexes are sound and agree."""
        for pool, index in zip(self.pools, self.indexes, strict=True):
            pool.check_integrity()
            index.check_integrity()
            for key in index.published_keys():
                block = index.block(key)
                assert block is not None
                assert pool.key(block) == key, "index and pool disagree"
            published = sum(pool.key(b) is not None for b in range(1, pool.num_blocks + 1))
            assert published == len(index), "a published block is not indexed"

    def _runs(
        self, group: KVGroup, chain: KeyChain, limit: int, extra: Collection[BlockRef]
    ) -> list[int]:
        """`runs[n]`: how many blocks without a gap end at block n - 1 (sliding groups only)."""
        runs = [0]
        if group.window_blocks is None:
            return runs
        index = self.indexes[group.index]
        for i, key in enumerate(chain.keys[group.index][:limit]):
            present = key in index or (group.index, i) in extra
            runs.append(runs[-1] + 1 if present else 0)
        return runs


def as_tokens(tokens: Sequence[int]) -> TokenArray:
    """Token ids as the int64 array that keys are made of."""
    return np.asarray(tokens, dtype=np.int64)
