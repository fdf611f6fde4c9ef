"""What share of the machine's limits the GPU kernels reach.

How a case is set up: see `kernel_bench.py`. The limit of the memory-bound cases is the better of an
eager bf16 `copy_` of 4 GiB and a streaming read, measured first; a run whose limit is below
4,100 GB/s on an H200 is void.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from bench_common import Report, Row, parser, summarise
from kernel_bench import (
    CHUNKS,
    DEVICE,
    GPT2,
    LLAMA,
    QUESTIONS,
    SMOLLM,
    Bench,
    Shape,
    causal_flops,
    event_ms,
    graph_us,
    memory_limits,
    ragged_lengths,
)
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from litecache.kernels import AttentionMetadata, paged_attention, plan_attention, store_kv
from litecache.kernels.triton_store import copy_rows
from litecache.kernels.tuning import prefill_config

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
    summary = summarise(bench.decode_us(metadata))
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
        times[queries] = summarise(bench.decode_us(metadata)).median
        case = f"verify {queries} tokens {bench.shape.name}, 64 x 4096"
        ratio = times[queries] / times[1]
        report.add(Row(case, "time a layer", times[queries], "us", times[1], ratio, "decode"))


def bench_quantised(report: Report, bf16_us: float, limit: float) -> None:
    """int8 and fp8 pools against bf16 at 64 x 4096."""
    lengths = [4096] * 64
    bench = None
    for dtype in ("int8", "float8_e4m3fn"):
        # the former pool goes before the next one's graph: 40 GB given back to the driver in the
        # middle of a case slowed it by a sixth
        del bench
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


def bench_questions(report: Report, limit: float) -> None:
    """Short chunks over long prefixes: keys in pieces, against the kernel that walks all of them.

    The limit of a row is the longer of reading the keys once and of computing at 600 TFLOP/s.
    """
    for dtype in ("bfloat16", "int8"):
        torch.cuda.empty_cache()
        bench = Bench(replace(LLAMA, dtype=dtype, pool_bytes=24 * 10**9))
        config = prefill_config(DEVICE, 128, getattr(torch, dtype).itemsize)
        for name, (queries, contexts) in QUESTIONS.items():
            metadata = bench.metadata(queries, contexts)
            layers = 8 if sum(queries) > 64 else 32
            cut = summarise(bench.chunks_us(metadata, layers=layers))
            whole = summarise(bench.prefill_us(metadata, config, 3, 4)).median
            read = sum(contexts) * bench.shape.token_bytes / 1e3
            flops = causal_flops(queries, contexts, bench.shape)
            least = max(read / limit, flops / 600e6)
            case = f"{name}, {bench.shape.name}"
            report.add(
                Row(case, "keys in pieces", cut.median, "us", least, least / cut.median,
                    "memory or 600 TFLOP/s", spread=cut.spread, samples=cut.samples),
                Row(case, "keys in pieces", flops / cut.median / 1e6, "TFLOP/s"),
                Row(case, "keys in pieces", read / cut.median, "GB/s", limit,
                    read / cut.median / limit, "memory limit"),
                Row(case, "all keys a program", whole, "us", cut.median, whole / cut.median,
                    "keys in pieces"),
            )  # fmt: skip


def plan_cost(bench: Bench, report: Report) -> None:
    """What cuDNN takes for lengths it has not seen: the first call against the second."""
    first, second = [], []
    for queries in (3072, 5120, 7168):
        metadata = bench.metadata([queries], [queries + 8192])
        layer = bench.layers(metadata, own=True)[0]
        for times in (first, second):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            paged_attention(layer, plan_attention(metadata, layer))
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
    arguments.add_argument(
        "--only", default="", help="decode, quantised, prefill, questions, moves"
    )
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels.py needs a CUDA device")
    report = Report("kernels", options.json)
    limits = memory_limits()
    limit = max(limits.values())
    for name, value in limits.items():
        report.add(Row("limit", name, value, "GB/s"))
    only = options.only.split(",")
    if options.quick:
        only = ["moves"]
    if "decode" in only:
        bench_decode(report, limit)
    if "quantised" in only:
        bf16 = [row.value for row in report.rows if row.case == "decode 32/8 dim 128, 64 x 4096"]
        bench_quantised(report, bf16[0] if bf16 else float("nan"), limit)
    if "prefill" in only:
        bench_prefill(report)
    if "questions" in only:
        bench_questions(report, limit)
    if "moves" in only:
        # As in the engine, which copies on streams of its own.
        with torch.cuda.stream(torch.cuda.Stream()):
            bench_moves(report)
    report.show()


if __name__ == "__main__":
    main()
