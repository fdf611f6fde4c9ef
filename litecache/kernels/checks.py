"""Argument checks of the kernels: shapes, strides, dtypes, devices; each error names the argument.

They read nothing from the device, so they cost microseconds and are safe while a CUDA graph is
captured. `LITECACHE_CHECK=1` adds checks of the contents (slot and table ranges), which wait for
the device.
"""

from __future__ import annotations

import os

import torch

from litecache.errors import KernelError
from litecache.kernels.metadata import AttentionMetadata
from litecache.kernels.quantise import LARGEST_CODE

POOL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, *LARGEST_CODE)
"""Element types a pool may hold; the quantised ones need scales."""


def contents_checked() -> bool:
    """Whether `LITECACHE_CHECK=1` asks for checks of what the index tensors hold."""
    return os.environ.get("LITECACHE_CHECK", "0") == "1"


def _shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], words: str) -> None:
    matches = tensor.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        raise KernelError(f"{name}.shape", tuple(tensor.shape), words)


def _index(name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise KernelError(f"{name}.dtype", tensor.dtype, f"{dtype}")
    if tensor.device != device:
        raise KernelError(f"{name}.device", tensor.device, f"the pool's device {device}")
    if tensor.ndim == 1 and tensor.numel() > 1 and tensor.stride(0) != 1:
        raise KernelError(f"{name}.stride()", tensor.stride(), "contiguous")


def check_caches(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Checks the layer views: `[num_blocks, kv_heads, block_size, dim]`, tokens contiguous."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.ndim != 4:
            raise KernelError(
                f"{name}.shape", tuple(cache.shape), "[num_blocks, kv_heads, block_size, dim]"
            )
        if cache.dtype not in POOL_DTYPES:
            raise KernelError(f"{name}.dtype", cache.dtype, f"one of {list(POOL_DTYPES)}")
        if cache.stride(3) != 1 or cache.stride(2) != cache.shape[3]:
            raise KernelError(
                f"{name}.stride()", cache.stride(), "a head's tokens must be contiguous"
            )
        if cache.stride(0) < 0 or cache.stride(1) < cache.shape[2] * cache.shape[3]:
            raise KernelError(
                f"{name}.stride()", cache.stride(), "heads of a block must not overlap"
            )
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise KernelError(
            "v_cache.shape", tuple(v_cache.shape), f"{tuple(k_cache.shape[:3])} + (v_dim,)"
        )
    if v_cache.dtype != k_cache.dtype:
        raise KernelError("v_cache.dtype", v_cache.dtype, f"k_cache's dtype {k_cache.dtype}")
    if v_cache.device != k_cache.device:
        raise KernelError("v_cache.device", v_cache.device, f"k_cache's device {k_cache.device}")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != (k_cache.dtype in LARGEST_CODE):
            raise KernelError(
                name, None if scale is None else "a tensor", "given for int8 and fp8 pools alone"
            )
        if scale is None:
            continue
        _shape(name, scale, tuple(k_cache.shape[:3]), "[num_blocks, kv_heads, block_size]")
        _index(name, scale, torch.float32, k_cache.device)
        if scale.stride(2) != 1 or scale.stride(1) != scale.shape[2]:
            raise KernelError(
                f"{name}.stride()", scale.stride(), "a block's scales must be contiguous"
            )


def _check_tokens(name: str, tensor: torch.Tensor, shape: tuple[int, ...], words: str) -> None:
    _shape(name, tensor, shape, words)
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise KernelError(f"{name}.dtype", tensor.dtype, "float32, float16 or bfloat16")
    if tensor.stride(-1) != 1:
        raise KernelError(
            f"{name}.stride()", tensor.stride(), "the last dimension must be contiguous"
        )


def check_store(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Checks the arguments of `store_kv`.

    Raises:
        KernelError: naming the first argument that is wrong.
    """
    check_caches(k_cache, v_cache, k_scale, v_scale)
    _shape("slot_mapping", slot_mapping, (None,), "[num_tokens]")
    _index("slot_mapping", slot_mapping, torch.int64, k_cache.device)
    num_tokens, kv_heads = slot_mapping.shape[0], k_cache.shape[1]
    for name, tensor, cache in (("key", key, k_cache), ("value", value, v_cache)):
        shape = (num_tokens, kv_heads, cache.shape[3])
        _check_tokens(name, tensor, shape, f"[num_tokens, kv_heads, dim] = {list(shape)}")
        if tensor.device != k_cache.device:
            raise KernelError(
                f"{name}.device", tensor.device, f"the pool's device {k_cache.device}"
            )
    if contents_checked() and num_tokens:
        low, high = slot_mapping.aminmax()
        slots = k_cache.shape[0] * k_cache.shape[2]
        if low < 0 or high >= slots:
            raise KernelError(
                "slot_mapping", f"{int(low)}..{int(high)}", f"slots lie in 0..{slots - 1}"
            )


def check_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    """Checks the arguments of `paged_attention`.

    Raises:
        KernelError: naming the first argument that is wrong.
    """
    check_caches(k_cache, v_cache, k_scale, v_scale)
    kv_heads, block_size, k_dim = k_cache.shape[1:]
    if query.ndim != 3:
        raise KernelError("query.shape", tuple(query.shape), "[num_tokens, num_heads, k_dim]")
    num_tokens, num_heads = query.shape[:2]
    _check_tokens("query", query, (num_tokens, num_heads, k_dim), f"k_cache's dim {k_dim}")
    if query.device != k_cache.device:
        raise KernelError("query.device", query.device, f"the pool's device {k_cache.device}")
    if num_heads % kv_heads:
        raise KernelError("num_heads", num_heads, f"a multiple of the {kv_heads} KV heads")
    if metadata.block_size != block_size:
        raise KernelError("metadata.block_size", metadata.block_size, f"the pool's {block_size}")
    _shape("metadata.block_tables", metadata.block_tables, (None, None), "[seqs, max_blocks]")
    num_seqs = metadata.block_tables.shape[0]
    _index("metadata.block_tables", metadata.block_tables, torch.int32, query.device)
    _shape("metadata.context_lens", metadata.context_lens, (num_seqs,), f"[{num_seqs}]")
    _index("metadata.context_lens", metadata.context_lens, torch.int32, query.device)
    _shape("metadata.cu_seqlens_q", metadata.cu_seqlens_q, (num_seqs + 1,), f"[{num_seqs + 1}]")
    _index("metadata.cu_seqlens_q", metadata.cu_seqlens_q, torch.int32, query.device)
    if metadata.block_tables.numel() and metadata.block_tables.stride(1) != 1:
        raise KernelError(
            "metadata.block_tables.stride()", metadata.block_tables.stride(), "rows contiguous"
        )
    if metadata.query_lens is not None and sum(metadata.query_lens) != num_tokens:
        raise KernelError(
            "query.shape[0]", num_tokens, f"query_lens sum to {sum(metadata.query_lens)}"
        )
    if window is not None and window < 1:
        raise KernelError("window", window, "None or at least 1")
    if softcap is not None and not softcap > 0:
        raise KernelError("softcap", softcap, "None or positive")
    for name, per_head in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if per_head is not None:
            _shape(name, per_head, (num_heads,), f"[num_heads] = [{num_heads}]")
            if per_head.device != query.device:
                raise KernelError(
                    f"{name}.device", per_head.device, f"query's device {query.device}"
                )
    if (key is None) != (value is None):
        raise KernelError(
            "key" if key is None else "value", None, "key and value come together or not at all"
        )
    for name, tensor, dim in (("key", key, k_dim), ("value", value, v_cache.shape[3])):
        if tensor is not None:
            _check_tokens(name, tensor, (num_tokens, kv_heads, dim), "[num_tokens, kv_heads, dim]")
    if out is not None:
        shape = (num_tokens, num_heads, v_cache.shape[3])
        _check_tokens("out", out, shape, f"[num_tokens, num_heads, v_dim] = {list(shape)}")
        if out.device != query.device:
            raise KernelError("out.device", out.device, f"query's device {query.device}")
    if contents_checked():
        _check_tables(metadata, k_cache.shape[0])


def _check_tables(metadata: AttentionMetadata, num_blocks: int) -> None:
    """Reads the tables back: every context fits its row, every entry is a block of the pool."""
    contexts = metadata.context_lens.tolist()
    room = metadata.block_tables.shape[1] * metadata.block_size
    for row, context in enumerate(contexts):
        if not 0 <= context <= room:
            raise KernelError(
                f"metadata.context_lens[{row}]", context, f"0..{room}, what its table row holds"
            )
        used = metadata.block_tables[row, : -(-context // metadata.block_size)]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < num_blocks:
            raise KernelError(
                f"metadata.block_tables[{row}]", used.tolist(), f"blocks 0..{num_blocks - 1}"
            )


def check_copy(pool: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Checks the arguments of `copy_blocks`.

    Raises:
        KernelError: naming the first argument that is wrong.
    """
    _shape("pool", pool, (None, None), "[num_blocks, block_bytes]")
    if pool.dtype != torch.uint8 or not pool.is_contiguous():
        raise KernelError("pool", f"{pool.dtype}, stride {pool.stride()}", "contiguous uint8")
    _shape("src", src, (None,), "[n]")
    _shape("dst", dst, tuple(src.shape), f"[n] = [{src.shape[0]}] like src")
    for name, blocks in (("src", src), ("dst", dst)):
        _index(name, blocks, torch.int64, pool.device)
        if contents_checked() and blocks.numel():
            low, high = blocks.aminmax()
            if low < 0 or high >= pool.shape[0]:
                raise KernelError(
                    name, f"{int(low)}..{int(high)}", f"blocks 0..{pool.shape[0] - 1}"
                )
