"""The one point that chooses who computes: Triton on a GPU, torch elsewhere.

`LITECACHE_KERNELS=reference|triton` forces a backend (`triton` on a CPU needs
`TRITON_INTERPRET=1`). Arguments are checked here, once for every backend; the backends trust them.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

from litecache.errors import KernelError
from litecache.kernels.checks import check_attention, check_copy, check_store
from litecache.kernels.metadata import Attention, AttentionMetadata, AttentionPlan

_BACKENDS = {
    "reference": "litecache.kernels.reference",
    "triton": "litecache.kernels.triton_backend",
}


def backend(device: torch.device) -> ModuleType:
    """The module that computes on `device`.

    Raises:
        KernelError: `LITECACHE_KERNELS` names no backend.
    """
    name = os.environ.get("LITECACHE_KERNELS") or (
        "triton" if device.type == "cuda" else "reference"
    )
    if name not in _BACKENDS:
        raise KernelError(f"LITECACHE_KERNELS={name!r} is invalid: one of {sorted(_BACKENDS)}")
    return importlib.import_module(_BACKENDS[name])


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Writes the step's keys and values of one layer into the pool.

    Args:
        key: `[T, kv_heads, k_dim]`, any strides with a contiguous last dimension.
        value: `[T, kv_heads, v_dim]`, likewise.
        k_cache: `[num_blocks, kv_heads, block_size, k_dim]`, a layer's view of the pool: float32,
            float16, bfloat16, or int8 / float8_e4m3fn, which are quantised on the way.
        v_cache: `[num_blocks, kv_heads, block_size, v_dim]`.
        slot_mapping: int64 `[T]`, `block * block_size + offset`. Slots are distinct, except those
            of the trash block, where any of the writers may win.
        k_scale: float32 `[num_blocks, kv_heads, block_size]` of a quantised pool, else None.
        v_scale: likewise.

    Raises:
        KernelError: naming the argument that is wrong.
    """
    check_store(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    if slot_mapping.shape[0]:
        backend(k_cache.device).store_kv(
            key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale
        )


def plan_attention(metadata: AttentionMetadata, layer: Attention) -> AttentionPlan:
    """Plans a step for all layers of one geometry, which then attend by it one after the other.

    On a GPU this launches what the plan takes; under capture that becomes part of the graph, and
    the plan of a replay follows from the lengths that the step's tensors hold then.

    Args:
        metadata: the step.
        layer: one of the layers.

    Raises:
        KernelError: naming what is wrong in either.
    """
    check_attention(layer, metadata)
    plan: AttentionPlan = backend(layer.query.device).plan_attention(metadata, layer.geometry)
    return plan


def paged_attention(layer: Attention, plan: AttentionPlan) -> torch.Tensor:
    """Attention of one layer.

    Args:
        layer: its arguments.
        plan: of the step, for the layer's geometry.

    Returns:
        `[T, num_heads, v_dim]` in query's dtype; zeros for sequences of context length 0.

    Raises:
        KernelError: naming the argument that is wrong.
    """
    check_attention(layer, plan.metadata)
    return plan.attend(layer) if layer.query.shape[0] else layer.output()


def copy_blocks(pool: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copies whole blocks inside a pool (copy-on-write).

    Args:
        pool: uint8 `[num_blocks, block_bytes]`, contiguous.
        src: int64 `[n]`, blocks to read; none of them is in `dst`.
        dst: int64 `[n]`, distinct blocks to write.

    Raises:
        KernelError: naming the argument that is wrong.
    """
    check_copy(pool, src, dst)
    if src.shape[0]:
        backend(pool.device).copy_blocks(pool, src, dst)
