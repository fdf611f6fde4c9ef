"""KV bytes of a mixed batch against Hugging Face's padded cache, and how large a batch may get.

64 requests, prompts uniform from 64 to 2,048 tokens, outputs uniform from 16 to 512, a small model
with random weights. HF answers them left-padded in one batch: its bytes are those of the cache
that `generate` returns. LiteCache's are the blocks in use at the worst moment, whole ones. Both
are counts of tensors, so they do not depend on the machine; the ratio holds for any geometry whose
layers are alike. The largest batch is the largest number of requests of that mix, all at once,
whose KV stays inside one budget (no request preempted, none waiting).

    python scripts/bench_memory.py [--requests 64] [--json FILE] [--quick]
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench_common import Report, Row, parser
from transformers import AutoConfig, AutoModelForCausalLM

from litecache import CacheConfig
from litecache.engine.engine import Engine
from litecache.engine.loading.model_source import ModelSource
from litecache.types import Request, SamplingParams, TokenDelta

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 4096, "eos_token_id": None,
}  # fmt: skip

Lengths = list[tuple[int, int]]


def mixed(count: int) -> Lengths:
    """Prompt and output lengths of the mix, the same first requests for any count."""
    draw = np.random.default_rng(0)
    pairs = draw.integers((64, 16), (2049, 513), size=(4096, 2))
    return [(int(prompt), int(new)) for prompt, new in pairs[:count]]


def hf_bytes(model: Any, lengths: Lengths) -> int:
    """Bytes of the cache of one left-padded batch at its end."""
    width, new = max(p for p, _ in lengths), max(n for _, n in lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(lengths):
        ids[row, width - prompt :] = torch.randint(1, 512, (prompt,))
        mask[row, width - prompt :] = 1
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
        return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    layers = out.past_key_values.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


class Watched(Engine):
    """An engine that notes the most blocks that were in use between two steps."""

    peak_blocks = 0

    def _turn(self) -> None:
        super()._turn()
        pool = self._scheduler.cache.pools[0]
        self.peak_blocks = max(self.peak_blocks, pool.num_blocks - pool.num_available)


def run(lengths: Lengths, num_blocks: int) -> tuple[int, int, int]:
    """Answer all at once: peak KV bytes, preemptions, and the bytes of a block."""
    done, left = threading.Event(), len(lengths)

    def sink(deltas: list[tuple[str, TokenDelta]]) -> None:
        nonlocal left
        left -= sum(delta.finish_reason is not None for _, delta in deltas)
        if not left:
            done.set()

    config = CacheConfig(
        device="cpu", dtype="float32", num_blocks=num_blocks, max_requests=max(1, len(lengths)),
        max_model_len=2560, max_batch_tokens=8192,
    )  # fmt: skip
    engine = Watched(ModelSource(config=CONFIG, weights="random"), config, sink=sink)
    try:
        draw = np.random.default_rng(1)
        engine.submit(
            [
                Request(str(i), "bench", tuple(draw.integers(1, 512, size=prompt).tolist()),
                        SamplingParams(new, new))
                for i, (prompt, new) in enumerate(lengths)
            ]
        )  # fmt: skip
        if not done.wait(600):
            raise SystemExit("the engine did not answer")
        block_bytes = engine.info.block_bytes[0]
        preemptions = engine.call(lambda: engine._scheduler.preemptions)
        return engine.peak_blocks * block_bytes, preemptions, block_bytes
    finally:
        engine.close()


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch that fits, by bisection; `fits` must be monotonous."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument("--requests", type=int, default=64)
    args = made.parse_args()
    count = 8 if args.quick else args.requests
    report = Report("KV memory", args.json)
    fields = dict(CONFIG)
    hf_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(hf_config).eval()
    plenty = 2560 // 16 * count + 64

    def compare(case: str, lengths: Lengths) -> tuple[int, int]:
        theirs = hf_bytes(model, lengths)
        ours, _, block_bytes = run(lengths, plenty)
        report.add(
            Row(case, "KV bytes", ours / 1e6, "MB", theirs / 1e6, ours / theirs, "HF, padded")
        )
        return theirs, block_bytes

    budget, block_bytes = compare(f"{count} mixed requests", mixed(count))
    compare(f"{count} equal requests", [(512, 64)] * count)

    def ours_fit(batch: int) -> bool:
        lengths = mixed(batch)
        blocks = budget // block_bytes
        if max(p + n for p, n in lengths) > blocks * 16:
            return False
        peak, preemptions, _ = run(lengths, blocks)
        prompts = sum(-(-prompt // 16) for prompt, _ in lengths)
        # All at once: every prompt in the pool together, and nobody sent back.
        return not preemptions and prompts <= blocks and peak <= budget

    batch = largest(ours_fit, 4 * count)
    case = f"largest batch in HF's bytes for {count}"
    report.add(Row(case, "requests", batch, "", count, batch / count, "HF, padded"))
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
