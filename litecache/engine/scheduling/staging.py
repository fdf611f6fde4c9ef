"""How a waiting request gets its blocks from the lower tiers, seen from the scheduler.

WAITING -> STAGING (the shards are asked) -> WAITING with leased slots -> LOADING (copies run)
-> WAITING with its blocks published and held. Then it is admitted like any other request, and
finds its blocks in the pool. A failed copy is a miss and nothing else.
"""

from __future__ import annotations

from litecache.engine.scheduling.orders import LoadOrder, Schedule, StageOrder
from litecache.engine.scheduling.prefix_cache import BlockRef, PrefixCache
from litecache.engine.scheduling.publisher import Publisher
from litecache.engine.scheduling.sequence import Sequence, SequenceStatus
from litecache.types import Tier

MAX_STAGING = 8
"""Requests that may hold leases in the shards at once."""


class Staging:
    """Orders lookups and loads, one of each at a time per request.

    Args:
        cache: pools and indexes.
        publisher: publishes what was loaded.
    """

    def __init__(self, cache: PrefixCache, publisher: Publisher) -> None:
        self._cache = cache
        self._publisher = publisher
        self._active: dict[int, Sequence] = {}

    @property
    def has_room(self) -> bool:
        """Another request may be staged."""
        return len(self._active) < MAX_STAGING

    def stage(self, seq: Sequence, out: Schedule) -> bool:
        """Ask the lower tiers for what the pools lack; False when they lack nothing."""
        wanted = {
            (group.index, i): key
            for group in self._cache.groups
            for i, key in enumerate(seq.chain.keys[group.index])
            if key not in self._cache.indexes[group.index]
        }
        if not wanted:
            seq.complete_at = self._cache.num_evictions
            return False
        seq.status = SequenceStatus.STAGING
        self._active[seq.ticket] = seq
        out.stages.append(StageOrder(seq.ticket, wanted))
        return True

    def on_staged(self, ticket: int, found: dict[BlockRef, str]) -> Schedule:
        """The lower tiers hold these blocks (-> tier) and have leased their slots."""
        out = Schedule()
        seq = self._active.get(ticket)
        if seq is None:
            out.discards.append(ticket)
            return out
        seq.status = SequenceStatus.WAITING
        seq.looked_up = True
        seq.staged = found
        if not found:
            del self._active[ticket]
        return out

    def load(self, seq: Sequence, out: Schedule) -> bool:
        """Order the useful staged blocks into the pools; False when there is no room now.

        When none is useful the request stays WAITING, without leases.
        """
        pools = self._cache.pools
        present, missing = self._split(seq)
        if not any(missing):
            self.drop(seq, out)
            return True
        for pool, blocks in zip(pools, present, strict=True):
            pool.acquire(blocks)
        if any(len(m) > pool.num_available for m, pool in zip(missing, pools, strict=True)):
            for pool, blocks in zip(pools, present, strict=True):
                pool.release(blocks)
            return False
        order: dict[BlockRef, int] = {}
        for group, indices in enumerate(missing):
            loading = pools[group].allocate(len(indices), loading=True)
            order.update({(group, i): b for i, b in zip(indices, loading, strict=True)})
            seq.held[group].extend(present[group] + loading)
            for i in indices:
                self._cache.indexes[group].set_pending(seq.chain.keys[group][i], seq.id)
        seq.status = SequenceStatus.LOADING
        out.loads.append(LoadOrder(seq.ticket, order))
        return True

    def on_loaded(self, order: LoadOrder, loaded: set[BlockRef]) -> None:
        """The copies of an order ended; its blocks that are not in `loaded` are misses."""
        seq = self._active.pop(order.ticket, None)
        if seq is None:
            for (group, _), block in order.blocks.items():
                self._cache.pools[group].release([block])
            return
        for group, index in sorted(order.blocks):
            if (group, index) in loaded:
                tier = seq.staged[group, index]
                block = order.blocks[group, index]
                stored = tier != Tier.REMOTE.value
                self._publisher.publish_loaded(seq, group, index, block, stored=stored)
                seq.tiers[index] = tier
        for prefix_index, keys in zip(self._cache.indexes, seq.chain.keys, strict=True):
            prefix_index.clear_pending(keys, seq.id)
        seq.status = SequenceStatus.WAITING
        seq.staged = {}

    def drop(self, seq: Sequence, out: Schedule) -> None:
        """Give up a request's lookups, leases or load; copies that run are waited for."""
        if self._active.pop(seq.ticket, None) is None:
            return
        seq.staged = {}
        if seq.status is SequenceStatus.LOADING:
            # `on_loaded` releases the loading blocks by its order; keep only the others here.
            seq.held = [
                [block for block in blocks if pool.key(block) is not None]
                for pool, blocks in zip(self._cache.pools, seq.held, strict=True)
            ]
        else:
            out.discards.append(seq.ticket)

    def _split(self, seq: Sequence) -> tuple[list[list[int]], list[list[int]]]:
        """Per group: pool blocks of the longest reusable prefix, and the indices to load."""
        length = self._cache.reusable_blocks(seq.chain, len(seq.chain.keys[0]), seq.staged)
        present: list[list[int]] = []
        missing: list[list[int]] = []
        for group, index in zip(self._cache.groups, self._cache.indexes, strict=True):
            keys = seq.chain.keys[group.index]
            needed = range(self._cache.first_needed(group, length), length)
            blocks = [(i, index.block(keys[i])) for i in needed]
            present.append([b for _, b in blocks if b is not None])
            missing.append([i for i, b in blocks if b is None])
        return present, missing
