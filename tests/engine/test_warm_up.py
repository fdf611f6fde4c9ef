"""What steps compile, seen without a GPU: launches are noted with what Triton compiles them for."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from plan_driver import FAMILIES
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from litecache.config import CacheConfig
from litecache.engine.kv_layout import KVLayout, KVPool
from litecache.engine.loading.model_loader import LoadedModel, load_model
from litecache.engine.loading.model_source import ModelSource
from litecache.engine.running.cuda_graphs import GraphCache, StepGraph
from litecache.engine.running.model_runner import ModelRunner
from litecache.engine.running.passes.fused_layers import FusedDecoderLayer, TritonOps
from litecache.engine.scheduling.orders import BlockCopy, NewRow, RowStep, StepPlan
from litecache.kernels import library_prefill, triton_common, triton_plan, tuning
from litecache.types import SamplingParams

MAX_REQUESTS, MAX_TOKENS, MAX_MODEL_LEN = 40, 3072, 13_400
_BACKEND = CUDABackend(GPUTarget("cuda", 90, 32))


class _Replayed:
    def replay(self) -> None:
        """Replaying compiles nothing."""


class _Graphs(GraphCache):
    """Runs a step once where a GPU would capture it."""

    def capture(self, key: Any, step: Any) -> StepGraph:
        logits, tokens = step()
        self.graphs[key] = StepGraph(_Replayed(), logits, torch.zeros_like(tokens))
        return self.graphs[key]


class _Event:
    def record(self) -> None:
        """The results are there at once."""

    synchronize = record


def _make_believe(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """What launches of Triton kernels and calls of cuDNN were compiled for, on a make-believe H200.

    Nothing is computed by them: their outputs are what was in memory.
    """
    variants: set[Any] = set()
    binders: dict[str, Any] = {}

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = binders.setdefault(
            kernel.fn.__name__,
            create_function_from_signature(kernel.signature, kernel.params, _BACKEND),
        )
        _, specialised, rest = binder(*args, **options)
        variants.add((kernel.fn.__name__, str(specialised), str(sorted(rest.items()))))

    def cudnn(query: Any, pair: Any, scale: float, *, causal: bool, lse: bool) -> Any:
        sides = tuple((x.shape, x.stride()) for x in (query, *pair))
        variants.add(("cudnn", sides, causal, lse))
        sums = torch.zeros(query.shape[1], query.shape[0])
        return torch.zeros_like(query), sums

    monkeypatch.setenv("LITECACHE_KERNELS", "triton")
    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(library_prefill, "_cudnn", cudnn)
    monkeypatch.setattr(library_prefill, "_has_library", lambda device: True)
    monkeypatch.setattr(triton_common, "_supports_pdl", lambda device: True)
    config = tuning.DecodeConfig(64, 2, 2, 528, 8)
    monkeypatch.setattr(tuning, "num_multiprocessors", lambda device: 132)
    monkeypatch.setattr(triton_plan, "decode_config", lambda device, shape: config)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return variants


def _loaded(family: str) -> LoadedModel:
    fields = {**FAMILIES[family], "model_type": family, "max_position_embeddings": MAX_MODEL_LEN}
    fields |= {"num_hidden_layers": 2, "hidden_size": 32}
    config = CacheConfig(device="cpu", dtype="bfloat16")
    return load_model(ModelSource(config=fields, weights="random", seed=0), config)


def _runner(loaded: LoadedModel, graphs: bool) -> ModelRunner:
    ops = TritonOps(loaded.device)
    for module in loaded.model.modules():
        if isinstance(module, FusedDecoderLayer):
            module._ops, module._on_gpu = ops, True
        elif hasattr(module, "_ops"):
            module._ops = ops
    layout = KVLayout.from_specs(loaded.specs, 16)
    runner = ModelRunner(
        loaded,
        layout,
        [KVPool(group, 4, loaded.device) for group in layout.groups],
        max_requests=MAX_REQUESTS,
        max_model_len=MAX_MODEL_LEN,
        max_batch_tokens=MAX_TOKENS,
    )
    runner._on_gpu, runner._decode_copies = True, None
    runner._results = [(torch.zeros(MAX_TOKENS, dtype=torch.int64), _Event(), _Event())]
    if graphs:
        runner._graphs = _Graphs(MAX_REQUESTS, 1024)
    return runner


def _random_plan(dice: random.Random, num_groups: int) -> StepPlan:
    """A step as the scheduler might make it: decodes, then chunks over prefixes of any length."""
    kind = dice.randrange(5)
    decodes = dice.choice((0, 0, dice.randrange(MAX_REQUESTS)))
    rows = MAX_REQUESTS - decodes
    lengths = {
        0: [],
        1: [dice.randint(2, 16)] * dice.randint(1, rows),
        2: [dice.randint(2, MAX_TOKENS - decodes)],
        3: [dice.randint(2, MAX_TOKENS // rows) for _ in range(dice.randint(1, rows))],
        4: [1024 * dice.randint(2, 3)],
    }[kind]
    decodes = max(0, min(decodes, MAX_TOKENS - sum(lengths))) or (1 if not lengths else 0)
    steps, news = [], []
    for row, count in enumerate([1] * decodes + lengths):
        room = MAX_MODEL_LEN - count
        start = dice.choice((0, 2048, 8192, 10240, dice.randint(0, room), dice.randint(0, room)))
        start = min(start, room)
        end = start + count
        sampling = SamplingParams(1, temperature=dice.choice((0.0, 0.7)))
        news.append(NewRow(row, np.zeros(end, dtype=np.int64), end, sampling))
        steps.append(RowStep(row, start, count, dice.choice((0, 1, 1))))
    copies = tuple(BlockCopy(dice.randrange(num_groups), 1, 2) for _ in range(dice.randrange(3)))
    return StepPlan(1, tuple(news), copies=copies, rows=tuple(steps))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "graphs"), [("llama", True), ("llama", False), ("gemma2", True)]
)
def test_after_the_warm_up_no_step_of_any_size_compiles_anything(family, graphs, monkeypatch):
    loaded = _loaded(family)
    compiled = _make_believe(monkeypatch)
    runner = _runner(loaded, graphs)
    runner.warm_up()
    prepared = set(compiled)
    dice = random.Random(7)
    missed = defaultdict(list)
    for _ in range(40):
        compiled.clear()
        plan = _random_plan(dice, len(runner._pools))
        runner.execute(plan)
        for variant in compiled - prepared:
            missed[variant].append([row[1:4] for row in plan.rows[:5]])
    assert len({name for name, *_ in prepared}) > 5
    told = [f"{name} {key} at {rows[0]}" for (name, *key), rows in missed.items()]
    assert not told, "\n".join(told)
