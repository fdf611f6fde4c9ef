"""Launch configurations by chip and shape: looked up at run time, measured by `litecache tune`.

The table was measured on an H200 and an H100 (compute capability 9.0); entries of other chips are
reasoned from their shared memory and registers, and say so. `litecache tune FILE` measures a
machine's own decode entries, the best of each shape, into a JSON file, which `LITECACHE_TUNING`
names from then on. Serving never searches: what is not in the file comes from the table here.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from litecache.errors import KernelError
from litecache.kernels.metadata import Attention, AttentionMetadata

logger = logging.getLogger(__name__)

_TAIL = 8
_BLOCK_SIZE = 16
_KV_HEADS = 8
_LAYERS = 8
_ROUNDS = 5
_BATCH, _CONTEXT = 64, 2048
"""Sequences of a step, and the mean of their tokens: from an eighth of it on, so that shares are
uneven."""


class DecodeConfig(NamedTuple):
    """How the decode kernel is launched.

    Attributes:
        block_n: keys a tile, a power of two.
        num_warps: warps a program.
        num_stages: tiles in flight.
        num_programs: size of the fixed grid. All of them must fit the chip at once: shares are
            equal, so a second wave would double the time.
        tail: one in so many tiles of a long line is handed out as programs finish; 0 = none. It
            takes registers, so where they bound the programs of a multiprocessor it costs a wave.
    """

    block_n: int
    num_warps: int
    num_stages: int
    num_programs: int
    tail: int = 0


class PrefillConfig(NamedTuple):
    """How the prefill kernel is launched: like decode, `block_m` rows of a group a program."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class ChunkConfig(NamedTuple):
    """How the prefill kernel is launched over pieces of keys.

    Attributes:
        block_m: rows a program, as for prefill.
        block_n: keys a tile.
        num_warps: warps a program.
        num_stages: tiles in flight.
        num_programs: how many programs the chip runs at once.
        registers: the most a thread may have for that, None = what the compiler takes.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    num_programs: int
    registers: int | None = None


class Shape(NamedTuple):
    """What a decode configuration depends on.

    Attributes:
        itemsize: bytes of a pool element.
        dim: the larger of K's and V's head dimension, padded to a power of two.
        grouped: several query heads read one KV head.
        rows: queries times heads of a group, padded to a power of two, at least 16.
        fp8: the elements are e4m3; with `itemsize=1` they are int8 otherwise.
    """

    itemsize: int
    dim: int
    grouped: bool
    rows: int
    fp8: bool = False

    @property
    def element(self) -> str:
        """The kind of a pool element."""
        return "fp8" if self.fp8 else f"{self.itemsize}B"

    @property
    def name(self) -> str:
        """The key of the shape in a tuning file."""
        kind = "grouped" if self.grouped else "single"
        return f"{self.element}-d{self.dim}-{kind}-r{self.rows}"


Numbers = tuple[int, int, int, int, int]
"""block_n, warps, stages, programs a multiprocessor, tail."""

# By capability, element, dim and whether heads share a KV head; for few rows.
_MEASURED: dict[tuple[tuple[int, int], str, int, bool], Numbers] = {
    ((9, 0), "2B", 128, True): (64, 2, 2, 4, 8),
    ((9, 0), "2B", 128, False): (64, 2, 2, 4, 8),
    ((9, 0), "2B", 64, True): (128, 4, 3, 3, 0),
    ((9, 0), "2B", 64, False): (64, 2, 2, 6, 8),
    ((9, 0), "1B", 128, True): (32, 1, 3, 8, 0),
    ((9, 0), "1B", 128, False): (32, 1, 3, 8, 0),
    ((9, 0), "fp8", 128, True): (128, 2, 2, 4, 0),
    ((9, 0), "fp8", 128, False): (128, 2, 2, 4, 0),
}
# The same where several queries a sequence fill 32 rows, unless the entry above serves them, too.
_MEASURED_32_ROWS: dict[tuple[tuple[int, int], str, int, bool], Numbers] = {
    ((9, 0), "2B", 128, True): (32, 2, 3, 4, 0),
    ((9, 0), "2B", 128, False): (32, 2, 3, 4, 0),
}
_MOST_ROWS_MEASURED = 32


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small stand-in for the interpreter."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def own_entries(path: str | None) -> dict[str, Sequence[int]]:
    """Entries of a tuning file: shape name to `Numbers`; without the last one there is no tail.

    Raises:
        KernelError: the file is not what `litecache tune` writes.
    """
    if not path:
        return {}
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["decode"]
        if not all(len([int(n) for n in numbers]) in (4, 5) for numbers in entries.values()):
            raise ValueError("an entry without four or five numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise KernelError(f"LITECACHE_TUNING={path!r} is no tuning file: {error}") from error
    return dict(entries)


def decode_config(device: torch.device, shape: Shape) -> DecodeConfig:
    """The decode launch for a shape on a device."""
    multiprocessors = num_multiprocessors(device)
    if device.type != "cuda":
        return DecodeConfig(16, 4, 1, multiprocessors, tail=8)
    key = (_capability(device), shape.element, shape.dim, shape.grouped)
    numbers = own_entries(os.environ.get("LITECACHE_TUNING")).get(shape.name)
    if numbers is None and shape.rows <= _MOST_ROWS_MEASURED:
        few = _MEASURED.get(key)
        numbers = few if shape.rows <= 16 else _MEASURED_32_ROWS.get(key, few)
    if numbers is None:
        # Reasoned, not measured: tiles of 16 KiB, two of them in flight, two programs of four warps
        # a multiprocessor fit the 100 KB of an L4 or RTX 4090 as well as the 164 KB of an A100.
        row_bytes = 2 * shape.dim * shape.itemsize
        block_n = max(16, min(64, 1 << max(0, (16384 // row_bytes).bit_length() - 1)))
        numbers = (block_n, 4, 2 if shape.rows > _MOST_ROWS_MEASURED else 3, 2, 0)
    block_n, warps, stages, programs, *tail = numbers
    return DecodeConfig(block_n, warps, stages, programs * multiprocessors, *tail)


def prefill_config(device: torch.device, dim: int, itemsize: int) -> PrefillConfig:
    """The prefill launch for heads of `dim` elements of `itemsize` bytes."""
    if device.type != "cuda":
        return PrefillConfig(16, 16, 4, 1)
    if itemsize == 4:
        return PrefillConfig(64, 32, 4, 1 if dim > 64 else 2)
    if _capability(device) == (9, 0) and itemsize == 2 and 64 < dim <= 128:
        return PrefillConfig(128, 32, 8, 4)
    # Reasoned, not measured: fits the 100 KB of shared memory of an L4 or RTX 4090.
    if dim <= 128:
        return PrefillConfig(64, 64, 4, 2)
    return PrefillConfig(64, 32, 4, 2)


def chunk_config(device: torch.device, dim: int, itemsize: int) -> ChunkConfig:
    """The prefill launch over pieces of keys, for heads of `dim` elements of `itemsize` bytes."""
    if device.type == "cuda" and _capability(device) == (9, 0) and itemsize <= 2 and dim <= 128:
        # Measured on an H200 (`sweep_kernels.py --parts chunks`): the best of 13 in nine of ten
        # cases over bf16 and int8; the other is within 6 %.
        tiles = PrefillConfig(64, 64, 4, 3)
    else:
        tiles = prefill_config(device, dim, itemsize)
    # By the compiler's report two programs of any of these fit a multiprocessor; those of eight
    # warps take 143 registers if they may, and lose nothing by the bound but 16 bytes of stack.
    registers = 128 if tiles.num_warps == 8 else None
    return ChunkConfig(*tiles, 2 * num_multiprocessors(device), registers)


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
