"""How many blocks the pool gets.

With `num_blocks` it is what the user said. On a GPU it is what `gpu_memory_fraction` leaves after
weights and the measured peak of the largest step; on a CPU a share of the free memory. A pool that
cannot hold one sequence is refused with the numbers and with what to change.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch

from litecache.config import CacheConfig
from litecache.engine.kv_layout import KVLayout, free_bytes
from litecache.engine.loading.model_loader import LoadedModel
from litecache.engine.running.batch import EVERY_TOKEN, Batch
from litecache.engine.running.hf_attention import AttentionOptions, attention_context
from litecache.engine.running.sampler import sample
from litecache.errors import CapacityError

CPU_POOL_BYTES = 4 << 30
CPU_MEMORY_SHARE = 0.25
GRAPH_BYTES = 1 << 30
"""Set aside on a GPU for captured graphs and the libraries' workspaces."""


def choose_num_blocks(loaded: LoadedModel, layout: KVLayout, config: CacheConfig) -> int:
    """Blocks per KV group, the trash block not counted.

    On a GPU the model's largest step is run once, without a pool.

    Raises:
        CapacityError: the blocks cannot hold one sequence of the shortest useful length, or do
            not fit the device.
    """
    if config.num_blocks is not None:
        need = (config.num_blocks + 1) * layout.block_bytes
        free = free_bytes(loaded.device)
        if need > free:
            raise CapacityError(
                f"num_blocks={config.num_blocks} needs {need:,} bytes on {loaded.device},"
                f" {free:,} are free: at most {max(free // layout.block_bytes - 1, 0)} blocks of"
                f" {layout.block_bytes:,} bytes fit"
            )
        return config.num_blocks
    if loaded.device.type == "cuda":
        room, why = _gpu_room(loaded, config)
        advice = (
            "end what else uses the GPU, raise gpu_memory_fraction, lower max_prefill_tokens or"
            " set num_blocks"
        )
    else:
        free = free_bytes(loaded.device)
        room = min(CPU_POOL_BYTES, int(free * CPU_MEMORY_SHARE))
        why = f"{CPU_MEMORY_SHARE:.0%} of {free:,} free bytes, at most {CPU_POOL_BYTES:,}"
        advice = "free memory or set num_blocks"
    # No sequence needs more than its own length, and no pool more than all requests at full length.
    per_sequence = -(-loaded.max_model_len // layout.block_size) + 1
    blocks = min(room // layout.block_bytes - 1, per_sequence * config.max_requests)
    least = min(per_sequence, -(-config.max_batch_tokens // layout.block_size))
    if blocks < least:
        raise CapacityError(
            f"the KV pool on {loaded.device} gets {max(room, 0):,} bytes ({why}), which is"
            f" {max(blocks, 0)} blocks of {layout.block_bytes:,} bytes; one sequence of"
            f" {least * layout.block_size} tokens needs {least}: {advice}"
        )
    return int(blocks)


@contextlib.contextmanager
def memory_for(what: str, advice: str) -> Iterator[None]:
    """Tell an allocation that a GPU refuses by what it was for.

    Raises:
        CapacityError: with the bytes that are left, and `advice`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        raise CapacityError(
            f"too little memory on the GPU for {what}, {free:,} of {total:,} bytes are left: end"
            f" what else uses it, or {advice}"
        ) from error


def _gpu_room(loaded: LoadedModel, config: CacheConfig) -> tuple[int, str]:
    """Bytes for the pool (below 0: too little), and how they come about."""
    gc.collect()  # models are linked in circles: one that was closed may still be there
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(loaded.device)
    own = torch.cuda.memory_allocated(loaded.device)
    with memory_for("the largest step", "lower max_prefill_tokens"):
        peak = profile_peak(loaded, config)
    share = int(total * config.gpu_memory_fraction)
    why = (
        f"gpu_memory_fraction={config.gpu_memory_fraction:g} of {total:,} are {share:,}, less"
        f" {own:,} of the model, {total - free - own:,} of others, {peak:,} for the largest step"
        f" and {GRAPH_BYTES:,} for graphs"
    )
    return share - (total - free) - peak - GRAPH_BYTES, why


def profile_peak(loaded: LoadedModel, config: CacheConfig) -> int:
    """Bytes that the largest step allocates on a GPU beside weights and pool."""
    device = loaded.device
    tokens = min(config.prefill_tokens(device.type), loaded.max_model_len)
    samples = min(config.max_requests, tokens)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    positions = torch.arange(tokens, device=device)[None]
    options: dict[str, Any] = {"position_ids": positions, "use_cache": False}
    if loaded.attention == "gathered":
        from litecache.engine.running.gather_cache import longest_context

        cache = longest_context(len(loaded.specs), tokens, loaded.max_model_len)
        options = {"past_key_values": cache, "use_cache": True}
    if loaded.keeps_logits:
        options["logits_to_keep"] = samples
    ones = torch.ones(samples, device=device)
    rules = {
        "temperature": ones,
        "top_k": torch.full((samples,), 8, device=device),
        "top_p": ones * 0.9,
        "min_p": ones * 0.1,
        "keys": torch.zeros(samples, dtype=torch.int64, device=device),
    }
    with torch.inference_mode(), attention_context(_Absent()):
        logits = loaded.model(positions % loaded.vocab_size, **options).logits[0][-samples:]
        sample(logits, Batch(rules, num_sorted=EVERY_TOKEN, any_min_p=True))
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del logits
    torch.cuda.empty_cache()
    return peak


class _Absent:
    """Attention that costs its output alone, for a forward without a pool."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
