"""Argument checks of the kernels: shapes, strides, dtypes, devices; each error names the argument.

They read nothing from the device, so they cost microseconds and are safe while a CUDA graph is
captured. `LITECACHE_CHECK=1` adds checks of the contents (slot and table ranges), which wait for
the device.
"""

from __future__ import annotations

import os

import torch

from litecache.errors import KernelError
from litecache.kernels.metadata import Attention, AttentionMetadata
from litecache.kernels.quantise import LARGEST_CODE

POOL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, *LARGEST_CODE)
"""Element types a pool may hold; the quantised ones need scales."""


def contents_checked() -> bool:
    """Whether `LITECACHE_CHECK=1` asks for checks of what the index tensors hold."""
    return os.environ.get("LITECACHE_CHECK", "0") == "1"


def _require(right: bool, name: str, value: object, valid: str) -> None:
    if not right:
        raise KernelError(name, value, valid)


def _shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], words: str) -> None:
    matches = tensor.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    _require(matches, f"{name}.shape", tuple(tensor.shape), words)


def _device(name: str, tensor: torch.Tensor, like: torch.Tensor, whose: str) -> None:
    valid = f"{whose}'s device {like.device}"
    _require(tensor.device == like.device, f"{name}.device", tensor.device, valid)


def _stride(name: str, tensor: torch.Tensor, right: bool, valid: str) -> None:
    _require(right, f"{name}.stride()", tensor.stride(), valid)


def _index(
    name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], words: str, dtype: torch.dtype
) -> None:
    _shape(name, tensor, shape, words)
    _require(tensor.dtype == dtype, f"{name}.dtype", tensor.dtype, f"{dtype}")
    if tensor.numel():
        dense = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        _stride(name, tensor, dense, "rows contiguous" if tensor.ndim > 1 else "contiguous")


def _range(name: str, index: torch.Tensor, end: int, words: str) -> None:
    """With `LITECACHE_CHECK=1`: every entry lies in `0 .. end - 1`."""
    if contents_checked() and index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        _require(0 <= low <= high < end, name, f"{low}..{high}", f"{words}0..{end - 1}")


def _check_caches(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Checks the layer views: `[num_blocks, kv_heads, block_size, dim]`, tokens contiguous."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _shape(name, cache, (None,) * 4, "[num_blocks, kv_heads, block_size, dim]")
        known = cache.dtype in POOL_DTYPES
        _require(known, f"{name}.dtype", cache.dtype, f"one of {list(POOL_DTYPES)}")
        dense = cache.stride(3) == 1 and cache.stride(2) == cache.shape[3]
        _stride(name, cache, dense, "a head's tokens must be contiguous")
        apart = cache.stride(0) >= 0 and cache.stride(1) >= cache.shape[2] * cache.shape[3]
        _stride(name, cache, apart, "heads of a block must not overlap")
    shape, dtype = tuple(k_cache.shape[:3]), k_cache.dtype
    _shape("v_cache", v_cache, (*shape, None), f"{shape} + (v_dim,)")
    _require(v_cache.dtype == dtype, "v_cache.dtype", v_cache.dtype, f"k_cache's dtype {dtype}")
    _device("v_cache", v_cache, k_cache, "k_cache")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        given = None if scale is None else "a tensor"
        fits = (scale is not None) == (dtype in LARGEST_CODE)
        _require(fits, name, given, "given for int8 and fp8 pools alone")
        if scale is not None:
            _index(name, scale, shape, "[num_blocks, kv_heads, block_size]", torch.float32)
            _device(name, scale, k_cache, "the pool")
            dense = scale.stride(1) == scale.shape[2]
            _stride(name, scale, dense, "a block's scales must be contiguous")


def _check_tokens(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], words: str, like: torch.Tensor
) -> None:
    _shape(name, tensor, shape, f"{words} = {list(shape)}")
    wide = tensor.dtype.is_floating_point and tensor.dtype.itemsize >= 2
    _require(wide, f"{name}.dtype", tensor.dtype, "float32, float16 or bfloat16")
    _stride(name, tensor, tensor.stride(-1) == 1, "the last dimension must be contiguous")
    _device(name, tensor, like, "the pool")


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
    _check_caches(k_cache, v_cache, k_scale, v_scale)
    _index("slot_mapping", slot_mapping, (None,), "[num_tokens]", torch.int64)
    _device("slot_mapping", slot_mapping, k_cache, "the pool")
    for name, tensor, cache in (("key", key, k_cache), ("value", value, v_cache)):
        shape = (slot_mapping.shape[0], cache.shape[1], cache.shape[3])
        _check_tokens(name, tensor, shape, "[num_tokens, kv_heads, dim]", k_cache)
    slots = k_cache.shape[0] * k_cache.shape[2]
    _range("slot_mapping", slot_mapping, slots, "slots lie in ")


def _check_metadata(metadata: AttentionMetadata) -> None:
    tables = metadata.block_tables
    _index("metadata.block_tables", tables, (None, None), "[seqs, max_blocks]", torch.int32)
    for name, more in (("context_lens", 0), ("cu_seqlens_q", 1)):
        index = getattr(metadata, name)
        length = tables.shape[0] + more
        _index(f"metadata.{name}", index, (length,), f"[{length}]", torch.int32)
        _device(f"metadata.{name}", index, tables, "block_tables")


def check_attention(layer: Attention, metadata: AttentionMetadata) -> None:
    """Checks a step and the arguments of one of its layers.

    Raises:
        KernelError: naming the first argument that is wrong.
    """
    query, k_cache = layer.query, layer.k_cache
    _check_caches(k_cache, layer.v_cache, layer.k_scale, layer.v_scale)
    num_blocks, kv_heads, block_size, k_dim = k_cache.shape
    v_dim = layer.v_cache.shape[3]
    _shape("query", query, (None, None, k_dim), f"[num_tokens, num_heads, {k_dim}]")
    tokens, heads = query.shape[:2]
    _check_tokens("query", query, (tokens, heads, k_dim), "[num_tokens, num_heads, k_dim]", k_cache)
    _require(heads % kv_heads == 0, "num_heads", heads, f"a multiple of the {kv_heads} KV heads")
    same = metadata.block_size == block_size
    _require(same, "metadata.block_size", metadata.block_size, f"the pool's {block_size}")
    _check_metadata(metadata)
    _device("metadata.block_tables", metadata.block_tables, query, "query")
    if metadata.query_lens is not None:
        count = sum(metadata.query_lens)
        _require(count == tokens, "query.shape[0]", tokens, f"query_lens sum to {count}")
    window, softcap = layer.window, layer.softcap
    _require(window is None or window >= 1, "window", window, "None or at least 1")
    _require(softcap is None or softcap > 0, "softcap", softcap, "None or positive")
    for name in ("sinks", "alibi_slopes"):
        per_head = getattr(layer, name)
        if per_head is not None:
            _shape(name, per_head, (heads,), f"[num_heads] = [{heads}]")
            _device(name, per_head, query, "query")
    missing = "key" if layer.key is None else "value"
    paired = (layer.key is None) == (layer.value is None)
    _require(paired, missing, None, "key and value come together or not at all")
    for name, shape in (
        ("key", (tokens, kv_heads, k_dim)),
        ("value", (tokens, kv_heads, v_dim)),
        ("out", (tokens, heads, v_dim)),
    ):
        tensor = getattr(layer, name)
        if tensor is not None:
            _check_tokens(name, tensor, shape, "[num_tokens, heads, dim]", k_cache)
    if contents_checked():
        _check_tables(metadata, num_blocks)


def _check_tables(metadata: AttentionMetadata, num_blocks: int) -> None:
    """Reads the tables back: every context fits its row, every entry is a block of the pool."""
    room = metadata.block_tables.shape[1] * metadata.block_size
    for row, context in enumerate(metadata.context_lens.tolist()):
        name, valid = f"metadata.context_lens[{row}]", f"0..{room}, what its table row holds"
        _require(0 <= context <= room, name, context, valid)
        used = metadata.block_tables[row, : -(-context // metadata.block_size)]
        _range(f"metadata.block_tables[{row}]", used, num_blocks, "blocks ")


def check_copy(pool: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Checks the arguments of `copy_blocks`.

    Raises:
        KernelError: naming the first argument that is wrong.
    """
    _shape("pool", pool, (None, None), "[num_blocks, block_bytes]")
    dense = pool.dtype == torch.uint8 and pool.is_contiguous()
    _require(dense, "pool", f"{pool.dtype}, stride {pool.stride()}", "contiguous uint8")
    for name, blocks, shape in (("src", src, (None,)), ("dst", dst, tuple(src.shape))):
        words = "[n]" if name == "src" else f"[n] = {list(src.shape)} like src"
        _index(name, blocks, shape, words, torch.int64)
        _device(name, blocks, pool, "the pool")
        _range(name, blocks, pool.shape[0], "blocks ")
