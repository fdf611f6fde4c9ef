"""The runner's persistent tables: what a row's request is, which blocks it holds, how it samples.

Plans carry only changes; these tables remember the rest. The host copies feed batch building, the
block tables also live on the device, where the forward gathers the rows of a batch. One row more
than there are requests is the padding row: its block tables hold the trash block only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from litecache.engine.kv_layout import KVLayout
from litecache.engine.running.logit_rules import RowRules
from litecache.engine.running.random_numbers import stream_keys
from litecache.engine.running.step_buffers import STRUCK_TOKENS
from litecache.engine.scheduling.step_plan import NewRow, TableUpdate


class RowTables:
    """Host and device tables of all rows.

    Args:
        layout: the KV groups; each has a block table.
        max_requests: rows.
        max_model_len: tokens a row can hold.
        device: where the block tables are gathered.

    Attributes:
        tokens: int32 `[rows + 1, max_model_len]`, ids the host knows.
        num_known: int64 `[rows + 1]`, how many of them are valid; later positions were sampled and
            are known to the device.
        num_prompt: int64 `[rows + 1]`, sampling positions count from it.
        life: int64 `[rows + 1]`, a number that no other request in any row has.
        stream: int64 `[rows + 1]`, of the random generator.
        rules: of the rows that have any.
        logprobs: of the rows that report log-probabilities, for how many of the likeliest.
        block_tables: int32 `[groups, rows + 1, max_blocks]` on the host.
        device_tables: the same on the device (on CPU the same memory).
    """

    def __init__(
        self, layout: KVLayout, max_requests: int, max_model_len: int, device: torch.device
    ) -> None:
        self.num_rows = max_requests
        max_blocks = -(-max_model_len // layout.block_size)
        # Zeros come from untouched pages: rows cost memory only once they are used.
        self.tokens = np.zeros((max_requests + 1, max_model_len), dtype=np.int32)
        self.num_known = np.zeros(max_requests + 1, dtype=np.int64)
        self.num_known[max_requests] = 1
        self.num_prompt = np.zeros(max_requests + 1, dtype=np.int64)
        self.life = np.zeros(max_requests + 1, dtype=np.int64)
        self._lives = 0
        self.temperature = np.zeros(max_requests + 1, dtype=np.float32)
        self.top_k = np.zeros(max_requests + 1, dtype=np.int64)
        self.top_p = np.ones(max_requests + 1, dtype=np.float32)
        self.min_p = np.zeros(max_requests + 1, dtype=np.float32)
        self.stream = np.zeros(max_requests + 1, dtype=np.int64)
        self.min_new_tokens = np.zeros(max_requests + 1, dtype=np.int64)
        self.eos_token_ids: list[tuple[int, ...]] = [()] * (max_requests + 1)
        # The end tokens in a form that a step can gather; rows with more of them take the slow way.
        self.struck_ends = np.full((max_requests + 1, STRUCK_TOKENS), -1, dtype=np.int32)
        self.begin_suppressed: list[tuple[int, ...]] = [()] * (max_requests + 1)
        self.rules: dict[int, RowRules] = {}
        self.logprobs: dict[int, int] = {}
        self.block_tables = np.zeros(
            (len(layout.groups), max_requests + 1, max_blocks), dtype=np.int32
        )
        self.device_tables = torch.from_numpy(self.block_tables).to(device)

    def set_row(self, new: NewRow) -> None:
        """A request takes a row."""
        row, count, sampling = new.row, len(new.token_ids), new.sampling
        self.tokens[row, :count] = new.token_ids.array
        self.num_known[row] = count
        self.num_prompt[row] = new.num_prompt_tokens
        self._lives += 1
        self.life[row] = self._lives
        self.temperature[row] = sampling.temperature
        self.top_k[row] = sampling.top_k
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p
        seed = np.array([sampling.seed], dtype=np.int64)
        self.stream[row] = stream_keys(seed, np.array([sampling.sample_index]))[0]
        self.min_new_tokens[row] = sampling.min_new_tokens
        self.eos_token_ids[row] = sampling.eos_token_ids
        self.struck_ends[row] = -1
        ends = sampling.eos_token_ids[:STRUCK_TOKENS]
        self.struck_ends[row, : len(ends)] = ends
        self.begin_suppressed[row] = sampling.begin_suppress_tokens
        self.rules.pop(row, None)
        if sampling.any_rules:
            self.rules[row] = RowRules(sampling, new.token_ids, new.num_prompt_tokens)
        self.logprobs.pop(row, None)
        if sampling.logprobs is not None:
            self.logprobs[row] = sampling.logprobs

    def update_tables(self, updates: Sequence[TableUpdate]) -> None:
        """Write blocks into the host's block tables (on CPU the device's too)."""
        for update in updates:
            end = update.start + len(update.block_ids)
            self.block_tables[update.group, update.row, update.start : end] = update.block_ids

    def flat_index(self, update: TableUpdate) -> int:
        """Where an update starts in the flattened block tables."""
        _, rows, width = self.block_tables.shape
        return (update.group * rows + update.row) * width + update.start
