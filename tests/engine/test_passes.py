"""Passes take what they know, keep the logits, share the weights, and are undone when wrong."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from plan_driver import FAMILIES, VOCAB, tiny_model

from litecache.config import CacheConfig
from litecache.engine.loading.model_loader import load_model
from litecache.engine.loading.model_source import ModelSource
from litecache.engine.loading.probe import paged_logits
from litecache.engine.running import passes
from litecache.engine.running.passes.fused_layers import FusedDecoderLayer, fuse_layers
from litecache.engine.running.passes.merged_projections import MergedProjection, merge_projections
from litecache.errors import ConfigError

LLAMA = FAMILIES["llama"]
VARIANTS = {
    "llama": LLAMA,
    "llama-bias": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama-gelu": {**LLAMA, "hidden_act": "gelu"},
    "qwen2": LLAMA,
    "qwen3": FAMILIES["qwen3"],
    "mistral": FAMILIES["mistral"],
    # Each third layer does not rotate.
    "smollm3": {**LLAMA, "no_rope_layers": [1, 1, 0], "pad_token_id": 0},
    # The structure of Llama, with multipliers that only the numbers show.
    "granite": {**LLAMA, "residual_multiplier": 0.3, "attention_multiplier": 0.1},
    "phi": FAMILIES["phi"],
    "gemma2": FAMILIES["gemma2"],
    "gpt2": FAMILIES["gpt2"],
}
FUSED_LAYERS = {
    "llama": 3,
    "llama-bias": 3,
    "llama-gelu": 0,
    "qwen2": 3,
    "qwen3": 3,
    "mistral": 3,
    "smollm3": 2,
    "granite": 0,
    "phi": 0,
    "gemma2": 0,
    "gpt2": 0,
}


def load(variant, chosen):
    fields = {**VARIANTS[variant], "model_type": variant.split("-")[0]}
    with mock.patch.dict(os.environ, LITECACHE_PASSES=chosen):
        return load_model(
            ModelSource(config=fields, weights="random"),
            CacheConfig(device="cpu", dtype="float32"),
        )


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_all_passes_keep_the_logits_of_every_family(variant):
    plain, fast = load(variant, "none"), load(variant, ",".join(passes.PASSES))
    fused = sum(isinstance(module, FusedDecoderLayer) for module in fast.model.modules())
    assert fused == FUSED_LAYERS[variant]
    expected = paged_logits(plain.model, plain.specs, 16)
    got = paged_logits(fast.model, fast.specs, 16)
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    assert plain.passes == ()
    assert fast.fingerprint == plain.fingerprint


@pytest.mark.parametrize("run", [lambda model: fuse_layers(model, 256), merge_projections])
def test_merged_weights_are_shared_and_undo_puts_the_modules_back(run):
    model = tiny_model("llama").model
    before = dict(model.named_modules())
    attention = model.model.layers[0].self_attn
    weights = attention.q_proj.weight.clone()
    undo = run(model)
    assert undo is not None
    q, k = attention.q_proj.weight, attention.k_proj.weight
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert torch.equal(q, weights)
    undo()
    assert dict(model.named_modules()) == before


def test_merged_projections_hold_no_activations():
    model = tiny_model("llama").model
    merge_projections(model)
    projection = model.model.layers[0].self_attn.q_proj
    assert isinstance(projection, MergedProjection)
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 4, 64)
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = getattr(attention, name)
        expected = torch.nn.functional.linear(x, layer.weight)
        assert torch.allclose(layer(x), expected, atol=1e-5)
    assert projection._shared._input is None
    # Asked with another input in between, each still answers for its own.
    other = torch.randn(1, 4, 64)
    attention.q_proj(x)
    got = attention.k_proj(other)
    assert torch.allclose(
        got, torch.nn.functional.linear(other, attention.k_proj.weight), atol=1e-5
    )


def test_a_pass_that_changes_the_logits_is_undone(monkeypatch):
    loaded = tiny_model("llama")
    expected = paged_logits(loaded.model, loaded.specs, 16)

    def wrong(model, max_model_len):
        undo = fuse_layers(model, max_model_len)
        model.model.layers[1]._options = mock.Mock(scale=9.0, window=3, softcap=None, sinks=None)
        return undo

    monkeypatch.setattr(passes, "fuse_layers", wrong)
    right = passes.apply_passes(loaded.model, loaded.specs, 16, 256)
    assert right == {"fused": False, "merged": True, "small": True}
    got = paged_logits(loaded.model, loaded.specs, 16)
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_an_unknown_pass_is_named():
    with pytest.raises(ConfigError, match="LITECACHE_PASSES='fast'"):
        tiny_model("llama", passes="fused,fast")


def test_rotary_tables_cover_every_position():
    loaded = tiny_model("llama", passes="small")
    stock = tiny_model("llama")
    x, positions = torch.zeros(1, 3, 64), torch.tensor([[0, 17, 255]])
    for got, expected in zip(
        loaded.model.model.rotary_emb(x, positions),
        stock.model.model.rotary_emb(x, positions),
        strict=True,
    ):
        assert torch.equal(got, expected)
    assert loaded.vocab_size == VOCAB
