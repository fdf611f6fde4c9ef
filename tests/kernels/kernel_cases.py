"""Random paged batches for the kernel tests: a block-major pool full of NaN but for live tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from litecache.kernels import Attention, AttentionMetadata, paged_attention, plan_attention
from litecache.kernels.quantise import dequantise, quantise


@dataclass(frozen=True)
class Case:
    """One point of the grid; `name` is its test id."""

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    block_size: int = 8
    dtype: torch.dtype = torch.float32
    pool_dtype: torch.dtype | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    own_kv: bool = False

    @property
    def name(self) -> str:
        parts = ["q" + "_".join(map(str, self.query_lens[:4])), f"c{max(self.context_lens)}"]
        parts += [f"h{self.heads[0]}-{self.heads[1]}", f"d{self.dims[0]}-{self.dims[1]}"]
        parts += [f"b{self.block_size}", str(self.dtype).removeprefix("torch.")]
        if self.pool_dtype is not None:
            parts.append(str(self.pool_dtype).removeprefix("torch."))
        parts += [f"w{self.window}"] if self.window else []
        parts += ["softcap"] if self.softcap else []
        parts += [name for name in ("sinks", "alibi", "own_kv") if getattr(self, name)]
        return "-".join(parts)


@dataclass
class Batch:
    """The tensors of a case. `wide_k` and `wide_v` are the pool as the oracle reads it."""

    case: Case
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    metadata: AttentionMetadata
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    wide_k: torch.Tensor
    wide_v: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def layer(self, **changes: Any) -> Attention:
        """Arguments of `paged_attention`."""
        layer = Attention(
            self.query, self.k_cache, self.v_cache, k_scale=self.k_scale, v_scale=self.v_scale,
            key=self.key if self.case.own_kv else None,
            value=self.value if self.case.own_kv else None, **self.options,
        )  # fmt: skip
        return layer._replace(**changes)

    def attend(self, metadata: AttentionMetadata | None = None, **changes: Any) -> torch.Tensor:
        """One layer behind a plan of its own, with some arguments changed."""
        layer = self.layer(**changes)
        plan = plan_attention(self.metadata if metadata is None else metadata, layer)
        return paged_attention(layer, plan)


def layer_view(
    buffer: torch.Tensor, dtype: torch.dtype, shape: Sequence[int], offset: int
) -> torch.Tensor:
    """A dense `shape` in every block, `offset` bytes from its start: `[num_blocks, *shape]`."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    typed = buffer.view(-1).view(dtype)
    return typed.as_strided(
        [buffer.shape[0], *shape],
        [buffer.shape[1] // dtype.itemsize, *strides],
        offset // dtype.itemsize,
    )


def align(size: int) -> int:
    return -(-size // 256) * 256


def make_batch(case: Case, device: str = "cpu", seed: int = 0) -> Batch:
    """Draws a batch: random tables over a pool of three layers, of which the middle one is used."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, kv_heads = case.heads
    size = case.block_size
    pool_dtype = case.pool_dtype or case.dtype
    needed = [-(-context // size) for context in case.context_lens]
    num_blocks = sum(needed) + 3
    order = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    tables = []
    for context, queries, count in zip(case.context_lens, case.query_lens, needed, strict=True):
        table, order = order[:count], order[count:]
        if case.window is not None:
            behind = max(0, context - queries + 1 - case.window) // size
            table[:behind] = [0] * behind
        tables.append(table)
    metadata = AttentionMetadata.build(
        case.query_lens, case.context_lens, tables, size, device=device
    )

    extents = [align(kv_heads * size * dim * pool_dtype.itemsize) for dim in case.dims]
    scale_bytes = align(kv_heads * size * 4)
    layer_bytes = sum(extents) + 2 * scale_bytes
    buffer = torch.full((num_blocks, -(-3 * layer_bytes // 4096) * 4096), 0xFF, dtype=torch.uint8)
    wide, caches, scales = [], [], []
    offset = layer_bytes
    for dim, extent in zip(case.dims, extents, strict=True):
        cache = layer_view(buffer, pool_dtype, (kv_heads, size, dim), offset)
        offset += extent
        scale = layer_view(buffer, torch.float32, (kv_heads, size), offset)
        offset += scale_bytes
        truth = torch.full(cache.shape, torch.nan, dtype=torch.float64)
        for table, context in zip(tables, case.context_lens, strict=True):
            for index, block in enumerate(table):
                live = min(size, context - index * size)
                if block == 0:
                    continue
                tokens = torch.randn(kv_heads, live, dim, generator=generator).to(case.dtype)
                if case.pool_dtype is None:
                    cache[block, :, :live] = tokens
                    truth[block, :, :live] = tokens.double()
                else:
                    codes, factor = quantise(tokens, pool_dtype)
                    cache.view(torch.uint8)[block, :, :live] = codes.view(torch.uint8)
                    scale[block, :, :live] = factor
                    truth[block, :, :live] = dequantise(codes, factor).double()
        wide.append(truth)
        caches.append((cache, scale))
        scales.append(scale)

    on_device = buffer.to(device)
    views = [
        (
            on_device.view(-1).view(pool_dtype).as_strided(c.shape, c.stride(), c.storage_offset()),
            on_device.view(-1).view(torch.float32)
            .as_strided(s.shape, s.stride(), s.storage_offset()),
        )
        for c, s in caches
    ]  # fmt: skip
    slots = metadata.slot_mapping.cpu()
    own = [
        truth[slots // size, :, slots % size].to(case.dtype).to(device) if len(slots) else
        torch.zeros(0, kv_heads, truth.shape[3], dtype=case.dtype, device=device)
        for truth in wide
    ]  # fmt: skip
    total = sum(case.query_lens)
    query = torch.randn(total, num_heads, case.dims[0], generator=generator).to(case.dtype)
    options: dict[str, Any] = {"scale": case.dims[0] ** -0.5, "window": case.window}
    options["softcap"] = case.softcap
    if case.sinks:
        options["sinks"] = torch.randn(num_heads, generator=generator).to(device)
    if case.alibi:
        options["alibi_slopes"] = torch.rand(num_heads, generator=generator).to(device) * 0.2
    quantised = case.pool_dtype is not None
    return Batch(
        case=case,
        query=query.to(device),
        key=own[0],
        value=own[1],
        k_cache=views[0][0],
        v_cache=views[1][0],
        metadata=metadata,
        k_scale=views[0][1] if quantised else None,
        v_scale=views[1][1] if quantised else None,
        wide_k=wide[0],
        wide_v=wide[1],
        options=options,
    )


def worst_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest `norm(out - expected) / norm(expected)` over the heads; inf where not finite."""
    wide = out.detach().cpu().double()
    if not bool(torch.isfinite(wide).all()):
        return float("inf")
    difference = (wide - expected).norm(dim=(0, 2))
    return float((difference / expected.norm(dim=(0, 2)).clamp_min(1e-30)).max())
