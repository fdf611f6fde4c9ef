"""`PagedAttentionCache`: the block pool and the kernels for those who bring their own loop.

It owns a pool of one KV group and the block tables of its sequences; no model, no scheduler, no
tiers. Sequences that were forked share blocks until one of them writes (copy-on-write). Used by
one thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from litecache.config import CacheConfig
from litecache.engine.block_pool import BlockPool
from litecache.engine.kv_layout import KVLayout, KVPool, KVSpec
from litecache.errors import CapacityError, ConfigError
from litecache.kernels import TRASH_BLOCK, AttentionMetadata, copy_blocks, paged_attention, store_kv


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
        self.config = config
        for name in ("num_layers", "num_heads", "head_dim", "dtype"):
            if getattr(config, name) is None:
                raise ConfigError(name, None, "required by PagedAttentionCache")
        assert config.num_layers and config.num_heads and config.head_dim  # noqa: PT018
        assert config.dtype
        self.num_layers, self.num_heads = config.num_layers, config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = config.head_dim
        self.device = torch.device(
            config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device", config.device, '"cpu": torch sees no CUDA device')
        dtype = config.kv_dtype or config.dtype
        spec = KVSpec(self.num_kv_heads, self.head_dim, self.head_dim, dtype)
        group = KVLayout.from_specs([spec] * self.num_layers, config.block_size).groups[0]
        num_blocks = config.num_blocks or self._blocks_that_fit(group.block_bytes)
        self._blocks = BlockPool(num_blocks)
        self._pool = KVPool(group, num_blocks + 1, self.device)
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0

    def allocate_sequence(self, seq_len: int = 0) -> int:
        """Opens a sequence of length 0 with room for `seq_len` tokens; it grows beyond as needed.

        Raises:
            ConfigError: `seq_len` is negative.
            CapacityError: too few blocks are free; nothing changed.
        """
        if not isinstance(seq_len, int) or seq_len < 0:
            raise ConfigError("seq_len", seq_len, "an integer, at least 0")
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
        self._check_layer(layer_idx)
        for name, tensor in (("key", key), ("value", value)):
            valid = f"[num_tokens, {self.num_kv_heads}, {self.head_dim}] on {self.device}"
            if tensor.ndim != 3 or tensor.shape[1:] != (self.num_kv_heads, self.head_dim):
                raise ConfigError(f"{name}.shape", tuple(tensor.shape), valid)
            if tensor.device.type != self.device.type:
                raise ConfigError(f"{name}.device", str(tensor.device), valid)
        if key.shape[0] != value.shape[0]:
            raise ConfigError("value.shape", tuple(value.shape), f"as key: {tuple(key.shape)}")
        first, count = sequence.layer_lens[layer_idx], key.shape[0]
        if count == 0:
            return
        self._make_writable(sequence, first, first + count)
        size = self.config.block_size
        slots = [
            sequence.blocks[position // size] * size + position % size
            for position in range(first, first + count)
        ]
        k_cache, v_cache = self._pool.layer(layer_idx)
        store_kv(key, value, k_cache, v_cache, torch.tensor(slots, device=self.device))
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
        rows = [self._sequence(seq_id).blocks for seq_id in seq_ids]
        width = max(1, max((len(row) for row in rows), default=1))
        padded = [row + [TRASH_BLOCK] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int32, device=self.device).view(len(rows), width)

    def context_lens(self, seq_ids: Sequence[int]) -> torch.Tensor:
        """Lengths, int32 `[batch]`: tokens that every layer has."""
        lens = [self._sequence(seq_id).length for seq_id in seq_ids]
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
            block_tables: as from `block_tables`.
            context_lens: tokens to attend to, the queries' own included; inside a forward pass,
                where later layers lack the newest tokens, that is `context_lens(...) + seq_len`.
            layer_idx: which layer's.

        Returns:
            The shape and dtype of `query`; zeros where the context length is 0.

        Raises:
            ConfigError: unknown layer or a tensor of another shape.
            KernelError: what the kernels themselves refuse.
        """
        self._check_layer(layer_idx)
        batch = block_tables.shape[0]
        heads_ok = query.ndim in (3, 4) and query.shape[1] == self.num_heads
        if not heads_ok or query.shape[0] != batch or query.shape[-1] != self.head_dim:
            valid = f"[{batch}, {self.num_heads}, (seq_len,) {self.head_dim}]"
            raise ConfigError("query.shape", tuple(query.shape), valid)
        queries = query.shape[2] if query.ndim == 4 else 1
        packed = query
        if query.ndim == 4:
            packed = query.transpose(1, 2).reshape(batch * queries, self.num_heads, self.head_dim)
        metadata = self._metadata(block_tables, context_lens, queries)
        k_cache, v_cache = self._pool.layer(layer_idx)
        out = paged_attention(packed, k_cache, v_cache, metadata, scale=self.head_dim**-0.5)
        if query.ndim == 4:
            out = out.view(batch, queries, self.num_heads, self.head_dim).transpose(1, 2)
        return out

    def free_sequence(self, seq_id: int) -> None:
        """Forgets a sequence; blocks that no other one shares become free.

        Raises:
            ConfigError: unknown sequence.
        """
        self._blocks.release(self._sequence(seq_id).blocks)
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
        for seq_id, sequence in self._sequences.items():
            room = len(sequence.blocks) * self.config.block_size
            assert max(sequence.layer_lens) <= room, f"sequence {seq_id} outgrew its blocks"
            assert TRASH_BLOCK not in sequence.blocks, f"sequence {seq_id} holds the trash block"

    def _blocks_that_fit(self, block_bytes: int) -> int:
        if self.device.type != "cuda":
            raise ConfigError("num_blocks", None, "required on a CPU")
        free, _ = torch.cuda.mem_get_info(self.device)
        count = int(free * self.config.gpu_memory_fraction) // block_bytes - 1
        if count < 1:
            raise CapacityError(f"a block takes {block_bytes} bytes, {free} are free")
        return count

    def _open(self, sequence: _Sequence) -> int:
        seq_id, self._next_id = self._next_id, self._next_id + 1
        self._sequences[seq_id] = sequence
        return seq_id

    def _sequence(self, seq_id: int) -> _Sequence:
        sequence = self._sequences.get(seq_id)
        if sequence is None:
            raise ConfigError("seq_id", seq_id, "an open sequence of this cache")
        return sequence

    def _check_layer(self, layer_idx: int) -> None:
        if not 0 <= layer_idx < self.num_layers:
            raise ConfigError("layer_idx", layer_idx, f"0..{self.num_layers - 1}")

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
            self._blocks.release(old)
            for index, block in zip(shared, new, strict=True):
                sequence.blocks[index] = block
        sequence.blocks += fresh[len(shared) :]

    def _metadata(
        self, block_tables: torch.Tensor, context_lens: torch.Tensor, queries: int
    ) -> AttentionMetadata:
        """A step of `queries` tokens for each row; nothing is stored, so it has no slots."""
        batch, width = block_tables.shape
        on_cpu = self.device.type == "cpu"
        return AttentionMetadata(
            slot_mapping=torch.empty(0, dtype=torch.int64, device=self.device),
            block_tables=block_tables.to(self.device, torch.int32).contiguous(),
            context_lens=context_lens.to(self.device, torch.int32),
            cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=self.device) * queries,
            block_size=self.config.block_size,
            max_query_len=queries,
            # An upper bound: asking a GPU for the true one would stall the caller.
            max_context_len=width * self.config.block_size,
            query_lens=(queries,) * batch,
            context_lens_host=tuple(context_lens.tolist()) if on_cpu else None,
        )
