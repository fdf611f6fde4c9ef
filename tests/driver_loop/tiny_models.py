"""Tiny random models of the driver loop's tests, and a comparison with stock results."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 97


_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
}
_MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SHAPE,
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 160},
    "qwen3": {**_SHAPE, "head_dim": 16},
    "gemma2": {**_SHAPE, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "mistral": {**_SHAPE, "sliding_window": 7},
    "mixtral": {**_SHAPE, **_MIXTURE},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 160,
        "init_std": 0.3,
    },
}
TINY_FAMILIES = tuple(_CONFIGS)


@functools.cache
def tiny_model(family: str = "llama", layers: int = 2, vocab: int = VOCAB) -> Any:
    """Random weights in float32, the same in every process."""
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    fields = {"vocab_size": vocab, "num_hidden_layers": layers, **ends, **_CONFIGS[family]}
    config = AutoConfig.for_model(family, **fields)
    before = torch.get_rng_state()
    torch.manual_seed(layers)
    # the scores' soft cap of Gemma 2 is in its eager attention alone
    attention = "eager" if family == "gemma2" else "sdpa"
    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    finally:
        torch.set_rng_state(before)


def ragged(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A left-padded batch as a tokenizer gives it."""
    width = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.ones_like(ids)
    for index, length in enumerate(lengths):
        ids[index, : width - length], mask[index, : width - length] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_same(ours: Any, stocks: Any) -> None:
    """Equal tokens, indices and shapes; equal numbers to 1e-4; caches of equal length."""
    if isinstance(stocks, torch.Tensor):
        assert ours.dtype == stocks.dtype
        most = 1e-4 if stocks.is_floating_point() else 0
        torch.testing.assert_close(ours, stocks, atol=most, rtol=most)
    elif isinstance(stocks, tuple):
        assert len(ours) == len(stocks)
        for our, stock in zip(ours, stocks, strict=True):
            assert_same(our, stock)
    elif hasattr(stocks, "get_seq_length"):
        assert ours.get_seq_length() == stocks.get_seq_length()
    elif hasattr(stocks, "keys"):
        assert type(ours) is type(stocks)
        assert [*ours] == [*stocks]
        for name in stocks:
            assert_same(ours[name], stocks[name])
    else:
        assert ours == stocks
