"""How waiting requests come in: staged, loaded, and started when their blocks fit.

In order of arrival and priority; a request that does not fit holds those behind it, so that
nobody is passed over for ever. Requests behind it may still be staged meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from litecache.engine.kv_layout import TRASH_BLOCK
from litecache.engine.scheduling.orders import Schedule
from litecache.engine.scheduling.plan_builder import PlanBuilder
from litecache.engine.scheduling.prefix_cache import PrefixCache, PrefixMatch
from litecache.engine.scheduling.publisher import Publisher
from litecache.engine.scheduling.request_queues import RequestQueues
from litecache.engine.scheduling.sequence import Sequence, SequenceStatus
from litecache.engine.scheduling.staging import Staging
from litecache.engine.scheduling.step_plan import NewRow, TableUpdate
from litecache.token_ids import TokenIds
from litecache.types import Tier


class Admission:
    """Starts waiting requests.

    Args:
        cache: pools and indexes.
        queues: who waits and who runs.
        staging: lookups and loads of the lower tiers.
        publisher: saves blocks on their second sight.
        lower_tiers: whether blocks can be staged.
    """

    def __init__(
        self,
        cache: PrefixCache,
        queues: RequestQueues,
        staging: Staging,
        publisher: Publisher,
        *,
        lower_tiers: bool,
    ) -> None:
        self._cache = cache
        self._queues = queues
        self._staging = staging
        self._publisher = publisher
        self._lower_tiers = lower_tiers

    def admit(self, plan: PlanBuilder, out: Schedule, alone: Sequence | None) -> None:
        """Stage, load and start waiting requests in order; one that does not fit holds the rest."""
        blocked = False
        for seq in list(self._queues.waiting):
            if (
                alone not in (None, seq)
                or seq.status is not SequenceStatus.WAITING
                or seq.num_in_flight
                or seq.paused
            ):
                continue
            blocked = blocked or plan.budget <= 0 or not self._queues.has_row
            asks = self._asks(seq, blocked)
            if blocked and not (asks and self._staging.has_room):
                if not (self._lower_tiers and self._staging.has_room):
                    return
                continue
            match = self._cache.match(seq.chain, seq.tokens)
            if match.pending_owner not in (None, seq.id):
                continue
            # No place to ask now: those who have one go first, or nobody ever gives one back.
            if asks and (not self._staging.has_room or self._staging.stage(seq, out)):
                continue
            if blocked:
                continue
            if not self._with_room(seq, functools.partial(self._load, seq, out)):
                blocked = True
            elif not seq.staged:
                start = functools.partial(self._start, seq, match, plan, out)
                blocked = not self._with_room(seq, start)

    def _asks(self, seq: Sequence, blocked: bool) -> bool:
        """Whether the lower tiers may hold blocks that the pool lacks."""
        if not self._lower_tiers or seq.looked_up:
            return False
        # What the pool held when it was asked may be evicted while the request waits, above all
        # the blocks of a preempted one: it asks again when its turn comes.
        return seq.complete_at is None or (
            not blocked and seq.complete_at != self._cache.num_evictions
        )

    def _with_room(self, seq: Sequence, act: Callable[[], bool]) -> bool:
        """Try `act`; when nothing runs that could free blocks, take others' loaded ones."""
        return act() or (not self._queues.running and self._drop_held(seq) and act())

    def _load(self, seq: Sequence, out: Schedule) -> bool:
        return not seq.staged or self._staging.load(seq, out)

    def _start(self, seq: Sequence, match: PrefixMatch, plan: PlanBuilder, out: Schedule) -> bool:
        """Give a waiting request its row and blocks; False when they do not fit now."""
        pools = self._cache.pools
        wanted = -(-seq.num_tokens // self._cache.block_size) - match.num_blocks
        kept = [
            [b for b in blocks if b != TRASH_BLOCK] + [p.block for p in match.partials[g : g + 1]]
            for g, blocks in enumerate(match.blocks)
        ]
        for pool, blocks in zip(pools, kept, strict=True):
            pool.acquire(blocks)
        # Each running request will want a block soon: leave it one, or preemptions begin at once.
        if any(wanted + len(self._queues.running) > pool.num_available for pool in pools):
            for pool, blocks in zip(pools, kept, strict=True):
                pool.release(blocks)
            return False
        self._queues.start(seq)
        tokens = TokenIds(seq.tokens)
        plan.new_rows.append(NewRow(seq.row, tokens, seq.num_prompt, seq.request.sampling))
        for group, pool in enumerate(pools):
            fresh = pool.allocate(wanted)
            seq.tables[group] = match.blocks[group] + fresh
            plan.tables.append(TableUpdate(seq.row, group, 0, tuple(seq.tables[group])))
            if match.partials:
                plan.copy_block(group, match.partials[group].block, fresh[0])
            pool.release(seq.held[group])
            seq.held[group] = []
            for key in seq.chain.keys[group][match.num_blocks :]:
                self._cache.indexes[group].set_pending(key, seq.id)
        seq.num_published = match.num_blocks
        seq.cached = match.num_tokens == seq.num_tokens
        seq.num_computed = match.num_tokens - seq.cached
        if seq.reused is None:
            seq.reused = self._reuse_by_tier(seq, match)
        self._publisher.save_on_sight(seq, match, out)
        self._publisher.touch(seq, match, out)
        if seq.num_todo == 1:
            plan.add_step(seq, 1)
        else:
            plan.add_chunk(seq)
        return True

    def _reuse_by_tier(self, seq: Sequence, match: PrefixMatch) -> dict[str, int]:
        """Tokens that need no computing, by the tier they came from."""
        size, gpu = self._cache.block_size, Tier.GPU.value
        reused: dict[str, int] = {}
        tail = match.num_tokens - match.num_blocks * size
        if not seq.tiers:
            return {gpu: match.num_tokens} if match.num_tokens else reused
        tier = gpu
        for index in reversed(range(match.num_blocks)):
            # What no window reaches any more was not fetched: it counts with what follows it.
            if any(blocks[index] != TRASH_BLOCK for blocks in match.blocks):
                tier = seq.tiers.get(index, gpu)
            reused[tier] = reused.get(tier, 0) + size
        if tail:
            reused[gpu] = reused.get(gpu, 0) + tail
        return reused

    def _drop_held(self, keep: Sequence) -> bool:
        """Nothing runs and `keep` does not fit: others' loaded blocks become evictable."""
        dropped = False
        for seq in self._queues.waiting:
            if seq is not keep and seq.status is SequenceStatus.WAITING and any(seq.held):
                for group, pool in enumerate(self._cache.pools):
                    pool.release(seq.held[group])
                    seq.held[group] = []
                dropped = True
        return dropped
