"""Executes step plans on the model: owns the row tables, builds batches, decides nothing.

The engine calls `execute` once a step and reads the handle's result when it needs the tokens.
Sampled tokens are written into the row's word on the device, so a plan that continues a row may be
executed before the result of the step that sampled its input was read.

Before the first request the runner executes steps (`warm_steps`) so that none compiles anything.
What is compiled for a step follows from its sizes: Triton's kernels from powers of two (tiles of
tokens, sequences and rows, and the limits between kernels are such), the library's plans from a
chunk's exact length and its prefix. These steps have one of each. All rows' block tables hold the
trash block, so they read and write it alone.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from litecache.engine.kv_layout import KVLayout, KVPool
from litecache.engine.loading.model_loader import LoadedModel
from litecache.engine.running.batch import STRUCK_TOKENS, Batch, StepBuffers
from litecache.engine.running.cuda_graphs import GraphCache, GraphKey, StepGraph, longest_graph
from litecache.engine.running.hf_attention import PagedContext, attention_context
from litecache.engine.running.logit_rules import RuleBook
from litecache.engine.running.row_tables import MAX_DELTAS, RowTables
from litecache.engine.running.sampler import INVALID_TOKEN, HandedOut, LogprobRows, sample, strike
from litecache.engine.scheduling.orders import BlockCopy, NewRow, RowStep, StepPlan, StepResult
from litecache.kernels import TRASH_BLOCK, AttentionMetadata, copy_blocks
from litecache.kernels.decode_copies import DecodeCopies
from litecache.token_ids import TokenIds
from litecache.types import SamplingParams

logger = logging.getLogger(__name__)

MAX_UNREAD_STEPS = 8
"""Steps that may be executed on a GPU before the result of the first is read."""

_AHEAD_TOKENS = 4096
"""Longer steps have no kernels of their own."""


@dataclass(frozen=True, eq=False)
class StepHandle:
    """A step under way.

    Attributes:
        step: number of the plan.
        rows: the sampled rows, in order.
        tokens: int64 `[>= len(rows)]` on the host, valid once `event` has passed.
        began, event: recorded in front of the step and behind the copy of its tokens; None when
            they are there already.
        logprobs: of the rows that asked for them; their copy lies before the event, too.
        handed_out: logits of the rows that ask for them; likewise.
    """

    step: int
    rows: tuple[int, ...]
    tokens: torch.Tensor
    began: torch.cuda.Event | None = None
    event: torch.cuda.Event | None = None
    logprobs: LogprobRows | None = None
    handed_out: HandedOut | None = None

    def ready(self) -> bool:
        """Whether `result` would return at once."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        """Wait for the step's tokens."""
        seconds = 0.0
        if self.began is not None and self.event is not None:
            self.event.synchronize()
            seconds = self.began.elapsed_time(self.event) / 1e3
        tokens = tuple(self.tokens[: len(self.rows)].tolist())
        invalid = tuple(
            row for row, token in zip(self.rows, tokens, strict=True) if token == INVALID_TOKEN
        )
        logprobs = {} if self.logprobs is None else self.logprobs.read()
        out = self.handed_out
        told = ({}, {}) if out is None else (out.logits(), out.logprobs())
        return StepResult(self.step, tokens, invalid, logprobs, *told, seconds)


class ModelRunner:
    """Runs one model over the pools of its KV groups.

    Args:
        loaded: the model, from `load_model`.
        layout: its KV groups.
        pools: one per group, in the layout's order, on the model's device.
        max_requests: rows of the tables; plans use rows 0 to max_requests - 1.
        max_model_len: longest sequence in tokens.
        max_batch_tokens: most tokens of one step.
        deterministic: attention cuts a sequence at places that do not depend on the batch.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        layout: KVLayout,
        pools: Sequence[KVPool],
        *,
        max_requests: int,
        max_model_len: int,
        max_batch_tokens: int,
        deterministic: bool = False,
    ) -> None:
        device = loaded.device
        self._deterministic = deterministic
        self._model = loaded.model
        self._layout = layout
        self._pools = tuple(pools)
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._max_model_len = max_model_len
        self._limits = (max_requests, max_batch_tokens, max_model_len, len(layout.groups))
        self._keeps_logits = loaded.keeps_logits
        self._vocab_size = loaded.vocab_size
        self._context = PagedContext(layout, pools)
        self._graphs: GraphCache | None = None
        paged = loaded.attention == "paged"
        # A row may stand in a step with several segments, and draw at several positions.
        most = max_batch_tokens
        if paged and self._on_gpu and os.environ.get("LITECACHE_GRAPHS", "1") != "0":
            self._graphs = GraphCache(max_requests, longest_graph(loaded))
            most = max(most, *self._graphs.largest.sizes)
        largest = (most, most, most, len(layout.groups), MAX_DELTAS)
        self._buffers = StepBuffers(largest, max_requests, device)
        self._tables = RowTables(
            layout, self._buffers, max_requests, max_model_len, max_batch_tokens
        )
        self._logits: Callable[[Batch], torch.Tensor] = self._paged
        if not paged:
            from litecache.engine.running.gather_cache import GatheredForward

            words, tables = self._buffers.words, self._tables.device_tables
            self._logits = GatheredForward(loaded.model, layout, pools, words, tables)
        self._rules = RuleBook(max_model_len, device)
        self._decode_copies = None if self._on_gpu else DecodeCopies()
        self._results: list[tuple[torch.Tensor, torch.cuda.Event, torch.cuda.Event]] = []
        self._turn = 0
        if self._on_gpu:
            self._results = [
                (
                    torch.empty(most, dtype=torch.int64, pin_memory=True),
                    torch.cuda.Event(enable_timing=True),  # type: ignore[no-untyped-call]
                    torch.cuda.Event(enable_timing=True),  # type: ignore[no-untyped-call]
                )
                for _ in range(MAX_UNREAD_STEPS)
            ]

    def execute(self, plan: StepPlan) -> StepHandle:
        """Start a step; steps run in the order of the calls.

        Raises:
            ConfigError: the plan has more tokens than `max_batch_tokens`.
        """
        with torch.inference_mode():
            if not plan.rows:
                self._tables.apply(plan)
                self._copy(plan.copies)
                return StepHandle(plan.step, (), torch.empty(0, dtype=torch.int64))
            began = event = None
            if self._on_gpu:
                self._turn = (self._turn + 1) % len(self._results)
                host, began, event = self._results[self._turn]
                began.record()
            key = self._graph_key(plan)
            graph = None if key is None else self._graph(key)
            batch = self._tables.build(plan, key if graph is not None else None)
            self._apply_deltas(batch)
            self._copy(plan.copies)
            if graph is not None:
                graph.graph.replay()
                logits, tokens = graph.logits, graph.tokens
            else:
                logits = self._logits(batch)
            handed_out = None
            if batch.handed_out:
                handed_out = HandedOut(logits, batch, self._vocab_size)
            logprobs = LogprobRows(logits, batch.logprobs) if batch.logprobs else None
            if graph is None or batch.needs_torch or not batch.masks_fit:
                tokens = self._draw(logits, batch)
            if logprobs is not None:
                logprobs.send(tokens)
            if event is not None:
                host[: len(tokens)].copy_(tokens, non_blocking=True)
                event.record()
                tokens = host
            sampled = batch.sampled_rows
            return StepHandle(plan.step, sampled, tokens, began, event, logprobs, handed_out)

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """On a GPU, capture all graphs and run a step of every kind, so that no request waits.

        Args:
            progress: called with how much is done and of how much.
        """
        keys = [] if self._graphs is None else self._graphs.all_keys()
        plans = list(warm_steps(*self._limits)) if self._on_gpu else []
        with torch.inference_mode():
            if plans:
                self._compile_ahead(keys, plans)
            for done, key in enumerate(keys, start=1):
                if self._graph(key) is None:
                    keys = keys[:done]  # refused: the log says why, and steps run without
                    break
                if progress is not None:
                    progress(done, len(keys) + len(plans))
        for done, plan in enumerate(plans, start=len(keys) + 1):
            try:
                self.execute(plan)
                torch.cuda.synchronize(self._device)
            except torch.OutOfMemoryError:
                logger.warning("a step of %d tokens does not fit beside the pool", plan.num_tokens)
                torch.cuda.empty_cache()
            if progress is not None:
                progress(done, len(keys) + len(plans))

    def _compile_ahead(self, keys: Sequence[GraphKey], plans: Sequence[StepPlan]) -> None:
        """Compile in parallel what the steps to come will ask for; what is missed comes then."""
        from litecache.kernels.triton_common import compiling_ahead

        try:
            with compiling_ahead():
                for key in keys:
                    if key.decodes.bit_count() <= 1:  # one of all that are padded alike
                        self._graph_step(key)()
                for plan in plans:
                    if plan.num_tokens <= _AHEAD_TOKENS and self._graph_key(plan) is None:
                        self.execute(plan)
        except (RuntimeError, NotImplementedError) as error:
            logger.info("kernels are compiled one by one: %s", error)

    def _graph_key(self, plan: StepPlan) -> GraphKey | None:
        if self._graphs is None:
            return None
        counts = [row.num_tokens for row in plan.rows]
        decodes = counts.count(1)
        key = self._graphs.key_for(decodes, sum(counts) - decodes, len(counts) - decodes)
        # a graph has room for one position of each sequence
        wanted = sum(row.sample + row.logits for row in plan.rows)
        if key is None or wanted > key.sizes[2] or any(row.sample > 1 for row in plan.rows):
            return None
        return key

    def _graph(self, key: GraphKey) -> StepGraph | None:
        """The graph of a bucket, captured now if it was not; None when the model refuses."""
        assert self._graphs is not None
        found = self._graphs.graphs.get(key)
        if found is not None:
            return found
        try:
            return self._graphs.capture(key, self._graph_step(key))
        except RuntimeError:
            logger.exception("no CUDA graphs for this model: %s cannot be captured", key)
            self._graphs = None
            return None

    def _graph_step(self, key: GraphKey) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """What a graph holds, over padding alone."""
        batch = self._tables.build(StepPlan(step=0), key)

        def step() -> tuple[torch.Tensor, torch.Tensor]:
            logits = self._forward(self._metadata(batch, key), batch)
            return logits, self._remember(logits, batch.fields)

        return step

    def _apply_deltas(self, batch: Batch) -> None:
        index = batch.fields["delta_index"]
        if len(index):
            tables = self._tables.device_tables.view(-1)
            tables.index_copy_(0, index, batch.fields["delta_value"])

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        for group in {copy.group for copy in copies}:
            pairs = [(copy.src, copy.dst) for copy in copies if copy.group == group]
            pool = self._pools[group].buffer
            src, dst = torch.tensor(pairs, dtype=torch.int64).T.contiguous().to(pool.device)
            copy_blocks(pool, src, dst)

    def _paged(self, batch: Batch) -> torch.Tensor:
        """Logits `[samples, vocab]` by the forward of models whose attention is exchanged."""
        return self._forward(self._metadata(batch), batch)

    def _forward(self, metadata: list[AttentionMetadata], batch: Batch) -> torch.Tensor:
        """Logits `[samples, vocab]`."""
        fields = batch.fields
        index = None if batch.every_token_sampled else fields["logit_index"]
        self._context.begin(metadata, index)
        options = {}
        if self._keeps_logits and index is not None:
            options["logits_to_keep"] = index
        with attention_context(self._context):
            logits = self._model(
                input_ids=self._buffers.words.index_select(0, fields["id_index"])[None],
                position_ids=fields["positions"][None],
                use_cache=False,
                **options,
            ).logits[0]
        if index is not None and not self._keeps_logits:
            logits = logits[index]
        return logits  # type: ignore[no-any-return]

    def _metadata(self, batch: Batch, key: GraphKey | None = None) -> list[AttentionMetadata]:
        """The step of each KV group; for a graph what holds for every step of its bucket."""
        fields, copies = batch.fields, self._decode_copies
        longest = max(batch.context_lens) if key is None else self._max_model_len
        query_lens = batch.query_lens if key is None else key.query_lens
        width = -(-longest // self._layout.block_size)
        if copies is not None:
            copies.begin_step()
        slots = fields["slots"].view(len(self._pools), -1)
        return [
            AttentionMetadata(
                slot_mapping=own_slots,
                block_tables=tables[:, :width].index_select(0, fields["rows"]),
                context_lens=fields["context_lens"],
                cu_seqlens_q=fields["cu_seqlens"],
                block_size=self._layout.block_size,
                max_query_len=max(query_lens),
                max_context_len=longest,
                query_lens=query_lens,
                context_lens_host=batch.context_lens if key is None else None,
                deterministic=self._deterministic,
                lives=batch.lives,
                copies=copies,
            )
            for own_slots, tables in zip(slots, self._tables.device_tables, strict=True)
        ]

    def _draw(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Draw tokens and write them where the next step reads them."""
        if self._on_gpu and not batch.needs_torch:
            if not batch.masks_fit:
                strike(logits, batch)
            return self._remember(logits, batch.fields)
        if batch.ruled:
            logits = self._rules.apply(logits, batch.ruled)
        tokens = sample(logits, batch)
        if batch.ruled:
            self._rules.remember(tokens)
        self._buffers.last_tokens.index_copy_(0, batch.fields["sample_rows"], tokens.clamp(min=0))
        return tokens

    def _remember(self, logits: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        from litecache.engine.running.passes.triton_sampler import sample_and_remember

        return sample_and_remember(
            logits,
            fields["temperature"],
            fields["keys"],
            fields["sample_rows"],
            fields["struck"].view(-1, STRUCK_TOKENS),
            self._buffers.last_tokens,
        )


Segments = list[tuple[int, int]]
"""Start and number of tokens, a row each."""

_DRAWN = (
    SamplingParams(1, temperature=1.0, top_k=8, logprobs=1),
    SamplingParams(1, temperature=1.0, top_p=0.9, min_p=0.1),
)
"""What the drawing kernels leave to torch."""


def warm_steps(
    max_requests: int, max_tokens: int, max_model_len: int, num_groups: int
) -> Iterator[StepPlan]:
    """Plans whose results are to be dropped.

    Args:
        max_requests: rows of the engine.
        max_tokens: most tokens of a step.
        max_model_len: longest sequence in tokens.
        num_groups: KV groups; each has a block copied.
    """
    # Triton is imported where a GPU is known to be there.
    from litecache.kernels.library_prefill import plan_cases

    requests, longest = sizes(max_requests), min(max_tokens, max_model_len)
    chunks = [size for size in sizes(longest) if size > 1]
    cases: list[Segments] = [[(0, 1)] * count for count in requests]
    cases += [[(0, chunk)] for chunk in chunks]
    # Short questions: rows of a tile are their tokens times heads.
    cases += [[(0, queries)] * count for queries in (2, 4, 8, 16) for count in requests]
    # Several chunks, short ones and such as fill a step: they are cut by the number of all.
    cases += [
        [(0, size)] * count for count in requests[2:] for size in (17, 65, max_tokens // count)
    ]
    # Beside a chunk that no graph holds, decodes take kernels by their own number.
    cases += [[(0, 1)] * count + [(0, chunk)] for count in requests for chunk in chunks[-1:]]
    # Many chunks in a step: of many short prompts, and of a few long ones.
    cases += [[(0, size)] * min(max_requests, max(1, max_tokens // size)) for size in (17, 1024)]
    cases += [[case] for case in plan_cases(longest, max_model_len)]
    copies = tuple(BlockCopy(group, TRASH_BLOCK, TRASH_BLOCK) for group in range(num_groups))
    for case in cases:
        start, count = max(case)
        if 0 < start + count <= max_model_len and sum(n for _, n in case) <= max_tokens:
            yield _plan(case, SamplingParams(1), copies)
            copies = ()
    for sampling, count in itertools.product(_DRAWN, (1, max_requests)):
        yield _plan([(0, 1)] * min(count, max_tokens), sampling)


def sizes(most: int) -> list[int]:
    """1, 2 and one more than each power of two from 16 on: one of all sizes padded alike."""
    powers = (1 << power for power in range(4, most.bit_length()))
    return [size for size in (1, 2, *(power + 1 for power in powers)) if size <= most]


def _plan(case: Segments, sampling: SamplingParams, copies: tuple[BlockCopy, ...] = ()) -> StepPlan:
    rows, news = [], []
    for row, (start, count) in enumerate(case):
        tokens = TokenIds(np.zeros(start + count, dtype=np.int64))
        news.append(NewRow(row, tokens, start + count, sampling))
        rows.append(RowStep(row, start, count, 1))
    return StepPlan(0, tuple(news), copies=copies, rows=tuple(rows))
