"""Measures the launch candidates of the decode and prefill kernels: what fills the tuning table.

    python scripts/sweep_kernels.py --parts llama,smollm,int8 [--json FILE]

Candidates are compiled in parallel first; each part ends with its candidates, best last.
"""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import replace

import torch
from bench_common import Report, Row, parser, summarise
from kernel_bench import (
    CHUNKS,
    GPT2,
    LLAMA,
    QUESTIONS,
    QWEN,
    SMOLLM,
    Bench,
    Shape,
    causal_flops,
    memory_limits,
    ragged_lengths,
    uniform_lengths,
)

from litecache.kernels.tuning import ChunkConfig, DecodeConfig, PrefillConfig, candidates
from litecache.kernels.tuning import Shape as TunedShape

Config = DecodeConfig | PrefillConfig | ChunkConfig


def decode_candidates(shape: Shape, tails: list[int]) -> list[DecodeConfig]:
    """The candidates of `litecache.kernels.tuning` for a geometry, with each of the tails."""
    item = getattr(torch, shape.dtype).itemsize
    tuned = TunedShape(
        item, shape.dim, shape.heads > shape.kv_heads, 16, shape.dtype == "float8_e4m3fn"
    )
    return [
        DecodeConfig(block_n, warps, stages, programs * 132, tail)
        for block_n, warps, stages, programs, _ in candidates(tuned)
        for tail in tails
    ]


def prefill_candidates(shape: Shape) -> list[PrefillConfig]:
    """Prefill configurations worth a try."""
    return [
        PrefillConfig(*numbers)
        for numbers in (
            (128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2),
            (64, 128, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (128, 64, 8, 4), (128, 64, 4, 2),
            (128, 64, 4, 3), (128, 32, 4, 3), (128, 32, 8, 3), (64, 128, 4, 3), (256, 64, 8, 2),
            (128, 32, 8, 4), (128, 32, 8, 2), (128, 64, 8, 3), (256, 32, 8, 3), (128, 16, 8, 4),
        )
    ]  # fmt: skip


def chunk_candidates(shape: Shape) -> list[ChunkConfig]:
    """Configurations of chunks cut into pieces that are worth a try."""
    numbers: list[tuple[int, int, int, int, int, int | None]] = [
        (128, 32, 8, 4, 2, 128), (128, 32, 8, 3, 2, 128), (128, 32, 8, 4, 1, None),
        (128, 32, 8, 4, 4, 128),
        (128, 64, 8, 3, 1, None), (128, 64, 8, 2, 1, None), (128, 128, 8, 2, 1, None),
        (64, 32, 4, 4, 2, None), (64, 64, 4, 3, 2, None), (64, 64, 4, 2, 2, None),
        (64, 32, 4, 3, 3, 168), (128, 64, 4, 2, 2, None), (256, 32, 8, 3, 1, None),
    ]  # fmt: skip
    return [ChunkConfig(*tiles, programs * 132, bound) for *tiles, programs, bound in numbers]


def _compile(task: tuple[Shape, Config, int]) -> None:
    shape, config, queries = task
    bench = Bench(replace(shape, pool_bytes=200 * (1 << 20)))
    try:
        if isinstance(config, DecodeConfig):
            bench.decode_us(bench.metadata([queries] * 2, [40] * 2), config, 1)
        elif isinstance(config, ChunkConfig):
            bench.chunks_us(bench.metadata([40], [40]), config, 1, 1)
        else:
            bench.prefill_us(bench.metadata([40], [40]), config, 1, 1)
    except Exception as error:
        print("failed", config, str(error)[:120], flush=True)


def compile_all(tasks: list[tuple[Shape, Config, int]]) -> None:
    """Compiles kernels in parallel; the measuring process then finds them in Triton's cache."""
    with multiprocessing.get_context("spawn").Pool(14) as workers:
        workers.map(_compile, tasks, chunksize=1)


def sweep_decode(
    bench: Bench,
    contexts: list[list[int]],
    limit: float,
    report: Report,
    queries: int,
    tails: list[int],
) -> None:
    """The share of the limit of every candidate, a row each, best last."""
    shape, found = bench.shape, []
    batches = [bench.metadata([queries] * len(lengths), lengths) for lengths in contexts]
    for config in decode_candidates(shape, tails):
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
        waves = f"x{config.num_programs // 132} t{config.tail}"
        print(shape.name, f"q{queries}", numbers, waves, *(f"{s:.3f}" for s in shares), flush=True)


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


def sweep_chunks(bench: Bench, report: Report) -> None:
    """Microseconds a layer of every candidate in each case, the fastest over all cases last."""
    found, batches = [], [bench.metadata(*lengths) for lengths in QUESTIONS.values()]
    for config in chunk_candidates(bench.shape):
        try:
            times = [summarise(bench.chunks_us(each, config, 3, 8)).median for each in batches]
        except Exception as error:
            print("failed", config, str(error)[:80], flush=True)
            continue
        found.append((math.prod(times), config, times))
        report.extra.setdefault("sweep", []).append([bench.shape.name, repr(config), times])
        report.write()
    print("us a layer:", *QUESTIONS, sep="\n    ")
    for _, config, times in sorted(found, key=lambda item: -item[0]):
        numbers = f"m{config.block_m} n{config.block_n} w{config.num_warps} s{config.num_stages}"
        print(bench.shape.name, numbers, f"x{config.num_programs // 132} r{config.registers}",
              *(f"{time:.1f}" for time in times), flush=True)  # fmt: skip


def sweep_all(report: Report, limit: float, names: list[str], tails: list[int]) -> None:
    """Compiles and measures the candidates of the named parts."""
    parts: dict[str, tuple[Shape, list[list[int]], int]] = {
        "llama": (LLAMA, [[4096] * 64, [8192] * 16, [1024] * 256, [131072], [8192] * 8], 1),
        "ragged": (LLAMA, [ragged_lengths(128)], 1),
        "uniform": (LLAMA, [uniform_lengths(n) for n in (240, 128, 64)], 1),
        "qwen": (QWEN, [uniform_lengths(n) for n in (240, 128, 64)], 1),
        "smollm": (SMOLLM, [[2048] * 128], 1),
        "gpt2": (GPT2, [[2048] * 64], 1),
        "int8": (replace(LLAMA, dtype="int8", pool_bytes=40 * 10**9), [[4096] * 64], 1),
        "fp8": (replace(LLAMA, dtype="float8_e4m3fn", pool_bytes=40 * 10**9), [[4096] * 64], 1),
        "verify": (LLAMA, [[4096] * 64], 8),
    }
    tasks: list[tuple[Shape, Config, int]] = [
        (shape, config, queries)
        for name, (shape, _, queries) in parts.items()
        if name in names
        for config in decode_candidates(shape, tails)
    ]
    if "prefill" in names:
        tasks += [(LLAMA, config, 1) for config in prefill_candidates(LLAMA)]
    if "chunks" in names:
        tasks += [(shape, config, 1) for shape in CUT for config in chunk_candidates(shape)]
    compile_all(tasks)
    bench = None
    for name, (shape, contexts, queries) in parts.items():
        if name not in names:
            continue
        if bench is None or bench.shape != shape:
            bench = None
            torch.cuda.empty_cache()
            bench = Bench(shape)
        sweep_decode(bench, contexts, limit, report, queries, tails)
    if "prefill" in names:
        if bench is None or bench.shape != LLAMA:
            bench = None
            torch.cuda.empty_cache()
            bench = Bench(LLAMA)
        batches = [([8192], [8192]), ([32768], [32768]), ([8192], [32768]), CHUNKS]
        sweep_prefill(bench, batches, report)

    if "chunks" in names:
        for shape in CUT:
            bench = None
            torch.cuda.empty_cache()
            bench = Bench(shape)
            sweep_chunks(bench, report)


CUT = [replace(LLAMA, dtype=dtype, pool_bytes=24 * 10**9) for dtype in ("bfloat16", "int8")]


def main() -> None:
    arguments = parser(__doc__ or "")
    names = "llama,ragged,uniform,qwen,smollm,gpt2,int8,fp8,verify,prefill,chunks"
    arguments.add_argument("--parts", default=names, help=f"some of {names}")
    arguments.add_argument("--tails", default="8", help="one in so many tiles handed out; 0 = none")
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("sweep_kernels.py needs a CUDA device")
    report = Report("kernel candidates", options.json)
    limits = memory_limits()
    for name, value in limits.items():
        report.add(Row("limit", name, value, "GB/s"))
    parts = ["smollm"] if options.quick else options.parts.split(",")
    sweep_all(report, max(limits.values()), parts, [int(n) for n in options.tails.split(",")])


if __name__ == "__main__":
    main()
