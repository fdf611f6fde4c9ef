"""What the kernel benchmarks share: pools, random steps, timing through CUDA graphs, limits.

Every case runs on the engine's own pool object, block-major over all layers of a geometry, filled
with random normal numbers, behind random block tables; one CUDA graph walks through the layers, so
that no layer finds its keys in the L2.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from bench_common import summarise

from litecache.engine.kv_layout import KVLayout, KVPool, KVSpec
from litecache.kernels import Attention, AttentionMetadata, paged_attention, plan_attention
from litecache.kernels.triton_chunks import plan_chunks
from litecache.kernels.triton_decode import decode
from litecache.kernels.triton_plan import plan_decode
from litecache.kernels.triton_prefill import attend_chunks, prefill
from litecache.kernels.tuning import ChunkConfig, DecodeConfig, PrefillConfig

DEVICE = torch.device("cuda")
GIB = 1 << 30


@triton.jit
def _read_kernel(source_ptr, out_ptr, per_program, BLOCK: tl.constexpr):  # noqa: N803
    base = tl.program_id(0).to(tl.int64) * per_program
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, per_program, BLOCK, num_stages=4):
        total += tl.load(source_ptr + base + start + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


def event_ms(work: Callable[[], Any], rounds: int, warm_up: int = 2) -> list[float]:
    """Milliseconds of each of `rounds` runs on the device."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def graph_us(step: Callable[[], Any], per_replay: int, rounds: int = 7) -> list[float]:
    """Microseconds of one of the `per_replay` launches inside `step`, replayed as a graph."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = [ms * 1e3 / per_replay for ms in event_ms(graph.replay, rounds, 1)]
    graph.reset()
    return times


def memory_limits() -> dict[str, float]:
    """GB/s of an eager copy (read plus write) and of a streaming read."""
    source = torch.empty(2 * GIB, dtype=torch.bfloat16, device=DEVICE).normal_()
    target = torch.empty_like(source)
    copied = summarise(event_ms(lambda: target.copy_(source), 10)).median
    programs, block = 132 * 16, 4096
    per_program = source.numel() // programs // block * block
    out = torch.empty(programs, device=DEVICE)
    read = min(
        event_ms(
            lambda: _read_kernel[(programs,)](source, out, per_program, block, num_warps=8), 10
        )
    )
    return {
        "copy": 2 * source.nbytes / copied / 1e6,
        "read": per_program * programs * 2 / read / 1e6,
    }


@dataclass(frozen=True)
class Shape:
    """Heads of a geometry and the pool that holds its KV."""

    heads: int
    kv_heads: int
    dim: int
    layers: int
    pool_bytes: int
    dtype: str = "bfloat16"
    block_size: int = 16

    @property
    def name(self) -> str:
        kind = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        return f"{self.heads}/{self.kv_heads} dim {self.dim}{kind}"

    @property
    def token_bytes(self) -> int:
        """KV bytes of a token in one layer, scales included."""
        item = getattr(torch, self.dtype).itemsize
        return 2 * self.kv_heads * (self.dim * item + (4 if item == 1 else 0))


class Bench:
    """A pool and the layers of it that a case walks through."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        item = getattr(torch, shape.dtype).itemsize
        spec = KVSpec(shape.kv_heads, shape.dim, shape.dim, shape.dtype)
        group = KVLayout.from_specs([spec] * shape.layers, shape.block_size).groups[0]
        self.pool = KVPool(group, shape.pool_bytes // group.block_bytes, DEVICE)
        self.views = []
        for layer in group.layers:
            k, v = self.pool.layer(layer)
            scales = self.pool.scales(layer)
            if item == 1:
                for cache, scale in ((k, scales[0]), (v, scales[1])):
                    if shape.dtype == "int8":
                        cache.random_(-127, 128)
                    else:
                        for part in cache.split(2048):
                            part.copy_(torch.randn(part.shape, device=DEVICE))
                    scale.uniform_(0.005, 0.02)
            else:
                k.normal_()
                v.normal_()
            self.views.append((k, v, *scales))

    def metadata(self, queries: Sequence[int], contexts: Sequence[int]) -> AttentionMetadata:
        """Random block tables over the whole pool."""
        size = self.shape.block_size
        order = list(range(1, self.pool.num_blocks))
        random.shuffle(order)
        tables = []
        for context in contexts:
            count = -(-context // size)
            tables.append(order[:count])
            order = order[count:]
        if any(len(t) < -(-c // size) for t, c in zip(tables, contexts, strict=True)):
            raise SystemExit(f"the pool of {self.pool.num_blocks} blocks is too small")
        return AttentionMetadata.build(queries, contexts, tables, size, DEVICE)

    def query(self, tokens: int) -> torch.Tensor:
        return torch.randn(
            tokens, self.shape.heads, self.shape.dim, device=DEVICE, dtype=torch.bfloat16
        )

    def layers(self, metadata: AttentionMetadata, own: bool = False) -> list[Attention]:
        """The arguments of every layer for a step, with the step's own tokens at hand if asked."""
        shape, tokens = self.shape, sum(metadata.query_lens or ())
        query = self.query(tokens)
        out = None if own else torch.empty_like(query)
        size = (tokens, shape.kv_heads, shape.dim)
        key, value = (
            torch.randn(size, device=DEVICE, dtype=torch.bfloat16) if own else None
            for _ in range(2)
        )
        return [
            Attention(
                query, k, v, shape.dim**-0.5, key=key, value=value,
                k_scale=k_scale, v_scale=v_scale, out=out,
            )
            for k, v, k_scale, v_scale in self.views
        ]  # fmt: skip

    def decode_us(
        self, metadata: AttentionMetadata, config: DecodeConfig | None = None, rounds: int = 7
    ) -> list[float]:
        """Microseconds a layer; without a configuration that of the tuning table."""
        layers = self.layers(metadata)
        out = layers[0].output()
        seqs = slice(0, metadata.num_seqs)

        def step() -> None:
            plan = plan_decode(metadata, layers[0].geometry, seqs, metadata.max_query_len, config)
            for layer in layers:
                decode(layer, plan, out)

        return graph_us(step, len(layers), rounds)

    def dispatched_us(self, metadata: AttentionMetadata, layers: int = 4) -> list[float]:
        """Microseconds a layer of the dispatched path, launched as the engine launches it."""
        asked = self.layers(metadata, own=True)[:layers]

        def step() -> None:
            plan = plan_attention(metadata, asked[0])
            for layer in asked:
                paged_attention(layer, plan)

        return [ms * 1e3 / len(asked) for ms in event_ms(step, 5)]

    def chunks_us(
        self,
        metadata: AttentionMetadata,
        config: ChunkConfig | None = None,
        rounds: int = 7,
        layers: int = 32,
    ) -> list[float]:
        """Microseconds a layer of chunks whose keys are cut into pieces, the plan included."""
        asked = self.layers(metadata)[:layers]
        out = asked[0].output()

        def step() -> None:
            plan = plan_chunks(metadata, asked[0].geometry, 0, config)
            for layer in asked:
                attend_chunks(layer, plan, out)

        return graph_us(step, len(asked), rounds)

    def prefill_us(
        self, metadata: AttentionMetadata, config: PrefillConfig, rounds: int = 5, layers: int = 4
    ) -> list[float]:
        """Microseconds a layer of the Triton path."""
        asked = self.layers(metadata)[:layers]
        out = asked[0].output()

        def step() -> None:
            for layer in asked:
                prefill(layer, metadata, 0, out, config)

        return graph_us(step, len(asked), rounds)


def ragged_lengths(count: int) -> list[int]:
    """Lengths from 16 to 32,768, evenly over the logarithm, shuffled by a fixed seed."""
    lengths = [round(16 * 2048 ** (i / (count - 1))) for i in range(count)]
    random.Random(0).shuffle(lengths)
    return lengths


def uniform_lengths(count: int) -> list[int]:
    """Lengths even from 100 to 1,500, as in the middle of the 256-sequence bench."""
    return [100 + 1400 * i // (count - 1) for i in range(count)]


LLAMA = Shape(32, 8, 128, 32, 76 * 10**9)
QWEN = Shape(16, 8, 128, 28, 60 * 10**9)
SMOLLM = Shape(9, 3, 64, 30, 16 * 10**9)
GPT2 = Shape(12, 12, 64, 12, 16 * 10**9)


def causal_flops(queries: Sequence[int], contexts: Sequence[int], shape: Shape) -> float:
    """Multiplications and additions of the visible scores and their values."""
    pairs = sum(q * c - q * (q - 1) / 2 for q, c in zip(queries, contexts, strict=True))
    return 4.0 * pairs * shape.heads * shape.dim


QUESTIONS: dict[str, tuple[list[int], list[int]]] = {
    "64 queries over 2,048": ([64], [2048 + 64]),
    "64 queries over 8,192": ([64], [8192 + 64]),
    "64 queries over 32,768": ([64], [32768 + 64]),
    "32 queries over 32,768": ([32], [32768 + 32]),
    "256 queries over 32,768": ([256], [32768 + 256]),
    "1,000 queries over 32,768": ([1000], [32768 + 1000]),
    "8 x 64 queries over 8,192": ([64] * 8, [8192 + 64] * 8),
    "4 of 17 to 300 queries over 1,000 to 32,768": (
        [17, 300, 64, 100],
        [1017, 9300, 32832, 3100],
    ),
    "512 queries alone": ([512], [512]),
    "8 x 128 queries alone": ([128] * 8, [128] * 8),
}
"""Questions behind what the pool holds, and two steps that have nothing to cut."""

CHUNKS = ([512] * 16, [512 + 1024 * i for i in range(1, 17)])
