"""A checkpoint is loaded whole or refused by name; code in its folder runs only when trusted."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_driver import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from litecache.config import CacheConfig
from litecache.engine.loading.fingerprint import model_fingerprint
from litecache.engine.loading.model_loader import LoadedModel, load_model
from litecache.engine.loading.model_source import ModelSource
from litecache.errors import ConfigError

CONFIG = CacheConfig(device="cpu", dtype="float32", max_model_len=64)
Tensors = dict[str, torch.Tensor]


def save_llama(folder: Path, *, shard_size: str = "1GB", **fields: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**FAMILIES["llama"], **fields})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def edit_weights(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def load(folder: Path, **fields: Any) -> LoadedModel:
    return load_model(ModelSource(path=str(folder), **fields), CONFIG)


@pytest.mark.parametrize(
    ("edit", "names", "count"),
    [
        (lambda t: {k: v for k, v in t.items() if ".layers.1." not in k}, "model.layers.1.", "9"),
        (lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}, "lm_head.weight", "1"),
        (lambda t: {f"foreign.{k}": v for k, v in t.items()}, "model.embed_tokens.weight", "30"),
    ],
    ids=["a layer", "the head", "a foreign prefix"],
)
def test_tensors_that_are_not_in_the_checkpoint_are_named_and_counted(
    tmp_path: Path, edit: Callable[[Tensors], Tensors], names: str, count: str
) -> None:
    edit_weights(save_llama(tmp_path), edit)
    with pytest.raises(ConfigError, match="model=") as refused:
        load(tmp_path)
    assert names in str(refused.value)
    assert f"{count} missing" in str(refused.value)
    assert str(refused.value).count("weight") <= 12


def test_a_config_of_more_layers_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    edit_json(save_llama(tmp_path) / "config.json", num_hidden_layers=4)
    with pytest.raises(ConfigError, match=r"9 missing.*model\.layers\.3\."):
        load(tmp_path)


def test_shapes_that_do_not_match_are_refused_with_both(tmp_path: Path) -> None:
    edit_json(save_llama(tmp_path) / "config.json", vocab_size=300)
    with pytest.raises(ConfigError, match=r"lm_head\.weight is \[211, 64\], not \[300, 64\]"):
        load(tmp_path)


def test_tensors_that_the_model_does_not_use_are_told_and_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = load(save_llama(tmp_path)).model.lm_head.weight.clone()
    edit_weights(tmp_path, lambda t: {**t, "extra.weight": torch.ones(2)})
    with caplog.at_level("WARNING", logger="litecache"):
        assert torch.equal(load(tmp_path).model.lm_head.weight, whole)
    assert "1 unused: extra.weight" in caplog.text


def test_a_tied_head_need_not_be_in_the_checkpoint(tmp_path: Path) -> None:
    model = load(save_llama(tmp_path, tie_word_embeddings=True)).model
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_shard_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    files = sorted(save_llama(tmp_path, shard_size="60KB").glob("*.safetensors"))
    assert len(files) > 2
    files[1].unlink()
    with pytest.raises(ConfigError, match=files[1].name):
        load(tmp_path)


@pytest.mark.parametrize("damage", [b"\xff" * 8, b"", b"\x10" + b"\0" * 7 + b"{}"])
def test_a_damaged_header_is_refused(tmp_path: Path, damage: bytes) -> None:
    file = save_llama(tmp_path) / "model.safetensors"
    file.write_bytes(damage + file.read_bytes()[len(damage) :] if damage else b"")
    with pytest.raises(ConfigError, match="weights can be read"):
        load(tmp_path)


def test_a_folder_that_changed_since_its_fingerprint_was_taken_is_refused(tmp_path: Path) -> None:
    before = model_fingerprint(save_llama(tmp_path))
    assert load(tmp_path, fingerprint=before).fingerprint == before
    edit_weights(tmp_path, lambda t: {k: v * 2 for k, v in t.items()})
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, fingerprint=before)
    assert before in str(refused.value)
    assert model_fingerprint(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: edit_json(f / "adapter_config.json", lora_alpha=32),
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"other"),
        lambda f: (f / "adapter_config.json").unlink(),
        lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}),
        lambda f: edit_json(f / "config.json", rope_parameters={"rope_theta": 5.0}),
        lambda f: edit_json(f / "config.json", sliding_window=8),
        lambda f: (f / "code" / "inner.py").write_text("x = 2\n"),
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        lambda f: (f / "config.5.0.0.json").write_text("{}"),
    ],
    ids=[
        "alpha",
        "adapter",
        "no adapter",
        "quantised",
        "rope",
        "window",
        "code",
        "index",
        "config",
    ],
)
def test_whatever_changes_the_forward_changes_the_fingerprint(
    tmp_path: Path, change: Callable[[Path], Any]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 16}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"lora")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "inner.py").write_text("x = 1\n")
    before = model_fingerprint(tmp_path)
    change(tmp_path)
    assert model_fingerprint(tmp_path) != before


def test_what_only_concerns_sampling_and_text_keeps_the_fingerprint(tmp_path: Path) -> None:
    before = model_fingerprint(save_llama(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    edit_json(tmp_path / "generation_config.json", temperature=0.5)
    (tmp_path / "README.md").write_text("words")
    assert model_fingerprint(tmp_path) == before


def test_an_adapter_beside_the_weights_is_not_silently_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (save_llama(tmp_path) / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    monkeypatch.setattr("transformers.utils.is_peft_available", lambda: False)
    with pytest.raises(ConfigError, match=r"adapter_config\.json.*merge"):
        load(tmp_path)


def write_own_code(folder: Path, mark: Path) -> Path:
    """A model whose class comes with its folder, and which tells when that code runs."""
    save_llama(folder)
    told = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    (folder / "own.py").write_text(
        told
        + "from transformers import LlamaConfig, LlamaForCausalLM\n"
        + "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        + "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        told + "def generate(model, *args, **kwargs):\n    raise RuntimeError\n"
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(folder / "config.json", model_type="own_llama", auto_map=auto)
    return folder


def test_code_of_a_folder_runs_only_when_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("a prompt on stdin")

    monkeypatch.setattr("builtins.input", asked)
    mark = tmp_path / "ran"
    folder = write_own_code(tmp_path / "model", mark)
    with pytest.raises(ConfigError, match="trust_remote_code=True"):
        load(folder)
    edit_json(folder / "config.json", model_type="llama")
    untrusted = load(folder)
    assert type(untrusted.model).__module__.startswith("transformers.")
    assert not mark.exists()
    edit_json(folder / "config.json", model_type="own_llama")
    trusted = load(folder, trust_remote_code=True)
    assert mark.exists()
    assert type(trusted.model).__name__ == "OwnModel"


def test_trusted_code_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    folder = write_own_code(tmp_path / "model", tmp_path / "ran")
    plain, trusted = (model_fingerprint(folder, trust_remote_code=t) for t in (False, True))
    assert plain != trusted
    with (folder / "own.py").open("a") as file:
        file.write("x = 1\n")
    assert model_fingerprint(folder, trust_remote_code=True) != trusted


def test_a_file_put_in_anothers_place_is_read_again(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    file = folder / "model.safetensors"
    before = model_fingerprint(folder)
    times = (1_600_000_000, 1_600_000_000)
    os.utime(file, times)
    model_fingerprint(folder)
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes()[:-1] + b"\x55")
    os.utime(other, times)
    other.replace(file)
    assert model_fingerprint(folder) != before


def test_trusted_code_of_another_place_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    folder = write_own_code(tmp_path / "model", tmp_path / "ran")
    elsewhere = tmp_path / "code"
    elsewhere.mkdir()
    (folder / "own.py").rename(elsewhere / "own.py")
    auto = json.loads((folder / "config.json").read_text())["auto_map"]
    refs = {name: f"{elsewhere}--{ref}" for name, ref in auto.items()}
    edit_json(folder / "config.json", auto_map=refs)
    before = load(folder, trust_remote_code=True).fingerprint
    with (elsewhere / "own.py").open("a") as file:
        file.write("x = 1\n")
    assert load(folder, trust_remote_code=True).fingerprint != before


@pytest.mark.parametrize(("kind", "package"), [("gptq", "optimum"), ("awq", "gptqmodel")])
def test_a_quantised_folder_whose_package_is_not_installed_is_refused_by_that_name(
    tmp_path: Path, kind: str, package: str
) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    settings = {"quant_method": kind, "bits": 4, "group_size": 32}
    edit_json(save_llama(tmp_path) / "config.json", quantization_config=settings)
    with pytest.raises(ConfigError, match=rf"pip install {package}"):
        load(tmp_path)
