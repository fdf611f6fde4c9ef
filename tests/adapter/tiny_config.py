"""Tiny models and settings that several tests and their helper processes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from litecache.config import CacheConfig

TINIEST = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
"""Fields of the config of a model for tests that hardly mind what it says."""


def tiny_config(folder: Path) -> CacheConfig:
    """All tiers, small: what a test writes in a second passes what the disk holds."""
    return CacheConfig(
        num_blocks=96,
        dtype="float32",
        ram_bytes="16MB",
        storage_dir=str(folder),
        storage_bytes="2MB",
    )


def small_llama(**fields: Any) -> LlamaConfig:
    """Two layers that mind what they read; `fields` go before."""
    small = {
        "vocab_size": 211, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaConfig(**{**small, **fields})


def endless_llama() -> LlamaConfig:
    """A model whose sequences never end by themselves and may be very long."""
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16384,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
