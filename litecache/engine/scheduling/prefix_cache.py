"""The pools and prefix indexes of all KV groups of a model: the one owner of block references.

A prefix of a sequence is reusable when every group holds the blocks that its window policy needs:
all of them for full attention, the trailing ones for a sliding window. This class answers "how
much of this sequence do we have", block by block, and gives and takes the references that
sequences, loads and copies hold: each call gives all it is asked for or changes nothing.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq

import numpy as np

from litecache.engine.kv_layout import TRASH_BLOCK, KVGroup
from litecache.engine.scheduling.below import Numbers, Refs
from litecache.engine.scheduling.block_pool import BlockPool
from litecache.engine.scheduling.prefix_index import (
    TOKEN_BYTES,
    PrefixIndex,
    TokenArray,
    sortable,
)
from litecache.engine.scheduling.sequence import GPU, KeyChain, Sequence
from litecache.errors import CapacityError
from litecache.hashing import KEY_BYTES, BlockKey, block_key


class PrefixCache:
    """Pools and indexes of all groups.

    Args:
        groups: the model's KV groups.
        num_blocks: blocks per group, the trash block not counted.
        quotas: root keys of salts (of every group) to the blocks that they may hold of its pool.

    Attributes:
        unsaved: per group, published keys that no lower tier is known to hold.
    """

    def __init__(
        self, groups: Seq[KVGroup], num_blocks: int, quotas: Mapping[BlockKey, int] | None = None
    ) -> None:
        self.groups = tuple(groups)
        self.block_size = groups[0].block_size
        self.indexes = [PrefixIndex() for _ in groups]
        self.unsaved: list[set[BlockKey]] = [set() for _ in groups]
        self.pools = [
            BlockPool(num_blocks, functools.partial(self._forget, group), quotas)
            for group in range(len(groups))
        ]

    def look(self, seq: Sequence) -> list[list[int]]:
        """Per group, where each full block that a sequence may reuse is: its block, `PENDING` or
        `MISSING`."""
        if not seq.num_logits:
            return self.look_whole(seq.chain)
        end = seq.num_reusable // self.block_size
        pairs = zip(seq.chain.keys, self.indexes, strict=True)
        return [index.look(keys[:end]) for keys, index in pairs]

    def look_whole(self, chain: KeyChain) -> list[list[int]]:
        """`look` for all full blocks of a chain."""
        return [index.look(keys) for keys, index in zip(chain.keys, self.indexes, strict=True)]

    def run_end(self, has: Callable[[int, int], bool], first: int, limit: int) -> int:
        """End of the longest run of blocks from `first` on behind which a sequence can go on.

        Args:
            has: whether the KV of block (group, index) is there.
            first: all in front of this block is there, as far as windows reach.
            limit: consider blocks below this index.
        """
        sliding = []
        for group in self.groups:
            if group.policy.slides:
                sliding.append(group)
                continue
            end = first
            while end < limit and has(group.index, end):
                end += 1
            limit = end
        for group in sliding:
            if limit > first and not any(has(group.index, i) for i in range(first, limit)):
                return first
        runs = [self._runs(has, group.index, first, limit) for group in sliding]
        for end in range(limit, first, -1):
            if all(
                run[end - first] >= end - max(first, group.policy.first_needed(end))
                for group, run in zip(sliding, runs, strict=True)
            ):
                return end
        return first

    def _runs(
        self, has: Callable[[int, int], bool], group: int, first: int, limit: int
    ) -> list[int]:
        """`runs[n]`: how many blocks without a gap end at block first + n - 1."""
        runs = [0]
        for index in range(first, limit):
            runs.append(runs[-1] + 1 if has(group, index) else 0)
        return runs

    def present(self, looked: Seq[Seq[int]]) -> int:
        """Length in blocks of the reusable prefix, of what `look` has told."""
        return self.run_end(lambda g, i: looked[g][i] >= 0, 0, len(looked[0]))

    def pending_owner(self, chain: KeyChain, index: int) -> str | None:
        """Who computes or loads a block right now, if somebody does."""
        if index >= len(chain.keys[0]):
            return None
        owners = (known.pending_owner(chain.keys[g][index]) for g, known in enumerate(self.indexes))
        return next((owner for owner in owners if owner is not None), None)

    def publish(self, seq: Sequence, group: int, indices: Seq[int], blocks: Seq[int]) -> list[int]:
        """Publish blocks that are computed or loaded; the indices of those whose keys were not
        published already.

        A sequence that shares nothing keeps its blocks to itself.
        """
        if seq.unshared or not indices:
            return []
        known, pool = self.indexes[group], self.pools[group]
        keys, root = seq.chain.keys[group], seq.chain.roots[group]
        first, size = min(indices), self.block_size
        tokens = sortable(seq.tokens[first * size : (max(indices) + 1) * size])
        size *= TOKEN_BYTES
        fresh = []
        for index, block in zip(indices, blocks, strict=True):
            key, parent, at = keys[index], keys[index - 1] if index else root, index - first
            if known.insert(key, block, parent, tokens[at * size : (at + 1) * size], root):
                pool.publish(block, key, owner=root)
                fresh.append(index)
        return fresh

    def publish_tail(self, seq: Sequence) -> None:
        """Let others copy the partial block at the end of a sequence whose positions are all
        computed: who goes on from there has nothing else to compute. It is the first to be
        evicted, and nothing saves it."""
        end = seq.num_tokens // self.block_size
        tokens = seq.tokens[end * self.block_size :]
        if seq.unshared or not len(tokens):
            return
        for group, (index, pool) in enumerate(zip(self.indexes, self.pools, strict=True)):
            parent, block = seq.chain.parent(group, end), seq.tables[group][end]
            key = block_key(parent, tokens)
            root = seq.chain.roots[group]
            if pool.is_writable(block) and index.insert(key, block, parent, sortable(tokens), root):
                pool.publish(block, key, partial=True, owner=root)

    def _forget(self, group: int, key: BlockKey) -> None:
        self.indexes[group].remove(key)
        self.unsaved[group].discard(key)

    def delete(self, roots: Seq[BlockKey]) -> int:
        """Evict all blocks under a salt's roots; what is in use gets a key that nobody asks for.

        Returns:
            How many there were.
        """
        count = 0
        for group, root in enumerate(roots):
            index, pool = self.indexes[group], self.pools[group]
            for key in index.of_root(root):
                count += 1
                block = index.block(key)
                assert block is not None
                if not pool.ref_count(block):
                    pool.evict(block)
                    continue
                self._forget(group, key)
                unknown = secrets.token_bytes(KEY_BYTES)
                index.insert(unknown, block, unknown, b"")
                pool.rename(block, unknown)
        return count

    # References of sequences

    def start(self, seq: Sequence, looked: Seq[Seq[int]], spare: int) -> bool:
        """Give a waiting sequence a table for all its known tokens: what the pools hold, the rest
        fresh, and the cursor behind the prefix that is whole.

        Args:
            seq: its tables are empty.
            looked: what `look` tells of it now.
            spare: blocks that must be left for others.

        Returns:
            Whether the blocks fit now.
        """
        size = self.block_size
        length = self.present(looked)
        total = -(-seq.num_tokens // size)
        kept: list[dict[int, int]] = []
        room = []
        for group, found in zip(self.groups, looked, strict=True):
            first = group.policy.first_needed(length)
            kept.append({i: b for i, b in enumerate(found) if b >= 0 and i >= first})
            room.append(total - first - len(kept[-1]) + spare)
        if not self._acquire([list(mine.values()) for mine in kept], room):
            return False
        for number, mine in enumerate(kept):
            first = self.groups[number].policy.first_needed(length)
            blocks = self.pools[number].allocate(total - first - len(mine))
            if mine:
                fresh = iter(blocks)
                blocks = [mine.get(i) or next(fresh) for i in range(first, total)]
            seq.tables[number] = [TRASH_BLOCK] * first + blocks
            seq.ahead[number] = {i for i in mine if i >= length}
            if not seq.unshared:
                self.indexes[number].set_pending(seq.chain.keys[number][length:], seq.id)
        seq.num_computed = length * size
        seq.num_published = length
        seq.changed.update((group, 0) for group in range(len(self.groups)))  # all of it is new
        return True

    def copy_tail(self, seq: Sequence, running: Iterable[Sequence] = ()) -> None:
        """Reuse to the token: copy the block that begins as does the one behind the hit.

        It is one that is published, or one that a running sequence is filling: what it holds by
        now does not change. Of a partial block at least the last token is left to compute. Nothing
        is changed where not all groups have such a block.
        """
        size = self.block_size
        end = seq.num_computed // size
        if seq.below.num_loading or any(seq.ahead):
            end = 1 + max({*seq.below.loading()[:1, 1].tolist()}.union(*seq.ahead))
        rest = seq.tokens[end * size : seq.num_reusable][:size]
        partials = [
            index.match_partial(seq.chain.parent(group, end), rest)
            for group, index in enumerate(self.indexes)
        ]
        shared = min((partial.num_tokens if partial else 0 for partial in partials), default=0)
        blocks = [partial.block if partial else TRASH_BLOCK for partial in partials]
        for donor in running if shared < len(rest) else ():
            count = self._held_of(donor, seq, end, rest)
            if count > shared:
                shared, blocks = count, [table[end] for table in donor.tables]
        writable = all(
            end < len(table)
            and pool.is_writable(table[end])
            and not seq.below.is_staged(group, end)
            for group, (table, pool) in enumerate(zip(seq.tables, self.pools, strict=True))
        )
        if not shared or not writable:
            return
        for group, block in enumerate(blocks):
            self.pools[group].acquire([block])
            seq.copies.append((group, block, seq.tables[group][end]))
        seq.tail = (end * size, end * size + shared)

    def _held_of(self, donor: Sequence, seq: Sequence, index: int, rest: TokenArray) -> int:
        """How many of the tokens `rest` of block `index` of a sequence a running one holds for
        certain, in the same place behind the same tokens."""
        first = index * self.block_size
        held = min(donor.num_confirmed - first, len(rest))
        if donor is seq or donor.unshared or held <= 0:
            return 0
        if donor.chain.parent(0, index) != seq.chain.parent(0, index):
            return 0
        if any(table[index] == TRASH_BLOCK for table in donor.tables):
            return 0
        if any(index in holes for holes in donor.holes):
            return 0
        differs = donor.tokens[first : first + held] != rest[:held]
        return int(np.argmax(differs)) if differs.any() else held

    def advance(self, seq: Sequence) -> None:
        """Move the cursor over what is there."""
        size = self.block_size
        while not seq.num_computed % size:
            if seq.tail is not None and seq.tail[0] == seq.num_computed:
                if not seq.tiers[seq.tail[0] // size]:
                    seq.num_tail = seq.tail[1] - seq.tail[0]
                seq.num_computed, seq.tail = seq.tail[1], None
                return
            first = seq.num_computed // size
            end = self.ahead_end(seq, first)
            if end == first:
                return
            tiers, passed = seq.tiers[first:end], range(first, end)
            tiers[tiers == 0] = GPU
            for group, (mine, holes) in enumerate(zip(seq.ahead, seq.holes, strict=True)):
                never = set(passed).difference(mine)
                holes.update(never)
                mine.difference_update(passed)
                keys = [seq.chain.keys[group][index] for index in never]
                self.indexes[group].clear_pending(keys, seq.id)  # nobody is to wait for them
            seq.num_computed = end * size

    def ahead_end(self, seq: Sequence, first: int) -> int:
        """Where the cursor would stand if it came to block `first`."""
        if not any(seq.ahead):
            return first
        if len(self.groups) == 1 and not self.groups[0].policy.slides:
            ahead, end = seq.ahead[0], first
            while end in ahead:
                end += 1
            return end
        return self.run_end(lambda g, i: i in seq.ahead[g], first, len(seq.chain.keys[0]))

    def make_writable(self, seq: Sequence, count: int) -> int:
        """Let a sequence compute its next `count` positions into blocks of its own.

        What is published, or what a copy may still write to, is left to others for a fresh block.

        Returns:
            How many of the positions have a block; fewer where there is no room.
        """
        size = self.block_size
        for index in range(seq.num_computed // size, -(-(seq.num_computed + count) // size)):
            for group, pool in enumerate(self.pools):
                block = seq.tables[group][index]
                if pool.is_writable(block):
                    continue
                if seq.reserve[group]:
                    self.reserve(seq, group, seq.reserve[group] - 1)
                try:
                    (fresh,) = pool.allocate(1)
                except CapacityError:
                    return max(0, index * size - seq.num_computed)
                pool.release([block], seq.last_step)
                seq.tables[group][index] = fresh
                seq.changed.add((group, index))
                seq.ahead[group].discard(index)
        return count

    def reserve(self, seq: Sequence, group: int, count: int) -> None:
        """Keep so many available blocks for a sequence, or as many as there are."""
        pool = self.pools[group]
        more = min(count - seq.reserve[group], pool.num_available)
        pool.reserved += more
        seq.reserve[group] += more

    def begin_copies(self, seq: Sequence, refs: Refs) -> tuple[Numbers, Numbers]:
        """Blocks of a sequence's table that something is copied into, and the last steps that use
        them, `[n]` each; each gets a reference."""
        blocks, steps = np.zeros((2, len(refs)), dtype=np.int64)
        for group, (pool, table) in enumerate(zip(self.pools, seq.tables, strict=True)):
            at = refs[:, 0] == group
            mine = [*map(table.__getitem__, refs[at, 1].tolist())]
            pool.begin_copies(mine)
            blocks[at], steps[at] = mine, [*map(pool.used_in.__getitem__, mine)]
        return blocks, steps

    def _acquire(self, blocks: Seq[Seq[int]], room: Seq[int]) -> bool:
        """Add references per group if that leaves `room` blocks to allocate; all or nothing."""
        for pool, mine in zip(self.pools, blocks, strict=True):
            pool.acquire(mine)
        if all(n <= pool.num_available for pool, n in zip(self.pools, room, strict=True)):
            return True
        for pool, mine in zip(self.pools, blocks, strict=True):
            pool.release(mine)
        return False

    def grow(self, seq: Sequence, group: int) -> None:
        """Append a fresh block to a running sequence's table.

        Raises:
            CapacityError: no block is available; nothing changed.
        """
        (block,) = self.pools[group].allocate(1)
        seq.changed.add((group, len(seq.tables[group])))
        seq.tables[group].append(block)

    def trim(self, seq: Sequence) -> None:
        """Free the published blocks of a running sequence that no later position sees."""
        for kv_group, table in zip(self.groups, seq.tables, strict=True):
            group = kv_group.index
            end = min(kv_group.policy.left_behind(seq.num_computed), seq.num_published)
            first = end
            while first > 0 and table[first - 1] != TRASH_BLOCK:
                first -= 1
            if first < end:
                self.pools[group].release(table[first:end], seq.last_step)
                table[first:end] = [TRASH_BLOCK] * (end - first)
                seq.changed.update((group, index) for index in range(first, end))

    def drop(self, seq: Sequence) -> None:
        """Take back all references of a sequence; those of copies under way stay."""
        for group, source, _ in seq.copies:
            self.pools[group].release([source])
        for group, pool in enumerate(self.pools):
            self.reserve(seq, group, 0)
            pool.release(seq.tables[group], seq.last_step)
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
