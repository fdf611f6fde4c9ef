"""When computed blocks become visible to others, and which of them are saved to lower tiers.

A key is published only after its bytes exist. What is published becomes eligible for saving by
the admission policy: "all" at once, "reused" on second sight, "none" never. A chain is saved in
order; what was dropped is tried again when it is used again.
"""

from __future__ import annotations

from collections.abc import Iterable

from litecache.engine.kv_layout import TRASH_BLOCK
from litecache.engine.scheduling.orders import SaveOrder, Schedule
from litecache.engine.scheduling.prefix_cache import PrefixCache, PrefixMatch
from litecache.engine.scheduling.sequence import Sequence

RUN_BYTES = 16 << 20
"""Bytes of a chain that go to one shard together."""


class Publisher:
    """Publishes blocks of sequences and orders their saving.

    Args:
        cache: pools and indexes.
        admission: "all", "reused" or "none".
    """

    def __init__(self, cache: PrefixCache, admission: str) -> None:
        self._cache = cache
        self._admission = admission

    def publish_computed(self, seq: Sequence, end: int, out: Schedule) -> None:
        """Publish the blocks that are full now that positions up to `end` are computed."""
        if end // self._cache.block_size <= seq.num_published:
            return
        last = min(end // self._cache.block_size, len(seq.chain.keys[0]))
        for index in range(seq.num_published, last):
            for group, table in enumerate(seq.tables):
                if table[index] != TRASH_BLOCK and self._publish(seq, group, index, table[index]):
                    self._cache.unsaved[group].add(seq.chain.keys[group][index])
                    if self._admission == "all":
                        self._save(seq, group, index, table[index], out)
        seq.num_published = max(seq.num_published, last)

    def publish_loaded(
        self, seq: Sequence, group: int, index: int, block: int, *, stored: bool
    ) -> None:
        """Publish a block that came from a lower tier (`stored`) or from another node."""
        if self._publish(seq, group, index, block) and not stored:
            self._cache.unsaved[group].add(seq.chain.keys[group][index])

    def save_on_sight(self, seq: Sequence, match: PrefixMatch, out: Schedule) -> None:
        """Blocks that are used again and were not saved so far are saved now."""
        if self._admission == "none" or not any(self._cache.unsaved):
            return
        for index in range(match.num_blocks):
            for group, blocks in enumerate(match.blocks):
                if blocks[index] != TRASH_BLOCK:
                    self._save(seq, group, index, blocks[index], out)

    def touch(self, seq: Sequence, match: PrefixMatch, out: Schedule) -> None:
        """Let the shards hear of a hit in the pool: the last key of each run of the chain.

        A use of a block is one of those before it, and runs may lie on different shards.
        """
        if self._admission == "none":
            return
        for group, keys in zip(self._cache.groups, seq.chain.keys, strict=True):
            run = max(1, RUN_BYTES // group.block_bytes)
            ends = [*range(run, match.num_blocks, run), match.num_blocks]
            out.touches += [keys[end - 1] for end in reversed(ends) if end]

    def on_saved(self, orders: Iterable[SaveOrder], dropped: Iterable[SaveOrder]) -> None:
        """Copies ended: give their references back; the dropped ones are unsaved again."""
        for order in orders:
            self._cache.pools[order.group].release([order.block])
        for order in dropped:
            if order.key in self._cache.indexes[order.group]:
                self._cache.unsaved[order.group].add(order.key)
            self._cache.pools[order.group].release([order.block])

    def _publish(self, seq: Sequence, group: int, index: int, block: int) -> bool:
        size = self._cache.block_size
        key, parent = seq.chain.keys[group][index], seq.chain.parent(group, index)
        tokens = seq.tokens[index * size : (index + 1) * size]
        return self._cache.publish(group, block, key, parent, tokens)

    def _save(self, seq: Sequence, group: int, index: int, block: int, out: Schedule) -> None:
        keys = seq.chain.keys[group]
        if keys[index] not in self._cache.unsaved[group]:
            return
        self._cache.unsaved[group].discard(keys[index])
        # The copy in flight keeps the block from being evicted under it.
        self._cache.pools[group].acquire([block])
        run = max(1, RUN_BYTES // self._cache.groups[group].block_bytes)
        parent = seq.chain.parent(group, index)
        run_key = keys[index - index % run]
        salt = seq.request.cache_salt
        out.saves.append(SaveOrder(group, block, keys[index], parent, run_key, salt))
