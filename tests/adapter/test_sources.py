from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from litecache.adapter import sources
from litecache.adapter.sources import resolve_model
from litecache.config import CacheConfig
from litecache.engine.loading import fingerprint
from litecache.engine.loading.fingerprint import model_fingerprint
from litecache.engine.loading.model_loader import load_model
from litecache.errors import ConfigError
from litecache.paths import ModelHold, list_models, models_folder

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
    assert (resolved.source.seed, resolved.config.max_position_embeddings) == (3, 128)


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
    assert not list(models_folder().glob(".making-*"))


def test_a_module_goes_by_its_name_and_is_written_without_a_progress_bar(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITECACHE_HOME", str(tmp_path))
    module = LlamaForCausalLM(TINY)
    assert resolve_model(module).source.name == "LlamaForCausalLM"
    assert [model.name for model in list_models()] == ["LlamaForCausalLM"]
    assert "shards" not in capfd.readouterr().err


def test_modules_written_stay_within_their_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITECACHE_HOME", str(tmp_path))
    first = resolve_model(LlamaForCausalLM(TINY))
    one = sum(model.bytes for model in list_models())
    held = Path(str(first.source.path))
    for _ in range(3):
        last = resolve_model(LlamaForCausalLM(TINY), models_bytes=int(2.5 * one))
        assert held.is_dir()
        assert sum(model.bytes for model in list_models()) <= 2.5 * one
        last.hold.release()
    first.hold.release()
    resolve_model(LlamaForCausalLM(TINY), models_bytes=one)
    assert not held.exists()


def test_buffers_that_no_checkpoint_holds_reach_the_actors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LITECACHE_PASSES", "none")
    torch.manual_seed(0)
    module = LlamaForCausalLM(TINY).eval()
    plain = resolve_model(module).source
    with torch.no_grad():
        module.model.rotary_emb.inv_freq.mul_(3)
    source = resolve_model(module).source
    assert source != plain
    loaded = load_model(source, CacheConfig(device="cpu"))
    assert loaded.model.model.rotary_emb.inv_freq.equal(module.model.rotary_emb.inv_freq)
    assert loaded.fingerprint != load_model(plain, CacheConfig(device="cpu")).fingerprint


def save_tiny(folder: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(TINY).save_pretrained(folder)
    return folder


def test_a_source_carries_the_fingerprint_of_its_folder_and_unchanged_files_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = save_tiny(tmp_path) / "model.safetensors"
    os.utime(weights, (1_600_000_000, 1_600_000_000))
    first = resolve_model(tmp_path).source
    assert first.fingerprint == model_fingerprint(tmp_path)
    with monkeypatch.context() as unread:
        unread.setattr(fingerprint, "_hash_file", None)
        assert resolve_model(tmp_path).source == first
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x11")
    assert resolve_model(tmp_path).source != first


def test_a_hub_name_is_held_to_the_commit_that_it_means_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--tiny"
    for commit in ("a" * 40, "b" * 40):
        save_tiny(repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(commit)
        assert resolve_model("someone/tiny").source.revision == commit


def test_code_of_a_model_runs_in_the_driver_only_when_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", None)
    mark = tmp_path / "ran"
    folder = save_tiny(tmp_path / "model")
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="own_llama", auto_map={"AutoConfig": "own.OwnConfig"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="trust_remote_code=True"):
        resolve_model(folder)
    assert not mark.exists()
    resolved = resolve_model(folder, trust_remote_code=True)
    assert mark.exists()
    assert resolved.source.trust_remote_code
    assert type(resolved.config).__name__ == "OwnConfig"


def test_a_gguf_model_goes_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models_folder() / "gguf-digest"
    made = (save_tiny(folder), ModelHold(None))
    monkeypatch.setattr(sources, "held_conversion", lambda path, most_bytes: made)
    first, second = (resolve_model(tmp_path / f"{name}.gguf").source for name in ("One", "Two"))
    assert (first.name, second.name) == ("One.gguf", "Two.gguf")
    assert first == second
