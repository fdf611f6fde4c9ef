"""A plain model of runner and tiers that the scheduler is driven against.

The world executes plans on symbolic KV: what a block holds at an offset is the whole prefix of
tokens up to that position, so attention can check that every visible position holds exactly what
it must. Tokens are a function of the prefix; a plain loop gives the expected output. Events of
lower tiers are delivered in any order, fail, and are late.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from litecache.engine.kv_layout import TRASH_BLOCK, KVLayout, KVSpec
from litecache.engine.scheduling.orders import LoadOrder, SaveOrder, Schedule, StageOrder
from litecache.engine.scheduling.prefix_cache import PrefixCache
from litecache.engine.scheduling.scheduler import Scheduler
from litecache.engine.scheduling.step_plan import StepPlan, StepResult
from litecache.hashing import BlockKey, root_key
from litecache.types import FinishReason, Request, SamplingParams

BLOCK_SIZE = 8
WINDOW = 20
VOCAB = 3
EOS = 2


def next_token(prefix: tuple[int, ...]) -> int:
    """The model: rarely the end of the sequence, else one of two tokens."""
    value = zlib.crc32(bytes(prefix))
    return EOS if value % 13 == 0 else value % 2


def expected_output(prompt: tuple[int, ...], max_new_tokens: int) -> tuple[int, ...]:
    """The plain reference: generate without any cache."""
    tokens = prompt
    for _ in range(max_new_tokens):
        tokens += (next_token(tokens),)
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def make_layout(windowed: bool, window: int = WINDOW) -> KVLayout:
    """One full-attention group, and a sliding-window one if asked for."""
    full = KVSpec(1, 8, 8, "float32")
    sliding = KVSpec(1, 8, 8, "float32", window=window)
    return KVLayout.from_specs([full, sliding] if windowed else [full], BLOCK_SIZE)


@dataclass
class _Row:
    tokens: list[int]
    tables: list[list[int]]


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
    rows: dict[int, _Row] = field(default_factory=dict)
    blocks: dict[tuple[int, int, int], tuple[int, ...]] = field(default_factory=dict)
    stored: dict[BlockKey, list[tuple[int, ...]]] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    finished: dict[str, FinishReason] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    reused: dict[str, dict[str, int]] = field(default_factory=dict)
    results: list[StepResult] = field(default_factory=list)
    stages: list[StageOrder] = field(default_factory=list)
    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    landed: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    leases: set[int] = field(default_factory=set)
    now: float = 0.0
    computed_tokens: int = 0

    def __post_init__(self) -> None:
        layout = make_layout(self.windowed, self.window)
        self.groups = layout.groups
        self.scheduler = Scheduler(
            PrefixCache(layout.groups, self.num_blocks),
            self.roots,
            max_requests=self.max_requests,
            max_batch_tokens=self.max_batch_tokens,
            max_prefill_tokens=self.max_prefill_tokens,
            lower_tiers=self.lower_tiers,
            admission=self.admission,
            deterministic=self.deterministic,
        )

    def roots(self, salt: str) -> tuple[BlockKey, ...]:
        return tuple(root_key({"group": group.index, "salt": salt}) for group in self.groups)

    # What the engine does

    def submit(self, prompt: tuple[int, ...], max_new_tokens: int, **fields: object) -> str:
        name = f"r{len(self.requests)}"
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
        self.loads += out.loads
        self.saves += out.saves
        for ticket in out.discards + out.cancels:
            self.leases.discard(ticket)
        for _, delta in out.deltas:
            assert delta.request_id not in self.finished, "a delta after the end"
            self.outputs[delta.request_id] += delta.token_ids
            if delta.reused_tokens is not None:
                self.reused[delta.request_id] = delta.reused_tokens
            if delta.finish_reason is not None:
                self.finished[delta.request_id] = delta.finish_reason

    def finish_step(self) -> None:
        self.take(self.scheduler.on_result(self.results.pop(0), self.now))

    def fail_last_step(self, out_of_memory: bool) -> None:
        step = self.results.pop().step
        out = self.scheduler.undo_step(step, "planted", out_of_memory=out_of_memory)
        self.take(out)

    def answer_stage(self, position: int, have: Callable[[BlockKey], bool]) -> None:
        order = self.stages.pop(position)
        found = {r: "ram" for r, key in order.blocks.items() if key in self.stored and have(key)}
        self.leases.add(order.ticket)
        if not found:
            self.leases.discard(order.ticket)
        self.take(self.scheduler.on_staged(order.ticket, found))

    def land_part(self, position: int, count: int) -> None:
        """The first copies of a load have landed; others of it are still under way."""
        order = self.loads[position]
        landed = self.landed.setdefault(id(order), set())
        part = [ref for ref in order.blocks if ref not in landed][:count]
        self._copy_in(order, part)
        landed.update(part)
        self.scheduler.on_loaded(order, part, ended=False)

    def answer_load(self, position: int, works: Callable[[int], bool]) -> None:
        order = self.loads.pop(position)
        self.leases.discard(order.ticket)
        landed = self.landed.pop(id(order), set())
        left = [ref for ref in order.blocks if ref not in landed]
        done = [ref for number, ref in enumerate(left) if works(number)]
        self._copy_in(order, done)
        for group, index in set(left) - set(done):
            # A failed copy may leave anything behind.
            for offset in range(BLOCK_SIZE):
                self.blocks[group, order.blocks[group, index], offset] = ()
        self.scheduler.on_loaded(order, done, ended=True)

    def _copy_in(self, order: LoadOrder, refs: list[tuple[int, int]]) -> None:
        for group, index in refs:
            content = self.stored[self._key_of(order, group, index)]
            for offset, prefix in enumerate(content):
                self.blocks[group, order.blocks[group, index], offset] = prefix

    def answer_save(self, position: int, works: bool) -> None:
        order = self.saves.pop(position)
        if works:
            self.stored[order.key] = [
                self.blocks[order.group, order.block, offset] for offset in range(BLOCK_SIZE)
            ]
        self.scheduler.on_saved([order] if works else [], [] if works else [order])

    def run_until_idle(self) -> None:
        """Deliver everything until nothing moves any more."""
        idle = 0
        while idle < 2:
            moved = self.step()
            while self.results:
                self.finish_step()
                moved = True
            while self.stages or self.loads or self.saves:
                if self.stages:
                    self.answer_stage(0, lambda key: True)
                elif self.loads:
                    self.answer_load(0, lambda number: True)
                else:
                    self.answer_save(0, True)
                moved = True
            self.check()
            idle = 0 if moved else idle + 1

    # The symbolic model

    def execute(self, plan: StepPlan) -> None:
        assert StepPlan.from_dict(plan.to_dict()) == plan
        for new in plan.new_rows:
            self.rows[new.row] = _Row(list(new.token_ids), [[] for _ in self.groups])
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
        assert len({row.row for row in plan.rows}) == len(plan.rows), "a row twice in one step"
        tokens = []
        for step in plan.rows:
            row = self.rows[step.row]
            if not step.cached:
                self._write(row, step.start, step.num_tokens)
            self.computed_tokens += step.num_tokens
            for position in range(step.start, step.start + step.num_tokens):
                self._attend(row, position)
            if step.sample:
                end = step.start + step.num_tokens
                assert end == len(row.tokens), "samples before the last known token"
                row.tokens.append(next_token(tuple(row.tokens)))
                tokens.append(row.tokens[-1])
        self.results.append(StepResult(plan.step, tuple(tokens)))

    def _write(self, row: _Row, start: int, count: int) -> None:
        for position in range(start, start + count):
            for group, table in enumerate(row.tables):
                block = table[position // BLOCK_SIZE]
                assert block != TRASH_BLOCK, "writes to the trash block"
                pool = self.scheduler.cache.pools[group]
                assert pool.key(block) is None, "a published block is written to"
                prefix = tuple(row.tokens[: position + 1])
                self.blocks[group, block, position % BLOCK_SIZE] = prefix

    def _attend(self, row: _Row, position: int) -> None:
        for group, table in zip(self.groups, row.tables, strict=True):
            window = group.spec.window
            first = 0 if window is None else max(0, position - window + 1)
            for seen in range(first, position + 1):
                block = table[seen // BLOCK_SIZE]
                held = self.blocks.get((group.index, block, seen % BLOCK_SIZE))
                assert held == tuple(row.tokens[: seen + 1]), (
                    f"position {position} of group {group.index} sees wrong KV at {seen}"
                )

    def _key_of(self, order: LoadOrder, group: int, index: int) -> BlockKey:
        active = self.scheduler._tiers._active.get(order.ticket)
        if active is None:
            return next(iter(self.stored))
        return active.chain.keys[group][index]

    def check(self) -> None:
        self.scheduler.check_integrity()

    def check_outputs(self) -> None:
        """Finished requests have exactly the reference's tokens; aborted ones a prefix of them."""
        for name, reason in self.finished.items():
            request = self.requests[name]
            wanted = expected_output(request.prompt, request.sampling.max_new_tokens)
            if reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert tuple(self.outputs[name]) == wanted, f"{name} has other tokens"
            else:
                assert tuple(self.outputs[name]) == wanted[: len(self.outputs[name])]
