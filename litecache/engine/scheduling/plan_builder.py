"""A step plan under construction, and the record of what was launched with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from litecache.engine.scheduling.sequence import Sequence
from litecache.engine.scheduling.step_plan import BlockCopy, NewRow, RowStep, StepPlan, TableUpdate


@dataclass
class Launched:
    """A step between its launch and its result.

    Attributes:
        rows: (sequence, its part of the plan, the sequence's life at launch), in plan order.
        copied_from: (group, block) of copy-on-write sources, referenced until the result.
    """

    rows: list[tuple[Sequence, RowStep, int]] = field(default_factory=list)
    copied_from: list[tuple[int, int]] = field(default_factory=list)


class PlanBuilder:
    """Collects the rows and deltas of one step within a token budget.

    Args:
        budget: tokens that prefills may still take; decodes are not refused.
        chunk_grid: end prefill chunks at multiples of this many tokens; None = anywhere.
    """

    def __init__(self, budget: int, chunk_grid: int | None) -> None:
        self.budget = budget
        self.launched = Launched()
        self.new_rows: list[NewRow] = []
        self.tables: list[TableUpdate] = []
        self._copies: list[BlockCopy] = []
        self._chunk_grid = chunk_grid
        self._prefill_tokens = 0

    def add_step(self, seq: Sequence, count: int) -> None:
        """Compute the next `count` positions of a running sequence."""
        sample = count == seq.num_todo
        step = RowStep(seq.row, seq.num_computed, count, sample, seq.cached)
        seq.cached = False
        seq.num_computed += count
        seq.num_in_flight += sample
        self.budget -= count
        self.launched.rows.append((seq, step, seq.life))

    def add_chunk(self, seq: Sequence) -> None:
        """Compute as much of a prefill as the budget allows, possibly nothing."""
        count = min(seq.num_todo, self.budget)
        if self._chunk_grid is not None:
            count = min(seq.num_todo, self._chunk_grid - seq.num_computed % self._chunk_grid)
            if self._prefill_tokens and count > self.budget:
                return
        if count > 0:
            self._prefill_tokens += count
            self.add_step(seq, count)

    def copy_block(self, group: int, src: int, dst: int) -> None:
        """Copy a block before the forward; the caller holds a reference to `src` for the step."""
        self._copies.append(BlockCopy(group, src, dst))
        self.launched.copied_from.append((group, src))

    def forget_row(self, row: int) -> None:
        """A row that has no step in this plan is given back: another request may take it now."""
        self.tables = [update for update in self.tables if update.row != row]

    def build(self, step: int) -> StepPlan | None:
        """The plan, single-token rows first; None when there is nothing to compute."""
        if not self.launched.rows:
            return None
        self.launched.rows.sort(key=lambda entry: entry[1].num_tokens > 1)
        return StepPlan(
            step,
            tuple(self.new_rows),
            tuple(self.tables),
            tuple(self._copies),
            tuple(row_step for _, row_step, _ in self.launched.rows),
        )
