"""Measures the launch candidates of the streamed products: what fills `passes/triton_linear.py`.

The products of the two geometries with 1, 16, 32 and 64 tokens, replayed in a CUDA graph over
weights larger than the L2, against the library (without the gate).

    python scripts/sweep_linear.py [--tokens 1 16 32 64] [--json FILE]
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import torch
from bench_common import Report, Row, parser
from bench_runner import graph_us
from torch.nn import functional

from litecache.engine.running.passes.triton_linear import StreamConfig, prepare, stream_linear

PRODUCTS = (
    (6144, 4096, False), (4096, 4096, False), (14336, 4096, True), (4096, 14336, False),
    (128256, 4096, False), (4096, 1024, False), (1024, 2048, False), (3072, 1024, True),
    (1024, 3072, False), (151936, 1024, False),
)  # fmt: skip
SHARED_BYTES = {1: 200 << 10, 2: 110 << 10}
MULTIPROCESSORS = 132


def candidates(tokens: int, n: int, k: int, gated: bool) -> Iterator[StreamConfig]:
    """Configurations worth a try: enough programs for the chip, tiles that fit it twice."""
    if tokens == 1:
        for numbers in (
            (4, 256, 2, 5), (4, 512, 4, 4), (2, 1024, 4, 3), (8, 256, 4, 4), (4, 512, 2, 3),
            (2, 512, 2, 4), (8, 256, 2, 4), (1, 1024, 2, 4), (4, 1024, 4, 3), (16, 128, 4, 4),
        ):  # fmt: skip
            yield StreamConfig(*numbers)
        return
    for block_n in (16, 32, 64, 128):
        for block_k in (64, 128, 256):
            for warps in (2, 4, 8):
                for splits in (1, 2, 4, 8):
                    if tokens > 16 and (block_n < 32 or (block_n < 64 and n > 4096)):
                        continue
                    if warps * 16 > max(block_n, 32) or (block_n >= 64 and warps == 2):
                        continue
                    programs = -(-n // block_n) * splits
                    if not 64 <= programs <= MULTIPROCESSORS * 8 and n < 100_000:
                        continue
                    if splits > 1 and (k // splits < 256 or n > 16_000):
                        continue
                    tile = (block_n * (1 + gated) + max(16, tokens)) * block_k * 2
                    together = 1 if programs <= MULTIPROCESSORS else 2
                    stages = min(6, SHARED_BYTES[together] // tile)
                    if stages >= 3:
                        yield StreamConfig(block_n, block_k, warps, stages, splits)


def _operands(
    tokens: int, n: int, k: int, gated: bool, count: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    rows = 2 * n if gated else n
    weights = [torch.randn(rows, k, device="cuda").bfloat16() for _ in range(count)]
    return weights, torch.randn(tokens, k, device="cuda").bfloat16()


def _compile(task: tuple[int, int, int, bool, StreamConfig]) -> None:
    tokens, n, k, gated, config = task
    # The launch depends on divisibility and epilogue alone, so few rows do for compiling.
    weights, x = _operands(tokens, min(n, 4096), k, gated, 1)
    try:
        stream_linear(x, weights[0], gated=gated, config=config)
        torch.cuda.synchronize()
    except Exception as error:
        print("failed", config, str(error)[:100], flush=True)


def compile_all(tasks: list[tuple[int, int, int, bool, StreamConfig]]) -> None:
    """Compile in parallel; the measuring process then finds the kernels in Triton's cache."""
    unique = {(t, k % c.block_k, min(k // c.splits, 1), g, c): (t, n, k, g, c)
              for t, n, k, g, c in tasks}  # fmt: skip
    with multiprocessing.get_context("spawn").Pool(14) as workers:
        workers.map(_compile, list(unique.values()), chunksize=4)


def sweep(report: Report, tokens: int, n: int, k: int, gated: bool, limit: float) -> None:
    """All candidates of one product, best first."""
    rows = 2 * n if gated else n
    count = max(2, min(24, int(6e8 / (rows * k * 2))))
    weights, x = _operands(tokens, n, k, gated, count)
    library = graph_us(lambda i: functional.linear(x, weights[i % count]), 2 * count)
    found = []
    for config in candidates(tokens, n, k, gated):
        try:
            run = lambda i, c=config: stream_linear(x, weights[i % count], gated=gated, config=c)  # noqa: E731
            found.append((graph_us(run, 2 * count), config))
        except Exception as error:
            print("failed", config, str(error)[:80], flush=True)
    found.sort(key=lambda pair: pair[0])
    case = f"{tokens} tokens, {n}x{k}{' gated' * gated}"
    report.extra.setdefault("sweep", {})[case] = [(us, repr(config)) for us, config in found[:8]]
    best, config = found[0]
    rate = rows * k * 2 / best / 1e3
    report.add(
        Row(case, "streamed", best, "us", library, library / best, "library"),
        Row(case, "read", rate, "GB/s", limit, rate / limit, "streaming read"),
    )
    for us, config in found[:4]:
        numbers = (config.block_n, config.block_k, config.num_warps, config.num_stages)
        print(f"  {case}: {us:8.2f} us  {numbers} x{config.splits}", flush=True)


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 32, 64])
    options = made.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("sweep_linear.py needs a CUDA device")
    from kernel_bench import memory_limits

    report = Report("streamed products", options.json)
    limit = memory_limits()["read"]
    report.add(Row("limit", "read", limit, "GB/s"))
    prepare(torch.device("cuda"))
    products = PRODUCTS[-2:] if options.quick else PRODUCTS
    compile_all(
        [(t, *p, config) for t in options.tokens for p in products for config in candidates(t, *p)]
    )
    for tokens in options.tokens:
        for product in products:
            sweep(report, tokens, *product, limit)
    report.show()


if __name__ == "__main__":
    main()
