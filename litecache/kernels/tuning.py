"""Launch configurations by chip and shape: read from a table, never searched at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel is launched.

    Attributes:
        block_n: keys a tile.
        num_warps: warps a program.
        num_stages: tiles in flight.
        num_programs: size of the fixed grid.
    """

    block_n: int
    num_warps: int
    num_stages: int
    num_programs: int


@dataclass(frozen=True)
class PrefillConfig:
    """How the prefill kernel is launched.

    Attributes:
        block_m: rows (queries times heads of a group) a program.
        block_n: keys a tile.
        num_warps: warps a program.
        num_stages: tiles in flight.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small stand-in for the interpreter."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def decode_config(device: torch.device, dim: int, itemsize: int) -> DecodeConfig:
    """The decode launch for heads of `dim` elements of `itemsize` bytes."""
    multiprocessors = num_multiprocessors(device)
    if device.type != "cuda":
        return DecodeConfig(16, 4, 1, multiprocessors)
    row_bytes = dim * itemsize
    block_n = max(16, min(64, 1 << (16384 // row_bytes).bit_length() - 1))
    return DecodeConfig(block_n, 4, 3, 2 * multiprocessors)


def prefill_config(device: torch.device, dim: int, itemsize: int) -> PrefillConfig:
    """The prefill launch for heads of `dim` elements of `itemsize` bytes."""
    if device.type != "cuda":
        return PrefillConfig(16, 16, 4, 1)
    if itemsize == 4:
        return PrefillConfig(64, 32, 4, 1 if dim > 64 else 2)
    if dim <= 64:
        return PrefillConfig(128, 128, 4, 3)
    if dim <= 128:
        return PrefillConfig(128, 64, 8, 3)
    return PrefillConfig(64, 32, 4, 2)
