"""Families with attention code of their own: their forward over KV gathered from the block pool.

Such a model gives each layer's new keys and values to a transformers `Cache` and attends, by its
own code, to what it gets back: here the KV of the rows' whole contexts, gathered from their blocks.
What a step packs is taken apart for that: decodes of similar length run as one batch, padded on the
left, every longer run of queries by itself. A batch of decodes that stays together keeps what was
gathered and grows by a token a step. This module imports transformers: the runner and the probe
import it only for such a model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from litecache.engine.kv_layout import KVLayout, KVPool
from litecache.engine.running.batch import Batch
from litecache.kernels import dispatch
from litecache.kernels.decode_copies import HEADROOM_TOKENS, MAX_BYTES, KVCopy
from litecache.kernels.reference import WORTHWHILE_PADDING


@dataclass(frozen=True)
class Rows:
    """The rows of one forward.

    Attributes:
        queries: new tokens of each.
        contexts: visible tokens of each, the new ones included.
        slots: by KV group, int64 `[rows * queries]`: where the new tokens' KV goes.
        tables: by KV group, `[rows, blocks]`: each row's blocks.
        lives: a number for each row that no other sequence ever has; none = nothing is kept.
    """

    queries: int
    contexts: tuple[int, ...]
    slots: Sequence[torch.Tensor]
    tables: Sequence[torch.Tensor]
    lives: tuple[int, ...] = ()
    _indices: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def longest(self) -> int:
        """Columns of keys."""
        return max(self.contexts)

    @property
    def padding(self) -> tuple[int, ...]:
        """Columns before each row's first token."""
        return tuple(self.longest - context for context in self.contexts)

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """What transformers calls the attention mask, `[rows, longest]`; None without padding."""
        if not any(self.padding):
            return None
        columns = torch.arange(self.longest, device=device)
        return (columns >= torch.tensor(self.padding, device=device)[:, None]).long()

    def index(self, group: int, cache: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Where the contexts' tokens lie in a layer's view, for all layers of equal strides.

        Args:
            group: KV group of the layer.
            cache: `[num_blocks, kv_heads, block_size, dim]`, a view of the pool.

        Returns:
            A unit in elements, and int64 `[rows * kv_heads * longest]` in units.
        """
        _, heads, size, _ = cache.shape
        unit = math.gcd(*cache.stride()[:3])
        name = (group, *cache.stride(), heads, size)
        if name not in self._indices:
            block, head, token = (stride // unit for stride in cache.stride()[:3])
            padding = torch.tensor(self.padding, device=cache.device)[:, None]
            # Padded columns read some token and are zeroed.
            place = (torch.arange(self.longest, device=cache.device) - padding).clamp_(min=0)
            blocks = self.tables[group].long().gather(1, place // size)
            index = (blocks * block + place % size * token)[:, None]
            index = index + torch.arange(heads, device=cache.device)[:, None] * head
            self._indices[name] = index.reshape(-1)
        return unit, self._indices[name]

    def gather(self, group: int, cache: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows' contexts out of a layer's view, `[rows, kv_heads, longest, dim]`."""
        blocks, heads, size, dim = cache.shape
        unit, index = self.index(group, cache)
        last = (blocks - 1) * cache.stride(0) + (heads - 1) * cache.stride(1)
        last += (size - 1) * cache.stride(2)
        tokens = cache.as_strided((last // unit + 1, dim), (unit, 1)).index_select(0, index)
        out = tokens.view(len(self.contexts), heads, self.longest, dim).to(dtype)
        for row, columns in enumerate(self.padding):
            # Masked is not enough: 0 * NaN would reach the sum.
            out[row, :, :columns] = 0
        return out


class GatherCache(Cache):  # type: ignore[misc]
    """The KV of a forward's rows, as a model with attention code of its own asks for it.

    Args:
        layout: the model's KV groups.
        pools: one per group.

    Attributes:
        rows: of the forward under way.
        step: counts the engine's steps; KV that a step did not use is given up.
    """

    def __init__(self, layout: KVLayout, pools: Sequence[KVPool]) -> None:
        groups = {
            layer: (group.index, pool)
            for group, pool in zip(layout.groups, pools, strict=True)
            for layer in group.layers
        }
        super().__init__(layers=[_Layer(self, n, *groups[n]) for n in sorted(groups)])
        self.rows: Rows | None = None
        self.step = 0
        self._kept: dict[tuple[int, tuple[int, ...]], KVCopy] = {}

    def begin_step(self) -> None:
        """Another step of the engine."""
        self._kept = {name: kept for name, kept in self._kept.items() if kept.step == self.step}
        self.step += 1

    def begin(self, rows: Rows) -> None:
        """Another forward, of these rows."""
        self.rows = rows
        for layer in self.layers:
            layer.updated = False

    def extended(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Kept KV with the new tokens behind it; None where the step before kept none."""
        rows = self.rows
        assert rows is not None
        kept = self._kept.get((layer, rows.lives))
        if kept is None or rows.longest > kept.keys.shape[2]:
            return None
        if kept.contexts != tuple(context - 1 for context in rows.contexts):
            return None
        kept.contexts, kept.step = rows.contexts, self.step
        kept.keys[:, :, rows.longest - 1] = key[:, :, 0]
        kept.values[:, :, rows.longest - 1] = value[:, :, 0]
        return kept.keys[:, :, : rows.longest], kept.values[:, :, : rows.longest]

    def keep(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep gathered KV `[rows, kv_heads, longest, dim]` for the next step, where it fits."""
        rows = self.rows
        assert rows is not None
        self._kept.pop((layer, rows.lives), None)
        capacity = rows.longest + HEADROOM_TOKENS
        needed = (keys.nbytes + values.nbytes) // rows.longest * capacity
        if needed + sum(kept.num_bytes for kept in self._kept.values()) > MAX_BYTES:
            return

        def space(gathered: torch.Tensor) -> torch.Tensor:
            made = gathered.new_empty(*gathered.shape[:2], capacity, gathered.shape[3])
            made[:, :, : rows.longest] = gathered
            return made

        self._kept[layer, rows.lives] = KVCopy(space(keys), space(values), rows.contexts, self.step)


class _OwnLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer whose KV lies elsewhere; the methods are those that transformers calls."""

    is_sliding = False
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing to make."""

    def get_max_length(self) -> int:
        """No bound that a mask would have to know."""
        return -1


class _Layer(_OwnLayer):
    """One layer of a `GatherCache`."""

    def __init__(self, cache: GatherCache, layer: int, group: int, pool: KVPool) -> None:
        super().__init__()
        self._cache, self._layer, self._group = cache, layer, group
        self._views = pool.layer(layer)
        self._backend = dispatch.backend(pool.buffer.device)
        self.updated = False

    @property
    def _rows(self) -> Rows:
        rows = self._cache.rows
        assert rows is not None
        return rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens' KV and return that of the whole contexts.

        Args:
            key_states: `[rows, kv_heads, queries, k_dim]`.
            value_states: `[rows, kv_heads, queries, v_dim]`.

        Returns:
            `[rows, kv_heads, longest, dim]` of each; zero where a row is padded.
        """
        rows, dtype = self._rows, key_states.dtype
        self.updated = True
        key, value = (t.transpose(1, 2).flatten(0, 1) for t in (key_states, value_states))
        k_cache, v_cache = self._views
        self._backend.store_kv(key, value, k_cache, v_cache, rows.slots[self._group])
        exact = dtype == k_cache.dtype
        if exact and rows.contexts == (rows.queries,) and rows.queries > 1:
            return key_states, value_states
        keeps = exact and rows.queries == 1 and bool(rows.lives)
        if keeps and (found := self._cache.extended(self._layer, key_states, value_states)):
            return found
        keys, values = (rows.gather(self._group, view, dtype) for view in self._views)
        if keeps:
            self._cache.keep(self._layer, keys, values)
        return keys, values

    def get_seq_length(self) -> int:
        """Columns that are there, those of the forward under way once they were given."""
        return self._rows.longest - (0 if self.updated else self._rows.queries)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of keys in this forward, and the first of them."""
        return self._rows.longest, 0


def longest_context(layers: int, queries: int, tokens: int) -> Cache:
    """What a forward over a `GatherCache` costs at most, without a pool: zeros for the context.

    Args:
        layers: of the model.
        queries: new tokens of the row.
        tokens: of its context, the new ones included.
    """
    return Cache(layers=[_Zeros(queries, tokens) for _ in range(layers)])


class _Zeros(_OwnLayer):
    def __init__(self, queries: int, tokens: int) -> None:
        super().__init__()
        self._seen, self._tokens = tokens - queries, tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[1, kv_heads, tokens, dim]` of zeros, twice."""
        self._seen = self._tokens
        key, value = (
            states.new_zeros(*states.shape[:2], self._tokens, states.shape[3])
            for states in (key_states, value_states)
        )
        return key, value

    def get_seq_length(self) -> int:
        """Tokens before the forward, once it came here those it brings as well."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of keys in this forward, and the first of them."""
        return self._tokens, 0


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
            for seqs in _forwards(batch.query_lens, batch.context_lens, batch.lives)
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


def _forwards(
    query_lens: Sequence[int], contexts: Sequence[int], lives: Sequence[int]
) -> Iterator[list[int]]:
    """Which sequences run together: decodes of similar length; others alone, those with tokens.

    Of one row's segments each reads what those in front of it store, so it runs after them.
    """
    rounds: dict[int, int] = {}
    by_round: list[list[int]] = []
    for seq in sorted(range(len(contexts)), key=contexts.__getitem__):
        number = rounds[lives[seq]] = rounds.get(lives[seq], -1) + 1
        by_round += [[]] if number == len(by_round) else []
        by_round[number].append(seq)
    for seqs in by_round:
        decodes = sorted((s for s in seqs if query_lens[s] == 1), key=lambda seq: -contexts[seq])
        while decodes:
            least = WORTHWHILE_PADDING * contexts[decodes[0]]
            together = [seq for seq in decodes if contexts[seq] >= least]
            decodes = decodes[len(together) :]
            yield sorted(together)
        yield from ([seq] for seq in sorted(seqs) if query_lens[seq] > 1)
