"""Measures decode configurations on this machine's GPU; the command is `litecache tune FILE`.

The best of each shape goes into a JSON file that `LITECACHE_TUNING` names from then on. Serving
never searches: what is not in the file comes from the table in `tuning.py`.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from litecache.errors import KernelError
from litecache.kernels.metadata import Attention, AttentionMetadata
from litecache.kernels.tuning import DecodeConfig, Numbers, Shape, num_multiprocessors

logger = logging.getLogger(__name__)

_TAIL = 8
_BLOCK_SIZE = 16
_KV_HEADS = 8
_LAYERS = 8
_ROUNDS = 5
_BATCH, _CONTEXT = 64, 2048
"""Sequences of a step, and the mean of their tokens: from an eighth of it on, so that shares are
uneven."""
SHAPES = tuple(
    Shape(itemsize, dim, grouped, 16, fp8)
    for itemsize, fp8 in ((2, False), (1, False), (1, True))
    for dim in (64, 128, 256)
    for grouped in (True, False)
)
"""What is tuned unless told otherwise."""


def candidates(shape: Shape) -> list[Numbers]:
    """Configurations worth a try for a shape; tiles of 4 to 32 KiB of keys and values."""
    row_bytes = 2 * shape.dim * shape.itemsize
    return [
        (block_n, warps, stages, programs, 0)
        for block_n in (16, 32, 64, 128)
        if 4096 <= block_n * row_bytes <= 32768
        for warps, stages, programs in (
            (1, 3, 8), (1, 3, 5), (2, 3, 4), (2, 2, 6), (2, 2, 4), (4, 3, 3), (4, 2, 3), (4, 3, 2),
        )
    ]  # fmt: skip


def tune(
    shapes: Iterable[Shape],
    measure: Callable[[Shape, Numbers], float],
    progress: Callable[[str], None] | None = None,
) -> dict[str, list[int]]:
    """The fastest candidate of each shape, with a tail where that is faster still.

    Args:
        shapes: what to tune.
        measure: microseconds of a shape under a configuration; raises RuntimeError or ValueError
            where the chip cannot run it.
        progress: called with a line for each shape that is done.

    Returns:
        Shape name to `Numbers`.

    Raises:
        KernelError: no candidate of a shape ran.
    """
    best: dict[str, list[int]] = {}
    for shape in shapes:
        times = _times(shape, candidates(shape), measure)
        if not times:
            raise KernelError(f"no decode configuration of {shape.name} runs on this GPU")
        fastest = min(times, key=times.__getitem__)
        times |= _times(shape, [(*fastest[:4], _TAIL)], measure)
        fastest = min(times, key=times.__getitem__)
        if progress is not None:
            progress(f"{shape.name}: {fastest}, {times[fastest]:.1f} us")
        best[shape.name] = list(fastest)
    return best


def _times(
    shape: Shape, tried: Iterable[Numbers], measure: Callable[[Shape, Numbers], float]
) -> dict[Numbers, float]:
    """Microseconds of those that run."""
    times = {}
    for numbers in tried:
        try:
            times[numbers] = measure(shape, numbers)
        except (RuntimeError, ValueError) as error:
            logger.info("%s under %s: %s", shape.name, numbers, error)
    return times


class GraphTimer:
    """Times the decode kernel over random blocks by replaying a CUDA graph through some layers.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shape: Shape | None = None

    def __call__(self, shape: Shape, numbers: Numbers) -> float:
        """Microseconds of one layer."""
        # Triton is imported where a GPU is known to be there.
        from litecache.kernels.triton_decode import decode
        from litecache.kernels.triton_plan import plan_decode

        if shape != self._shape:
            self._prepare(shape)
        block_n, warps, stages, programs, tail = numbers
        grid = programs * num_multiprocessors(self._device)
        config = DecodeConfig(block_n, warps, stages, grid, tail)
        out = torch.empty_like(self._query)

        def step() -> None:
            geometry = self._layers[0].geometry
            plan = plan_decode(self._metadata, geometry, slice(0, _BATCH), 1, config)
            for layer in self._layers:
                decode(layer, plan, out)

        step()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        times = []
        for _ in range(_ROUNDS + 1):
            begin, end = (_event() for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(self._layers))
        graph.reset()
        return float(statistics.median(times[1:]))

    def _prepare(self, shape: Shape) -> None:
        """A pool of several layers, larger than the cache together, and a step over it."""
        self._shape = shape
        low, high = _CONTEXT // 8, 2 * _CONTEXT - _CONTEXT // 8
        lens = [low + (high - low) * i // (_BATCH - 1) for i in range(_BATCH)]
        widths = [-(-length // _BLOCK_SIZE) for length in lens]
        count = sum(widths) + 1
        blocks = iter((torch.randperm(count - 1) + 1).tolist())
        tables = [[next(blocks) for _ in range(width)] for width in widths]
        self._metadata = AttentionMetadata.build(
            [1] * _BATCH, lens, tables, _BLOCK_SIZE, self._device
        )
        heads = _KV_HEADS * (4 if shape.grouped else 1)
        self._query = torch.randn(
            _BATCH, heads, shape.dim, device=self._device, dtype=torch.bfloat16
        )
        self._layers = [self._layer(count, shape) for _ in range(_LAYERS)]

    def _layer(self, num_blocks: int, shape: Shape) -> Attention:
        size = (num_blocks, _KV_HEADS, _BLOCK_SIZE, shape.dim)
        if shape.itemsize == 1:
            dtype = torch.float8_e4m3fn if shape.fp8 else torch.int8
            k, v = (
                torch.randint(-127, 128, size, dtype=torch.int16, device=self._device).to(dtype)
                for _ in range(2)
            )
            scale = torch.rand(size[:3], device=self._device)
        else:
            k, v = (torch.randn(size, dtype=torch.bfloat16, device=self._device) for _ in range(2))
            scale = None
        return Attention(self._query, k, v, shape.dim**-0.5, k_scale=scale, v_scale=scale)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def tune_to_file(path: Path, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Tune every shape in `SHAPES` on the current GPU and write the file, whole or not at all.

    Args:
        path: the JSON file to write.
        progress: called with a line for each shape that is done.

    Returns:
        What was written: `gpu` and the `decode` entries.

    Raises:
        KernelError: there is no CUDA device, or no candidate of a shape runs on it.
    """
    if not torch.cuda.is_available():
        raise KernelError("tuning needs a CUDA device, and torch sees none here")
    device = torch.device("cuda", torch.cuda.current_device())
    entries = tune(SHAPES, GraphTimer(device), progress)
    document = {"gpu": torch.cuda.get_device_name(device), "decode": entries}
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return document
