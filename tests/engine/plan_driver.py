"""A hand-cranked scheduler for runner tests: it allocates blocks and writes plans, nothing more."""

from __future__ import annotations

import functools
import os
import random
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from litecache.config import CacheConfig
from litecache.engine.kv_layout import KVLayout, KVPool
from litecache.engine.loading.model_loader import LoadedModel, load_model
from litecache.engine.loading.model_source import ModelSource
from litecache.engine.running.model_runner import ModelRunner, StepHandle
from litecache.engine.scheduling.orders import BlockCopy, NewRow, RowStep, StepPlan, TableUpdate
from litecache.types import SamplingParams

VOCAB = 211
DEVICE = "cpu"
"""The GPU tests set it to "cuda"."""
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Wide, so that attention matters and greedy choices are no ties.
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": _SHAPE,
    "qwen3": {**_SHAPE, "head_dim": 32},
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.2,
    },
    "phi": _SHAPE,
    "gemma2": {**_SHAPE, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "mistral": {**_SHAPE, "sliding_window": 20},
}
GREEDY = SamplingParams(max_new_tokens=64)


def tiny_model(family: str, seed: int = 0, passes: str = "none", **config: object) -> LoadedModel:
    """A random float32 model of three layers, by default without any pass."""
    fields = {**FAMILIES[family], "model_type": family}
    source = ModelSource(config=fields, weights="random", seed=seed)
    config = {"device": DEVICE, "dtype": "float32", **config}
    with mock.patch.dict(os.environ, LITECACHE_PASSES=passes):
        return load_model(source, CacheConfig(**config))


@functools.cache
def stock_model(family: str, seed: int, device: str) -> Any:
    """The same weights in unmodified transformers."""
    loaded = tiny_model(family, seed, device=device)
    softcap = getattr(loaded.model.config, "attn_logit_softcapping", None)
    loaded.model.set_attn_implementation("eager" if softcap else "sdpa")
    loaded.model.generation_config.eos_token_id = None
    return loaded.model


def stock_generate(loaded: LoadedModel, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by unmodified transformers from the weights of seed 0, without end."""
    model = stock_model(loaded.model.config.model_type, 0, loaded.device.type)
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),  # else it takes ids equal to the padding for padding
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def random_prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


@dataclass
class _Row:
    length: int
    computed: int = 0
    blocks: list[list[int]] = field(default_factory=list)


class PlanDriver:
    """Rows over a shuffled pool; `step` computes so many tokens of each row given."""

    def __init__(self, loaded: LoadedModel, *, num_blocks: int = 96, max_requests: int = 8) -> None:
        self.layout = KVLayout.from_specs(loaded.specs, 16)
        self.pools = [KVPool(group, num_blocks, loaded.device) for group in self.layout.groups]
        self.runner = ModelRunner(
            loaded,
            self.layout,
            self.pools,
            max_requests=max_requests,
            max_model_len=256,
            max_batch_tokens=256,
        )
        self.rows: dict[int, _Row] = {}
        self._free = [list(range(1, num_blocks)) for _ in self.layout.groups]
        for free in self._free:
            random.Random(3).shuffle(free)
        self._new: list[NewRow] = []
        self._updates: list[TableUpdate] = []
        self._copies: list[BlockCopy] = []
        self._step = 0

    def add(
        self,
        row: int,
        tokens: list[int],
        sampling: SamplingParams = GREEDY,
        *,
        num_prompt_tokens: int | None = None,
        prefix_of: int | None = None,
        num_shared: int = 0,
    ) -> None:
        """Start a row, taking the first `num_shared` tokens' KV from row `prefix_of`.

        Whole blocks are shared, a partial one is copied.
        """
        self._new.append(NewRow(row, tuple(tokens), num_prompt_tokens or len(tokens), sampling))
        state = _Row(len(tokens), num_shared, [[] for _ in self.layout.groups])
        if prefix_of is not None:
            whole, partial = divmod(num_shared, 16)
            for group in range(len(self.layout.groups)):
                theirs = self.rows[prefix_of].blocks[group]
                self._append(row, state, group, theirs[:whole])
                if partial:
                    copied = self._free[group].pop()
                    self._copies.append(BlockCopy(group, theirs[whole], copied))
                    self._append(row, state, group, [copied])
        self.rows[row] = state

    def _append(self, row: int, state: _Row, group: int, blocks: list[int]) -> None:
        if blocks:
            start = len(state.blocks[group])
            self._updates.append(TableUpdate(row, group, start, tuple(blocks)))
            state.blocks[group] += blocks

    def plan(self, counts: dict[int, int], cached: tuple[int, ...] = ()) -> StepPlan:
        """Compute `counts[row]` more tokens of each row; a finished prompt draws a token."""
        steps = []
        for row, count in sorted(counts.items(), key=lambda item: item[1] > 1):
            state = self.rows[row]
            end = state.computed + count
            assert end <= state.length, "more tokens than the row has"
            for group in range(len(self.layout.groups)):
                missing = -(-end // 16) - len(state.blocks[group])
                taken = [self._free[group].pop() for _ in range(missing)]
                self._append(row, state, group, taken)
            sample = end == state.length
            steps.append(RowStep(row, state.computed, count, sample, row in cached))
            state.computed = end
            state.length += sample
        self._step += 1
        plan = StepPlan(
            self._step,
            tuple(self._new),
            tuple(self._updates),
            tuple(self._copies),
            tuple(steps),
        )
        self._new, self._updates, self._copies = [], [], []
        return plan

    def step(self, counts: dict[int, int], cached: tuple[int, ...] = ()) -> StepHandle:
        return self.runner.execute(self.plan(counts, cached))

    def decode(self, row: int, count: int) -> list[int]:
        """So many more tokens of one row, each step started before the last one's result.

        A result is read before a third step starts: its place on the host is used again.
        """
        tokens: list[int] = []
        under_way: StepHandle | None = None
        for _ in range(count):
            handle = self.step({row: 1})
            if under_way is not None:
                tokens += under_way.result().tokens
            under_way = handle
        return tokens if under_way is None else [*tokens, *under_way.result().tokens]
