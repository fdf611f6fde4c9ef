"""The runner's forward for families with attention code of their own: row by row over gathered KV.

What a step packs is taken apart again: decodes of similar length run as one batch, padded on the
left, every longer run of queries by itself, each by the model's own attention over a `GatherCache`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from litecache.engine.kv_layout import KVLayout, KVPool
from litecache.engine.running.batch import Batch
from litecache.engine.running.gather_cache import GatherCache, Rows
from litecache.kernels.reference import WORTHWHILE_PADDING


class GatheredForward:
    """Runs batches over the pools.

    Args:
        model: of a family with attention code of its own.
        layout: its KV groups.
        pools: one per group.
        words: int64, where the batch's fields `id_index` point.
        tables: int32 `[groups, rows + 1, blocks]` on the device.
    """

    def __init__(
        self,
        model: Any,
        layout: KVLayout,
        pools: Sequence[KVPool],
        words: torch.Tensor,
        tables: torch.Tensor,
    ) -> None:
        self._model = model
        self._block_size = layout.block_size
        self._words, self._tables = words, tables
        self._cache = GatherCache(layout, pools)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._keeps_logits = "logits_to_keep" in accepted

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Logits of the positions `batch.places`, `[places, vocab]`."""
        self._cache.begin_step()
        starts = np.cumsum((0, *batch.query_lens))
        parts = [
            self._run(batch, seqs, starts[seqs])
            for seqs in _forwards(batch.query_lens, batch.context_lens)
        ]
        first, _ = parts[0]
        out = first.new_empty(len(batch.places), first.shape[1])
        for logits, wanted in parts:
            out[torch.from_numpy(wanted).to(out.device)] = logits
        return out

    def _run(self, batch: Batch, seqs: Sequence[int], first: Any) -> tuple[torch.Tensor, Any]:
        """Logits of the wanted positions of some sequences, and their indices in `places`."""
        fields, queries = batch.fields, batch.query_lens[seqs[0]]
        device = self._words.device
        tokens: slice | torch.Tensor = slice(int(first[0]), int(first[0]) + queries * len(seqs))
        if (np.diff(first) != queries).any():
            tokens = torch.from_numpy(first).to(device)
        contexts = tuple(batch.context_lens[seq] for seq in seqs)
        width = -(-max(contexts) // self._block_size)
        of_rows = fields["rows"][torch.tensor(seqs, device=device)]
        rows = Rows(
            queries,
            contexts,
            slots=[s[tokens] for s in fields["slots"].view(len(self._tables), -1)],
            tables=[table[:, :width].index_select(0, of_rows) for table in self._tables],
            lives=tuple(batch.lives[seq] for seq in seqs),
        )
        # The wanted positions, in order of the sequences and, in each, of the tokens.
        wanted = np.concatenate(
            [np.flatnonzero((batch.places >= n) & (batch.places < n + queries)) for n in first]
        )
        row = np.searchsorted(first, batch.places[wanted], side="right") - 1
        places = batch.places[wanted] - first[row]
        options: dict[str, Any] = {}
        if self._takes_positions:
            options["position_ids"] = fields["positions"][tokens].view(len(seqs), queries)
        if self._keeps_logits and len(seqs) == 1:
            options["logits_to_keep"] = torch.from_numpy(places).to(device)
            places = np.arange(len(places))
        self._cache.begin(rows)
        ids = self._words.index_select(0, fields["id_index"][tokens])
        logits = self._model(
            input_ids=ids.view(len(seqs), queries),
            attention_mask=rows.mask(device),
            past_key_values=self._cache,
            use_cache=True,
            **options,
        ).logits
        taken = (torch.from_numpy(index).to(device) for index in (row, places))
        return logits[tuple(taken)], wanted


def _forwards(query_lens: Sequence[int], contexts: Sequence[int]) -> Iterator[list[int]]:
    """Which sequences run together: decodes of similar length; others alone, those with tokens."""
    decodes = [seq for seq, count in enumerate(query_lens) if count == 1]
    decodes.sort(key=lambda seq: -contexts[seq])
    while decodes:
        least = WORTHWHILE_PADDING * contexts[decodes[0]]
        together = [seq for seq in decodes if contexts[seq] >= least]
        decodes = decodes[len(together) :]
        yield sorted(together)
    yield from ([seq] for seq, count in enumerate(query_lens) if count > 1)
