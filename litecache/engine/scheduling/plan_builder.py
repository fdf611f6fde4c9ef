"""A step plan under construction, and the record of what was launched with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from litecache.engine.scheduling.below import BlockRef
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
