"""Decides what each engine step computes. Pure: no clock, no I/O, no torch.

Messages go in (requests, staged and loaded blocks, step results, aborts), a `Schedule` comes
out. Steps are continuous batches: decodes first, then chunks of running prefills, then newly
admitted requests, within one token budget. A request is admitted when blocks for all its known
tokens are there, in order of arrival and priority: one that does not fit holds those behind it, so
that nobody is passed over for ever. When a decode finds no block, the youngest request is
preempted, and resumes through the prefix cache and the tiers below it.

A prefill goes from the front and jumps over what the pool holds or what has been loaded meanwhile
(`loads.py`); a step may hold several segments of one row.

Tokens of launched steps need not be known: a request counts the samples in flight, and the
runner feeds a sampled token to the next step itself. So step n + 1 can be planned while step n
runs. A guided row is in no plan from one sample to its driver's answer, and nobody waits for it; it
keeps its blocks meanwhile, as long as no other needs them. The stream order of the device makes it
safe to hand out blocks that a running step still writes to; a copy on another stream waits for the
last step that uses its block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

from litecache.engine.scheduling.below import BlockRef
from litecache.engine.scheduling.cost_model import CostModel
from litecache.engine.scheduling.loads import Crowd, Loads
from litecache.engine.scheduling.orders import RowStep, Schedule, StepResult
from litecache.engine.scheduling.plan_builder import PlanBuilder, StepsUnderWay
from litecache.engine.scheduling.prefix_cache import PrefixCache
from litecache.engine.scheduling.prefix_view import PrefixView, view_prefix
from litecache.engine.scheduling.saves import Saves
from litecache.engine.scheduling.sequence import (
    GPU,
    KeyChain,
    RequestQueues,
    Sequence,
    SequenceStatus,
)
from litecache.errors import CapacityError
from litecache.hashing import BlockKey
from litecache.token_ids import TokenIds
from litecache.types import FinishReason, Guidance, Request, TokenDelta, TokenLogprobs

REMEMBERED_ABORTS = 4096
LOAD_CHUNK_TOKENS = 2048
"""Of a prefill chunk beside a load: the longer it is, the later the meeting is seen."""
LOOKUP_PATIENCE_S = 0.1
GUIDANCE_PATIENCE_S = 60.0
"""A guided request whose driver has not answered for so long fails."""
MEETING_S = 0.005
"""Who waits for loads looks again after so long: a source that stalls sends no message."""


class Scheduler:
    """Continuous batching over a `PrefixCache`.

    Args:
        cache: pools and indexes; the scheduler is their only user.
        roots: cache salt -> root key of every KV group.
        max_requests: rows, so requests that run at once.
        max_batch_tokens: token budget of a step.
        max_prefill_tokens: the same for a step in which nothing decodes; None = no more.
        cost: what loading and computing cost; None = there are no lower tiers.
        admission: which published blocks are saved: "all", "frequent", "reused" or "none".
        deterministic: end prefill chunks on a fixed grid.
        load_chunk_tokens: of a prefill chunk beside a load.
        lookup_patience_s: a request whose lookup takes longer, and longer than it is worth, starts
            without; a late answer is of use all the same.

    Attributes:
        loads: is told what the lower tiers hold and what has landed.
        saves: is told what was saved, and what found no room.
    """

    def __init__(
        self,
        cache: PrefixCache,
        roots: Callable[[str], Seq[BlockKey]],
        *,
        max_requests: int,
        max_batch_tokens: int,
        max_prefill_tokens: int | None = None,
        cost: CostModel | None = None,
        admission: str = "all",
        deterministic: bool = False,
        load_chunk_tokens: int = LOAD_CHUNK_TOKENS,
        lookup_patience_s: float = LOOKUP_PATIENCE_S,
    ) -> None:
        self.cache = cache
        self.preemptions = 0
        self._roots = roots
        self._windowed = any(group.policy.slides for group in cache.groups)
        self._cost = cost
        self.loads = Loads(cache, cost, min(load_chunk_tokens, max_batch_tokens))
        self.saves = Saves(cache, "none" if cost is None else admission)
        self._max_batch_tokens = max_batch_tokens
        self._max_prefill_tokens = max_prefill_tokens or max_batch_tokens
        self._chunk_grid = max(1, max_batch_tokens // 2) if deterministic else None
        self._sequences: dict[str, Sequence] = {}
        self._timed: dict[str, Sequence] = {}
        self._early_aborts: dict[str, None] = {}
        self._suspects: dict[str, Sequence] = {}
        self._asking: dict[str, Sequence] = {}
        self._queues = RequestQueues(max_requests)
        self._lookup_patience_s = lookup_patience_s
        self._steps = StepsUnderWay(cost, cache.pools)
        self._arrivals = 0
        self._wake_s: float | None = None

    # What comes in

    def add(self, request: Request, now: float) -> Schedule:
        """Queue a request that the engine has validated."""
        self._arrivals += 1
        roots = self._roots(request.cache_salt)
        seq = Sequence(request, roots, self.cache.block_size, self._arrivals, now)
        assert seq.id not in self._sequences, f"request {seq.id} is open already"
        self._queues.add(seq)
        self._sequences[seq.id] = seq
        if seq.deadline_s is not None:
            self._timed[seq.id] = seq
        out = self.abort([seq.id] if seq.id in self._early_aborts else [])
        if seq.id in self._sequences:
            looked = self.cache.look(seq)
            seq.num_found = self.cache.present(looked) * self.cache.block_size
            if self.loads.has_room:
                self._look_up(seq, looked, now, out)
        return out

    def abort(self, request_ids: Iterable[str]) -> Schedule:
        """End requests; one that is not known may have been overtaken by its abort."""
        out = Schedule()
        for request_id in request_ids:
            if request_id in self._sequences:
                self._early_aborts.pop(request_id, None)
                self._finish(self._sequences[request_id], FinishReason.ABORT, out)
            else:
                self._early_aborts[request_id] = None
        while len(self._early_aborts) > REMEMBERED_ABORTS:
            del self._early_aborts[next(iter(self._early_aborts))]
        return out

    def guide(self, guidance: Guidance) -> Schedule:
        """A driver says how a guided request goes on; void unless that request waits for it."""
        out = Schedule()
        seq = self._asking.get(guidance.request_id)
        if seq is None or seq.num_tokens != guidance.num_tokens:
            return out
        del self._asking[seq.id]
        if not guidance.mask:
            self._finish(seq, FinishReason.STOP, out)
        elif seq.num_tokens + len(guidance.token_ids) >= seq.max_tokens:
            message = f"request {seq.id}: guided beyond max_new_tokens"
            self._finish(seq, FinishReason.ERROR, out, message)
        else:
            for token in guidance.token_ids:
                seq.append(token)
            seq.mask = guidance.mask
        return out

    def set_paused(self, request_ids: Iterable[str], paused: bool) -> None:
        """Hold or resume requests whose client does not take their tokens."""
        for request_id in request_ids:
            if request_id in self._sequences:
                seq = self._sequences[request_id]
                seq.paused = paused
                if paused:
                    self.cache.clear_pending(seq)

    def delete_salt(self, salt: str) -> int:
        """Let nobody find the pools' blocks of a salt any more; how many there were.

        Requests of that salt that are open go on, and publish and save nothing from here on.
        """
        for seq in self._sequences.values():
            if seq.request.cache_salt == salt:
                seq.unshared = True
                self.cache.clear_pending(seq)
        return self.cache.delete(self._roots(salt))

    def save_prefix(self, tokens: TokenIds, owner: Request | str, *, everything: bool) -> Schedule:
        """Save what the pools hold of a prefix; see `Saves.save_prefix`."""
        salt = owner if isinstance(owner, str) else owner.cache_salt
        chain = KeyChain(tuple(self._roots(salt)), self.cache.block_size)
        chain.extend(tokens.array)
        return self.saves.save_prefix(chain, owner, everything=everything)

    def view_prefix(
        self, request: Request, below: Seq[Seq[str]], others: Seq[BlockKey], now: float
    ) -> PrefixView:
        """What a request would find and cost if it came now; nothing is queued."""
        seq = Sequence(request, self._roots(request.cache_salt), self.cache.block_size, 0, now)
        decodes = sum(other.num_todo == 1 for other in self._queues.running)
        crowd = self._crowd(self.num_queued_tokens, decodes, now)
        return view_prefix(seq, below, others, self.cache, self.loads, self._cost, crowd, now)

    def on_result(
        self, result: StepResult, now: float, tell: Callable[[Schedule], None] | None = None
    ) -> Schedule:
        """A launched step is done; `tell` takes what clients hear of it at once, so that no token
        waits until blocks are published."""
        out = Schedule()
        launched = self._steps.end(result.step, now, result.seconds)
        place, size = -1, self.cache.block_size
        for number, (seq, step, life) in enumerate(launched.rows):
            token = None
            if step.sample:
                place += 1
                token = result.tokens[place]
                seq.num_in_flight -= 1
            if seq.status is SequenceStatus.FINISHED or result.step in seq.void:
                continue
            self._suspects.pop(seq.id, None)
            if token is not None and step.row in result.invalid_rows:
                where = f"step {result.step} at position {step.start + step.num_tokens - 1}"
                message = f"request {seq.id}: the logits of {where} are not finite"
                if seq.guided or seq.request.sampling.any_rules:
                    message += ", or its rules leave no token to draw"
                self._finish(seq, FinishReason.ERROR, out, message)
                continue
            if token is not None:
                seq.append(token)
            if life == seq.life and seq.status is SequenceStatus.RUNNING:
                end = step.start + step.num_tokens
                if token is not None:
                    seq.num_confirmed = end
                if end // size > step.start // size:
                    self.saves.computed(seq, step.start, end)
                if step.logits:
                    self._hand_out(seq, step, result, number, now, out)
            if token is not None:
                self._emit(seq, token, result.logprobs.get(place), now, out)
        if tell is not None and out.deltas:
            tell(out)
            out = Schedule()
        self.saves.publish_all(out)
        return out

    def undo_step(self, step: int, message: str, *, out_of_memory: bool) -> Schedule:
        """A launched step raised: nothing of it counts.

        Out of memory, the step's requests start over under half the token budget. After any other
        error they run alone, one after the other, so that the one that raises is found and fails
        by itself. A step of one request that cannot be made smaller fails it.
        """
        out = Schedule()
        launched = self._steps.end(step, None)
        tokens = sum(row_step.num_tokens for _, row_step, _ in launched.rows)
        smaller = max(self.cache.block_size, min(tokens, self._max_prefill_tokens) // 2)
        hopeless = len(launched.rows) == 1 and (not out_of_memory or tokens <= smaller)
        if out_of_memory:
            self._max_prefill_tokens = min(self._max_prefill_tokens, smaller)
            self._max_batch_tokens = min(self._max_batch_tokens, smaller)
        for seq, row_step, life in launched.rows:
            seq.num_in_flight -= row_step.sample
            seq.void = range(step, self._steps.last + 1)
            if seq.status is SequenceStatus.FINISHED:
                continue
            if hopeless:
                self._finish(seq, FinishReason.ERROR, out, message)
                continue
            if seq.status is SequenceStatus.RUNNING and life == seq.life:
                self._preempt(seq, out)
            if not out_of_memory:
                self._suspects[seq.id] = seq
        return out

    # What goes out

    def schedule(self, now: float) -> Schedule:
        """Plan the next step; `plan` is None when there is nothing to compute right now."""
        out = Schedule()
        for seq in list(self._timed.values()):
            if seq.deadline_s is not None and now >= seq.deadline_s:
                self._finish(seq, FinishReason.LENGTH, out)
        for seq in list(self._asking.values()):
            if now >= seq.asked_driver_s + GUIDANCE_PATIENCE_S:
                message = f"its driver has allowed no token for {GUIDANCE_PATIENCE_S:g} s"
                self._finish(seq, FinishReason.ERROR, out, f"request {seq.id}: {message}")
        plan, self._wake_s = self._steps.begin(self._max_batch_tokens, self._chunk_grid, now), None
        suspects = (s for s in self._suspects.values() if not s.paused and s.id not in self._asking)
        alone = next(suspects, None)
        if alone is not None and alone.status is not SequenceStatus.RUNNING:
            # the others do not step meanwhile, and may hold the row, blocks or keys that it needs
            for seq in self._queues.running[::-1]:
                self._preempt(seq, out)
        running = [seq for seq in self._queues.running if alone in (None, seq)]
        for seq in running:
            # a guided row grows by several tokens: the youngest gives way before it is planned
            one = seq.num_todo == 1
            if (one or seq.guided) and self._may_step(seq) and self._grow(seq, out) and one:
                plan.add_step(seq, 1)
        num_decodes = len(plan.launched.rows)
        if not num_decodes:
            plan.budget = self._max_prefill_tokens
        queued = 0
        for seq in running:
            if seq.num_todo > 1 and self._may_step(seq):
                if self.loads.wants_plan(seq):
                    self.loads.plan(seq, now, self._crowd(queued, num_decodes, now, plan), out)
                self._prefill(seq, plan, now, out)
                queued += seq.num_todo
        self._admit(plan, alone, queued, num_decodes, now, out)
        out.plan = self._steps.launch(plan)
        return out

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self._queues.waiting)

    @property
    def num_running(self) -> int:
        """Requests with a row."""
        return len(self._queues.running)

    @property
    def num_queued_tokens(self) -> int:
        """Positions of prompts that will be computed before what comes next, as far as is known.

        Any thread may ask, so that nobody who wants to know waits for a step.
        """
        tokens, size = 0, self.cache.block_size
        # a list is copied in one step of the interpreter
        waiting, running = list(self._queues.waiting), list(self._queues.running)
        for seq in waiting:
            tokens += max(1, seq.num_todo - max(seq.num_found, size * seq.below.num_staged))
        for seq in running:
            if seq.num_todo > 1:
                tokens += max(1, seq.num_todo - size * len(seq.ahead[0]))
        return tokens

    def next_deadline(self) -> float | None:
        """When to plan again though nothing comes in: a request ends, or has waited enough."""
        deadlines = [seq.deadline_s for seq in self._timed.values()]
        deadlines += [s.asked_driver_s + GUIDANCE_PATIENCE_S for s in self._asking.values()]
        return min((d for d in (*deadlines, self._wake_s) if d is not None), default=None)

    def open_requests(self) -> list[tuple[str, str]]:
        """(client id, request id) of all unfinished requests."""
        return [(seq.client_id, seq.id) for seq in self._sequences.values()]

    def check_integrity(self, saving: Iterable[BlockRef] | None = None) -> None:
        """Assert that rows, block tables and references add up.

        Args:
            saving: (group, block) of all saves under way; None = not known.
        """
        self.cache.check_integrity()
        self._queues.check_integrity()
        for seq in self._sequences.values():
            asking = seq.guided and seq.mask is None
            assert asking == (seq.id in self._asking), "a guided row waits for nobody, or steps"
            assert not (asking and seq.num_in_flight), "a guided row has stepped unasked"
        live = [seq.id for seq in self._queues.waiting + self._queues.running]
        assert sorted(live) == sorted(self._sequences), "a request is in no queue, or in two"
        refs = [[0] * (pool.num_blocks + 1) for pool in self.cache.pools]
        self.loads.check_integrity(refs)
        held = [(g, b) for seq in self._sequences.values() for g, b, _ in seq.copies]
        held += self._steps.copied_from
        for seq in self._sequences.values():
            held += [(group, block) for group, table in enumerate(seq.tables) for block in table]
        for group, block in (*held, *(saving or ())):
            refs[group][block] += 1
        for group, pool in enumerate(self.cache.pools):
            reserved = sum(seq.reserve[group] for seq in self._sequences.values())
            assert pool.reserved == reserved, f"{pool.reserved} blocks reserved, not {reserved}"
            for block in range(1, pool.num_blocks + 1):
                count, known = pool.ref_count(block), refs[group][block]
                assert count == known or (saving is None and count > known), (
                    f"block {block} has {count} references, {known} are known"
                )

    # Running requests

    def _crowd(
        self, queued_tokens: int, num_decodes: int, now: float, plan: PlanBuilder | None = None
    ) -> Crowd:
        return Crowd(queued_tokens, num_decodes, self._steps.left_s(now, plan), self.num_waiting)

    def _may_step(self, seq: Sequence) -> bool:
        return seq.status is SequenceStatus.RUNNING and seq.wants_step and not seq.paused

    def _grow(self, seq: Sequence, out: Schedule) -> bool:
        """Make room for known tokens, preempting the youngest; False if `seq` had to give way."""
        if self._windowed and seq.num_todo == 1:
            self.cache.trim(seq)
        index = (seq.num_tokens + seq.num_in_flight - 1) // self.cache.block_size
        for group, table in enumerate(seq.tables):
            while index >= len(table):
                try:
                    self.cache.grow(seq, group)
                except CapacityError:
                    victim = self._queues.running[-1]
                    self._preempt(victim, out)
                    if victim is seq:
                        return False
        return True

    def _prefill(self, seq: Sequence, plan: PlanBuilder, now: float, out: Schedule) -> None:
        """Add what this step computes of a prefill: segments between what is there already."""
        size, room = self.cache.block_size, self.loads.chunk(seq)
        while not seq.num_in_flight:
            self.cache.advance(seq)
            first = seq.num_computed // size
            if seq.below.num_loading and seq.below.first < first:
                self.loads.pass_over(seq, first, out)
            if not seq.num_todo:
                if seq.num_logits:
                    return
                # All is there: the last token is computed again, for its logits.
                seq.num_computed -= 1
                seq.cached = True
            count = min(plan.room(seq), room)
            if count <= 0:
                return
            if seq.cached:
                return plan.add_chunk(seq, count)
            if self.loads.loads(seq, first):
                if self.loads.waits(seq, count, now, self._steps.left_s(now, plan)):
                    self._wake(now + MEETING_S)
                    return
                count = self.loads.take_over(seq, count, out)
            count = self.cache.make_writable(seq, min(count, self._hole(seq, count)))
            if not count:
                self._wake(now + MEETING_S)
                return
            plan.add_chunk(seq, count)
            room -= count

    def _hole(self, seq: Sequence, count: int) -> int:
        """How many of the next `count` positions are not there and not loading."""
        if seq.tail is not None and seq.tail[0] > seq.num_computed:
            count = min(count, seq.tail[0] - seq.num_computed)
        if not seq.below.num_loading and not any(seq.ahead):
            return count
        size = self.cache.block_size
        for index in range(seq.num_computed // size + 1, -(-(seq.num_computed + count) // size)):
            if self.loads.loads(seq, index) or self.cache.ahead_end(seq, index) > index:
                return index * size - seq.num_computed
        return count

    def _wake(self, at_s: float) -> None:
        self._wake_s = at_s if self._wake_s is None else min(self._wake_s, at_s)

    def _preempt(self, seq: Sequence, out: Schedule) -> None:
        self.preemptions += 1
        self.loads.drop(seq, out)
        self.cache.drop(seq)
        self._queues.preempt(seq)
        seq.life += 1
        seq.begin_life()
        seq.asked_s = -math.inf

    # Waiting requests

    def _admit(
        self,
        plan: PlanBuilder,
        alone: Sequence | None,
        queued: int,
        num_decodes: int,
        now: float,
        out: Schedule,
    ) -> None:
        """Look up and start waiting requests in order; one that does not fit holds the rest."""
        blocked = False
        for seq in list(self._queues.waiting):
            waits = seq.num_in_flight or seq.paused or seq.id in self._asking
            if waits or alone not in (None, seq):
                if not self.loads.has_room:  # who cannot start holds up nobody who can
                    self.loads.drop(seq, out)
                continue
            if seq.status is SequenceStatus.STAGING:
                until_s = seq.asked_s + max(self._lookup_patience_s, seq.lookup_worth_s)
                if now < until_s:
                    self._wake(until_s)
                    continue
            full = plan.budget <= 0 and not seq.below.num_staged
            blocked = blocked or full or not self._queues.has_row
            if blocked:
                if seq.asked_s == -math.inf and self.loads.has_room:
                    self._look_up(seq, self.cache.look(seq), now, out)
                continue
            if seq.awaits is not None and self._is_pending(seq, seq.awaits):
                continue
            looked = self.cache.look(seq)
            length = self.cache.present(looked)
            owned = length < len(looked[0]) and self._is_pending(seq, length)
            seq.awaits = length if owned else None
            if owned or self._look_up(seq, looked, now, out):
                continue
            # Each running request will want a block soon: leave it one, or preemptions begin.
            if not self.cache.start(seq, looked, spare=len(self._queues.running)):
                blocked = True
                continue
            self._queues.start(seq)
            seq.begin_account()
            seq.tiers[[*range(length), *set.intersection(*seq.ahead)]] = GPU
            self.loads.plan(seq, now, self._crowd(queued, num_decodes, now, plan), out)
            self.cache.copy_tail(seq, self._queues.running)
            self.saves.on_hit(seq, length, out)
            self._prefill(seq, plan, now, out)
            queued += seq.num_todo

    def _is_pending(self, seq: Sequence, index: int) -> bool:
        return self.cache.pending_owner(seq.chain, index) is not None

    def _look_up(self, seq: Sequence, looked: Seq[Seq[int]], now: float, out: Schedule) -> bool:
        """Ask below for what the pools lack; False when there is nothing to ask."""
        seq.asked_s = now
        wanted = self.loads.wanted(seq, looked)
        if not len(wanted):
            return False
        # No place to ask now: those who have one go first, or nobody ever gives one back.
        if self.loads.has_room or self.loads.give_way(self._queues.waiting, seq, out):
            # else nobody knows when its turn comes
            wait_s = self._steps.left_s(now) if self._queues.is_next(seq) else math.inf
            self.loads.ask(seq, wanted, now, wait_s, out)
        return True

    # Ends

    def _emit(
        self, seq: Sequence, token: int, logprobs: TokenLogprobs | None, now: float, out: Schedule
    ) -> None:
        reason = FinishReason.LENGTH if seq.num_tokens >= seq.max_tokens else None
        if token in seq.eos_token_ids:
            reason = FinishReason.STOP
        told = () if logprobs is None else (logprobs,)
        asks = seq.guided and reason is None
        if asks:
            seq.mask, seq.asked_driver_s = None, now
            self._asking[seq.id] = seq
        delta = TokenDelta(seq.id, (token,), reason, logprobs=told, awaits_guidance=asks)
        if not seq.announced:
            delta = self._announced(seq, delta, now)
        else:
            # of all rows of a step the same, as a rule
            gap_s = now - seq.last_token_s
            out.token_gaps[gap_s] = out.token_gaps.get(gap_s, 0) + 1
        seq.last_token_s = now
        out.deltas.append((seq.client_id, delta))
        if reason is not None:
            self._end(seq, out)

    def _hand_out(
        self,
        seq: Sequence,
        step: RowStep,
        result: StepResult,
        place: int,
        now: float,
        out: Schedule,
    ) -> None:
        """Keep the logits of a segment; with the last one the request ends."""
        seq.num_handed_out += step.logits
        if place in result.logits:
            seq.handed_out[step.start] = result.logits[place]
        else:
            seq.told[step.start] = result.prompt_logprobs[place]
        if seq.num_handed_out < seq.num_logits:
            return
        # a step has its segments of one token first
        logits = b"".join(part for _, part in sorted(seq.handed_out.items())) or None
        told = tuple(one for _, part in sorted(seq.told.items()) for one in part)
        delta = TokenDelta(seq.id, (), FinishReason.LENGTH, logprobs=told, logits=logits)
        out.deltas.append((seq.client_id, self._announced(seq, delta, now)))
        self.cache.publish_tail(seq)
        self._end(seq, out)

    def _announced(self, seq: Sequence, delta: TokenDelta, now: float) -> TokenDelta:
        """The first news of a request, with what it found and how long it took."""
        found, reused = seq.account()
        seq.announced = True
        self.loads.on_first_token(seq, now)
        ttft_s = now - seq.submitted_s
        return delta._replace(reused_tokens=reused, ttft_s=ttft_s, found_tokens=found)

    def _finish(
        self, seq: Sequence, reason: FinishReason, out: Schedule, error: str | None = None
    ) -> None:
        delta = TokenDelta(seq.id, (), reason, error, "LiteCacheError" if error else None)
        out.deltas.append((seq.client_id, delta))
        self._end(seq, out)

    def _end(self, seq: Sequence, out: Schedule) -> None:
        """Take a request out of its queue and give back all it holds."""
        self.saves.publish(seq, out)
        self._queues.remove(seq)
        self.loads.drop(seq, out)
        self.cache.drop(seq)
        seq.status = SequenceStatus.FINISHED
        del self._sequences[seq.id]
        for known in (self._timed, self._suspects, self._asking):
            known.pop(seq.id, None)
