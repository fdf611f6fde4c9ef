"""What `KVCacheAdapter` refuses before it starts anything, Ray included."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import ray
from transformers import LlamaConfig, LlamaForCausalLM, RoFormerConfig, ViTConfig

from litecache.adapter import KVCacheAdapter
from litecache.config import CacheConfig
from litecache.engine.loading.fingerprint import model_fingerprint
from litecache.errors import ConfigError, GroupMismatchError, ModelNotSupportedError

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=128,
)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", started)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache_config": CacheConfig(num_layers=5)}, ConfigError, r"num_layers=5"),
        ({"cache_config": CacheConfig(max_model_len=999)}, ConfigError, r"max_model_len=999"),
        ({"cache_config": {"block_size": 16}}, ConfigError, r"cache_config="),
        ({"group": "a:b"}, ConfigError, r"group='a:b'"),
        ({"replicas": 0}, ConfigError, r"replicas=0"),
        ({"num_threads": 1.5}, ConfigError, r"num_threads=1.5"),
        ({"seed": -1}, ConfigError, r"seed=-1"),
        ({"trust_remote_code": "yes"}, ConfigError, r"trust_remote_code='yes'"),
        ({"weights": "auto"}, ConfigError, r"weights='auto'"),
        ({"actor_options": {"cpu": {}}}, ConfigError, r"actor_options='cpu'"),
        ({"actor_options": {"gpu": {"num_cpus": math.nan}}}, ConfigError, r"\['gpu'\].*num_cpus"),
        ({"actor_options": {"shard": {"no_such": 1}}}, ConfigError, r"\['shard'\].*no_such"),
        ({"actor_options": {"gpu": {"num_gpus": "x"}}}, ConfigError, r"\['gpu'\].*num_gpus"),
        ({"actor_options": {"shard": {"max_concurrency": 0}}}, ConfigError, r"\['shard'\]"),
        ({"actor_options": {"shard": {"max_restarts": 2**70}}}, ConfigError, r"\['shard'\]"),
        ({"actor_options": {"coordinator": {5: 5}}}, ConfigError, r"\['coordinator'\]"),
    ],
)
def test_bad_settings_are_refused_before_anything_starts(
    no_ray: None, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        KVCacheAdapter(LLAMA, **{"weights": "random", **options})


def test_unsupported_models_are_named_with_the_reason(no_ray: None) -> None:
    recurrent = LlamaConfig(**{**LLAMA.to_dict(), "mamba_d_state": 16})
    with pytest.raises(ModelNotSupportedError, match=r"'llama' is not supported.*recurrent"):
        KVCacheAdapter(recurrent, weights="random")


def test_what_is_no_language_model_is_refused(no_ray: None) -> None:
    with pytest.raises(ModelNotSupportedError, match=r"'vit'.*no causal language model"):
        KVCacheAdapter(ViTConfig(), weights="random")


def test_an_unknown_path_is_refused(no_ray: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model="):
        KVCacheAdapter(tmp_path / "nothing-here")


def test_a_gpu_that_the_cluster_lacks_is_refused(ray_local: None) -> None:
    config = CacheConfig(device="cuda")
    if ray.cluster_resources().get("GPU"):
        pytest.skip("this cluster has a GPU")
    with pytest.raises(ConfigError, match=r"device='cuda'.*no GPU"):
        KVCacheAdapter(LLAMA, weights="random", cache_config=config)
    with pytest.raises(ConfigError, match=r"Ray picks the GPU"):
        KVCacheAdapter(LLAMA, weights="random", cache_config=CacheConfig(device="cuda:1"))


@pytest.mark.slow
def test_a_model_that_only_the_probe_can_judge_leaves_no_actor(ray_local: None) -> None:
    roformer = RoFormerConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        is_decoder=True,
    )
    with pytest.raises(ModelNotSupportedError, match="roformer"):
        KVCacheAdapter(
            roformer, weights="random", group="roformer", cache_config=CacheConfig(max_model_len=64)
        )
    named = ray.util.list_named_actors(all_namespaces=True)
    assert not [actor for actor in named if ":roformer:" in actor["name"]]


@pytest.mark.slow
def test_a_group_whose_model_was_trained_on_is_not_joined(ray_local: None, tmp_path: Path) -> None:
    LlamaForCausalLM(LLAMA).save_pretrained(tmp_path)
    config = CacheConfig(num_blocks=8, dtype="float32", ram_bytes="4MB")
    with KVCacheAdapter(tmp_path, group="trained", cache_config=config, num_threads=1) as first:
        theirs = first.info.fingerprint
        with KVCacheAdapter(tmp_path, group="trained") as second:
            assert second.info == first.info
        LlamaForCausalLM(LLAMA).save_pretrained(tmp_path)
        with pytest.raises(GroupMismatchError) as mismatch:
            KVCacheAdapter(tmp_path, group="trained")
        with pytest.raises(GroupMismatchError, match="trust_remote_code is False, not True"):
            KVCacheAdapter(tmp_path, group="trained", trust_remote_code=True)
        assert first.generate_batch([[1, 2, 3]], max_new_tokens=2)
    assert theirs in str(mismatch.value)
    assert model_fingerprint(tmp_path) in str(mismatch.value)
