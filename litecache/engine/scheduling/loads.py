"""What the scheduler orders from the lower tiers: lookups and loads.

A request is looked up as it arrives, and starts with its whole table. Of what was found below, a
gap-free run of blocks [m, end) is loaded from the back while chunks are computed from the front;
the cost model chooses m, again as blocks arrive. Where the cursor meets the loads it waits for
them, if that is sooner than to compute the next chunk, or takes blocks over: their copies are
cancelled, and those that have begun end in blocks that nobody reads.

Every ordered copy holds a reference to its block until it is reported, whatever has become of the
request meanwhile. What has landed is published. A lost block is a hole and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from litecache.engine.scheduling.below import NO_REFS, Below, FoundBelow, Numbers, Refs
from litecache.engine.scheduling.cost_model import CostModel, Found, FoundBlocks, LoadPlan
from litecache.engine.scheduling.orders import (
    CancelOrder,
    LoadOrder,
    LoadReport,
    Schedule,
    StageOrder,
)
from litecache.engine.scheduling.prefix_cache import PrefixCache
from litecache.engine.scheduling.prefix_index import MISSING
from litecache.engine.scheduling.sequence import DISK, TIERS, Sequence, SequenceStatus
from litecache.storage.protocol import ALL_KEYS
from litecache.types import Tier

MAX_STAGING = 8
"""Requests that may hold leases in the shards at once."""

LOOKUP_MOST_S = 2.0
"""A lookup is waited for as long as computing all that it asks for would take, so that a request
takes at most twice as long, but no longer than a call to a shard may take."""

REPLAN_BLOCKS = 16
"""A plan is made anew when so many have landed, or half of what is left."""


class Crowd(NamedTuple):
    """What is in front of a request, beside it and behind it: see `CostModel.plan`.

    Attributes:
        queued_tokens: prefill tokens in front of it.
        num_decodes: beside it.
        busy_s: seconds that the steps under way still take.
        num_waiting: requests behind it.
    """

    queued_tokens: int
    num_decodes: int
    busy_s: float
    num_waiting: int


class Loads:
    """Lookups and loads of all requests.

    Args:
        cache: pools and indexes.
        cost: says what to load and what to compute; None = there are no lower tiers.
        chunk_tokens: of a prefill chunk beside a load.
    """

    def __init__(self, cache: PrefixCache, cost: CostModel | None, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self._cache = cache
        self._cost = cost
        self._windowed = any(group.policy.slides for group in cache.groups)
        self._chunk_blocks = -(-chunk_tokens // cache.block_size)
        self._tickets = 0
        # requests that are looked up or hold leases
        self._active: dict[int, Sequence] = {}
        # whose request ordered copies, and of those under way the block of the pool, `[groups, n]`
        self._copies: dict[int, tuple[Sequence, Numbers]] = {}

    # Lookups

    @property
    def has_room(self) -> bool:
        """Another request may be looked up."""
        return self._cost is not None and len(self._active) < MAX_STAGING

    def wanted(self, seq: Sequence, looked: Seq[Seq[int]]) -> Refs:
        """Blocks that nobody here has or makes, and that were not asked for yet, from the back."""
        if self._cost is None:
            return NO_REFS
        return seq.below.unasked(np.array(looked, dtype=np.int64) == MISSING)

    def ask(self, seq: Sequence, refs: Refs, now: float, wait_s: float, out: Schedule) -> None:
        """Look blocks up in the lower tiers, which begin to read from disk what may be loaded.

        Args:
            seq: the request.
            refs: of the blocks, from the back.
            now: of the engine's clock.
            wait_s: until its first step, as far as is known.
            out: takes the order.
        """
        if not seq.ticket:
            self._tickets += 1
            seq.ticket = self._tickets
        self._active[seq.ticket] = seq
        seq.status, seq.asked_s = SequenceStatus.STAGING, now
        assert self._cost is not None
        count = len(np.unique(refs[:, 1])) * self._cache.block_size
        spared_s = self._cost.compute_s(count, seq.num_tokens - count)
        seq.lookup_worth_s = min(spared_s, LOOKUP_MOST_S)
        seq.below.ask(refs)
        keys = [seq.chain.keys[group][index] for group, index in refs.tolist()]
        reads = ALL_KEYS
        if len(self._cache.groups) == 1 and not self._windowed:
            nbytes = self._cache.groups[0].tier_bytes
            reads = self._cost.worth_reading(nbytes, spared_s, wait_s, seq.num_tokens, now)
        out.stages.append(StageOrder(seq.ticket, refs, keys, reads))

    def give_way(self, waiting: Seq[Sequence], seq: Sequence, out: Schedule) -> bool:
        """Take a lookup from the last of those that wait behind `seq`; False if there is none."""
        for other in reversed(waiting):
            if other is seq:
                return False
            if other.ticket in self._active and other.status is SequenceStatus.WAITING:
                self.drop(other, out)
                return True
        return False

    def on_staged(self, ticket: int, found: FoundBelow) -> Schedule:
        """The lower tiers hold these blocks and have leased their slots."""
        out = Schedule()
        seq = self._active.get(ticket)
        if seq is None:
            out.discards.append(ticket)
            return out
        if seq.status is SequenceStatus.STAGING:
            seq.status = SequenceStatus.WAITING
        seq.below.stage(found)
        if not seq.below.num_staged and not seq.below.num_loading:
            del self._active[ticket]
        elif seq.status is SequenceStatus.RUNNING:
            seq.num_landed = len(seq.tables[0]) + REPLAN_BLOCKS
            if seq.num_todo <= 1:
                self.cancel(seq, seq.below.loading(), out)
        return out

    # Loads

    def plan(self, seq: Sequence, now: float, crowd: Crowd, out: Schedule) -> None:
        """Choose what a running request loads, or choose again as blocks have arrived.

        Args:
            seq: the request.
            now: of the engine's clock.
            crowd: around it.
            out: takes the orders.
        """
        seq.num_landed = 0
        first = -(-seq.num_computed // self._cache.block_size)
        unread = seq.below.unread(first)
        seq.tiers[unread[seq.tiers[unread] == 0]] = DISK
        if self._cost is None or not (seq.below.num_staged or seq.below.num_loading):
            return
        end = len(seq.chain.keys[0])
        for _ in range(2):
            found, end = self._found(seq, first, end)
            tiers = [TIERS.index(kind.source.partition(":")[0]) for kind in found.kinds]
            known = seq.tiers[first:end]
            np.copyto(known, np.array(tiers, np.uint8)[found.codes], where=known == 0)
            plan = self._cost.plan(
                num_tokens=seq.num_tokens,
                start=first,
                found=found,
                now=now,
                ticket=seq.ticket,
                asked_s=seq.asked_s,
                **crowd._asdict(),
            )
            if plan.load_end in (end, plan.load_from) or not self._windowed:
                break
            # What windows reach depends on where the load ends.
            end = plan.load_end
        else:
            plan = plan._replace(load_from=plan.load_end)
        self._carry_out(seq, plan, now, out)

    def found(self, seq: Sequence, first: int) -> FoundBlocks:
        """Where the blocks of a sequence from `first` to the end of its hit are."""
        return self._found(seq, first, len(seq.chain.keys[0]))[0]

    def _found(self, seq: Sequence, first: int, limit: int) -> tuple[FoundBlocks, int]:
        """Where the blocks from `first` to the end of the hit are, and that end."""
        end = self._end_of_hit(seq, first, limit) if self._windowed else limit
        groups = [
            (group.index, group.policy.first_needed(end), group.tier_bytes, seq.ahead[group.index])
            for group in self._cache.groups
        ]
        sources = seq.below.sources(first, end)
        if len(groups) == 1 and not self._windowed:
            return self._found_of_one(seq, first, sources[0])
        of_groups, names = sources.tolist(), seq.below.names
        end = min(end, first + sources.shape[1])
        found: list[Found] = []
        behind = gpu = Tier.GPU.value
        for index in range(end - 1, first - 1, -1):
            source, nbytes, needed = gpu, 0, False
            for group, start, block_bytes, ahead in groups:
                if index < start:
                    continue
                needed = True
                if index not in ahead:
                    source = names[of_groups[group][index - first]]
                    if not source:
                        nbytes = 0
                        break
                    nbytes += block_bytes
            # What no window reaches comes with what follows it.
            if not needed:
                source = behind
            elif source:
                behind = source
            if source or found:
                found.append(Found(source, nbytes))
        return FoundBlocks.of(found[::-1]), first + len(found)

    def _found_of_one(
        self, seq: Sequence, first: int, sources: npt.NDArray[np.int16]
    ) -> tuple[FoundBlocks, int]:
        """`_found` of the usual model, whose prompts may have thousands of blocks."""
        nbytes, names = self._cache.groups[0].tier_bytes, seq.below.names
        kinds = [Found(name, nbytes if name else 0) for name in names] + [Found(Tier.GPU.value, 0)]
        codes = sources.astype(np.int64)
        end = first + len(codes)
        codes[[index - first for index in seq.ahead[0] if first <= index < end]] = len(names)
        count = 1 + int(np.flatnonzero(codes)[-1]) if codes.any() else 0
        return FoundBlocks(kinds, codes[:count]), first + count

    def _end_of_hit(self, seq: Sequence, first: int, limit: int) -> int:
        """Behind the last block in front of which all is there, or found, that windows reach."""

        held = (seq.below.sources(0, limit) > 0).tolist()
        limit = min(limit, len(held[0]))

        def has(group: int, index: int) -> bool:
            return index in seq.ahead[group] or held[group][index]

        for end in range(limit, first, -1):
            for group in self._cache.groups:
                start = group.policy.first_needed(end) if group.policy.slides else end - 1
                if not all(has(group.index, i) for i in range(max(first, start), end)):
                    break
            else:
                return end
        return first

    def _carry_out(self, seq: Sequence, plan: LoadPlan, now: float, out: Schedule) -> None:
        assert self._cost is not None
        blocks = range(plan.load_from, plan.load_end)
        below, groups = seq.below, self._cache.groups
        loading = below.loading()
        late = loading[(loading[:, 1] < blocks.start) | (loading[:, 1] >= blocks.stop)]
        if self._windowed:
            seq.load_run = blocks
        refs = below.staged(blocks.start, blocks.stop)
        first = [max(blocks.start, group.policy.first_needed(blocks.stop)) for group in groups]
        wanted = refs[:, 1] >= np.array(first)[refs[:, 0]]
        for group, ahead in enumerate(seq.ahead):
            if ahead:
                wanted &= (refs[:, 0] != group) | ~np.isin(refs[:, 1], list(ahead))
        refs = refs[wanted]
        sources = self._bytes_of(seq, below.load(refs))
        if seq.planned_s is None:
            seq.planned_s, seq.plan = now, plan
            self._cost.begin(seq.ticket, plan, sources, now, seq.asked_s)
        elif len(refs):
            assert seq.plan is not None
            self._cost.begin(seq.ticket, seq.plan, sources, now, seq.asked_s)
        if len(refs):
            targets, steps = self._cache.begin_copies(seq, refs)
            shape = (len(groups), len(seq.chain.keys[0]))
            copies = self._copies.setdefault(seq.ticket, (seq, np.zeros(shape, np.int64)))[1]
            copies[refs[:, 0], refs[:, 1]] = targets
            out.loads.append(LoadOrder(seq.ticket, refs, targets, steps))
        self.cancel(seq, late, out)
        for group in range(len(groups)):
            count = sum(n for (g, _), n in below.left.items() if g == group)
            self._cache.reserve(seq, group, min(count, self._chunk_blocks))

    def on_loaded(self, report: LoadReport) -> Schedule:
        """Copies have landed, or will never; only the first count."""
        out = Schedule()
        assert self._cost is not None
        seq, copies = self._copies[report.ticket]
        mine = seq.ticket == report.ticket
        landed: Counter[str] = Counter()
        for group, indices, blocks, sources in self._ended(seq, copies, report.landed, mine=mine):
            keys, nbytes = seq.chain.keys[group], self._cache.groups[group].tier_bytes
            published = self._cache.publish(seq, group, indices, blocks)
            names = seq.below.names
            for source, count in enumerate(np.bincount(sources).tolist()):
                landed[names[source]] += count * nbytes
                # What was loaded is never encoded again: each time would lose a little.
                if _is_remote(names[source]) and self._cache.groups[group].stored is None:
                    far = set(np.array(indices)[sources == source].tolist()).intersection(published)
                    self._cache.unsaved[group].update(keys[index] for index in far)
            wanted = np.array(indices)[sources > 0].tolist()
            seq.ahead[group].update(wanted)
            seq.num_landed += len(wanted)
            self._cache.pools[group].release(blocks[::-1])  # they came from the back
        landed.pop("", None)
        for name, total in landed.items():
            self._cost.progress(report.ticket, name, total, report.at_s, waited=report.waited)
        for group, indices, blocks, sources in self._ended(seq, copies, report.lost, mine=mine):
            self._cache.pools[group].release(blocks[::-1])
            lost = np.array(indices)[sources > 0]
            if len(lost):
                seq.tiers[lost] = 0
                seq.load_run = range(0)
        for name in report.failed:
            self._cost.note_read(name, 0, 0.0)
        if not copies.any():
            del self._copies[report.ticket]
        if mine and not seq.below.num_loading:
            self._finish(seq, out)
        return out

    def _ended(
        self, seq: Sequence, copies: Numbers, refs: Refs, *, mine: bool
    ) -> Iterator[tuple[int, list[int], list[int], Numbers]]:
        """By KV group: indices, blocks and source numbers (0: nobody waits for it any more) of
        copies that have ended; their references are still to be released."""
        sources = seq.below.take(refs) if mine else np.zeros(len(refs), np.int64)
        for group in np.unique(refs[:, 0]).tolist():
            at = refs[:, 0] == group
            indices = refs[at, 1]
            blocks = copies[group, indices].tolist()
            copies[group, indices] = 0
            self._cache.pools[group].end_copies(blocks)
            yield group, indices.tolist(), blocks, sources[at]

    @property
    def awaits_news(self) -> bool:
        """Blocks are looked up or copied."""
        return bool(self._copies) or any(
            seq.status is SequenceStatus.STAGING for seq in self._active.values()
        )

    def chunk(self, seq: Sequence) -> int:
        """How many tokens of a prefill a step may have.

        Beside a load half of what is in front of it, in whole chunks: long ones are computed
        faster, and short ones meet the load where it is by then.
        """
        if not seq.below.num_loading:
            return seq.num_tokens
        front = seq.below.first * self._cache.block_size - seq.num_computed
        return self.chunk_tokens * max(1, front // 2 // self.chunk_tokens)

    def wants_plan(self, seq: Sequence) -> bool:
        """Enough has arrived to plan anew; copies from RAM change nothing on their way."""
        first = seq.num_computed // self._cache.block_size
        below = seq.below
        if (
            all(_is_ram(below.names[source]) for (_, source), n in below.left.items() if n)
            and below.num_loading
            and below.first <= first
        ):
            return False
        return seq.num_landed >= max(REPLAN_BLOCKS, below.num_loading // 2)

    def loads(self, seq: Sequence, index: int) -> bool:
        """Whether a block is being loaded, or will be jumped over with what is."""
        return seq.below.num_loading > 0 and (
            index in seq.load_run
            or any(seq.below.is_loading(group, index) for group in range(len(seq.tables)))
        )

    def waits(self, seq: Sequence, count: int, now: float, busy_s: float) -> bool:
        """At the meeting: what loads will be there before the next chunk would be."""
        assert self._cost is not None
        left = self._bytes_of(seq, seq.below.left)
        size, groups = self._cache.block_size, self._cache.groups
        spared = -(-count // size) * sum(group.tier_bytes for group in groups)
        return self._cost.sooner(seq.ticket, left, spared, count, seq.num_computed, now, busy_s)

    def _bytes_of(self, seq: Sequence, counts: Mapping[tuple[int, int], int]) -> dict[str, int]:
        """By source, bytes of so many blocks by KV group and source number."""
        nbytes: dict[str, int] = {}
        for (group, number), count in counts.items():
            source, more = seq.below.names[number], count * self._cache.groups[group].tier_bytes
            nbytes[source] = nbytes.get(source, 0) + more
        return nbytes

    def take_over(self, seq: Sequence, count: int, out: Schedule) -> int:
        """Compute the next `count` positions, or the run of blocks that begins there, though it
        loads; returns how many."""
        size = self._cache.block_size
        first = seq.num_computed // size
        end = first + 1
        while end * size < seq.num_computed + count and self.loads(seq, end):
            end += 1
        seq.load_run = range(end, max(end, seq.load_run.stop))
        self.cancel(seq, seq.below.loading(first, end), out)
        return min(count, end * size - seq.num_computed)

    def pass_over(self, seq: Sequence, first: int, out: Schedule) -> None:
        """The cursor has come to block `first`: do without what still loads in front of it."""
        passed = seq.below.loading(0, first)
        seq.below.first = first
        if len(passed):
            self.cancel(seq, passed, out)

    def cancel(self, seq: Sequence, refs: Refs, out: Schedule) -> None:
        """Do without these blocks, which are loading."""
        if len(refs):
            seq.below.take(refs)
            out.cancels.append(CancelOrder(seq.ticket, refs))
        if not seq.below.num_loading:
            self._finish(seq, out)

    def drop(self, seq: Sequence, out: Schedule) -> None:
        """Give up a request's lookups, leases and loads; copies that run are waited for."""
        if self._active.pop(seq.ticket, None) is not None:
            out.cancels.append(CancelOrder(seq.ticket))
            self._end(seq)
        seq.ticket = 0
        seq.below = Below(len(seq.tables))
        if seq.status is SequenceStatus.STAGING:
            seq.status = SequenceStatus.WAITING

    def on_first_token(self, seq: Sequence, now: float) -> None:
        """Tell the cost model what the prediction was worth."""
        if self._cost is not None and seq.planned_s is not None:
            self._cost.note_first_token(seq.ticket, now - seq.planned_s)

    def _finish(self, seq: Sequence, out: Schedule) -> None:
        """Nothing is loaded any more: the leases that are left end."""
        if seq.status is SequenceStatus.RUNNING and self._active.pop(seq.ticket, None) is not None:
            out.discards.append(seq.ticket)
            seq.below.forget_staged()
            self._end(seq)

    def _end(self, seq: Sequence) -> None:
        assert self._cost is not None
        self._cost.end(seq.ticket)
        for group in range(len(seq.tables)):
            self._cache.reserve(seq, group, 0)

    def check_integrity(self, refs: list[list[int]]) -> None:
        """Add the references of copies to `refs`, and assert that they and requests agree."""
        for _, copies in self._copies.values():
            assert copies.any(), "a load without copies was kept"
            for group, blocks in enumerate(copies):
                for block in blocks[blocks > 0].tolist():
                    refs[group][block] += 1
        for ticket, seq in self._active.items():
            assert seq.ticket == ticket, "a lookup of an earlier life was kept"
            seq.below.check_integrity()
            for group, index in seq.below.loading().tolist():
                copies = self._copies[ticket][1]
                assert copies[group, index] == seq.tables[group][index], "it loads elsewhere"
                assert index * self._cache.block_size >= seq.num_computed, "loads what is computed"


def _is_ram(source: str) -> bool:
    return source.startswith(Tier.RAM.value)


def _is_remote(source: str) -> bool:
    return source.startswith(Tier.REMOTE.value)
