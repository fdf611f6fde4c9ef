"""A plain model of runner and tiers that the scheduler is driven against.

The world executes plans on symbolic KV: what a block holds at an offset is the whole prefix of
tokens up to that position, so attention can check that every visible position holds exactly what
it must. Tokens are a function of the prefix; a plain loop gives the expected output. The driver of
a guided request is another such function: what it appends, and what it allows. Events of lower
tiers are delivered in any order, fail, and are late. A copy that has begun leaves anything in its
block until it has landed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from litecache.engine.kv_layout import TRASH_BLOCK, KVLayout, KVSpec
from litecache.engine.scheduling.below import BlockRef, FoundBelow, as_pairs, as_refs
from litecache.engine.scheduling.cost_model import CostModel
from litecache.engine.scheduling.orders import (
    CancelOrder,
    LoadOrder,
    LoadReport,
    RowStep,
    SaveOrder,
    Schedule,
    StageOrder,
    StepPlan,
    StepResult,
)
from litecache.engine.scheduling.prefix_cache import PrefixCache
from litecache.engine.scheduling.scheduler import Scheduler
from litecache.engine.scheduling.sequence import Sequence
from litecache.hashing import BlockKey, root_key
from litecache.types import FinishReason, Guidance, Request, SamplingParams

BLOCK_SIZE = 8
WINDOW = 20
VOCAB = 3
EOS = 2


def next_token(prefix: tuple[int, ...]) -> int:
    """The model: rarely the end of the sequence, else one of two tokens."""
    value = zlib.crc32(bytes(prefix))
    return EOS if value % 13 == 0 else value % 2


def draw(prefix: tuple[int, ...], mask: bytes) -> int:
    """What the model draws of the allowed tokens; of all where there is no mask."""
    token, bits = next_token(prefix), int.from_bytes(mask, "little") or 0b111
    return token if bits >> token & 1 else (bits & -bits).bit_length() - 1


def guide(prefix: tuple[int, ...], room: int) -> tuple[tuple[int, ...], bytes]:
    """What a driver appends, of at most `room` tokens, and what it allows then; b"" ends it."""
    value = zlib.crc32(bytes((9, *prefix)))
    forced = tuple(value >> place & 1 for place in range(value % 23 if value % 3 else 0))[:room]
    ends = prefix and value % 17 == 0
    return forced, b"" if ends else bytes((1 + zlib.crc32(bytes((8, *prefix))) % 7, 0, 0, 0))


def expected_output(
    prompt: tuple[int, ...], max_new_tokens: int, mask: bytes | None = None
) -> tuple[int, ...]:
    """The plain reference: generate without any cache; guided where there is a first mask."""
    tokens, last = prompt, len(prompt) + max_new_tokens
    while len(tokens) < last:
        tokens += (draw(tokens, mask or b""),)
        if tokens[-1] == EOS:
            break
        if mask is not None and len(tokens) < last:
            forced, mask = guide(tokens, last - len(tokens) - 1)
            tokens += forced
            if not mask:
                break
    return tokens[len(prompt) :]


def logits_after(tokens: tuple[int, ...], count: int) -> bytes:
    """What the last `count` positions hand out: a byte each."""
    ends = range(len(tokens) - count + 1, len(tokens) + 1)
    return bytes(next_token(tokens[:end]) for end in ends)


def make_layout(windowed: bool, window: int = WINDOW) -> KVLayout:
    """One full-attention group, and a sliding-window one if asked for."""
    full = KVSpec(1, 8, 8, "float32")
    sliding = KVSpec(1, 8, 8, "float32", window=window)
    return KVLayout.from_specs([full, sliding] if windowed else [full], BLOCK_SIZE)


class ForcedCosts(CostModel):
    """Plans what a test says, and waits at the meeting as long as it says."""

    def __init__(self) -> None:
        self.load_from: Callable[[int, int], int] = lambda first, end: first
        self.patient = True
        super().__init__(BLOCK_SIZE, loads=lambda first, end: self.load_from(first, end))

    def sooner(self, *args: object, **kwargs: object) -> bool:
        return self.patient


@dataclass
class Row:
    tokens: list[int]
    tables: list[list[int]]
    computed: set[int] = field(default_factory=set)


@dataclass
class Load:
    """A load order; `left` is not begun, what is in `begun` is being copied."""

    order: LoadOrder
    seq: Sequence
    targets: dict[BlockRef, int]
    left: list[BlockRef]
    begun: list[BlockRef] = field(default_factory=list)


@dataclass
class World:
    """Scheduler, symbolic pools, and a lower tier that keeps what was saved."""

    num_blocks: int
    windowed: bool = False
    window: int = WINDOW
    lower_tiers: bool = True
    admission: str = "all"
    max_requests: int = 3
    max_batch_tokens: int = 24
    max_prefill_tokens: int | None = None
    deterministic: bool = False
    load_chunk_tokens: int = 16
    rows: dict[int, Row] = field(default_factory=dict)
    blocks: dict[tuple[int, int, int], tuple[int, ...]] = field(default_factory=dict)
    stored: dict[BlockKey, list[tuple[int, ...]]] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    logits: dict[str, bytes | None] = field(default_factory=dict)
    finished: dict[str, FinishReason] = field(default_factory=dict)
    asking: list[str] = field(default_factory=list)
    requests: dict[str, Request] = field(default_factory=dict)
    reused: dict[str, dict[str, int]] = field(default_factory=dict)
    found: dict[str, dict[str, int]] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)
    stages: list[StageOrder] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    reports: list[LoadReport] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    leases: dict[int, set[BlockRef]] = field(default_factory=dict)
    last_use: dict[tuple[int, int], int] = field(default_factory=dict)
    landed: set[tuple[str, int, int]] = field(default_factory=set)
    now: float = 0.0
    computed_tokens: int = 0

    def __post_init__(self) -> None:
        layout = make_layout(self.windowed, self.window)
        self.groups = layout.groups
        self.costs = ForcedCosts()
        self.scheduler = Scheduler(
            PrefixCache(layout.groups, self.num_blocks),
            self.roots,
            max_requests=self.max_requests,
            max_batch_tokens=self.max_batch_tokens,
            max_prefill_tokens=self.max_prefill_tokens,
            cost=self.costs if self.lower_tiers else None,
            admission=self.admission,
            deterministic=self.deterministic,
            load_chunk_tokens=self.load_chunk_tokens,
        )

    def roots(self, salt: str) -> tuple[BlockKey, ...]:
        return tuple(root_key({"group": group.index, "salt": salt}) for group in self.groups)

    # What the engine does

    def submit(self, prompt: tuple[int, ...], max_new_tokens: int, **fields: object) -> str:
        name = f"r{len(self.requests)}"
        assert not (max_new_tokens and fields.get("logits")), "either tokens or logits"
        sampling = SamplingParams(max_new_tokens, eos_token_ids=(EOS,))
        request = Request(name, "client", prompt, sampling, **fields)  # type: ignore[arg-type]
        self.requests[name] = request
        self.outputs[name] = []
        self.take(self.scheduler.add(request, self.now))
        return name

    def step(self) -> bool:
        """Schedule and, if there is a plan, execute it; its result waits in `results`."""
        out = self.scheduler.schedule(self.now)
        self.take(out)
        if out.plan is None:
            return False
        self.execute(out.plan)
        return True

    def take(self, out: Schedule) -> None:
        self.stages += out.stages
        for order in out.loads:
            self._order(order)
        self.saves += out.saves
        for cancel in out.cancels:
            self._cancel(cancel)
        for ticket in out.discards:
            self.leases.pop(ticket, None)
        for _, delta in out.deltas:
            assert delta.request_id not in self.finished, "a delta after the end"
            self.outputs[delta.request_id] += delta.token_ids
            if delta.reused_tokens is not None:
                self.reused[delta.request_id] = delta.reused_tokens
                self.found[delta.request_id] = delta.found_tokens or {}
            if delta.awaits_guidance:
                self.asking.append(delta.request_id)
            if delta.finish_reason is not None:
                self.finished[delta.request_id] = delta.finish_reason
                self.logits[delta.request_id] = delta.logits

    def _order(self, order: LoadOrder) -> None:
        seq = self.scheduler.loads._copies[order.ticket][0]
        running = {result.step for result in self.results}
        refs = as_pairs(order.refs)
        steps = order.steps.tolist()
        for ref, block, step in zip(refs, order.blocks.tolist(), steps, strict=True):
            self.leases[order.ticket].remove(ref)  # each lease is taken once
            used = self.last_use.get((ref[0], block), 0)
            assert used <= step or used not in running, "a copy would overtake a step"
        indices = [index for _, index in refs]
        assert indices == sorted(indices, reverse=True), "not ordered from the back"
        targets = dict(zip(refs, order.blocks.tolist(), strict=True))
        self.loads.append(Load(order, seq, targets, refs))

    def _cancel(self, cancel: CancelOrder) -> None:
        """What has not begun is lost; that is told some time later."""
        refs = None if cancel.refs is None else as_pairs(cancel.refs)
        if refs is None:
            self.leases.pop(cancel.ticket, None)
        for load in [load for load in self.loads if load.order.ticket == cancel.ticket]:
            lost = [ref for ref in load.left if refs is None or ref in refs]
            load.left = [ref for ref in load.left if ref not in lost]
            if lost:
                self.reports.append(LoadReport(cancel.ticket, lost=as_refs(lost)))
        self._tidy()

    def _tidy(self) -> None:
        self.loads = [load for load in self.loads if load.left or load.begun]

    def finish_step(self) -> None:
        self.take(self.scheduler.on_result(self.results.pop(0), self.now, self.take))

    def fail_last_step(self, out_of_memory: bool) -> None:
        step = self.results.pop().step
        out = self.scheduler.undo_step(step, "planted", out_of_memory=out_of_memory)
        self.take(out)

    def answer_stage(self, position: int, have: Callable[[BlockKey], bool]) -> None:
        order = self.stages.pop(position)
        asked = zip(as_pairs(order.refs), order.keys, strict=True)
        found = {ref: "ram:0" for ref, key in asked if key in self.stored and have(key)}
        if found:
            self.leases.setdefault(order.ticket, set()).update(found)
        self.take(self.scheduler.loads.on_staged(order.ticket, FoundBelow.of(found)))

    def begin_copies(self, position: int, count: int) -> None:
        """The next copies of a load begin: whatever they are asked, they end."""
        load = self.loads[position]
        begun, load.left = load.left[:count], load.left[count:]
        load.begun += begun
        for ref in begun:
            self._spoil(load, ref)

    def land(self, position: int, count: int, works: Callable[[int], bool] = bool) -> None:
        """The next copies of a load have landed, or were lost."""
        self.begin_copies(position, max(0, count - len(self.loads[position].begun)))
        load = self.loads[position]
        part, load.begun = load.begun[:count], load.begun[count:]
        done = [ref for number, ref in enumerate(part, start=1) if works(number)]
        for group, index in done:
            block = load.targets[group, index]
            for offset, prefix in enumerate(self.stored[load.seq.chain.keys[group][index]]):
                self.blocks[group, block, offset] = prefix
            if load.seq.ticket == load.order.ticket and load.seq.below.is_loading(group, index):
                self.landed.add((load.seq.id, load.seq.life, index))
        self._tidy()
        lost = [ref for ref in part if ref not in done]
        report = LoadReport(load.order.ticket, as_refs(done), as_refs(lost))
        self.take(self.scheduler.loads.on_loaded(report))

    def answer_load(self, position: int, works: Callable[[int], bool] = bool) -> None:
        """All the rest of a load ends."""
        load = self.loads[position]
        self.land(position, len(load.left) + len(load.begun), works)

    def report(self, position: int) -> None:
        """What a cancelled load has lost is told."""
        self.take(self.scheduler.loads.on_loaded(self.reports.pop(position)))

    def _spoil(self, load: Load, ref: BlockRef) -> None:
        for offset in range(BLOCK_SIZE):
            self.blocks[ref[0], load.targets[ref], offset] = ()

    def answer_driver(self, position: int, times: int = 1) -> None:
        """The driver of a guided request says how it goes on, perhaps again and again."""
        name = self.asking.pop(position)
        if name in self.finished:
            return
        request, output = self.requests[name], self.outputs[name]
        tokens = (*request.prompt, *output)
        room = request.sampling.max_new_tokens - len(output) - 1
        guidance = Guidance(name, len(tokens), *guide(tokens, room))
        output += guidance.token_ids
        for _ in range(times):
            self.take(self.scheduler.guide(guidance))

    def answer_save(self, position: int, works: bool) -> None:
        order = self.saves.pop(position)
        if works:
            self.stored[order.key] = [
                self.blocks[order.group, order.block, offset] for offset in range(BLOCK_SIZE)
            ]
        self.scheduler.saves.on_saved([order] if works else [], [] if works else [order])

    def run_steps(self) -> None:
        """Deliver steps alone until nothing moves any more."""
        while self.step() or self.results:
            while self.results:
                self.finish_step()

    def run_until_idle(self) -> None:
        """Deliver everything until nothing moves any more: an engine would sleep then."""
        moved = True
        while moved:
            moved = self.step()
            while self.results:
                self.finish_step()
                moved = True
            while self.stages or self.loads or self.saves or self.reports or self.asking:
                if self.asking:
                    self.answer_driver(0, times=2)
                elif self.stages:
                    self.answer_stage(0, lambda key: True)
                elif self.loads:
                    self.answer_load(0)
                elif self.reports:
                    self.report(0)
                else:
                    self.answer_save(0, True)
                moved = True
            self.check()

    # The symbolic model

    def execute(self, plan: StepPlan) -> None:
        assert StepPlan.from_dict(plan.to_dict()) == plan
        for new in plan.new_rows:
            self.rows[new.row] = Row(list(new.token_ids), [[] for _ in self.groups])
        masks = {}
        for told in plan.guides:
            tokens = self.rows[told.row].tokens
            assert told.start <= len(tokens), "a guided row has a gap"
            assert tuple(tokens[told.start :]) == told.token_ids[: len(tokens) - told.start]
            tokens[told.start :] = told.token_ids
            masks[told.row] = told.mask
        written = [
            (update.group, update.row, update.start + offset)
            for update in plan.table_updates
            for offset in range(len(update.block_ids))
        ]
        assert len(written) == len(set(written)), "an entry is written twice: a race on a GPU"
        for update in plan.table_updates:
            table = self.rows[update.row].tables[update.group]
            table[update.start :] = update.block_ids + tuple(
                table[update.start + len(update.block_ids) :]
            )
        for copy in plan.copies:
            for offset in range(BLOCK_SIZE):
                source = self.blocks.get((copy.group, copy.src, offset), ())
                self.blocks[copy.group, copy.dst, offset] = source
        budget = self.max_batch_tokens
        if not any(row.num_tokens == 1 for row in plan.rows):
            budget = self.max_prefill_tokens or budget
        assert plan.num_tokens <= budget + self.max_requests
        sizes = [row.num_tokens > 1 for row in plan.rows]
        assert sizes == sorted(sizes), "rows of one token must come first"
        self.plans.append(plan)
        tokens, logits = [], {}
        # In every layer all of a step's keys and values are written before any is read.
        for step in plan.rows:
            if not step.cached:
                self._write(step)
        for place, step in enumerate(plan.rows):
            row = self.rows[step.row]
            self.computed_tokens += step.num_tokens
            for position in range(step.start, step.start + step.num_tokens):
                self._attend(row, position)
            if step.sample:
                end = step.start + step.num_tokens
                assert end == len(row.tokens), "samples before the last known token"
                (seq,) = (s for s in self.scheduler._queues.running if s.row == step.row)
                assert bool(masks.get(step.row)) == seq.guided, "a guided row draws unguided"
                row.tokens.append(draw(tuple(row.tokens), masks.get(step.row, b"")))
                tokens.append(row.tokens[-1])
            if step.logits:
                seen = tuple(row.tokens[: step.start + step.num_tokens])
                logits[place] = logits_after(seen, step.logits)
        self.results.append(StepResult(plan.step, tuple(tokens), logits=logits))

    def _write(self, step: RowStep) -> None:
        row = self.rows[step.row]
        (seq,) = (seq for seq in self.scheduler._queues.running if seq.row == step.row)
        being_copied = {(ref[0], load.targets[ref]) for load in self.loads for ref in load.begun}
        for position in range(step.start, step.start + step.num_tokens):
            assert position not in row.computed, "computed twice"
            row.computed.add(position)
            if not self.windowed:
                index = position // BLOCK_SIZE
                assert (seq.id, seq.life, index) not in self.landed, "computes what has landed"
            for group, table in enumerate(row.tables):
                block = table[position // BLOCK_SIZE]
                assert block != TRASH_BLOCK, "writes to the trash block"
                pool = self.scheduler.cache.pools[group]
                assert pool.key(block) is None, "a published block is written to"
                assert (group, block) not in being_copied, "computes into a block that loads"
                prefix = tuple(row.tokens[: position + 1])
                self.blocks[group, block, position % BLOCK_SIZE] = prefix
                self.last_use[group, block] = self.plans[-1].step

    def _attend(self, row: Row, position: int) -> None:
        for group, table in zip(self.groups, row.tables, strict=True):
            window = group.spec.window
            first = 0 if window is None else max(0, position - window + 1)
            for seen in range(first, position + 1):
                block = table[seen // BLOCK_SIZE]
                held = self.blocks.get((group.index, block, seen % BLOCK_SIZE))
                self.last_use[group.index, block] = self.plans[-1].step
                assert held == tuple(row.tokens[: seen + 1]), (
                    f"position {position} of group {group.index} sees wrong KV at {seen}"
                )

    def check(self) -> None:
        self.scheduler.check_integrity([(order.group, order.block) for order in self.saves])

    def check_outputs(self) -> None:
        """Finished requests have exactly the reference's tokens; aborted ones a prefix of them."""
        for name, reason in self.finished.items():
            request = self.requests[name]
            new, mask = request.sampling.max_new_tokens, request.mask
            wanted = expected_output(tuple(request.prompt), new, mask)
            if request.logits and reason is FinishReason.LENGTH:
                told = logits_after(tuple(request.prompt), request.logits)
                assert self.logits[name] == told, f"{name} has other logits"
            if reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert tuple(self.outputs[name]) == wanted, f"{name} has other tokens"
            else:
                assert tuple(self.outputs[name]) == wanted[: len(self.outputs[name])]
