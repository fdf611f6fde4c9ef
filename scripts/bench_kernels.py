"""What share of the machine's limits the GPU kernels reach.

Every case runs on the engine's own pool object, block-major over all layers of a geometry, filled
with random normal numbers, behind random block tables; one CUDA graph walks through the layers, so
that no layer finds its keys in the L2. The limit of the memory-bound cases is the better of an
eager bf16 `copy_` of 4 GiB and a streaming read, measured first; a run whose limit is below
4,100 GB/s on an H200 is void.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from bench_common import Report, Row, parser, summarise
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from litecache.engine.kv_layout import KVLayout, KVPool, KVSpec
from litecache.kernels import AttentionMetadata, paged_attention, store_kv
from litecache.kernels.moves import move_blocks
from litecache.kernels.triton_decode import decode
from litecache.kernels.triton_prefill import prefill
from litecache.kernels.triton_store import copy_rows
from litecache.kernels.tuning import DecodeConfig, PrefillConfig, decode_config, prefill_config
from litecache.kernels.tuning import Shape as TunedShape

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
        scale_bytes = 2 * shape.kv_heads * shape.block_size * 4 if item == 1 else 0
        spec = KVSpec(shape.kv_heads, shape.dim, shape.dim, shape.dtype, scale_bytes=scale_bytes)
        group = KVLayout.from_specs([spec] * shape.layers, shape.block_size).groups[0]
        self.pool = KVPool(group, shape.pool_bytes // group.block_bytes, DEVICE)
        self.views = []
        self.own: tuple[torch.Tensor, torch.Tensor] | None = None
        for index, layer in enumerate(group.layers):
            k, v = self.pool.layer(layer)
            scales = (None, None)
            if item == 1:
                at = group.extents[index].scale_offset // 4
                half = shape.kv_heads * shape.block_size
                words = self.pool.buffer.view(-1).view(torch.float32)
                scales = tuple(
                    words.as_strided(
                        k.shape[:3], (group.block_bytes // 4, shape.block_size, 1), at + part * half
                    )
                    for part in (0, 1)
                )
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

    def decode_us(
        self, metadata: AttentionMetadata, config: DecodeConfig, rounds: int = 7
    ) -> list[float]:
        """Microseconds a layer."""
        query = self.query(sum(metadata.query_lens or ()))
        out = torch.empty_like(query)

        def step() -> None:
            metadata.scratch.clear()
            for k, v, k_scale, v_scale in self.views:
                decode(
                    query, k, v, metadata, metadata.num_seqs, out, config,
                    scale=self.shape.dim**-0.5, window=None, softcap=None, sinks=None,
                    alibi_slopes=None, k_scale=k_scale, v_scale=v_scale,
                )  # fmt: skip

        return graph_us(step, len(self.views), rounds)

    def config(self, metadata: AttentionMetadata) -> DecodeConfig:
        """What the tuning table gives for a step."""
        group = self.shape.heads // self.shape.kv_heads
        rows = max(16, triton.next_power_of_2(metadata.max_query_len * group))
        item = getattr(torch, self.shape.dtype).itemsize
        dim = triton.next_power_of_2(self.shape.dim)
        return decode_config(DEVICE, TunedShape(item, dim, group > 1, rows))

    def attend(self, query: torch.Tensor, metadata: AttentionMetadata, layer: int) -> torch.Tensor:
        """One layer by whichever path the dispatcher takes, the step's own tokens at hand."""
        k, v, k_scale, v_scale = self.views[layer]
        shape = (query.shape[0], self.shape.kv_heads, self.shape.dim)
        if self.own is None or self.own[0].shape != shape:
            self.own = (
                torch.randn(shape, device=DEVICE, dtype=torch.bfloat16),
                torch.randn(shape, device=DEVICE, dtype=torch.bfloat16),
            )
        return paged_attention(
            query, k, v, metadata, scale=self.shape.dim**-0.5, key=self.own[0], value=self.own[1],
            k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip

    def dispatched_us(self, metadata: AttentionMetadata, layers: int = 4) -> list[float]:
        """Microseconds a layer of the dispatched path, launched as the engine launches it."""
        query = self.query(sum(metadata.query_lens or ()))

        def step() -> None:
            for layer in range(layers):
                self.attend(query, metadata, layer)

        return [ms * 1e3 / layers for ms in event_ms(step, 5)]

    def prefill_us(
        self, metadata: AttentionMetadata, config: PrefillConfig, rounds: int = 5, layers: int = 4
    ) -> list[float]:
        """Microseconds a layer of the Triton path."""
        query = self.query(sum(metadata.query_lens or ()))
        out = torch.empty_like(query)

        def step() -> None:
            for k, v, k_scale, v_scale in self.views[:layers]:
                prefill(
                    query, k, v, metadata, 0, out, config,
                    scale=self.shape.dim**-0.5, window=None, softcap=None, sinks=None,
                    alibi_slopes=None, k_scale=k_scale, v_scale=v_scale,
                )  # fmt: skip

        return graph_us(step, min(layers, len(self.views)), rounds)


def ragged_lengths(count: int) -> list[int]:
    """Lengths from 16 to 32,768, evenly over the logarithm, shuffled by a fixed seed."""
    lengths = [round(16 * 2048 ** (i / (count - 1))) for i in range(count)]
    random.Random(0).shuffle(lengths)
    return lengths


LLAMA = Shape(32, 8, 128, 32, 76 * 10**9)
SMOLLM = Shape(9, 3, 64, 30, 16 * 10**9)
GPT2 = Shape(12, 12, 64, 12, 16 * 10**9)
DECODES: list[tuple[Shape, str, list[int], float]] = [
    (LLAMA, "64 x 4096", [4096] * 64, 0.97),
    (LLAMA, "16 x 8192", [8192] * 16, 0.92),
    (LLAMA, "256 x 1024", [1024] * 256, 0.92),
    (LLAMA, "1 x 131072", [131072], 0.88),
    (LLAMA, "8 x 8192", [8192] * 8, 0.82),
    (LLAMA, "ragged 128", ragged_lengths(128), 0.85),
    (SMOLLM, "128 x 2048", [2048] * 128, 0.80),
    (GPT2, "64 x 2048", [2048] * 64, 0.85),
]


def decode_candidates(shape: Shape) -> list[DecodeConfig]:
    """Decode configurations worth a try: block_n, warps, stages, programs a multiprocessor."""
    numbers = [
        (32, 2, 3, 4), (32, 2, 3, 5), (32, 2, 2, 5), (32, 2, 2, 6), (64, 4, 2, 3), (64, 2, 2, 4),
        (64, 4, 3, 3), (32, 4, 3, 3), (32, 2, 4, 4),
    ]  # fmt: skip
    item = getattr(torch, shape.dtype).itemsize
    if item == 1:
        numbers = [
            (64, 2, 3, 4), (64, 2, 2, 4), (64, 4, 3, 2), (64, 4, 3, 3), (32, 2, 3, 4),
            (64, 1, 3, 5), (64, 1, 3, 6), (128, 4, 2, 2), (32, 1, 3, 8),
        ]  # fmt: skip
    elif shape.dim == 64:
        numbers = [
            (64, 2, 3, 5), (64, 2, 2, 6), (64, 2, 3, 6), (128, 4, 3, 3), (128, 4, 2, 3),
            (64, 2, 2, 7), (128, 2, 2, 4), (64, 4, 3, 4), (32, 1, 3, 12),
        ]  # fmt: skip
    return [DecodeConfig(n, warps, stages, waves * 132) for n, warps, stages, waves in numbers]


def prefill_candidates(shape: Shape) -> list[PrefillConfig]:
    """Prefill configurations worth a try."""
    return [
        PrefillConfig(*numbers)
        for numbers in (
            (128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2),
            (64, 128, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (128, 64, 8, 4),
        )
    ]  # fmt: skip


def _compile(task: tuple[Shape, DecodeConfig | PrefillConfig, int]) -> None:
    shape, config, queries = task
    bench = Bench(replace(shape, pool_bytes=200 * (1 << 20)))
    try:
        if isinstance(config, DecodeConfig):
            bench.decode_us(bench.metadata([queries] * 2, [40] * 2), config, 1)
        else:
            bench.prefill_us(bench.metadata([40], [40]), config, 1, 1)
    except Exception as error:
        print("failed", config, str(error)[:120], flush=True)


def compile_all(tasks: list[tuple[Shape, DecodeConfig | PrefillConfig, int]]) -> None:
    """Compiles kernels in parallel; the measuring process then finds them in Triton's cache."""
    with multiprocessing.get_context("spawn").Pool(14) as workers:
        workers.map(_compile, tasks, chunksize=1)


def sweep_decode(
    bench: Bench, contexts: list[list[int]], limit: float, report: Report, queries: int = 1
) -> None:
    """The share of the limit of every candidate, a row each, best last."""
    shape, found = bench.shape, []
    batches = [bench.metadata([queries] * len(lengths), lengths) for lengths in contexts]
    for config in decode_candidates(shape):
        shares = []
        try:
            for metadata, lengths in zip(batches, contexts, strict=True):
                times = summarise(bench.decode_us(metadata, config, 3)).median
                shares.append(sum(lengths) * shape.token_bytes / times / 1e3 / limit)
        except Exception as error:
            print("failed", config, str(error)[:80], flush=True)
            continue
        found.append((sum(shares), config, shares))
        report.extra.setdefault("sweep", []).append([shape.name, queries, repr(config), shares])
        report.write()
    for _, config, shares in sorted(found, key=lambda item: item[0]):
        numbers = f"n{config.block_n} w{config.num_warps} s{config.num_stages}"
        waves = f"x{config.num_programs // 132}"
        print(shape.name, f"q{queries}", numbers, waves, *(f"{s:.3f}" for s in shares), flush=True)


def causal_flops(queries: Sequence[int], contexts: Sequence[int], shape: Shape) -> float:
    """Multiplications and additions of the visible scores and their values."""
    pairs = sum(q * c - q * (q - 1) / 2 for q, c in zip(queries, contexts, strict=True))
    return 4.0 * pairs * shape.heads * shape.dim


def sweep_prefill(bench: Bench, batches: list[tuple[list[int], list[int]]], report: Report) -> None:
    """TFLOP/s of every candidate of the Triton path, best last."""
    found = []
    for config in prefill_candidates(bench.shape):
        rates = []
        try:
            for queries, contexts in batches:
                metadata = bench.metadata(queries, contexts)
                times = summarise(bench.prefill_us(metadata, config, 3, 2)).median
                rates.append(causal_flops(queries, contexts, bench.shape) / times / 1e6)
        except Exception as error:
            print("failed", config, str(error)[:80], flush=True)
            continue
        found.append((sum(rates), config, rates))
        report.extra.setdefault("sweep", []).append([bench.shape.name, repr(config), rates])
        report.write()
    for _, config, rates in sorted(found, key=lambda item: item[0]):
        print(bench.shape.name, config, *(f"{rate:.0f}" for rate in rates), flush=True)


CHUNKS = ([512] * 16, [512 + 1024 * i for i in range(1, 17)])


def sweep_all(report: Report, limit: float, names: list[str]) -> None:
    """Compiles and measures the candidates of the named parts."""
    parts: dict[str, tuple[Shape, list[list[int]], int]] = {
        "llama": (LLAMA, [[4096] * 64, [1024] * 256, [131072], [8192] * 8], 1),
        "ragged": (LLAMA, [ragged_lengths(128)], 1),
        "smollm": (SMOLLM, [[2048] * 128], 1),
        "gpt2": (GPT2, [[2048] * 64], 1),
        "int8": (replace(LLAMA, dtype="int8", pool_bytes=40 * 10**9), [[4096] * 64], 1),
        "fp8": (replace(LLAMA, dtype="float8_e4m3fn", pool_bytes=40 * 10**9), [[4096] * 64], 1),
        "verify": (LLAMA, [[4096] * 64], 8),
    }
    tasks: list[tuple[Shape, DecodeConfig | PrefillConfig, int]] = [
        (shape, config, queries)
        for name, (shape, _, queries) in parts.items()
        if name in names
        for config in decode_candidates(shape)
    ]
    if "prefill" in names:
        tasks += [(LLAMA, config, 1) for config in prefill_candidates(LLAMA)]
    compile_all(tasks)
    bench = None
    for name, (shape, contexts, queries) in parts.items():
        if name not in names:
            continue
        if bench is None or bench.shape != shape:
            bench = None
            torch.cuda.empty_cache()
            bench = Bench(shape)
        sweep_decode(bench, contexts, limit, report, queries)
    if "prefill" in names:
        if bench is None or bench.shape != LLAMA:
            bench = None
            torch.cuda.empty_cache()
            bench = Bench(LLAMA)
        batches = [([8192], [8192]), ([32768], [32768]), ([8192], [32768]), CHUNKS]
        sweep_prefill(bench, batches, report)


def bench_decode(report: Report, limit: float) -> None:
    """Decode of bf16 pools: GB/s of keys and values read against the limit."""
    bench = None
    for shape, name, lengths, goal in DECODES:
        if bench is None or bench.shape != shape:
            bench = None
            torch.cuda.empty_cache()
            bench = Bench(shape)
        metadata = bench.metadata([1] * len(lengths), lengths)
        report.add(*decode_rows(bench, name, metadata, lengths, limit, goal))
        if name == "64 x 4096":
            bench_verify(bench, report, lengths, limit)
            bench_store(bench, report)


def decode_rows(
    bench: Bench,
    name: str,
    metadata: AttentionMetadata,
    lengths: list[int],
    limit: float,
    goal: float | None = None,
) -> list[Row]:
    """Microseconds and GB/s of the configuration that the table gives."""
    summary = summarise(bench.decode_us(metadata, bench.config(metadata)))
    rate = sum(lengths) * bench.shape.token_bytes / summary.median / 1e3
    case = f"decode {bench.shape.name}, {name}"
    peer = "memory limit" if goal is None else f"memory limit, goal {goal}"
    return [
        Row(case, "time a layer", summary.median, "us", spread=summary.spread,
            samples=summary.samples),
        Row(case, "read rate", rate, "GB/s", limit, rate / limit, peer),
    ]  # fmt: skip


def bench_verify(bench: Bench, report: Report, lengths: list[int], limit: float) -> None:
    """Several queries a sequence, against one."""
    times = {}
    for queries in (1, 4, 8, 16):
        metadata = bench.metadata([queries] * len(lengths), lengths)
        times[queries] = summarise(bench.decode_us(metadata, bench.config(metadata))).median
        case = f"verify {queries} tokens {bench.shape.name}, 64 x 4096"
        ratio = times[queries] / times[1]
        report.add(Row(case, "time a layer", times[queries], "us", times[1], ratio, "decode"))


def bench_quantised(report: Report, bf16_us: float, limit: float) -> None:
    """int8 and fp8 pools against bf16 at 64 x 4096."""
    lengths = [4096] * 64
    for dtype in ("int8", "float8_e4m3fn"):
        torch.cuda.empty_cache()
        bench = Bench(replace(LLAMA, dtype=dtype, pool_bytes=40 * 10**9))
        rows = decode_rows(bench, "64 x 4096", bench.metadata([1] * 64, lengths), lengths, limit)
        mine = rows[0].value
        case = f"decode {bench.shape.name}, 64 x 4096"
        report.add(*rows, Row(case, "against bf16", mine, "us", bf16_us, mine / bf16_us, "bf16"))


def bench_prefill(report: Report) -> None:
    """Whole and chunked prompts: what the dispatcher takes, the Triton path, and bare SDPA."""
    torch.cuda.empty_cache()
    bench = Bench(replace(LLAMA, pool_bytes=24 * 10**9))
    batches = {
        "8k": ([8192], [8192]),
        "32k": ([32768], [32768]),
        "8k over a prefix of 24k": ([8192], [32768]),
        "2k over a prefix of 6k": ([2048], [8192]),
        "1k over a prefix of 7k": ([1024], [8192]),
        "16 chunks of 512 over prefixes to 16k": CHUNKS,
    }
    config = prefill_config(DEVICE, 128, 2)
    for name, (queries, contexts) in batches.items():
        metadata = bench.metadata(queries, contexts)
        flops = causal_flops(queries, contexts, bench.shape)
        case = f"prefill {bench.shape.name}, {name}"
        triton_us = summarise(bench.prefill_us(metadata, config, 5, 2))
        chosen = summarise(bench.dispatched_us(metadata))
        report.add(
            Row(case, "dispatched", flops / chosen.median / 1e6, "TFLOP/s", samples=5),
            Row(case, "Triton path", flops / triton_us.median / 1e6, "TFLOP/s", samples=5),
        )
        if queries == contexts:
            q, k, v = (
                torch.randn(1, heads, queries[0], 128, device=DEVICE, dtype=torch.bfloat16)
                for heads in (32, 8, 8)
            )
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                run = partial(
                    functional.scaled_dot_product_attention,
                    q,
                    k,
                    v,
                    is_causal=True,
                    enable_gqa=True,
                )
                with sdpa_kernel(backend):
                    bare = summarise(event_ms(run, 5)).median
                rate = flops / bare / 1e9
                report.add(Row(case, f"bare SDPA {backend.name}", rate, "TFLOP/s", samples=5))
    plan_cost(bench, report)


def plan_cost(bench: Bench, report: Report) -> None:
    """What cuDNN takes for lengths it has not seen: the first call against the second."""
    first, second = [], []
    for extra in (16, 48, 80):
        metadata = bench.metadata([1024 + extra], [4096 + 2 * extra])
        query = bench.query(1024 + extra)
        for times in (first, second):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            bench.attend(query, metadata, 0)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
    case = "library prefill, new lengths"
    report.add(
        Row(case, "first call", summarise(first).median, "ms", samples=3),
        Row(case, "second call", summarise(second).median, "ms", samples=3),
    )


def bench_store(bench: Bench, report: Report, tokens: int = 8192) -> None:
    """`store_kv` against a `copy_` of the same bytes; every layer has its own source."""
    shape = bench.shape
    layers = len(bench.views)
    size = (layers, 2, tokens, shape.kv_heads, shape.dim)
    source = torch.empty(size, dtype=torch.bfloat16, device=DEVICE).normal_()
    target = torch.empty_like(source)
    slots = torch.randperm(bench.pool.num_blocks - 1, device=DEVICE)[: tokens // 16] + 1
    slots = (slots[:, None] * 16 + torch.arange(16, device=DEVICE)).flatten()

    def store() -> None:
        for layer, (k, v, k_scale, v_scale) in enumerate(bench.views):
            store_kv(source[layer, 0], source[layer, 1], k, v, slots, k_scale, v_scale)

    def copy() -> None:
        for layer in range(layers):
            target[layer].copy_(source[layer])

    ours, theirs = (summarise(graph_us(step, layers)).median for step in (store, copy))
    case = f"store_kv {shape.name}, {tokens} tokens"
    report.add(Row(case, "time a layer", ours, "us", theirs, theirs / ours, "copy_ of the bytes"))


def by_copy_engine(
    source: torch.Tensor, target: torch.Tensor, src: Sequence[int], dst: Sequence[int]
) -> None:
    """One asynchronous copy a block."""
    for read, write in zip(src, dst, strict=True):
        target[write].copy_(source[read], non_blocking=True)


def bench_moves(report: Report) -> None:
    """Blocks between the pool and pinned slots, by the copy engine and by a kernel."""
    for block_bytes, count in ((2 << 20, 512), (360 << 10, 1024)):
        pool = torch.randint(0, 255, (4 * count, block_bytes), dtype=torch.uint8, device=DEVICE)
        slots = torch.empty(count, block_bytes, dtype=torch.uint8, pin_memory=True)
        line = pool[:count]
        blocks = random.Random(0).sample(range(4 * count), count)
        rows = random.Random(1).sample(range(count), count)
        there, here = (torch.tensor(x, device=DEVICE) for x in (blocks, rows))
        for name, whole, lists, tensors in (
            ("to the host", (line, slots), (pool, slots, blocks, rows), (there, here)),
            ("to the pool", (slots, line), (slots, pool, rows, blocks), (here, there)),
        ):
            ways = {
                "whole": partial(whole[1].copy_, whole[0], non_blocking=True),
                "copy engine": partial(by_copy_engine, *lists),
                "kernel": partial(copy_rows, lists[0], lists[1], *tensors),
                "move_blocks": partial(move_blocks, *lists),
            }
            rates = {
                way: count * block_bytes / summarise(event_ms(work, 5, 1)).median / 1e6
                for way, work in ways.items()
            }
            case = f"{count} blocks of {block_bytes >> 10} KiB {name}"
            for way, rate in rates.items():
                peer = ("one pinned copy", rates["whole"]) if way != "whole" else (None, None)
                report.add(Row(case, way, rate, "GB/s", peer[1], rate / rates["whole"], peer[0]))


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--sweep", default="", help="measure the candidates of these parts")
    arguments.add_argument("--only", default="", help="decode, quantised, prefill, moves")
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels.py needs a CUDA device")
    report = Report("kernels", options.json)
    limits = memory_limits()
    limit = max(limits.values())
    for name, value in limits.items():
        report.add(Row("limit", name, value, "GB/s"))
    if options.sweep:
        sweep_all(report, limit, options.sweep.split(","))
        return
    only = options.only.split(",") if options.only else ["decode", "quantised", "prefill", "moves"]
    if options.quick:
        only = ["moves"]
    if "decode" in only:
        bench_decode(report, limit)
    if "quantised" in only:
        bf16 = [row.value for row in report.rows if row.case == "decode 32/8 dim 128, 64 x 4096"]
        bench_quantised(report, bf16[0] if bf16 else float("nan"), limit)
    if "prefill" in only:
        bench_prefill(report)
    if "moves" in only:
        bench_moves(report)
    report.show()


if __name__ == "__main__":
    main()
