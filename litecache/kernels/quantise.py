"""Eight-bit forms of keys and values: int8 or fp8 e4m3 codes with one scale per token and head.

The scale is float32, `absmax / largest code`, so a row of zeros has scale 0 and reads back as
zeros. These torch functions define the format; the Triton kernels write and read the same bytes.

`convert_blocks` rewrites whole blocks, for tiers that hold half the bytes. A block's form says
where each layer's keys, values and scales lie in it, as `kv_layout` lays them out: layers at a
constant stride, in each K, then V, then the scales of K and of V.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class BlockForm:
    """How the KV of all layers lies in one block.

    Attributes:
        dtype: of keys and values; int8 and float8_e4m3fn come with scales.
        num_layers: layers of the block.
        rows: KV heads times tokens of a block.
        dim: head dimension of keys and of values.
        layer_bytes: from one layer's keys to the next one's.
        v_offset: bytes from a layer's keys to its values.
        scale_offset: bytes from a layer's keys to the scales of the keys, float32 `[rows]`, which
            those of the values follow; 0 without scales.
    """

    dtype: torch.dtype
    num_layers: int
    rows: int
    dim: int
    layer_bytes: int
    v_offset: int
    scale_offset: int = 0

    @property
    def quantised(self) -> bool:
        """Whether blocks of this form carry scales."""
        return self.dtype in LARGEST_CODE

    def tokens(self, pool: torch.Tensor) -> torch.Tensor:
        """Keys and values `[num_blocks, layers, 2, rows, dim]`, a view of `pool`."""
        item = self.dtype.itemsize
        return torch.as_strided(
            pool.view(-1).view(self.dtype),
            (pool.shape[0], self.num_layers, 2, self.rows, self.dim),
            (pool.shape[1] // item, self.layer_bytes // item, self.v_offset // item, self.dim, 1),
        )

    def scales(self, pool: torch.Tensor) -> torch.Tensor:
        """Scales float32 `[num_blocks, layers, 2, rows]`, a view of `pool`."""
        return torch.as_strided(
            pool.view(-1).view(torch.float32),
            (pool.shape[0], self.num_layers, 2, self.rows),
            (pool.shape[1] // 4, self.layer_bytes // 4, self.rows, 1),
            self.scale_offset // 4,
        )

    def check(self, name: str, pool: torch.Tensor) -> None:
        """Raises KernelError unless `pool` can hold blocks of this form."""
        if pool.ndim != 2 or pool.dtype != torch.uint8 or not pool.is_contiguous():
            raise KernelError(f"{name} must be contiguous uint8 [num_blocks, block_bytes]")
        last = (self.num_layers - 1) * self.layer_bytes
        needed = last + self.v_offset + self.rows * self.dim * self.dtype.itemsize
        if self.quantised:
            needed = last + self.scale_offset + 2 * self.rows * 4
        if pool.shape[1] < needed or pool.shape[1] % 4:
            raise KernelError(f"{name}.shape={tuple(pool.shape)}: blocks need {needed} bytes")


def convert_blocks(
    source: torch.Tensor,
    source_form: BlockForm,
    target: torch.Tensor,
    target_form: BlockForm,
    src: torch.Tensor,
    dst: torch.Tensor,
) -> None:
    """Rewrites blocks of one form as blocks of another, quantising or widening.

    Args:
        source: uint8 `[n, block_bytes]`.
        source_form: how its blocks lie.
        target: uint8 `[m, block_bytes]`, on the same device.
        target_form: how its blocks lie; exactly one of the two forms is quantised.
        src: int64 `[k]`, blocks to read.
        dst: int64 `[k]`, distinct blocks to write.

    Raises:
        KernelError: naming the argument that is wrong.
    """
    source_form.check("source", source)
    target_form.check("target", target)
    if source_form.quantised == target_form.quantised:
        raise KernelError(f"target_form.dtype={target_form.dtype}: one side must be quantised")
    for name in ("num_layers", "rows", "dim"):
        ours, theirs = getattr(source_form, name), getattr(target_form, name)
        if ours != theirs:
            raise KernelError(f"target_form.{name}={theirs}: the source has {ours}")
    if src.shape != dst.shape or src.ndim != 1:
        raise KernelError(f"dst.shape={tuple(dst.shape)}: [k] like src {tuple(src.shape)}")
    if src.shape[0] == 0:
        return
    if source.is_cuda:
        from litecache.kernels.triton_store import convert
    else:
        convert = convert_reference
    convert(source, source_form, target, target_form, src, dst)


def convert_reference(
    source: torch.Tensor,
    source_form: BlockForm,
    target: torch.Tensor,
    target_form: BlockForm,
    src: torch.Tensor,
    dst: torch.Tensor,
) -> None:
    """`convert_blocks` in torch."""
    tokens = source_form.tokens(source)
    if target_form.quantised:
        codes, scales = quantise(tokens[src], target_form.dtype)
        target_form.tokens(target).view(torch.uint8)[dst] = codes.view(torch.uint8)
        target_form.scales(target)[dst] = scales
    else:
        codes = tokens.view(torch.uint8)[src].view(source_form.dtype)
        wide = dequantise(codes, source_form.scales(source)[src], target_form.dtype)
        target_form.tokens(target)[dst] = wide
