"""Models are loaded as asked, and refused by name before anything else is made."""

from __future__ import annotations

import pickle

import pytest
import torch
from plan_driver import FAMILIES, tiny_model
from transformers import PretrainedConfig

from litecache.config import CacheConfig
from litecache.engine.loading.model_checks import UNSTATED_POSITIONS, check_limits
from litecache.engine.loading.model_loader import load_model
from litecache.engine.loading.model_source import ModelSource
from litecache.errors import ConfigError, ModelNotSupportedError

LLAMA = {**FAMILIES["llama"], "model_type": "llama"}


def load(config, **cache):
    source = ModelSource(config=config, weights="random")
    return load_model(source, CacheConfig(device="cpu", dtype="float32", **cache))


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first, again, other = (tiny_model("llama", seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    weights = [m.model.lm_head.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_saved_model_loads_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LITECACHE_PASSES", "none")
    first = tiny_model("qwen3")
    first.model.save_pretrained(tmp_path)
    config = CacheConfig(device="cpu", max_model_len=100)
    second = load_model(ModelSource(path=str(tmp_path)), config)
    assert second.dtype == torch.float32
    assert second.max_model_len == 100
    assert second.vocab_size == 211
    assert second.specs == first.specs
    for (name, a), (_, b) in zip(
        first.model.named_parameters(), second.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert load_model(ModelSource(path=str(tmp_path)), config).fingerprint == second.fingerprint
    bf16 = load_model(ModelSource(path=str(tmp_path)), CacheConfig(device="cpu", dtype="bfloat16"))
    assert bf16.model.lm_head.weight.dtype == torch.bfloat16
    assert {spec.dtype for spec in bf16.specs} == {"bfloat16"}


def test_layers_with_windows_form_a_group_of_their_own():
    windows = [spec.window for spec in tiny_model("gemma2").specs]
    assert windows == [16, None, 16]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mamba"}, "recurrent"),
        ({"model_type": "qwen3_next"}, "recurrent"),
        ({"model_type": "lfm2"}, "recurrent"),
        ({"model_type": "deepseek_v32"}, "index beside the keys"),
        ({"model_type": "t5"}, "encoder-decoder"),
    ],
)
def test_unsupported_models_are_refused_by_name(config, reason):
    with pytest.raises(ModelNotSupportedError, match=reason) as error:
        load(config, max_model_len=64)
    assert config["model_type"] in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 4),
        ("num_heads", 8),
        ("num_kv_heads", 1),
        ("head_dim", 32),
        ("max_model_len", 257),
    ],
)
def test_fields_that_disagree_with_the_model_are_named(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        load(LLAMA, **{field: value})


def test_a_dynamic_rope_is_taken_up_to_the_length_from_which_it_follows_the_sequence():
    config = {**LLAMA, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}
    assert load(config).max_model_len == 256
    with pytest.raises(ConfigError, match=r"max_model_len=257.*256.*dynamic rope"):
        load(config, max_model_len=257)


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"n_positions": 300}, 300),
        ({"max_seq_len": 700, "n_ctx": 500}, 500),
        ({"max_position_embeddings": None, "max_seq_len": 700}, 700),
        ({}, UNSTATED_POSITIONS),
    ],
)
def test_positions_are_read_from_the_field_that_a_family_has(fields, limit):
    config = PretrainedConfig(**fields)
    assert check_limits(config, CacheConfig()) == limit
    assert check_limits(config, CacheConfig(max_model_len=100)) == 100
    if fields:
        with pytest.raises(ConfigError, match=f"at most {limit}"):
            check_limits(config, CacheConfig(max_model_len=limit + 1))
    else:
        assert check_limits(config, CacheConfig(max_model_len=limit + 1)) == limit + 1


def test_fields_that_agree_are_accepted():
    loaded = load(LLAMA, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16)
    assert loaded.max_model_len == 256


def test_an_unknown_path_or_type_is_named(tmp_path):
    config = CacheConfig(device="cpu")
    with pytest.raises(ConfigError, match="nowhere"):
        load_model(ModelSource(path=str(tmp_path / "nowhere")), config)
    with pytest.raises(ConfigError, match="model="):
        load_model(ModelSource(path=str(tmp_path)), config)
    with pytest.raises(ConfigError, match="no_such_type"):
        load({"model_type": "no_such_type"})


def test_weights_that_cannot_be_read_are_named(tmp_path):
    tiny_model("llama").model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="model="):
        load_model(ModelSource(path=str(tmp_path)), CacheConfig(device="cpu"))


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="cuda:77"):
        load_model(ModelSource(config=LLAMA, weights="random"), CacheConfig(device="cuda:77"))


@pytest.mark.parametrize(
    "fields",
    [{}, {"path": "a", "config": {}}, {"config": {"a": 1}, "weights": "random"}, {"config": LLAMA}],
)
def test_a_source_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ConfigError):
        ModelSource(**fields)


def test_a_source_survives_pickling():
    source = ModelSource(config=LLAMA, weights="random", seed=4)
    assert pickle.loads(pickle.dumps(source)) == source
