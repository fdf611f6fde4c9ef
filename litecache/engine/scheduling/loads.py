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
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

from litecache.engine.scheduling.cost_model import CostModel, Found, LoadPlan
from litecache.engine.scheduling.orders import (
    CancelOrder,
    LoadOrder,
    LoadReport,
    Schedule,
    StageOrder,
)
from litecache.engine.scheduling.prefix_cache import PrefixCache
from litecache.engine.scheduling.prefix_index import MISSING
from litecache.engine.scheduling.sequence import (
    BlockRef,
    LoadingBlocks,
    Sequence,
    SequenceStatus,
)
from litecache.types import Tier

MAX_STAGING = 8
"""Requests that may hold leases in the shards at once."""

REPLAN_BLOCKS = 16
"""A plan is made anew when so many have landed, or half of what is left."""


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
        # copies under way, and whose request ordered them
        self._copies: dict[int, tuple[Sequence, dict[BlockRef, int]]] = {}

    # Lookups

    @property
    def has_room(self) -> bool:
        """Another request may be looked up."""
        return self._cost is not None and len(self._active) < MAX_STAGING

    def wanted(self, seq: Sequence, looked: Seq[Seq[int]]) -> list[BlockRef]:
        """Blocks that nobody here has or makes, and that were not asked for yet, from the back."""
        if self._cost is None:
            return []
        return [
            (group, index)
            for index in reversed(range(len(looked[0])))
            for group in range(len(looked))
            if looked[group][index] == MISSING and (group, index) not in seq.asked
        ]

    def ask(self, seq: Sequence, refs: Seq[BlockRef], now: float, out: Schedule) -> None:
        """Look blocks up in the lower tiers, which begin to read them from disk."""
        if not seq.ticket:
            self._tickets += 1
            seq.ticket = self._tickets
        self._active[seq.ticket] = seq
        seq.status, seq.asked_s = SequenceStatus.STAGING, now
        seq.asked.update(refs)
        out.stages.append(StageOrder(seq.ticket, {(g, i): seq.chain.keys[g][i] for g, i in refs}))

    def give_way(self, waiting: Seq[Sequence], seq: Sequence, out: Schedule) -> bool:
        """Take a lookup from the last of those that wait behind `seq`; False if there is none."""
        for other in reversed(waiting):
            if other is seq:
                return False
            if other.ticket in self._active and other.status is SequenceStatus.WAITING:
                self.drop(other, out)
                return True
        return False

    def on_staged(self, ticket: int, found: dict[BlockRef, str]) -> Schedule:
        """The lower tiers hold these blocks (-> source) and have leased their slots."""
        out = Schedule()
        seq = self._active.get(ticket)
        if seq is None:
            out.discards.append(ticket)
            return out
        if seq.status is SequenceStatus.STAGING:
            seq.status = SequenceStatus.WAITING
        seq.staged.update(found)
        if not seq.staged and not seq.loading:
            del self._active[ticket]
        elif seq.status is SequenceStatus.RUNNING:
            seq.num_landed = len(seq.tables[0]) + REPLAN_BLOCKS
            if seq.num_todo <= 1:
                self.cancel(seq, tuple(seq.loading), out)
        return out

    # Loads

    def plan(
        self, seq: Sequence, now: float, crowd: tuple[int, int, float, int], out: Schedule
    ) -> None:
        """Choose what a running request loads, or choose again as blocks have arrived.

        Args:
            seq: the request.
            now: of the engine's clock.
            crowd: prefill tokens in front of it, decodes, seconds that the steps under way still
                take, requests behind it: see `CostModel.plan`.
            out: takes the orders.
        """
        queued_tokens, num_decodes, busy_s, num_waiting = crowd
        seq.num_landed = 0
        if self._cost is None or not (seq.staged or seq.loading):
            return
        first = -(-seq.num_computed // self._cache.block_size)
        end = len(seq.chain.keys[0])
        for _ in range(2):
            found, end = self._found(seq, first, end)
            for index, block in enumerate(found, start=first):
                if block.source and index not in seq.tiers:
                    seq.tiers[index] = block.source.partition(":")[0]
            plan = self._cost.plan(
                num_tokens=seq.num_tokens,
                start=first,
                found=found,
                queued_tokens=queued_tokens,
                num_decodes=num_decodes,
                now=now,
                ticket=seq.ticket,
                asked_s=seq.asked_s,
                busy_s=busy_s,
                num_waiting=num_waiting,
            )
            if plan.load_end in (end, plan.load_from) or not self._windowed:
                break
            # What windows reach depends on where the load ends.
            end = plan.load_end
        else:
            plan = plan._replace(load_from=plan.load_end)
        self._carry_out(seq, plan, now, out)

    def found(self, seq: Sequence, first: int) -> list[Found]:
        """Where the blocks of a sequence from `first` to the end of its hit are."""
        return self._found(seq, first, len(seq.chain.keys[0]))[0]

    def _found(self, seq: Sequence, first: int, limit: int) -> tuple[list[Found], int]:
        """Where the blocks from `first` to the end of the hit are, and that end."""
        end = self._end_of_hit(seq, first, limit) if self._windowed else limit
        groups = [
            (group.index, group.policy.first_needed(end), group.tier_bytes, seq.ahead[group.index])
            for group in self._cache.groups
        ]
        staged, loading = seq.staged, seq.loading
        found: list[Found] = []
        behind = gpu = Tier.GPU.value
        if len(groups) == 1 and not self._windowed:
            return self._found_of_one(seq, first, end)
        for index in range(end - 1, first - 1, -1):
            source, nbytes, needed = gpu, 0, False
            for group, start, block_bytes, ahead in groups:
                if index < start:
                    continue
                needed = True
                if index not in ahead:
                    ref = (group, index)
                    source = staged.get(ref) or loading.get(ref) or ""
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
        return found[::-1], first + len(found)

    def _found_of_one(self, seq: Sequence, first: int, end: int) -> tuple[list[Found], int]:
        """`_found` of the usual model, whose prompts may have thousands of blocks."""
        nbytes, ahead = self._cache.groups[0].tier_bytes, seq.ahead[0]
        refs = [(0, index) for index in range(first, end)]
        staged, loading = seq.staged.get, seq.loading.get
        names = [
            Tier.GPU.value if ref[1] in ahead else staged(ref) or loading(ref) or "" for ref in refs
        ]
        kinds = {name: Found(name, nbytes) for name in set(names)}
        kinds[""] = Found("", 0)
        kinds[Tier.GPU.value] = Found(Tier.GPU.value, 0)
        while names and not names[-1]:
            names.pop()
        return [kinds[name] for name in names], first + len(names)

    def _end_of_hit(self, seq: Sequence, first: int, limit: int) -> int:
        """Behind the last block in front of which all is there, or found, that windows reach."""

        def has(group: int, index: int) -> bool:
            ref = (group, index)
            return index in seq.ahead[group] or ref in seq.staged or ref in seq.loading

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
        late = [ref for ref in seq.loading if ref[1] not in blocks]
        if self._windowed:
            seq.load_run = blocks
        groups = self._cache.groups
        first = [max(blocks.start, group.policy.first_needed(blocks.stop)) for group in groups]
        wanted = [(g, i) for i in reversed(blocks) for g in range(len(groups)) if i >= first[g]]
        staged, ahead = seq.staged, seq.ahead
        refs = [ref for ref in wanted if ref in staged and ref[1] not in ahead[ref[0]]]
        ordered = {ref: staged.pop(ref) for ref in refs}
        before = Counter(seq.loading.left)
        seq.loading.add(ordered)
        sources = self._bytes_of(seq.loading.left - before)
        if seq.planned_s is None:
            seq.planned_s, seq.plan = now, plan
            self._cost.begin(seq.ticket, plan, sources, now, seq.asked_s)
        elif refs:
            assert seq.plan is not None
            self._cost.begin(seq.ticket, seq.plan, sources, now, seq.asked_s)
        if refs:
            copies = self._cache.begin_copies(seq, refs)
            self._copies.setdefault(seq.ticket, (seq, {}))[1].update(copies)
            used_in = [pool.used_in for pool in self._cache.pools]
            targets = {ref: (block, used_in[ref[0]][block]) for ref, block in copies.items()}
            out.loads.append(LoadOrder(seq.ticket, targets))
        self.cancel(seq, late, out)
        for group in range(len(groups)):
            loading = sum(n for (g, _), n in seq.loading.left.items() if g == group)
            self._cache.reserve(seq, group, min(loading, self._chunk_blocks))

    def on_loaded(self, report: LoadReport) -> Schedule:
        """Copies have landed, or will never; only the first count."""
        out = Schedule()
        assert self._cost is not None
        seq, copies = self._copies[report.ticket]
        landed: dict[str, int] = {}
        for ref in report.landed:
            group, index = ref
            block = copies.pop(ref)
            self._cache.pools[group].end_copy(block)
            source = seq.loading.take(ref) if seq.ticket == report.ticket else None
            published = self._cache.publish(seq, group, index, block)
            far = source is not None and source.startswith(Tier.REMOTE.value)
            # What was loaded is never encoded again: each time would lose a little.
            if published and far and self._cache.groups[group].stored is None:
                self._cache.unsaved[group].add(seq.chain.keys[group][index])
            if source is not None:
                seq.ahead[group].add(index)
                seq.num_landed += 1
                landed[source] = landed.get(source, 0) + self._cache.groups[group].tier_bytes
            self._cache.pools[group].release([block])
        for source, nbytes in landed.items():
            self._cost.progress(report.ticket, source, nbytes, report.at_s, waited=report.waited)
        for ref in report.lost:
            group, index = ref
            block = copies.pop(ref)
            self._cache.pools[group].end_copy(block)
            self._cache.pools[group].release([block])
            if seq.ticket == report.ticket and seq.loading.take(ref) is not None:
                seq.tiers.pop(index, None)
                seq.load_run = range(0)
        for source in report.failed:
            self._cost.note_read(source, 0, 0.0)
        if not copies:
            del self._copies[report.ticket]
        if seq.ticket == report.ticket and not seq.loading:
            self._finish(seq, out)
        return out

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
        if not seq.loading:
            return seq.num_tokens
        front = seq.loading.first * self._cache.block_size - seq.num_computed
        return self.chunk_tokens * max(1, front // 2 // self.chunk_tokens)

    def wants_plan(self, seq: Sequence) -> bool:
        """Enough has arrived to plan anew; copies from RAM change nothing on their way."""
        first = seq.num_computed // self._cache.block_size
        tiers = {
            source.partition(":")[0] for (_, source), count in seq.loading.left.items() if count
        }
        if tiers == {Tier.RAM.value} and seq.loading.first <= first:
            return False
        return seq.num_landed >= max(REPLAN_BLOCKS, len(seq.loading) // 2)

    def loads(self, seq: Sequence, index: int) -> bool:
        """Whether a block is being loaded, or will be jumped over with what is."""
        return bool(seq.loading) and (
            index in seq.load_run
            or any((group, index) in seq.loading for group in range(len(seq.tables)))
        )

    def waits(self, seq: Sequence, count: int, now: float, busy_s: float) -> bool:
        """At the meeting: what loads will be there before the next chunk would be."""
        assert self._cost is not None
        left = self._bytes_of(seq.loading.left)
        size, groups = self._cache.block_size, self._cache.groups
        spared = -(-count // size) * sum(group.tier_bytes for group in groups)
        return self._cost.sooner(seq.ticket, left, spared, count, seq.num_computed, now, busy_s)

    def _bytes_of(self, counts: Mapping[tuple[int, str], int]) -> dict[str, int]:
        """By source, bytes of so many blocks by KV group and source."""
        nbytes: dict[str, int] = {}
        for (group, source), count in counts.items():
            more = count * self._cache.groups[group].tier_bytes
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
        self.cancel(seq, [ref for ref in seq.loading if first <= ref[1] < end], out)
        return min(count, end * size - seq.num_computed)

    def pass_over(self, seq: Sequence, first: int, out: Schedule) -> None:
        """The cursor has come to block `first`: do without what still loads in front of it."""
        passed = [ref for ref in seq.loading if ref[1] < first]
        seq.loading.first = first
        if passed:
            self.cancel(seq, passed, out)

    def cancel(self, seq: Sequence, refs: Iterable[BlockRef], out: Schedule) -> None:
        """Do without these blocks, which are loading."""
        refs = tuple(refs)
        for ref in refs:
            seq.loading.take(ref)
        if refs:
            out.cancels.append(CancelOrder(seq.ticket, refs))
        if not seq.loading:
            self._finish(seq, out)

    def drop(self, seq: Sequence, out: Schedule) -> None:
        """Give up a request's lookups, leases and loads; copies that run are waited for."""
        if self._active.pop(seq.ticket, None) is not None:
            out.cancels.append(CancelOrder(seq.ticket))
            self._end(seq)
        seq.ticket = 0
        seq.asked, seq.staged, seq.loading = set(), {}, LoadingBlocks()
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
            seq.staged = {}
            self._end(seq)

    def _end(self, seq: Sequence) -> None:
        assert self._cost is not None
        self._cost.end(seq.ticket)
        for group in range(len(seq.tables)):
            self._cache.reserve(seq, group, 0)

    def check_integrity(self, refs: list[list[int]]) -> None:
        """Add the references of copies to `refs`, and assert that they and requests agree."""
        for _, copies in self._copies.values():
            for (group, _), block in copies.items():
                refs[group][block] += 1
            assert copies, "a load without copies was kept"
        for ticket, seq in self._active.items():
            assert seq.ticket == ticket, "a lookup of an earlier life was kept"
            copies = self._copies.get(ticket, (seq, {}))[1]
            assert +seq.loading.left == Counter((g, s) for (g, _), s in seq.loading.items())
            for ref in seq.loading:
                group, index = ref
                assert index >= seq.loading.first, "a block in front of the first one"
                assert copies[ref] == seq.tables[group][index], "it loads into another's block"
                assert index * self._cache.block_size >= seq.num_computed, "loads what is computed"


def _is_ram(source: str) -> bool:
    return source.startswith(Tier.RAM.value)
