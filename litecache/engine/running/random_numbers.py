"""A counter-based generator: each number is a function of its key and counter alone.

The finaliser is that of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
generators, OOPSLA 2014), applied to `key + (counter + 1) * golden`. A draw therefore depends on
(seed, sample index, position, purpose) and on nothing of the batch, the device or the history.
Keys are made on the host with numpy, numbers where the logits are, with the same integers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

PURPOSE_TOKEN = 1
"""The draw of a token; other purposes get other, independent numbers."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _mix(word: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(_MIX_1)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(_MIX_2)
    mixed: npt.NDArray[np.uint64] = word ^ (word >> np.uint64(31))
    return mixed


def stream_keys(
    seed: npt.NDArray[np.int64],
    sample_index: npt.NDArray[np.int64],
    purpose: int = PURPOSE_TOKEN,
) -> npt.NDArray[np.int64]:
    """The part of a draw's key that all positions of a sequence share."""
    word = _mix(np.full(len(seed), purpose, dtype=np.uint64) * np.uint64(_GOLDEN))
    for part in (seed, sample_index):
        word = _absorb(word, part)
    return word.view(np.int64)


def position_keys(
    stream: npt.NDArray[np.int64], position: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The keys of one position in each of several sequences."""
    return _absorb(stream.view(np.uint64), position).view(np.int64)


def _absorb(word: npt.NDArray[np.uint64], part: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    golden = np.uint64(_GOLDEN)
    return _mix((word + part.astype(np.uint64)) * golden + golden)


def random_bits(keys: torch.Tensor, count: int) -> torch.Tensor:
    """32 random bits per key and counter.

    Args:
        keys: int64 `[n]`.
        count: numbers per key.

    Returns:
        int64 `[n, count]` in `[0, 2**32)`, equal on every device.
    """
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device)
    word = keys[:, None] + counter * _signed(_GOLDEN)
    # int64 shifts drag the sign along: the masks make them logical.
    word = (word ^ ((word >> 30) & ((1 << 34) - 1))) * _signed(_MIX_1)
    word = (word ^ ((word >> 27) & ((1 << 37) - 1))) * _signed(_MIX_2)
    word = word ^ ((word >> 31) & ((1 << 33) - 1))
    return (word >> 32) & 0xFFFFFFFF


def exponentials(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Exponentially distributed numbers, float32 `[n, count]`, for keys int64 `[n]`."""
    bits = random_bits(keys, count)
    # Small numbers decide an exponential race, so the fine end of float32 lies there.
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log1p(-uniform.clamp_(max=1 - 2.0**-24))
