"""The pools and prefix indexes of all KV groups of a model: the one owner of block references.

A prefix of a sequence is reusable when every group holds the blocks that its window policy needs:
all of them for full attention, the trailing ones for a sliding window. This class answers "how
much of this sequence do we have", block by block, and gives and takes the references that
sequences, loads and copies hold: each call gives all it is asked for or changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from collections.abc import Sequence as Seq
from typing import NamedTuple

from litecache.engine.kv_layout import TRASH_BLOCK, KVGroup
from litecache.engine.scheduling.block_pool import BlockPool
from litecache.engine.scheduling.prefix_index import PartialMatch, PrefixIndex, TokenArray
from litecache.engine.scheduling.sequence import BlockRef, KeyChain, Sequence
from litecache.hashing import BlockKey


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

    def __init__(self, groups: Seq[KVGroup], num_blocks: int) -> None:
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
            if not group.policy.slides:
                keys = chain.keys[group.index][:limit]
                limit = index.match_run(keys)
                while limit < len(keys) and (keys[limit] in index or (group.index, limit) in extra):
                    limit += 1
        sliding = [group for group in self.groups if group.policy.slides]
        if not sliding:
            return limit
        runs = [self._runs(group, chain, limit, extra) for group in sliding]
        for length in range(limit, 0, -1):
            if all(
                run[length] >= length - group.policy.first_needed(length)
                for group, run in zip(sliding, runs, strict=True)
            ):
                return length
        return 0

    def look(self, chain: KeyChain) -> list[list[int]]:
        """Per group, where each full block of a sequence is: its block, `PENDING` or `MISSING`."""
        return [index.look(keys) for keys, index in zip(chain.keys, self.indexes, strict=True)]

    def match(self, chain: KeyChain, tokens: TokenArray) -> PrefixMatch:
        """Find what the pools hold of a sequence; takes no references.

        The match covers all tokens only if they end with a full block: of a partial block at
        least the last token is left to compute.
        """
        full_blocks = len(tokens) // self.block_size
        length = self.reusable_blocks(chain, full_blocks)
        blocks = []
        for group, index in zip(self.groups, self.indexes, strict=True):
            first = group.policy.first_needed(length)
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

    def publish(self, seq: Sequence, group: int, index: int, block: int) -> bool:
        """Publish a block that is computed or loaded; False if its key is published already."""
        size = self.block_size
        key, parent = seq.chain.keys[group][index], seq.chain.parent(group, index)
        tokens = seq.tokens[index * size : (index + 1) * size].copy()
        if not self.indexes[group].insert(key, block, parent, tokens):
            return False
        self.pools[group].publish(block, key)
        return True

    def _forget(self, group: int, key: BlockKey) -> None:
        self.indexes[group].remove(key)
        self.unsaved[group].discard(key)

    # References of sequences

    def start(self, seq: Sequence, match: PrefixMatch, spare: int) -> list[int] | None:
        """Give a waiting sequence blocks for all its known tokens, the match's and fresh ones.

        Args:
            seq: gets its block tables; what it held for the wait goes.
            match: what the pools hold of it.
            spare: blocks that must be left for others.

        Returns:
            Per group, the first fresh block (the trash block if there is none); None when the
            blocks do not fit now.
        """
        wanted = -(-seq.num_tokens // self.block_size) - match.num_blocks
        kept = [
            [b for b in blocks if b != TRASH_BLOCK] + [p.block for p in match.partials[g : g + 1]]
            for g, blocks in enumerate(match.blocks)
        ]
        if not self._acquire(kept, [wanted + spare] * len(self.pools)):
            return None
        firsts = []
        for group, pool in enumerate(self.pools):
            fresh = pool.allocate(wanted)
            seq.tables[group] = match.blocks[group] + fresh
            firsts.append(fresh[0] if fresh else TRASH_BLOCK)
            for key in seq.chain.keys[group][match.num_blocks :]:
                self.indexes[group].set_pending(key, seq.id)
        self.release_held(seq)
        return firsts

    def begin_load(self, seq: Sequence) -> bool:
        """Give a waiting sequence `loading` blocks for what was staged and is of use.

        The blocks of its reusable prefix that are in the pools already are held with them, so that
        the prefix is whole when the load has ended.

        Returns:
            False when the blocks do not fit now. Nothing to load is an empty `loading`.
        """
        length = self.reusable_blocks(seq.chain, len(seq.chain.keys[0]), seq.staged)
        present: list[list[int]] = []
        missing: list[list[int]] = []
        for kv_group, blocks in zip(self.groups, self.look(seq.chain), strict=True):
            needed = range(kv_group.policy.first_needed(length), length)
            present.append([blocks[i] for i in needed if blocks[i] >= 0])
            missing.append([i for i in needed if blocks[i] < 0])
        if not any(missing):
            return True
        if not self._acquire(present, [len(indices) for indices in missing]):
            return False
        for group, indices in enumerate(missing):
            loading = self.pools[group].allocate(len(indices), loading=True)
            seq.loading.update(zip(((group, i) for i in indices), loading, strict=True))
            seq.held[group].extend(present[group])
            for i in indices:
                self.indexes[group].set_pending(seq.chain.keys[group][i], seq.id)
        return True

    def _acquire(self, blocks: Seq[Seq[int]], room: Seq[int]) -> bool:
        """Add references per group if that leaves `room` blocks to allocate; all or nothing."""
        for pool, mine in zip(self.pools, blocks, strict=True):
            pool.acquire(mine)
        if all(n <= pool.num_available for pool, n in zip(self.pools, room, strict=True)):
            return True
        for pool, mine in zip(self.pools, blocks, strict=True):
            pool.release(mine)
        return False

    def grow(self, seq: Sequence, group: int) -> int:
        """Append a fresh block to a running sequence's table.

        Raises:
            CapacityError: no block is available; nothing changed.
        """
        (block,) = self.pools[group].allocate(1)
        seq.tables[group].append(block)
        return block

    def trim(self, seq: Sequence) -> list[tuple[int, int, int]]:
        """Free the published blocks of a running sequence that no later position sees.

        Returns:
            (group, first, end) of the table entries that are the trash block now.
        """
        trimmed = []
        for kv_group, table in zip(self.groups, seq.tables, strict=True):
            group = kv_group.index
            end = min(kv_group.policy.left_behind(seq.num_computed), seq.num_published)
            first = end
            while first > 0 and table[first - 1] != TRASH_BLOCK:
                first -= 1
            if first < end:
                self.pools[group].release(table[first:end])
                table[first:end] = [TRASH_BLOCK] * (end - first)
                trimmed.append((group, first, end))
        return trimmed

    def release_held(self, seq: Sequence) -> bool:
        """Let go of what a waiting sequence holds besides a load; False if that is nothing."""
        held = any(seq.held)
        for pool, blocks in zip(self.pools, seq.held, strict=True):
            pool.release(blocks)
        seq.held = [[] for _ in self.pools]
        return held

    def drop(self, seq: Sequence) -> None:
        """Take back all references of a sequence, but for those of a load under way."""
        for group, pool in enumerate(self.pools):
            pool.release(seq.tables[group])
            seq.tables[group] = []
        self.release_held(seq)
        self.clear_pending(seq)

    def clear_pending(self, seq: Sequence) -> None:
        """Nobody needs to wait for this sequence's blocks any more."""
        for index, keys in zip(self.indexes, seq.chain.keys, strict=True):
            index.clear_pending(keys, seq.id)

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
        index = self.indexes[group.index]
        for i, key in enumerate(chain.keys[group.index][:limit]):
            present = key in index or (group.index, i) in extra
            runs.append(runs[-1] + 1 if present else 0)
        return runs
