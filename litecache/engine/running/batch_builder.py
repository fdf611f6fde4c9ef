"""From a plan to the step's inputs: every position, slot and sampling number, vectorised.

The builder applies the plan's changes to the row tables and fills one host buffer. There is no
Python loop over tokens; those over rows are short comprehensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from litecache.engine.kv_layout import TRASH_BLOCK, KVLayout
from litecache.engine.running.cuda_graphs import GraphKey
from litecache.engine.running.logit_rules import RuledSample
from litecache.engine.running.random_numbers import position_keys
from litecache.engine.running.row_tables import RowTables
from litecache.engine.running.sampler import EVERY_TOKEN
from litecache.engine.running.step_buffers import STRUCK_TOKENS, Fields, StepBuffers, StepShape
from litecache.engine.scheduling.step_plan import RowStep, StepPlan, TableUpdate
from litecache.errors import ConfigError

Ints = npt.NDArray[np.int64]

MAX_DELTAS = 1 << 14
"""Block table entries that travel with a step; a step with more copies them by themselves."""


@dataclass(frozen=True)
class Batch:
    """What the host knows of a step whose inputs are on the device.

    Attributes:
        shape: of the inputs, padding included.
        query_lens: tokens of each sequence, a graph's padded decodes included.
        context_lens: visible tokens of each sequence, likewise.
        lives: life of each sequence's row, likewise.
        sampled_rows: rows whose token is drawn, without padding.
        every_token_sampled: logits are wanted at all tokens, in order.
        all_greedy, num_sorted, any_min_p: see SamplingBatch.
        masked: (sample, token) pairs whose logits are struck out.
        masks_fit: the drawing kernels find all of them among the step's inputs.
        ruled: sampled rows with rules.
        logprobs: (sample, number of the likeliest) of the rows that report log-probabilities.
    """

    shape: StepShape
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    lives: tuple[int, ...]
    sampled_rows: tuple[int, ...]
    every_token_sampled: bool
    all_greedy: bool
    num_sorted: int
    any_min_p: bool
    masked: tuple[tuple[int, int], ...]
    masks_fit: bool
    ruled: tuple[RuledSample, ...]
    logprobs: tuple[tuple[int, int], ...]

    @property
    def filtered(self) -> bool:
        """Whether drawing needs more than a race over all tokens."""
        return not self.masks_fit or self.needs_torch

    @property
    def needs_torch(self) -> bool:
        """Whether it takes what the drawing kernels do not have: an order, or rules."""
        return bool(self.num_sorted or self.any_min_p or self.ruled)


class BatchBuilder:
    """Fills a step's inputs.

    Args:
        layout: the KV groups.
        tables: of all rows; changed by each plan.
        buffers: where the inputs go.
        max_batch_tokens: most tokens of one step.
    """

    def __init__(
        self, layout: KVLayout, tables: RowTables, buffers: StepBuffers, max_batch_tokens: int
    ) -> None:
        self._block_size = layout.block_size
        self._shift = layout.block_size.bit_length() - 1
        self._groups = len(layout.groups)
        self._tables = tables
        self._buffers = buffers
        self._max_tokens = max_batch_tokens

    def build(self, plan: StepPlan, graph: GraphKey | None = None) -> Batch:
        """Apply a plan's changes and upload its inputs.

        Args:
            plan: with at least one row step, unless `graph` is given.
            graph: the bucket to pad to.

        Raises:
            ConfigError: the plan has more tokens than the buffers hold.
        """
        deltas = self.apply(plan)
        steps = np.array(plan.rows, dtype=np.int64).reshape(-1, len(RowStep._fields))
        num_tokens = int(steps[:, 2].sum())
        if num_tokens > self._max_tokens:
            raise ConfigError("num_tokens", num_tokens, f"at most {self._max_tokens} in a step")
        if graph is not None:
            steps = self._pad_decodes(steps, graph.decodes)
        rows, starts, counts, sample, cached = steps.T
        samples = np.flatnonzero(sample)
        if graph is None:
            shape = StepShape(num_tokens, len(rows), len(samples), self._groups, deltas)
        else:
            shape = replace(graph.shape(self._groups), deltas=deltas)
        fields = self._buffers.host(shape)
        ends = np.cumsum(counts)
        contexts = starts + counts
        self._fill_tokens(fields, rows, starts, counts, cached, ends)
        self._fill_seqs(fields, rows, contexts, ends)
        self._fill_samples(fields, rows[samples], contexts[samples], ends[samples] - 1)
        if deltas:
            self._fill_deltas(fields, plan.table_updates)
        self._buffers.upload(shape)
        return self._batch(shape, samples, rows, counts, contexts)

    def _pad_decodes(self, steps: Ints, slots: int) -> Ints:
        """Fill a graph's decode slots: the padding row's token, hidden in the trash block."""
        decodes = int((steps[:, 2] == 1).sum())
        if decodes == slots:
            return steps
        padding = np.tile(
            np.array([self._tables.num_rows, 0, 1, 0, 1], dtype=np.int64), (slots - decodes, 1)
        )
        return np.concatenate([steps[:decodes], padding, steps[decodes:]])

    def apply(self, plan: StepPlan) -> int:
        """Enter a plan's new rows and block table changes.

        Returns:
            How many entries of the device's tables have yet to be changed by the step's deltas.
        """
        for new in plan.new_rows:
            self._tables.set_row(new)
        self._tables.update_tables(plan.table_updates)
        if not plan.table_updates or not self._buffers.separate:
            return 0
        count = sum(len(update.block_ids) for update in plan.table_updates)
        if count <= MAX_DELTAS and plan.rows:
            return count
        for update in plan.table_updates:
            end = update.start + len(update.block_ids)
            place = (update.group, update.row, slice(update.start, end))
            # Blocking copies: this is rare, and the host table may change before a later one ran.
            self._tables.device_tables[place] = torch.from_numpy(self._tables.block_tables[place])
        return 0

    def _fill_tokens(
        self, fields: Fields, rows: Ints, starts: Ints, counts: Ints, cached: Ints, ends: Ints
    ) -> None:
        """Ids, positions and slots of all tokens; padding writes to the trash block."""
        tables, count = self._tables, int(counts.sum())
        if count == len(rows):
            token_rows, positions, hidden = rows, starts, cached
        else:
            token_rows = np.repeat(rows, counts)
            positions = np.arange(count) + np.repeat(starts - ends + counts, counts)
            hidden = np.repeat(cached, counts)
        on_device = positions >= tables.num_known[token_rows]
        known = tables.tokens[token_rows, np.where(on_device, 0, positions)]
        fields["ids"][:count] = known
        fields["ids"][count:] = 0
        index = fields["id_index"]
        index[:] = np.arange(len(index)) + self._buffers.first_id
        # A token that an earlier step sampled is read from its row's word on the device.
        np.copyto(index[:count], token_rows, where=on_device)
        fields["positions"][:count] = positions
        fields["positions"][count:] = 0
        blocks = tables.block_tables[:, token_rows, positions >> self._shift].astype(np.int64)
        slots = (blocks << self._shift) + (positions & (self._block_size - 1))
        if hidden.any():
            slots[:, hidden != 0] = TRASH_BLOCK
        padded_slots = fields["slots"].reshape(self._groups, -1)
        padded_slots[:, :count] = slots
        padded_slots[:, count:] = 0

    def _fill_seqs(self, fields: Fields, rows: Ints, contexts: Ints, ends: Ints) -> None:
        """Sequences after the last one have no tokens."""
        count = len(rows)
        fields["rows"][:count] = rows
        fields["rows"][count:] = self._tables.num_rows
        fields["context_lens"][:count] = contexts
        fields["context_lens"][count:] = 1
        starts = fields["cu_seqlens"]
        starts[0] = 0
        starts[1 : count + 1] = ends
        starts[count + 1 :] = starts[count]

    def _fill_samples(self, fields: Fields, rows: Ints, contexts: Ints, logit_index: Ints) -> None:
        tables, count = self._tables, len(rows)
        fields["logit_index"][:count] = logit_index
        fields["logit_index"][count:] = 0
        fields["sample_rows"][:count] = rows
        fields["sample_rows"][count:] = tables.num_rows
        for name in ("temperature", "top_k", "top_p", "min_p"):
            fields[name][:count] = getattr(tables, name)[rows]
            fields[name][count:] = 0
        num_new = contexts - tables.num_prompt[rows]
        if fields["temperature"].any():
            fields["keys"][:count] = position_keys(tables.stream[rows], num_new)
            fields["keys"][count:] = 0
        struck = fields["struck"].reshape(-1, STRUCK_TOKENS)
        struck[:] = -1
        early = num_new < tables.min_new_tokens[rows]
        struck[:count][early] = tables.struck_ends[rows[early]]

    def _fill_deltas(self, fields: Fields, updates: tuple[TableUpdate, ...]) -> None:
        start = 0
        for update in updates:
            end = start + len(update.block_ids)
            first = self._tables.flat_index(update)
            fields["delta_index"][start:end] = np.arange(first, first + end - start)
            fields["delta_value"][start:end] = update.block_ids
            start = end

    def _batch(
        self, shape: StepShape, samples: Ints, rows: Ints, counts: Ints, contexts: Ints
    ) -> Batch:
        tables = self._tables
        sampled = rows[samples]
        drawing = sampled[tables.temperature[sampled] > 0]
        masked: list[tuple[int, int]] = []
        num_new = contexts[samples] - tables.num_prompt[sampled]
        fit = True
        for index in np.flatnonzero(num_new < tables.min_new_tokens[sampled]).tolist():
            ends = tables.eos_token_ids[sampled[index]]
            fit = fit and len(ends) <= STRUCK_TOKENS
            masked += [(index, token) for token in ends]
        for index in np.flatnonzero(num_new == 0).tolist():
            suppressed = tables.begin_suppressed[sampled[index]]
            fit = fit and not suppressed
            masked += [(index, token) for token in suppressed]
        return Batch(
            shape=shape,
            query_lens=tuple(counts.tolist()),
            context_lens=tuple(contexts.tolist()),
            lives=tuple(tables.life[rows].tolist()),
            sampled_rows=tuple(sampled.tolist()),
            every_token_sampled=len(samples) == shape.tokens,
            all_greedy=not len(drawing),
            num_sorted=_num_sorted(tables.top_k[drawing], tables.top_p[drawing]),
            any_min_p=bool(len(drawing) and (tables.min_p[drawing] > 0).any()),
            masked=tuple(masked),
            masks_fit=fit,
            ruled=self._ruled(sampled, contexts[samples]),
            logprobs=self._logprobs(sampled),
        )

    def _ruled(self, sampled: Ints, contexts: Ints) -> tuple[RuledSample, ...]:
        rules = self._tables.rules
        if not rules:
            return ()
        rows = zip(sampled.tolist(), contexts.tolist(), strict=True)
        return tuple(
            RuledSample(index, row, length, rules[row])
            for index, (row, length) in enumerate(rows)
            if row in rules
        )

    def _logprobs(self, sampled: Ints) -> tuple[tuple[int, int], ...]:
        counts = self._tables.logprobs
        if not counts:
            return ()
        return tuple((i, counts[row]) for i, row in enumerate(sampled.tolist()) if row in counts)


def _num_sorted(top_k: Ints, top_p: npt.NDArray[np.float32]) -> int:
    """See `SamplingBatch.num_sorted`, for the rows that draw."""
    if not len(top_k):
        return 0
    if ((top_k == 0) & (top_p < 1)).any():
        return EVERY_TOKEN
    return int(top_k.max())
