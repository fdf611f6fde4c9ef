"""After the warm-up no prompt compiles a Triton kernel or asks cuDNN for a new plan."""

from __future__ import annotations

import queue
import random
from typing import Any

import pytest

from litecache.config import CacheConfig
from litecache.engine.engine import Engine
from litecache.engine.loading.model_source import ModelSource
from litecache.kernels import library_prefill
from litecache.token_ids import TokenIds
from litecache.types import Request, SamplingParams

pytestmark = pytest.mark.gpu

VOCAB = 4096
FIELDS = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40_960,
}


def test_no_prompt_of_any_size_compiles_a_kernel_or_builds_a_plan(monkeypatch):
    from triton import knobs

    compiled: list[str] = []
    plans: set[Any] = set()
    asked = library_prefill._cudnn

    def cudnn(query, pair, scale, *, causal, lse):
        plans.add((*((x.shape, x.stride()) for x in (query, *pair)), causal, lse))
        return asked(query, pair, scale, causal=causal, lse=lse)

    def note(*args, fn=None, **kwargs):
        compiled.append(f"{getattr(fn, 'name', fn)} {kwargs.get('repr')}")

    monkeypatch.setattr(library_prefill, "_cudnn", cudnn)
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", note)
    deltas: queue.SimpleQueue[Any] = queue.SimpleQueue()
    config = CacheConfig(
        device="cuda", dtype="bfloat16", num_blocks=8192, max_requests=64, admission="none"
    )
    source = ModelSource(config=FIELDS, weights="random", seed=0)
    engine = Engine(source, config, sink=deltas.put)
    try:
        assert compiled
        assert plans
        compiled.clear()
        prepared = set(plans)
        dice = random.Random(5)
        prompts: list[list[int]] = []
        for turn in range(20):
            # Alone, or several at once; some go on where an earlier one ended.
            burst = []
            for place in range(dice.choice((1, 1, 3, 40))):
                length = dice.choice((dice.randint(2, 40), dice.randint(2, 12_000), 8192, 3072))
                prompt = dice.choices(range(VOCAB), k=length if place < 3 else 20)
                if prompts and dice.random() < 0.5:
                    prompt = dice.choice(prompts) + prompt
                prompts.append(prompt)
                sampling = SamplingParams(
                    4, temperature=dice.choice((0.0, 0.8)), top_k=dice.choice((0, 0, 5))
                )
                name = f"{turn}-{place}"
                burst.append(Request(name, "client", TokenIds(prompt[:40_000]), sampling))
            engine.submit(burst)
            left = {request.request_id for request in burst}
            while left:
                for _, delta in deltas.get(timeout=60):
                    assert delta.error is None, delta.error
                    if delta.finish_reason is not None:
                        left.discard(delta.request_id)
            assert compiled == [], f"turn {turn}"
            assert plans == prepared, f"turn {turn}: {plans - prepared}"
    finally:
        engine.close()
