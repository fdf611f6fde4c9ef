"""The runner's persistent tables, and the step's inputs that are made from them.

Plans carry only changes; the tables remember the rest: what a row's request is, which blocks it
holds, how it samples. The host copies feed batch building (no Python loop over tokens; those over
rows are short comprehensions), the block tables also live on the device, where the forward gathers
the rows of a batch. One row more than there are requests is the padding row: its block tables hold
the trash block only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from litecache.engine.kv_layout import TRASH_BLOCK, KVLayout
from litecache.engine.running.batch import (
    EVERY_TOKEN,
    STRUCK_TOKENS,
    Batch,
    Fields,
    Ints,
    StepBuffers,
)
from litecache.engine.running.cuda_graphs import GraphKey
from litecache.engine.running.logit_rules import RowRules, RuledSample
from litecache.engine.running.sampler import position_keys, stream_keys
from litecache.engine.scheduling.orders import (
    NewRow,
    RowGuide,
    RowStep,
    StepPlan,
    TableUpdate,
)
from litecache.errors import ConfigError
from litecache.types import SamplingParams

MAX_DELTAS = 1 << 14
"""Block table entries that travel with a step; a step with more copies them by themselves."""


class RowTables:
    """Host and device tables of all rows.

    Args:
        layout: the KV groups; each has a block table.
        buffers: where the inputs of a step go.
        max_requests: rows.
        max_model_len: tokens a row can hold.
        max_batch_tokens: most tokens of one step.

    Attributes:
        tokens: int32 `[rows + 1, max_model_len]`, ids the host knows.
        num_known: int64 `[rows + 1]`, how many of them are valid; later positions were sampled and
            are known to the device.
        num_prompt: int64 `[rows + 1]`, sampling positions count from it.
        life: int64 `[rows + 1]`, a number that no other request in any row has.
        stream: int64 `[rows + 1]`, of the random generator.
        drawing: `[rows + 1]` each, the numbers of the sampling parameters that steps gather.
        sampling: the parameters themselves.
        rules: of the rows that have any.
        block_tables: int32 `[groups, rows + 1, max_blocks]` on the host.
        device_tables: the same on the device (on CPU the same memory).
    """

    def __init__(
        self,
        layout: KVLayout,
        buffers: StepBuffers,
        max_requests: int,
        max_model_len: int,
        max_batch_tokens: int,
    ) -> None:
        self.num_rows = max_requests
        self._buffers = buffers
        self._block_size = layout.block_size
        self._shift = layout.block_size.bit_length() - 1
        self._groups = len(layout.groups)
        self._max_tokens = max_batch_tokens
        rows, max_blocks = max_requests + 1, -(-max_model_len // layout.block_size)
        # Zeros come from untouched pages: rows cost memory only once they are used.
        self.tokens = np.zeros((rows, max_model_len), dtype=np.int32)
        self.num_known, self.num_prompt, self.life, self.stream = np.zeros((4, rows), np.int64)
        self.num_known[max_requests] = 1
        self._lives = 0
        self.drawing: dict[str, npt.NDArray[Any]] = {
            "temperature": np.zeros(rows, dtype=np.float32),
            "top_k": np.zeros(rows, dtype=np.int64),
            "top_p": np.ones(rows, dtype=np.float32),
            "min_p": np.zeros(rows, dtype=np.float32),
            "min_new_tokens": np.zeros(rows, dtype=np.int64),
        }
        self.sampling = [SamplingParams(1)] * rows
        # The end tokens in a form that a step can gather; rows with more of them take the slow way.
        self.struck_ends = np.full((rows, STRUCK_TOKENS), -1, dtype=np.int32)
        self.rules: dict[int, RowRules] = {}
        self._with_logprobs: set[int] = set()
        self.block_tables = np.zeros((self._groups, rows, max_blocks), dtype=np.int32)
        self.device_tables = torch.from_numpy(self.block_tables).to(buffers.words.device)

    def _set_row(self, new: NewRow) -> None:
        """A request takes a row."""
        row, count, sampling = new.row, len(new.token_ids), new.sampling
        self.tokens[row, :count] = new.token_ids.array
        self.num_known[row] = count
        self.num_prompt[row] = new.num_prompt_tokens
        self._lives += 1
        self.life[row] = self._lives
        self.sampling[row] = sampling
        for name, column in self.drawing.items():
            column[row] = getattr(sampling, name)
        seed = np.array([sampling.seed], dtype=np.int64)
        self.stream[row] = stream_keys(seed, np.array([sampling.sample_index]))[0]
        self.struck_ends[row] = -1
        ends = sampling.eos_token_ids[:STRUCK_TOKENS]
        self.struck_ends[row, : len(ends)] = ends
        self.rules.pop(row, None)
        if sampling.any_rules:
            self.rules[row] = RowRules(sampling, new.token_ids, new.num_prompt_tokens)
        self._with_logprobs.discard(row)
        if sampling.logprobs is not None:
            self._with_logprobs.add(row)

    def _guide_row(self, guide: RowGuide) -> None:
        """The host learns what the row has drawn, and what its driver has appended."""
        row, end = guide.row, guide.start + len(guide.token_ids)
        self.tokens[row, guide.start : end] = guide.token_ids
        self.num_known[row] = end
        if len(guide.token_ids) > 1 and row in self.rules:
            # the rules' history has what was drawn, and nothing of what was not
            known = self.tokens[row, :end].tolist()
            self.rules[row] = RowRules(self.sampling[row], known, int(self.num_prompt[row]))

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
        rows, starts, counts, drawn, cached, wanted = steps.T
        ends, contexts = np.cumsum(counts), starts + counts
        # The last `drawn` positions of each sequence, in order: how far each is from its end.
        seqs = np.repeat(np.arange(len(rows)), drawn)
        back = np.cumsum(drawn)[seqs] - 1 - np.arange(len(seqs))
        places = ends[seqs] - 1 - back
        handed_out, last = [], len(seqs)
        following: dict[int, tuple[Ints, int]] = {}
        for seq in np.flatnonzero(wanted).tolist():
            row, count, end = int(rows[seq]), int(wanted[seq]), int(contexts[seq])
            handed_out.append((seq, last, count))
            places = np.concatenate((places, np.arange(ends[seq] - count, ends[seq])))
            last += count
            if row in self._with_logprobs:
                known = self.tokens[row, end - count + 1 : min(end + 1, self.num_known[row])]
                tokens = np.full(count, -1, dtype=np.int64)
                tokens[: len(known)] = known
                following[seq] = tokens, self.sampling[row].logprobs or 0
        sizes = (num_tokens, len(rows), last, self._groups, deltas)
        if graph is not None:
            sizes = (*graph.sizes, self._groups, deltas)
        fields, on_device = self._buffers.begin(sizes)
        self._fill_tokens(fields, rows, starts, counts, cached, ends)
        self._fill_seqs(fields, rows, contexts, ends)
        fields["logit_index"][:last] = places
        fields["logit_index"][last:] = 0
        sampled, lengths = rows[seqs], contexts[seqs] - back
        drawing = self._fill_samples(fields, sampled, lengths)
        # The next step reads what a row's last position drew; the word of no row takes the others.
        fields["sample_rows"][: len(seqs)][back > 0] = self.num_rows
        if deltas:
            self._fill_deltas(fields, plan.table_updates)
        self._buffers.upload(sizes)
        masked, fit = self._masked(sampled, lengths)
        masks = {guide.row: guide.mask for guide in plan.guides if guide.mask}
        top_k, top_p, min_p = (self.drawing[name][drawing] for name in ("top_k", "top_p", "min_p"))
        sampled_rows, rules = sampled.tolist(), self.rules
        return Batch(
            fields=on_device,
            query_lens=tuple(counts.tolist()),
            context_lens=tuple(contexts.tolist()),
            lives=tuple(self.life[rows].tolist()),
            sampled_rows=tuple(sampled_rows),
            handed_out=tuple(handed_out),
            following=following,
            places=places,
            every_token_sampled=len(seqs) == sizes[0] and not handed_out,
            all_greedy=not len(drawing),
            num_sorted=num_sorted(top_k, top_p),
            any_min_p=bool(min_p.any()),
            masked=masked,
            allowed=tuple((i, masks[row]) for i, row in enumerate(sampled_rows) if row in masks)
            if masks
            else (),
            masks_fit=fit and not masks,
            ruled=tuple(
                RuledSample(index, row, length, rules[row])
                for index, (row, length) in enumerate(
                    zip(sampled_rows, lengths.tolist(), strict=True)
                )
                if row in rules
            )
            if rules
            else (),
            logprobs=tuple(
                (index, self.sampling[row].logprobs or 0)
                for index, row in enumerate(sampled_rows)
                if row in self._with_logprobs
            )
            if self._with_logprobs
            else (),
        )

    def _pad_decodes(self, steps: Ints, slots: int) -> Ints:
        """Fill a graph's decode slots: the padding row's token, hidden in the trash block."""
        decodes = int((steps[:, 2] == 1).sum())
        if decodes == slots:
            return steps
        padding = np.array([RowStep(self.num_rows, 0, 1, 0, cached=True)], dtype=np.int64)
        padding = padding.repeat(slots - decodes, axis=0)
        return np.concatenate([steps[:decodes], padding, steps[decodes:]])

    def apply(self, plan: StepPlan) -> int:
        """Enter a plan's new rows and block table changes.

        Returns:
            How many entries of the device's tables have yet to be changed by the step's deltas.
        """
        for new in plan.new_rows:
            self._set_row(new)
        for guide in plan.guides:
            self._guide_row(guide)
        for update in plan.table_updates:
            end = update.start + len(update.block_ids)
            self.block_tables[update.group, update.row, update.start : end] = update.block_ids
        if not plan.table_updates or not self._buffers.separate:
            return 0
        count = sum(len(update.block_ids) for update in plan.table_updates)
        if count <= MAX_DELTAS and plan.rows:
            return count
        for update in plan.table_updates:
            end = update.start + len(update.block_ids)
            place = (update.group, update.row, slice(update.start, end))
            # Blocking copies: this is rare, and the host table may change before a later one ran.
            self.device_tables[place] = torch.from_numpy(self.block_tables[place])
        return 0

    def _fill_tokens(
        self, fields: Fields, rows: Ints, starts: Ints, counts: Ints, cached: Ints, ends: Ints
    ) -> None:
        """Ids, positions and slots of all tokens; padding writes to the trash block."""
        count = int(counts.sum())
        if count == len(rows):
            token_rows, positions, hidden = rows, starts, cached
        else:
            token_rows = np.repeat(rows, counts)
            positions = np.arange(count) + np.repeat(starts - ends + counts, counts)
            hidden = np.repeat(cached, counts)
        on_device = positions >= self.num_known[token_rows]
        known = self.tokens[token_rows, np.where(on_device, 0, positions)]
        fields["ids"][:count] = known
        fields["ids"][count:] = 0
        index = fields["id_index"]
        index[:] = np.arange(len(index)) + self._buffers.first_id
        # A token that an earlier step sampled is read from its row's word on the device.
        np.copyto(index[:count], token_rows, where=on_device)
        fields["positions"][:count] = positions
        fields["positions"][count:] = 0
        blocks = self.block_tables[:, token_rows, positions >> self._shift].astype(np.int64)
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
        fields["rows"][count:] = self.num_rows
        fields["context_lens"][:count] = contexts
        fields["context_lens"][count:] = 1
        starts = fields["cu_seqlens"]
        starts[0] = 0
        starts[1 : count + 1] = ends
        starts[count + 1 :] = starts[count]

    def _fill_samples(self, fields: Fields, rows: Ints, contexts: Ints) -> Ints:
        """How the samples draw; returns the rows of those that are not greedy."""
        count = len(rows)
        fields["sample_rows"][:count] = rows
        fields["sample_rows"][count:] = self.num_rows
        temperature = self.drawing["temperature"][rows]
        fields["temperature"][:count] = temperature
        fields["temperature"][count:] = 0
        num_new = contexts - self.num_prompt[rows]
        struck = fields["struck"].reshape(-1, STRUCK_TOKENS)
        struck[:] = -1
        early = num_new < self.drawing["min_new_tokens"][rows]
        struck[:count][early] = self.struck_ends[rows[early]]
        drawing = rows[temperature > 0]
        if len(drawing):  # nothing else is read of greedy samples
            for name in ("top_k", "top_p", "min_p"):
                fields[name][:count] = self.drawing[name][rows]
                fields[name][count:] = 0
            fields["keys"][:count] = position_keys(self.stream[rows], num_new)
            fields["keys"][count:] = 0
        return drawing

    def _fill_deltas(self, fields: Fields, updates: tuple[TableUpdate, ...]) -> None:
        """Where the updates lie in the flattened block tables, and what they write."""
        _, rows, width = self.block_tables.shape
        start = 0
        for update in updates:
            end = start + len(update.block_ids)
            first = (update.group * rows + update.row) * width + update.start
            fields["delta_index"][start:end] = np.arange(first, first + end - start)
            fields["delta_value"][start:end] = update.block_ids
            start = end

    def _masked(self, sampled: Ints, lengths: Ints) -> tuple[tuple[tuple[int, int], ...], bool]:
        """The struck pairs of (sample, token), and whether the drawing kernels know of all."""
        num_new = lengths - self.num_prompt[sampled]
        early = np.flatnonzero(num_new < self.drawing["min_new_tokens"][sampled]).tolist()
        first = np.flatnonzero(num_new == 0).tolist()
        ends = [(index, self.sampling[sampled[index]].eos_token_ids) for index in early]
        begins = [(index, self.sampling[sampled[index]].begin_suppress_tokens) for index in first]
        fit = all(len(tokens) <= STRUCK_TOKENS for _, tokens in ends)
        fit = fit and not any(tokens for _, tokens in begins)
        return tuple((i, token) for i, tokens in (*ends, *begins) for token in tokens), fit


def num_sorted(top_k: Ints, top_p: npt.NDArray[np.float32]) -> int:
    """See `Batch.num_sorted`, for the samples that draw."""
    if not len(top_k):
        return 0
    if ((top_k == 0) & (top_p < 1)).any():
        return EVERY_TOKEN
    return int(top_k.max())
