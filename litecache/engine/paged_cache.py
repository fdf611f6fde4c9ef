"""`PagedAttentionCache`: the block pool and the kernels for those who bring their own loop.

It owns a pool of one KV group and the block tables of its sequences; no model, no scheduler, no
tiers. Sequences that were forked share blocks until one of them writes (copy-on-write). Used by
one thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from litecache.checks import check_integer
from litecache.config import CacheConfig
from litecache.engine.kv_layout import (
    KVLayout,
    KVPool,
    KVSpec,
    check_kv_dtype,
    choose_device,
    free_bytes,
)
from litecache.engine.scheduling.block_pool import BlockPool
from litecache.errors import CapacityError, ConfigError, KernelError, outline
from litecache.kernels import (
    TRASH_BLOCK,
    Attention,
    AttentionMetadata,
    copy_blocks,
    paged_attention,
    plan_attention,
    store_kv,
)
from litecache.kernels.checks import contents_checked

_MOST_ROWS = 1 << 20
_INT32 = 2**31


@dataclass
class _Sequence:
    """One sequence: its blocks, and how many tokens each layer has been given."""

    blocks: list[int]
    layer_lens: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens that every layer has."""
        return min(self.layer_lens)


class PagedAttentionCache:
    """A paged KV cache with attention, one method per verb.

    ```python
    cache = PagedAttentionCache(CacheConfig(
        block_size=16, num_blocks=1024, num_heads=32, head_dim=128, num_layers=32,
        dtype=torch.float16, device="cuda"))
    seq = cache.allocate_sequence(len(prompt))
    cache.append(seq, key, value, layer_idx=0)          # [num_tokens, num_kv_heads, head_dim]
    out = cache.paged_attention(query, cache.block_tables([seq]), cache.context_lens([seq]))
    ```

    Args:
        config: with `num_layers`, `num_heads`, `head_dim` and `dtype` given; `num_blocks=None`
            takes `gpu_memory_fraction` of the free memory of a GPU.

    Raises:
        ConfigError: a field that is needed is missing, or the device does not exist.
    """

    def __init__(self, config: CacheConfig) -> None:
        if not isinstance(config, CacheConfig):
            raise ConfigError("config", outline(config), "a litecache.CacheConfig")
        self.config = config
        required = ("num_layers", "num_heads", "head_dim", "dtype")
        given = [getattr(config, name) for name in required]
        if None in given:
            raise ConfigError(required[given.index(None)], None, "required by PagedAttentionCache")
        self.num_layers, self.num_heads, self.head_dim, dtype = given
        self.num_kv_heads = config.num_kv_heads or self.num_heads
        self.device = choose_device(config.device)
        dtype = config.kv_dtype or dtype
        spec = KVSpec(self.num_kv_heads, self.head_dim, self.head_dim, dtype)
        check_kv_dtype([spec], self.device)
        group = KVLayout.from_specs([spec] * self.num_layers, config.block_size).groups[0]
        num_blocks = self._check_room(group.block_bytes)
        # An inference tensor could not be written to outside of inference mode.
        try:
            with torch.inference_mode(False):
                self._pool = KVPool(group, num_blocks + 1, self.device)
        except (RuntimeError, MemoryError) as error:
            needed = (num_blocks + 1) * group.block_bytes
            raise CapacityError(f"{self.device} has no {needed:,} bytes: {error}") from error
        self._blocks = BlockPool(num_blocks)
        # Tokens that each layer has of each block: what attention may look at.
        self._written = np.zeros((self.num_layers, num_blocks + 1), np.int16)
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0

    def allocate_sequence(self, seq_len: int = 0) -> int:
        """Opens a sequence of length 0 with room for `seq_len` tokens; it grows beyond as needed.

        Raises:
            ConfigError: `seq_len` is negative.
            CapacityError: too few blocks are free; nothing changed.
        """
        seq_len = check_integer("seq_len", seq_len, 0, 1 << 62, "an integer, at least 0")
        blocks = self._blocks.allocate(-(-seq_len // self.config.block_size))
        return self._open(_Sequence(blocks, [0] * self.num_layers))

    def append(
        self, seq_id: int, key: torch.Tensor, value: torch.Tensor, layer_idx: int = 0
    ) -> None:
        """Writes the next tokens of one layer; the length grows when the last layer has them.

        Args:
            seq_id: from `allocate_sequence` or `fork`.
            key: `[num_tokens, num_kv_heads, head_dim]`, floating point.
            value: likewise.
            layer_idx: which layer's.

        Raises:
            ConfigError: unknown sequence or layer, or tensors of another shape or device.
            CapacityError: too few blocks are free; nothing changed.
        """
        sequence = self._sequence(seq_id)
        layer_idx = self._check_layer(layer_idx)
        for name, tensor in (("key", key), ("value", value)):
            self._check_tokens(name, tensor)
            if tensor.ndim != 3 or tensor.shape[1:] != (self.num_kv_heads, self.head_dim):
                valid = f"[num_tokens, {self.num_kv_heads}, {self.head_dim}]"
                raise ConfigError(f"{name}.shape", tuple(tensor.shape), valid)
        if key.shape[0] != value.shape[0]:
            raise ConfigError("value.shape", tuple(value.shape), f"as key: {tuple(key.shape)}")
        first, count = sequence.layer_lens[layer_idx], key.shape[0]
        if count == 0:
            return
        self._make_writable(sequence, first, first + count)
        size = self.config.block_size
        positions = np.arange(first, first + count)
        blocks = np.asarray(sequence.blocks)[positions // size]
        k_cache, v_cache = self._pool.layer(layer_idx)
        slots = torch.from_numpy(blocks * size + positions % size).to(self.device)
        with torch.no_grad():
            scales = self._pool.scales(layer_idx)
            store_kv(_rows(key), _rows(value), k_cache, v_cache, slots, *scales)
        self._written[layer_idx, blocks] = positions % size + 1
        sequence.layer_lens[layer_idx] = first + count

    def fork(self, seq_id: int) -> int:
        """A second sequence with the same tokens; blocks are shared until one of the two writes.

        Raises:
            ConfigError: unknown sequence, or some layers have more tokens than others.
        """
        sequence = self._sequence(seq_id)
        if len(set(sequence.layer_lens)) > 1:
            raise ConfigError("seq_id", seq_id, "a sequence whose layers have equally many tokens")
        self._blocks.acquire(sequence.blocks)
        return self._open(_Sequence(list(sequence.blocks), list(sequence.layer_lens)))

    def block_tables(self, seq_ids: Sequence[int]) -> torch.Tensor:
        """Block tables, int32 `[batch, max_blocks]`, padded with the trash block."""
        rows = [sequence.blocks for sequence in self._rows_of(seq_ids)]
        width = max([1, *map(len, rows)])
        padded = [row + [TRASH_BLOCK] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int32, device=self.device).view(len(rows), width)

    def context_lens(self, seq_ids: Sequence[int]) -> torch.Tensor:
        """Lengths, int32 `[batch]`: tokens that every layer has."""
        lens = [sequence.length for sequence in self._rows_of(seq_ids)]
        return torch.tensor(lens, dtype=torch.int32, device=self.device)

    def paged_attention(
        self,
        query: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        layer_idx: int = 0,
    ) -> torch.Tensor:
        """Causal attention over the cached tokens of one layer.

        Args:
            query: `[batch, num_heads, head_dim]`, the last token of each sequence, or
                `[batch, num_heads, seq_len, head_dim]`, its last `seq_len` tokens.
            block_tables: as from `block_tables`, int32 or int64.
            context_lens: tokens to attend to, the queries' own included; inside a forward pass,
                where later layers lack the newest tokens, that is `context_lens(...) + seq_len`.
                At most what this layer has of the row's blocks.
            layer_idx: which layer's.

        Returns:
            The shape and dtype of `query`; zeros where the context length is 0.

        Raises:
            ConfigError: unknown layer, or a query of another shape or dtype.
            KernelError: tables or lengths of another shape, dtype or device, or with contents that
                would give a wrong answer. Contents in GPU memory are looked at with
                `LITECACHE_CHECK=1` alone, which waits for the GPU.
        """
        layer_idx = self._check_layer(layer_idx)
        self._check_index("block_tables", block_tables, 2)
        self._check_index("context_lens", context_lens, 1)
        batch = block_tables.shape[0]
        if context_lens.shape[0] != batch:
            raise KernelError("context_lens.shape", tuple(context_lens.shape), f"[{batch}]")
        self._check_tokens("query", query)
        heads_ok = query.ndim in (3, 4) and query.shape[1] == self.num_heads
        if not heads_ok or query.shape[0] != batch or query.shape[-1] != self.head_dim:
            valid = f"[{batch}, {self.num_heads}, (seq_len,) {self.head_dim}]"
            raise ConfigError("query.shape", tuple(query.shape), valid)
        queries = query.shape[2] if query.ndim == 4 else 1
        if query.numel() == 0:
            return torch.empty_like(query)
        self._check_contents(block_tables, context_lens, queries, layer_idx)
        # A step of `queries` tokens for each row; nothing is stored, so it has no slots.
        size, on_cpu = self.config.block_size, self.device.type == "cpu"
        metadata = AttentionMetadata(
            slot_mapping=torch.empty(0, dtype=torch.int64, device=self.device),
            block_tables=block_tables.to(self.device, torch.int32).contiguous(),
            context_lens=context_lens.to(self.device, torch.int32).contiguous(),
            cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=self.device) * queries,
            block_size=size,
            max_query_len=queries,
            # An upper bound: asking a GPU for the true one would stall the caller.
            max_context_len=block_tables.shape[1] * size,
            query_lens=(queries,) * batch,
            context_lens_host=tuple(context_lens.tolist()) if on_cpu else None,
        )
        packed = query.transpose(1, 2).flatten(0, 1) if query.ndim == 4 else query
        k_cache, v_cache = self._pool.layer(layer_idx)
        k_scale, v_scale = self._pool.scales(layer_idx)
        layer = Attention(
            *(_rows(packed), k_cache, v_cache, self.head_dim**-0.5),
            k_scale=k_scale,
            v_scale=v_scale,
        )
        out = paged_attention(layer, plan_attention(metadata, layer))
        return out if query.ndim == 3 else out.view(batch, queries, *out.shape[1:]).transpose(1, 2)

    def free_sequence(self, seq_id: int) -> None:
        """Forgets a sequence; blocks that no other one shares become free.

        Raises:
            ConfigError: unknown sequence.
        """
        self._release(self._sequence(seq_id).blocks)
        del self._sequences[seq_id]

    def stats(self) -> dict[str, int]:
        """Sequences, their tokens, and blocks by state."""
        tokens = sum(sequence.length for sequence in self._sequences.values())
        blocks = {f"blocks_{state}": count for state, count in self._blocks.stats().items()}
        return {"sequences": len(self._sequences), "tokens": tokens, **blocks}

    def check_integrity(self) -> None:
        """Asserts that references, tables and lengths agree."""
        self._blocks.check_integrity()
        held = Counter(block for s in self._sequences.values() for block in s.blocks)
        for block in range(1, self._blocks.num_blocks + 1):
            references = self._blocks.ref_count(block)
            assert references == held[block], f"block {block}: {references} != {held[block]}"
        size = self.config.block_size
        for seq_id, sequence in self._sequences.items():
            starts = np.arange(len(sequence.blocks)) * size
            assert max(sequence.layer_lens) <= len(starts) * size, f"{seq_id} outgrew its blocks"
            assert TRASH_BLOCK not in sequence.blocks, f"sequence {seq_id} holds the trash block"
            least = np.clip(np.array(sequence.layer_lens)[:, None] - starts, 0, size)
            assert (self._written[:, sequence.blocks] >= least).all(), f"{seq_id} is unwritten"
        free = np.array([b for b in range(len(held), 0, -1) if not held[b]], np.int64)
        assert not self._written[:, free].any(), "a free block counts as written"

    def _check_room(self, block_bytes: int) -> int:
        """How many blocks: as many as the config says, or as fit the GPU."""
        count, free = self.config.num_blocks, free_bytes(self.device)
        if count is None and self.device.type != "cuda":
            raise ConfigError("num_blocks", None, "required on a CPU")
        if count is None:
            count = int(free * self.config.gpu_memory_fraction) // block_bytes - 1
        if count < 1 or (count + 1) * block_bytes > free:
            raise CapacityError(
                f"{max(count, 1):,} blocks and the trash block take {block_bytes:,} bytes each, "
                f"{free:,} bytes are free on {self.device}"
            )
        return count

    def _open(self, sequence: _Sequence) -> int:
        seq_id, self._next_id = self._next_id, self._next_id + 1
        self._sequences[seq_id] = sequence
        return seq_id

    def _sequence(self, seq_id: int) -> _Sequence:
        valid = "an open sequence of this cache"
        sequence = self._sequences.get(check_integer("seq_id", seq_id, 0, 1 << 62, valid))
        if sequence is None:
            raise ConfigError("seq_id", seq_id, valid)
        return sequence

    def _rows_of(self, seq_ids: Sequence[int]) -> list[_Sequence]:
        try:
            few = len(seq_ids) <= _MOST_ROWS
            ids = list(seq_ids) if few else []
        except Exception as error:  # whatever was passed has no length or no items
            raise ConfigError("seq_ids", outline(seq_ids), "a list of sequences") from error
        if not few:
            raise ConfigError("seq_ids", outline(seq_ids), f"at most {_MOST_ROWS:,} sequences")
        return [self._sequence(seq_id) for seq_id in ids]

    def _check_layer(self, layer_idx: int) -> int:
        last = self.num_layers - 1
        return check_integer("layer_idx", layer_idx, 0, last, f"0..{last}")

    def _check_tokens(self, name: str, tensor: Any) -> None:
        valid = f"a dense floating point tensor on {self.device}"
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(name, outline(tensor), valid)
        if tensor.layout != torch.strided or tensor.dtype not in _FLOATS:
            raise ConfigError(f"{name}.dtype", tensor.dtype, valid)
        if tensor.device != self._pool.buffer.device:
            raise ConfigError(f"{name}.device", tensor.device, valid)

    def _check_index(self, name: str, tensor: Any, ndim: int) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise KernelError(name, outline(tensor), "an int32 tensor")
        if tensor.layout != torch.strided or tensor.dtype not in (torch.int32, torch.int64):
            raise KernelError(f"{name}.dtype", tensor.dtype, "dense, int32 or int64")
        if tensor.device.type != "cpu" and tensor.device != self._pool.buffer.device:
            raise KernelError(f"{name}.device", tensor.device, f"{self.device} or cpu")
        if tensor.ndim != ndim:
            raise KernelError(f"{name}.shape", tuple(tensor.shape), f"{ndim} dimensions")

    def _check_contents(
        self, block_tables: torch.Tensor, context_lens: torch.Tensor, queries: int, layer: int
    ) -> None:
        """Every row's context is there: within its table, in blocks that hold that many tokens."""
        both = (block_tables, context_lens)
        # int64 of a GPU is not what this class hands out; narrowed unread, it could wrap
        seen = [t for t in both if t.device.type == "cpu" or t.dtype == torch.int64]
        if len(seen) < 2 and not contents_checked():
            if seen:
                low, high = torch.cat([t.flatten().cpu().long() for t in seen]).aminmax()
                if low < 0 or high >= _INT32:
                    valid = "0..2**31 - 1"
                    raise KernelError("block_tables or context_lens", f"{low}..{high}", valid)
            return
        tables, lens = (t.cpu().numpy().astype(np.int64) for t in both)
        size = self.config.block_size
        room = tables.shape[1] * size
        wrong = (lens < 0) | (lens > room) | ((lens > 0) & (lens < queries))
        if wrong.any():
            row = int(wrong.argmax())
            valid = f"0, or {queries}..{room}, what its table row holds"
            raise KernelError(f"context_lens[{row}]", int(lens[row]), valid)
        wanted = np.clip(lens[:, None] - np.arange(tables.shape[1]) * size, 0, size)
        known = (tables > 0) & (tables <= self._blocks.num_blocks)
        there = np.where(known, self._written[layer, np.where(known, tables, 0)], 0)
        if (there < wanted).any():
            row, at = (int(i) for i in np.argwhere(there < wanted)[0])
            valid = (
                f"a block in which layer {layer} has the {wanted[row, at]} tokens that "
                f"context_lens[{row}]={lens[row]} asks for; it has {there[row, at]}"
            )
            raise KernelError(f"block_tables[{row}, {at}]", int(tables[row, at]), valid)

    def _release(self, blocks: Sequence[int]) -> None:
        """Give up references; what nobody holds any more is not to be read any more."""
        self._blocks.release(blocks)
        self._written[:, [b for b in blocks if not self._blocks.ref_count(b)]] = 0

    def _make_writable(self, sequence: _Sequence, first: int, end: int) -> None:
        """Gives the sequence blocks of its own for positions `first .. end`."""
        size = self.config.block_size
        touched = range(first // size, min(-(-end // size), len(sequence.blocks)))
        shared = [i for i in touched if self._blocks.ref_count(sequence.blocks[i]) > 1]
        missing = max(0, -(-end // size) - len(sequence.blocks))
        fresh = self._blocks.allocate(len(shared) + missing)
        if shared:
            old = [sequence.blocks[index] for index in shared]
            new = fresh[: len(shared)]
            src, dst = (torch.tensor(x, device=self.device) for x in (old, new))
            copy_blocks(self._pool.buffer, src, dst)
            self._written[:, new] = self._written[:, old]
            self._release(old)
            for index, block in zip(shared, new, strict=True):
                sequence.blocks[index] = block
        sequence.blocks += fresh[len(shared) :]


_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """With a contiguous last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
