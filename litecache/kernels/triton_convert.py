"""`convert_blocks` for Triton: a program rewrites some rows of one layer's keys or values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from litecache.kernels.quantise import LARGEST_CODE, BlockForm

_ROWS = 32


@triton.jit
def _convert_kernel(
    wide_ptr, codes_ptr, scale_ptr, wide_blocks_ptr, code_blocks_ptr,
    wide_block, wide_layer, wide_side, code_block, code_layer, code_side,
    scale_block, scale_layer,
    TOKENS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
    LARGEST: tl.constexpr, QUANTISE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    layer = tl.program_id(1) // 2
    side = tl.program_id(1) % 2
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, D_PAD)
    there = row < TOKENS
    mask = there[:, None] & (dim < D)[None, :]
    place = row[:, None] * D + dim[None, :]
    wide = tl.load(wide_blocks_ptr + index) * wide_block + layer * wide_layer + side * wide_side
    code = tl.load(code_blocks_ptr + index)
    scale_at = scale_ptr + code * scale_block + layer * scale_layer + side * TOKENS + row
    code = code * code_block + layer * code_layer + side * code_side
    if QUANTISE:
        values = tl.load(wide_ptr + wide + place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.div_rn(tl.max(tl.abs(values), 1), LARGEST)
        codes = tl.div_rn(values, tl.where(scale > 0, scale, 1.0)[:, None])
        if codes_ptr.dtype.element_ty == tl.int8:
            codes = tl.minimum(tl.maximum(tl.floor(codes + 0.5), -127.0), 127.0)
        tl.store(codes_ptr + code + place, codes.to(codes_ptr.dtype.element_ty), mask=mask)
        tl.store(scale_at, scale, mask=there)
    else:
        scale = tl.load(scale_at, mask=there, other=0.0)
        codes = tl.load(codes_ptr + code + place, mask=mask).to(tl.float32)
        values = codes * scale[:, None]
        tl.store(wide_ptr + wide + place, values.to(wide_ptr.dtype.element_ty), mask=mask)


def convert(
    source: torch.Tensor,
    source_form: BlockForm,
    target: torch.Tensor,
    target_form: BlockForm,
    src: torch.Tensor,
    dst: torch.Tensor,
) -> None:
    """Rewrites blocks; see `litecache.kernels.quantise.convert_blocks`."""
    quantise = target_form.quantised
    sides = ((source, source_form, src), (target, target_form, dst))
    (wide, wide_form, wide_blocks), (codes, code_form, code_blocks) = (
        sides if quantise else sides[::-1]
    )
    wide_tokens, code_tokens = wide_form.tokens(wide), code_form.tokens(codes)
    scales = code_form.scales(codes)
    grid = (src.shape[0], 2 * wide_form.num_layers, triton.cdiv(wide_form.rows, _ROWS))
    _convert_kernel[grid](
        wide_tokens, code_tokens, scales, wide_blocks, code_blocks,
        wide_tokens.stride(0), wide_tokens.stride(1), wide_tokens.stride(2),
        code_tokens.stride(0), code_tokens.stride(1), code_tokens.stride(2),
        scales.stride(0), scales.stride(1),
        TOKENS=wide_form.rows, D=wide_form.dim, D_PAD=triton.next_power_of_2(wide_form.dim),
        ROWS=_ROWS, LARGEST=LARGEST_CODE[code_form.dtype], QUANTISE=quantise, num_warps=4,
    )  # fmt: skip
