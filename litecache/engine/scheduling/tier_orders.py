"""What a scheduler orders of the lower tiers: lookups, loads and saves, and word of use.

A waiting request gets its blocks from below so: WAITING -> STAGING (the shards are asked) ->
WAITING with leased slots -> LOADING (copies run, and what has landed is published, whoever else
waits for it) -> WAITING with its blocks held. Then it is admitted like any other, and finds its
blocks in the pool. A failed copy is a miss and nothing else.

A key is published only after its bytes exist. What is published becomes eligible for saving by the
admission policy: "all" at once, "reused" on second sight, "none" never. A chain is saved in order;
what was dropped is tried again when it is used again.
"""

from __future__ import annotations

from collections.abc import Iterable

from litecache.engine.kv_layout import TRASH_BLOCK
from litecache.engine.scheduling.orders import LoadOrder, SaveOrder, Schedule, StageOrder
from litecache.engine.scheduling.prefix_cache import PrefixCache, PrefixMatch
from litecache.engine.scheduling.sequence import BlockRef, Sequence, SequenceStatus
from litecache.types import Tier

MAX_STAGING = 8
"""Requests that may hold leases in the shards at once."""

RUN_BYTES = 16 << 20
"""Bytes of a chain that go to one shard together."""


class TierOrders:
    """Orders of all requests; one lookup and one load at a time for each.

    Args:
        cache: pools and indexes.
        lower_tiers: whether there are any.
        admission: which published blocks are saved: "all", "reused" or "none".
    """

    def __init__(self, cache: PrefixCache, *, lower_tiers: bool, admission: str) -> None:
        self.exist = lower_tiers
        self._cache = cache
        self._admission = admission if lower_tiers else "none"
        self._active: dict[int, Sequence] = {}
        # blocks of loads that nobody waits for any more, until their copies have ended
        self._orphans: dict[int, dict[BlockRef, int]] = {}

    # Down to up

    @property
    def has_room(self) -> bool:
        """Another request may be staged."""
        return self.exist and len(self._active) < MAX_STAGING

    def stage(self, seq: Sequence, out: Schedule) -> bool:
        """Ask the lower tiers for what the pools lack; False when they lack nothing."""
        wanted = {
            (group, index): key
            for group, blocks in enumerate(self._cache.look(seq.chain))
            for index, (key, block) in enumerate(zip(seq.chain.keys[group], blocks, strict=True))
            if block < 0
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
        if not self._cache.begin_load(seq):
            return False
        if seq.loading:
            seq.status = SequenceStatus.LOADING
            out.loads.append(LoadOrder(seq.ticket, dict(seq.loading)))
        else:
            self.drop(seq, out)
        return True

    def on_loaded(self, order: LoadOrder, loaded: Iterable[BlockRef], *, ended: bool) -> None:
        """Copies of a load have landed; when it has ended, what did not land is a miss."""
        seq = self._active.get(order.ticket)
        if seq is not None:
            for group, index in sorted(loaded):
                block = seq.loading.pop((group, index))
                seq.held[group].append(block)
                seq.tiers[index] = tier = seq.staged[group, index]
                if self._cache.publish(seq, group, index, block) and tier == Tier.REMOTE.value:
                    self._cache.unsaved[group].add(seq.chain.keys[group][index])
        if not ended:
            return
        under_way = self._orphans.pop(order.ticket, {}) if seq is None else seq.loading
        for ref in order.blocks:
            if ref in under_way:
                self._cache.pools[ref[0]].release([under_way.pop(ref)])
        if seq is None and under_way:
            self._orphans[order.ticket] = under_way
        elif seq is not None and not under_way:
            self._cache.clear_pending(seq)
            del self._active[order.ticket]
            seq.status, seq.staged = SequenceStatus.WAITING, {}

    def drop(self, seq: Sequence, out: Schedule) -> None:
        """Give up a request's lookups, leases or load; copies that run are waited for."""
        if self._active.pop(seq.ticket, None) is None:
            return
        if seq.loading:
            self._orphans[seq.ticket] = seq.loading
            out.cancels.append(seq.ticket)
        else:
            out.discards.append(seq.ticket)
        seq.staged, seq.loading = {}, {}

    # Up to down

    def publish_computed(self, seq: Sequence, end: int, out: Schedule) -> None:
        """Publish the blocks that are full now that positions up to `end` are computed."""
        if end // self._cache.block_size <= seq.num_published:
            return
        last = min(end // self._cache.block_size, len(seq.chain.keys[0]))
        for index in range(seq.num_published, last):
            for group, table in enumerate(seq.tables):
                block = table[index]
                if block != TRASH_BLOCK and self._cache.publish(seq, group, index, block):
                    self._cache.unsaved[group].add(seq.chain.keys[group][index])
                    if self._admission == "all":
                        self._save(seq, group, index, block, out)
        seq.num_published = max(seq.num_published, last)

    def on_hit(self, seq: Sequence, match: PrefixMatch, out: Schedule) -> None:
        """A request has found blocks in the pool: unsaved ones are saved, the shards hear of all.

        They are told the last key of each run of the chain: a use of a block is one of those
        before it, and runs may lie on different shards.
        """
        if self._admission == "none":
            return
        if any(self._cache.unsaved):
            for index in range(match.num_blocks):
                for group, blocks in enumerate(match.blocks):
                    if blocks[index] != TRASH_BLOCK:
                        self._save(seq, group, index, blocks[index], out)
        for group, keys in enumerate(seq.chain.keys):
            run = self._run(group)
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

    def _save(self, seq: Sequence, group: int, index: int, block: int, out: Schedule) -> None:
        keys = seq.chain.keys[group]
        if keys[index] not in self._cache.unsaved[group]:
            return
        self._cache.unsaved[group].discard(keys[index])
        # The copy in flight keeps the block from being evicted under it.
        self._cache.pools[group].acquire([block])
        parent = seq.chain.parent(group, index)
        run_key = keys[index - index % self._run(group)]
        salt = seq.request.cache_salt
        out.saves.append(SaveOrder(group, block, keys[index], parent, run_key, salt))

    def _run(self, group: int) -> int:
        """Blocks of a chain that go to one shard together."""
        return max(1, RUN_BYTES // self._cache.groups[group].block_bytes)
