from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from litecache.adapter.sources import resolve_model
from litecache.errors import ConfigError
from litecache.paths import models_folder

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=128,
)


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c", "no-such-model", ""])
def test_an_unknown_model_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="model="):
        resolve_model(name)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder with a saved model"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("model", [None, 7, nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="model="):
        resolve_model(model)


def test_a_config_needs_random_weights() -> None:
    with pytest.raises(ConfigError, match=r'weights=.*"random"'):
        resolve_model(TINY)
    resolved = resolve_model(TINY, weights="random", seed=3)
    assert resolved.source.config is not None
    assert (resolved.source.seed, resolved.max_positions) == (3, 128)


def test_a_module_is_written_once_and_loads_with_the_same_weights() -> None:
    torch.manual_seed(0)
    module = LlamaForCausalLM(TINY)
    first = resolve_model(module).source
    assert first.path is not None
    written = Path(first.path) / "model.safetensors"
    stamp = written.stat().st_mtime_ns
    assert resolve_model(module).source == first
    assert written.stat().st_mtime_ns == stamp
    loaded = AutoModelForCausalLM.from_pretrained(first.path)
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    with torch.no_grad():
        next(module.parameters()).add_(1)
    assert resolve_model(module).source != first
    assert not list(models_folder().glob(".saving-*"))
