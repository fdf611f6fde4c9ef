"""Decides what each engine step computes. Pure: no clock, no I/O, no torch.

Messages go in (requests, staged and loaded blocks, step results, aborts), a `Schedule` comes
out. Steps are continuous batches: decodes first, then chunks of running prefills, then newly
admitted requests, within one token budget. A request is admitted when blocks for all its known
tokens are there; when a decode finds no block, the youngest request is preempted, and resumes
through the prefix cache and the tiers below it.

Tokens of launched steps need not be known: a request counts the samples in flight, and the
runner feeds a sampled token to the next step itself. So step n + 1 can be planned while step n
runs. The stream order of the device makes it safe to hand out blocks that a running step still
writes to; copies on other streams wait for the steps launched before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

from litecache.engine.kv_layout import TRASH_BLOCK
from litecache.engine.scheduling.admission import Admission
from litecache.engine.scheduling.orders import LoadOrder, SaveOrder, Schedule
from litecache.engine.scheduling.plan_builder import Launched, PlanBuilder
from litecache.engine.scheduling.prefix_cache import PrefixCache
from litecache.engine.scheduling.sequence import (
    BlockRef,
    RequestQueues,
    Sequence,
    SequenceStatus,
)
from litecache.engine.scheduling.step_plan import StepResult, TableUpdate
from litecache.engine.scheduling.tier_orders import TierOrders
from litecache.errors import CapacityError
from litecache.hashing import BlockKey
from litecache.types import FinishReason, Request, TokenDelta, TokenLogprobs

REMEMBERED_ABORTS = 4096


class Scheduler:
    """Continuous batching over a `PrefixCache`.

    Args:
        cache: pools and indexes; the scheduler is their only user.
        roots: cache salt -> root key of every KV group.
        max_requests: rows, so requests that run at once.
        max_batch_tokens: token budget of a step.
        max_prefill_tokens: the same for a step in which nothing decodes; None = no more.
        lower_tiers: whether blocks can be staged from and saved to shards.
        admission: which published blocks are saved: "all", "reused" or "none".
        deterministic: end prefill chunks on a fixed grid.
    """

    def __init__(
        self,
        cache: PrefixCache,
        roots: Callable[[str], Seq[BlockKey]],
        *,
        max_requests: int,
        max_batch_tokens: int,
        max_prefill_tokens: int | None = None,
        lower_tiers: bool = False,
        admission: str = "all",
        deterministic: bool = False,
    ) -> None:
        self.cache = cache
        self.preemptions = 0
        self._roots = roots
        self._windowed = any(group.policy.slides for group in cache.groups)
        self._tiers = TierOrders(cache, lower_tiers=lower_tiers, admission=admission)
        self._max_batch_tokens = max_batch_tokens
        self._max_prefill_tokens = max_prefill_tokens or max_batch_tokens
        self._chunk_grid = max(1, max_batch_tokens // 2) if deterministic else None
        self._sequences: dict[str, Sequence] = {}
        self._timed: dict[str, Sequence] = {}
        self._early_aborts: dict[str, None] = {}
        self._suspects: dict[str, Sequence] = {}
        self._queues = RequestQueues(max_requests)
        self._admission = Admission(cache, self._queues, self._tiers)
        self._launched: dict[int, Launched] = {}
        self._arrivals = 0
        self._step = 0

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
        return self.abort([seq.id] if seq.id in self._early_aborts else [])

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

    def set_paused(self, request_ids: Iterable[str], paused: bool) -> None:
        """Hold or resume requests whose client does not take their tokens."""
        for request_id in request_ids:
            if request_id in self._sequences:
                self._sequences[request_id].paused = paused

    def on_staged(self, ticket: int, found: dict[BlockRef, str]) -> Schedule:
        """The lower tiers hold these blocks (-> tier) and have leased their slots."""
        return self._tiers.on_staged(ticket, found)

    def on_loaded(self, order: LoadOrder, loaded: Iterable[BlockRef], *, ended: bool) -> None:
        """Copies of a load have landed; once it has ended, what did not land is a miss."""
        self._tiers.on_loaded(order, loaded, ended=ended)

    def on_saved(self, orders: Iterable[SaveOrder], dropped: Iterable[SaveOrder] = ()) -> None:
        """Copies of save orders ended; dropped ones may be saved on a later sight."""
        self._tiers.on_saved(orders, dropped)

    def on_result(self, result: StepResult, now: float) -> Schedule:
        """A launched step is done."""
        out = Schedule()
        launched = self._take_launched(result.step)
        tokens, logprobs = result.tokens, result.logprobs
        place = -1
        for seq, step, life in launched.rows:
            token = None
            if step.sample:
                place += 1
                token = tokens[place]
                seq.num_in_flight -= 1
            if seq.status is SequenceStatus.FINISHED:
                continue
            if self._suspects:
                self._suspects.pop(seq.id, None)
            if token is not None and step.row in result.invalid_rows:
                message = (
                    f"request {seq.id}: the logits of step {result.step} at position"
                    f" {step.start + step.num_tokens - 1} are not finite"
                )
                if seq.request.sampling.any_rules:
                    message += ", or its rules leave no token to draw"
                self._finish(seq, FinishReason.ERROR, out, message)
                continue
            if token is not None:
                seq.append(token)
            if life == seq.life and seq.status is SequenceStatus.RUNNING:
                self._tiers.publish_computed(seq, step.start + step.num_tokens, out)
            if token is not None:
                self._emit(seq, token, logprobs.get(place) if logprobs else None, now, out)
        return out

    def undo_step(self, step: int, message: str, *, out_of_memory: bool) -> Schedule:
        """A launched step raised: nothing of it counts.

        Out of memory, the step's requests start over under half the token budget. After any other
        error they run alone, one after the other, so that the one that raises is found and fails
        by itself. A step of one request that cannot be made smaller fails it.
        """
        out = Schedule()
        launched = self._take_launched(step)
        tokens = sum(row_step.num_tokens for _, row_step, _ in launched.rows)
        smaller = max(self.cache.block_size, min(tokens, self._max_prefill_tokens) // 2)
        hopeless = len(launched.rows) == 1 and (not out_of_memory or tokens <= smaller)
        if out_of_memory:
            self._max_prefill_tokens = min(self._max_prefill_tokens, smaller)
            self._max_batch_tokens = min(self._max_batch_tokens, smaller)
        for seq, row_step, life in launched.rows:
            seq.num_in_flight -= row_step.sample
            if seq.status is SequenceStatus.FINISHED:
                continue
            if hopeless:
                self._finish(seq, FinishReason.ERROR, out, message)
                continue
            if seq.status is SequenceStatus.RUNNING and life == seq.life:
                self._preempt(seq)
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
        plan = PlanBuilder(self._max_batch_tokens, self._chunk_grid)
        alone = next(iter(self._suspects.values()), None)
        running = list(self._queues.running)
        if alone is not None:
            running = [seq for seq in running if seq is alone]
        for seq in running:
            if seq.num_todo == 1 and self._may_step(seq) and self._grow(seq, plan):
                plan.add_step(seq, 1)
        if not plan.launched.rows:
            plan.budget = self._max_prefill_tokens
        for seq in running:
            if seq.num_todo > 1 and self._may_step(seq):
                plan.add_chunk(seq)
        self._admission.admit(plan, out, alone)
        out.plan = plan.build(self._step + 1)
        if out.plan is not None:
            self._step += 1
            self._launched[self._step] = plan.launched
        return out

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self._queues.waiting)

    @property
    def num_running(self) -> int:
        """Requests with a row."""
        return len(self._queues.running)

    def next_deadline(self) -> float | None:
        """Earliest deadline of any request."""
        deadlines = (seq.deadline_s for seq in self._timed.values())
        return min((d for d in deadlines if d is not None), default=None)

    def open_requests(self) -> list[tuple[str, str]]:
        """(client id, request id) of all unfinished requests."""
        return [(seq.client_id, seq.id) for seq in self._sequences.values()]

    def check_integrity(self) -> None:
        """Assert that rows, block tables and references add up."""
        self.cache.check_integrity()
        self._queues.check_integrity()
        live = sorted(seq.id for seq in self._queues.waiting + self._queues.running)
        assert live == sorted(self._sequences), "a request is in no queue, or in two"
        for group, pool in enumerate(self.cache.pools):
            refs = [0] * (pool.num_blocks + 1)
            for seq in self._sequences.values():
                loading = [b for (g, _), b in seq.loading.items() if g == group]
                for block in seq.tables[group] + seq.held[group] + loading:
                    refs[block] += 1
            for launched in self._launched.values():
                for held_group, block in launched.copied_from:
                    refs[block] += held_group == group
            for block in range(1, pool.num_blocks + 1):
                assert pool.ref_count(block) >= refs[block], f"block {block} used, not referenced"

    # Running requests

    def _may_step(self, seq: Sequence) -> bool:
        return seq.status is SequenceStatus.RUNNING and seq.wants_token and not seq.paused

    def _grow(self, seq: Sequence, plan: PlanBuilder) -> bool:
        """Make room for the next token, preempting the youngest; False if `seq` had to give way."""
        for group, first, end in self.cache.trim(seq) if self._windowed else ():
            gone = (TRASH_BLOCK,) * (end - first)
            plan.tables.append(TableUpdate(seq.row, group, first, gone))
        index = seq.num_computed // self.cache.block_size
        for group, table in enumerate(seq.tables):
            while index >= len(table):
                try:
                    block = self.cache.grow(seq, group)
                except CapacityError:
                    victim = self._queues.running[-1]
                    plan.forget_row(victim.row)
                    self._preempt(victim)
                    if victim is seq:
                        return False
                else:
                    plan.tables.append(TableUpdate(seq.row, group, index, (block,)))
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.preemptions += 1
        self.cache.drop(seq)
        self._queues.preempt(seq)
        seq.life += 1
        seq.looked_up = seq.cached = False
        seq.complete_at = None
        seq.num_computed = 0

    # Ends

    def _emit(
        self,
        seq: Sequence,
        token: int,
        logprobs: TokenLogprobs | None,
        now: float,
        out: Schedule,
    ) -> None:
        reason = None
        if token in seq.eos_token_ids:
            reason = FinishReason.STOP
        elif seq.num_tokens >= seq.max_tokens:
            reason = FinishReason.LENGTH
        told = () if logprobs is None else (logprobs,)
        if seq.announced:
            delta = TokenDelta(seq.id, (token,), reason, logprobs=told)
        else:
            ttft_s = now - seq.submitted_s
            reused = dict(seq.reused or {})
            delta = TokenDelta(
                seq.id, (token,), reason, reused_tokens=reused, ttft_s=ttft_s, logprobs=told
            )
            seq.announced = True
        out.deltas.append((seq.client_id, delta))
        if reason is not None:
            self._end(seq, out)

    def _finish(
        self, seq: Sequence, reason: FinishReason, out: Schedule, error: str | None = None
    ) -> None:
        delta = TokenDelta(seq.id, (), reason, error, "LiteCacheError" if error else None)
        out.deltas.append((seq.client_id, delta))
        self._end(seq, out)

    def _end(self, seq: Sequence, out: Schedule) -> None:
        """Take a request out of its queue and give back all it holds."""
        self._queues.remove(seq)
        self._tiers.drop(seq, out)
        self.cache.drop(seq)
        seq.status = SequenceStatus.FINISHED
        del self._sequences[seq.id]
        self._timed.pop(seq.id, None)
        self._suspects.pop(seq.id, None)

    def _take_launched(self, step: int) -> Launched:
        launched = self._launched.pop(step)
        for group, block in launched.copied_from:
            self.cache.pools[group].release([block])
        return launched
