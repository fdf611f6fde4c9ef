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
from litecache.engine.scheduling.sequence import RequestQueues, Sequence, SequenceStatus
from litecache.engine.scheduling.step_plan import NewRow, TableUpdate
from litecache.engine.scheduling.tier_orders import TierOrders
from litecache.token_ids import TokenIds
from litecache.types import Tier


class Admission:
    """Starts waiting requests.

    Args:
        cache: pools and indexes.
        queues: who waits and who runs.
        tiers: what is ordered of the lower tiers.
    """

    def __init__(self, cache: PrefixCache, queues: RequestQueues, tiers: TierOrders) -> None:
        self._cache = cache
        self._queues = queues
        self._tiers = tiers

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
            if blocked and not (asks and self._tiers.has_room):
                if not self._tiers.has_room:
                    return
                continue
            match = self._cache.match(seq.chain, seq.tokens)
            if match.pending_owner not in (None, seq.id):
                continue
            # No place to ask now: those who have one go first, or nobody ever gives one back.
            if asks and (not self._tiers.has_room or self._tiers.stage(seq, out)):
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
        if not self._tiers.exist or seq.looked_up:
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
        return not seq.staged or self._tiers.load(seq, out)

    def _start(self, seq: Sequence, match: PrefixMatch, plan: PlanBuilder, out: Schedule) -> bool:
        """Give a waiting request its row and blocks; False when they do not fit now."""
        # Each running request will want a block soon: leave it one, or preemptions begin at once.
        firsts = self._cache.start(seq, match, spare=len(self._queues.running))
        if firsts is None:
            return False
        self._queues.start(seq)
        tokens = TokenIds(seq.tokens)
        plan.new_rows.append(NewRow(seq.row, tokens, seq.num_prompt, seq.request.sampling))
        for group, table in enumerate(seq.tables):
            plan.tables.append(TableUpdate(seq.row, group, 0, tuple(table)))
            if match.partials:
                plan.copy_block(group, match.partials[group].block, firsts[group])
        seq.num_published = match.num_blocks
        seq.cached = match.num_tokens == seq.num_tokens
        seq.num_computed = match.num_tokens - seq.cached
        if seq.reused is None:
            seq.reused = self._reuse_by_tier(seq, match)
        self._tiers.on_hit(seq, match, out)
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
        others = [
            seq
            for seq in self._queues.waiting
            if seq is not keep and seq.status is SequenceStatus.WAITING
        ]
        released = [self._cache.release_held(seq) for seq in others]
        return any(released)
