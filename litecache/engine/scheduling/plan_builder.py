"""A step plan under construction, and the steps that were launched and have not ended."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from litecache.engine.scheduling.below import BlockRef
from litecache.engine.scheduling.block_pool import BlockPool
from litecache.engine.scheduling.cost_model import CostModel
from litecache.engine.scheduling.orders import (
    BlockCopy,
    NewRow,
    RowGuide,
    RowStep,
    StepPlan,
    TableUpdate,
)
from litecache.engine.scheduling.sequence import Sequence
from litecache.token_ids import TokenIds

MAX_STEP_LOGITS = 256
"""Positions whose logits a step hands out: each takes a row of the vocabulary, in float32 twice."""


@dataclass
class Launched:
    """A step between its launch and its result.

    Attributes:
        rows: (sequence, its part of the plan, the sequence's life at launch), in plan order.
        copied_from: (group, block) of copy-on-write sources, referenced until the result.
        at_s: when it was planned.
    """

    rows: list[tuple[Sequence, RowStep, int]] = field(default_factory=list)
    copied_from: list[BlockRef] = field(default_factory=list)
    at_s: float = 0.0

    @property
    def work(self) -> tuple[int, int, int]:
        """Prefill tokens, tokens in front of them on the mean, and decodes."""
        chunks = [step for _, step, _ in self.rows if step.num_tokens > 1]
        tokens = sum(step.num_tokens for step in chunks)
        context = sum(step.num_tokens * step.start for step in chunks) // max(1, tokens)
        return tokens, context, len(self.rows) - len(chunks)


class PlanBuilder:
    """Collects the segments of one step within a token budget, and what its rows have to be told.

    Args:
        step: its number.
        budget: tokens that prefills may still take; decodes are not refused.
        chunk_grid: end prefill chunks at multiples of this many tokens; None = anywhere.
    """

    def __init__(self, step: int, budget: int, chunk_grid: int | None) -> None:
        self.budget = budget
        self.launched = Launched()
        self._step = step
        self._new_rows: list[NewRow] = []
        self._tables: list[TableUpdate] = []
        self._copies: list[BlockCopy] = []
        self._chunk_grid = chunk_grid
        self._prefill_tokens = 0
        self._logits_left = MAX_STEP_LOGITS
        self._untold: dict[int, Sequence] = {}
        self._guided: dict[int, tuple[Sequence, bytes]] = {}

    def room(self, seq: Sequence) -> int:
        """How many of the next positions of a prefill may be computed in this step."""
        count = min(seq.num_todo, self.budget)
        if self._chunk_grid is not None:
            count = min(seq.num_todo, self._chunk_grid - seq.num_computed % self._chunk_grid)
            if self._prefill_tokens and count > self.budget:
                return 0
        if seq.num_logits:
            count = min(count, max(0, seq.num_reusable - seq.num_computed) + self._logits_left)
        return count

    def add_chunk(self, seq: Sequence, count: int) -> None:
        """Compute the next `count` positions of a prefill."""
        self._prefill_tokens += count
        self.add_step(seq, count)

    def add_step(self, seq: Sequence, count: int) -> None:
        """Compute the next `count` positions of a running sequence."""
        sample, logits = count == seq.num_todo, 0
        if seq.num_logits:
            sample, logits = False, min(count, seq.num_computed + count - seq.num_reusable)
            logits = max(0, logits)
            self._logits_left -= logits
        step = RowStep(seq.row, seq.num_computed, count, sample, seq.cached, logits)
        if seq.cached:
            seq.cached = False
        elif not seq.announced:
            seq.count_computed(seq.num_computed, count)
        seq.num_computed += count
        seq.num_in_flight += sample
        seq.last_step = self._step
        self.budget -= count
        self.launched.rows.append((seq, step, seq.life))
        if seq.changed:
            self._untold[seq.row] = seq
        if seq.guided:
            self._guided[seq.row] = seq, (seq.mask or b"") if sample else b""

    def _enter(self, seq: Sequence) -> None:
        """The row is new to the runner."""
        tokens = TokenIds(seq.tokens)
        self._new_rows.append(NewRow(seq.row, tokens, seq.num_prompt, seq.request.sampling))
        for group, table in enumerate(seq.tables):
            self._tables.append(TableUpdate(seq.row, group, 0, tuple(table)))
        for group, source, target in seq.copies:
            self._copies.append(BlockCopy(group, source, target))
            self.launched.copied_from.append((group, source))
        seq.copies = []
        seq.changed.clear()
        seq.entered = True
        seq.num_told = seq.num_tokens

    def _guide(self, seq: Sequence, mask: bytes) -> RowGuide:
        """What the row does not know of its tokens yet, and which ones it may draw."""
        start, seq.num_told = seq.num_told, seq.num_tokens
        return RowGuide(seq.row, start, tuple(seq.tokens[start:].tolist()), mask)

    def _tell(self, seq: Sequence) -> None:
        """Table entries have changed since the row's last step; neighbours are one update."""
        entries = sorted(seq.changed)
        first = 0
        for place, (group, index) in enumerate(entries, start=1):
            if place == len(entries) or entries[place] != (group, index + 1):
                start = entries[first][1]
                blocks = tuple(seq.tables[group][start : index + 1])
                self._tables.append(TableUpdate(seq.row, group, start, blocks))
                first = place
        seq.changed.clear()

    def build(self) -> StepPlan | None:
        """The plan, single-token rows first; None when there is nothing to compute."""
        if not self.launched.rows:
            return None
        self.launched.rows.sort(key=lambda entry: entry[1].num_tokens > 1)
        for seq in self._untold.values():
            if seq.entered:
                self._tell(seq)
            else:
                self._enter(seq)
        return StepPlan(
            self._step,
            tuple(self._new_rows),
            tuple(self._tables),
            tuple(self._copies),
            tuple(row_step for _, row_step, _ in self.launched.rows),
            tuple(self._guide(seq, mask) for seq, mask in self._guided.values()),
        )


class StepsUnderWay:
    """Steps from their launch to their result, in order.

    Args:
        cost: is told what they took, and says what they will take; None = nobody asks.
        pools: hold the sources of copies until the step that copies has ended.
    """

    def __init__(self, cost: CostModel | None, pools: Seq[BlockPool]) -> None:
        self._cost, self._pools = cost, pools
        self._launched: dict[int, Launched] = {}
        self._number = 0
        self._last_result_s = 0.0

    @property
    def copied_from(self) -> list[BlockRef]:
        """(group, block) that a reference is held to, for copies."""
        return [ref for launched in self._launched.values() for ref in launched.copied_from]

    @property
    def last(self) -> int:
        """The number of the step that was launched last."""
        return self._number

    def begin(self, budget: int, chunk_grid: int | None, now: float) -> PlanBuilder:
        """The next plan, still empty; arguments as of `PlanBuilder`."""
        plan = PlanBuilder(self._number + 1, budget, chunk_grid)
        plan.launched.at_s = now
        return plan

    def launch(self, plan: PlanBuilder) -> StepPlan | None:
        """Finish a plan, whose step is under way from now on; None: there is nothing in it."""
        built = plan.build()
        if built is not None:
            self._number += 1
            self._launched[self._number] = plan.launched
        return built

    def end(self, step: int, now: float | None, seconds: float = 0.0) -> Launched:
        """A step has given its result; `now` is None where it raised, and tells nothing. The device
        took `seconds` for it, or 0 where that was not measured."""
        launched = self._launched.pop(step)
        for group, block in launched.copied_from:
            self._pools[group].release([block])
        if now is not None and self._cost is not None:
            began_s = max(launched.at_s, self._last_result_s)
            self._last_result_s = now
            if launched.rows[-1][1].num_tokens > 1:  # longer ones come last
                tokens, context, decodes = launched.work
                self._cost.note_step(
                    prefill_tokens=tokens,
                    context_tokens=context,
                    num_decodes=decodes,
                    seconds=seconds or now - began_s,
                )
        return launched

    def left_s(self, now: float, plan: PlanBuilder | None = None) -> float:
        """Seconds until they have ended, and what is in a plan already."""
        if self._cost is None:
            return 0.0
        steps = list(self._launched.values())
        if plan is not None and plan.launched.rows:
            steps.append(plan.launched)
        began_s = max(steps[0].at_s, self._last_result_s) if steps else now
        return self._cost.left_s([launched.work for launched in steps], began_s, now)
