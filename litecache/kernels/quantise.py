"""Eight-bit forms of keys and values: int8 or fp8 e4m3 codes with one scale per token and head.

The scale is float32, `absmax / largest code`, so a row of zeros has scale 0 and reads back as
zeros. These torch functions define the format; the Triton kernels write and read the same bytes.
"""

from __future__ import annotations

import torch

from litecache.errors import KernelError

LARGEST_CODE: dict[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest magnitude each quantised pool dtype represents."""


def quantise(tokens: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises the last dimension.

    Args:
        tokens: `[..., dim]`, floating point.
        dtype: `torch.int8` or `torch.float8_e4m3fn`.

    Returns:
        Codes `[..., dim]` of `dtype` and scales float32 `[...]`.

    Raises:
        KernelError: `dtype` is not a quantised pool dtype.
    """
    if dtype not in LARGEST_CODE:
        raise KernelError(f"dtype={dtype} is no quantised dtype: use one of {list(LARGEST_CODE)}")
    wide = tokens.float()
    scale = wide.abs().amax(-1) / LARGEST_CODE[dtype]
    codes = wide / torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(-1)
    if dtype == torch.int8:
        # Ties round up, as the kernels do.
        codes = (codes + 0.5).floor().clamp_(-127, 127)
    return codes.to(dtype), scale


def dequantise(
    codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Reads quantised rows back: `codes [..., dim] * scale [...]`, in `dtype`."""
    return (codes.float() * scale.unsqueeze(-1)).to(dtype)
