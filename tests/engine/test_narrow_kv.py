"""Pools of eight bits: what they hold, that hit and miss agree, and where they are refused."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from engine_harness import Harness, family_source
from plan_driver import FAMILIES, VOCAB, tiny_model
from transformers import AttentionInterface

from litecache.config import CacheConfig
from litecache.engine.kv_layout import KVLayout, KVPool, KVSpec, check_kv_dtype
from litecache.engine.loading import probe
from litecache.engine.loading.model_loader import load_model
from litecache.engine.loading.model_source import ModelSource
from litecache.engine.loading.probe import ProbePlan, paged_logits
from litecache.engine.paged_cache import PagedAttentionCache
from litecache.errors import ConfigError, ModelNotSupportedError
from litecache.kernels import reference
from litecache.kernels.quantise import dequantise, quantise

NARROW = ("int8", "fp8")
TORCH = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of which many begin alike, so that later ones hit what earlier ones left."""
    draw = random.Random(seed)
    stems = [[draw.randrange(1, VOCAB) for _ in range(48)] for _ in range(4)]
    tails = [[draw.randrange(1, VOCAB) for _ in range(draw.randrange(1, 40))] for _ in range(count)]
    return [draw.choice(stems)[: draw.choice((16, 32, 48))] + tail for tail in tails]


@pytest.mark.parametrize(
    ("given", "kept"),
    [("int8", "int8"), (torch.int8, "int8"), ("fp8", "fp8"), ("float8_e4m3fn", "fp8"),
     (torch.float8_e4m3fn, "fp8"), (torch.bfloat16, "bfloat16")],
)  # fmt: skip
def test_a_narrow_pool_may_be_named_or_given_as_a_dtype(given: object, kept: str) -> None:
    assert CacheConfig(kv_dtype=given).kv_dtype == kept  # type: ignore[arg-type]
    for refused in ("int4", torch.float8_e5m2, torch.uint8):
        with pytest.raises(ConfigError, match=r"kv_dtype.*int8, fp8"):
            CacheConfig(kv_dtype=refused)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dtype"):
        CacheConfig(dtype=given if kept != "bfloat16" else "int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", NARROW)
def test_every_byte_of_keys_values_and_scales_has_a_place_of_its_own(dtype: str) -> None:
    specs = [KVSpec(3, 24, 8, dtype)] * 2 + [KVSpec(1, 16, 16, dtype, window=8)]
    layout = KVLayout.from_specs(specs, 8)
    wide = KVLayout.from_specs([dataclasses.replace(s, dtype="bfloat16") for s in specs], 8)
    assert layout.block_bytes <= wide.block_bytes
    for group in layout.groups:
        pool = KVPool(group, 3, "cpu")
        views = []
        for layer in group.layers:
            scales = pool.scales(layer)
            assert all(s is not None and s.shape == (3, group.spec.kv_heads, 8) for s in scales)
            views += [*pool.layer(layer), *scales]
        for view in views:
            view.view(torch.uint8).add_(1)
        assert int(pool.buffer.sum()) == sum(view.numel() * view.itemsize for view in views)
        assert pool.buffer.max() == 1, "two views share a byte"


def test_half_the_bytes_of_bfloat16_and_the_scales_are_all_that_a_block_takes() -> None:
    # the geometry of an 8B model: 1,024 bytes of codes and 64 of scales a token, layer and side
    blocks = {
        dtype: KVLayout.from_specs([KVSpec(8, 128, 128, dtype)] * 32, 16).block_bytes
        for dtype in ("bfloat16", *NARROW)
    }
    assert blocks["int8"] == blocks["fp8"] == 32 * 16 * 2 * 8 * (128 + 4)
    assert blocks["bfloat16"] == 32 * 16 * 2 * 8 * 256


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "int8"), ("llama", "fp8"), ("gemma2", "int8")]
)
def test_hit_and_miss_agree_from_every_tier(family: str, dtype: str) -> None:
    asked = prompts(6, seed=5)
    common = {"kv_dtype": dtype, "deterministic": True, "max_batch_tokens": 32}
    with Harness(family_source(family), folders=[None], **common) as harness:
        assert harness.engine.info.kv_dtype == dtype

        def answers(*emptied: str) -> tuple[list[list[int]], torch.Tensor, set[str]]:
            """Tokens and logprobs of each prompt alone, and the tiers that were of use to all."""
            tokens, told, tiers = [], [], {"gpu", "ram"}
            for prompt in asked:
                tokens += harness.run([prompt], 8, logprobs=1)
                told.append([each.logprob for each in harness.logprobs[0]])
                tiers &= {tier for tier, count in harness.reused[0].items() if count}
                harness.empty(*emptied)
            return tokens, torch.tensor(told), tiers

        cold, exact, tiers = answers("gpu", "ram")
        assert not tiers
        harness.run(asked, 8)
        for emptied in ((), ("gpu",)):
            if emptied:
                harness.empty("gpu")
            tokens, told, tiers = answers(*emptied)
            assert tokens == cold
            assert tiers == {"ram" if emptied else "gpu"}
            # Chunks of other sizes round in another way: far less than a code's step.
            torch.testing.assert_close(told, exact, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_hit_and_miss_give_equal_tokens_whatever_the_chunks() -> None:
    asked = prompts(40, seed=6)
    with Harness(family_source("llama"), kv_dtype="int8", max_batch_tokens=48) as harness:
        cold = []
        for prompt in asked:
            cold += harness.run([prompt], 8)
            harness.empty("gpu")
        harness.run(asked, 1)
        warm = harness.run(asked, 8)
        assert all(counts["gpu"] for counts in harness.reused)
    assert sum(a == b for a, b in zip(cold, warm, strict=True)) >= 39


@pytest.mark.parametrize("dtype", NARROW)
def test_prefill_reads_what_the_pool_holds_its_own_chunk_included(dtype: str) -> None:
    loaded = tiny_model("llama", kv_dtype=dtype)
    assert {spec.dtype for spec in loaded.specs} == {dtype}
    plan = ProbePlan((0, 0), 40)
    logits = paged_logits(loaded.model, loaded.specs, 16, plan)

    def stored(module: torch.nn.Module, query: torch.Tensor, *kv: torch.Tensor, **named: object):
        key, value = (dequantise(*quantise(x, TORCH[dtype])) for x in kv[:2])
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("as_stored", stored)
    loaded.model.set_attn_implementation("as_stored")
    with torch.inference_mode():
        wanted = loaded.model(plan.inputs(loaded.model)[0], use_cache=False).logits
    assert probe.relative_error(logits, wanted) < 1e-4


@pytest.mark.parametrize("dtype", NARROW)
def test_the_paged_cache_attends_over_what_a_narrow_pool_keeps(dtype: str) -> None:
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "num_layers": 2}
    cache = PagedAttentionCache(
        CacheConfig(**shape, num_blocks=8, block_size=8, dtype="float32", kv_dtype=dtype,
                    device="cpu")
    )  # fmt: skip
    first = cache.allocate_sequence()
    key, value = torch.randn(2, 21, 2, 8)
    for layer in range(2):
        cache.append(first, key[:13], value[:13], layer)
    second = cache.fork(first)
    for layer in range(2):
        cache.append(second, key[13:], value[13:], layer)
    query = torch.randn(1, 4, 21, 8)
    tables, lens = cache.block_tables([second]), cache.context_lens([second])
    out = cache.paged_attention(query, tables, lens, layer_idx=1)
    kept = (
        dequantise(*quantise(x, TORCH[dtype])).transpose(0, 1)[None].repeat_interleave(2, 1)
        for x in (key, value)
    )
    wanted = torch.nn.functional.scaled_dot_product_attention(query, *kept, is_causal=True)
    torch.testing.assert_close(out, wanted)
    cache.check_integrity()


def test_heads_that_do_not_fill_words_are_refused_by_name() -> None:
    named = r"kv_dtype='int8'.*words of four, heads here have 6 dimensions"
    shape = {"num_heads": 2, "head_dim": 6, "num_layers": 1, "dtype": "float32", "device": "cpu"}
    with pytest.raises(ConfigError, match=named):
        PagedAttentionCache(CacheConfig(**shape, num_blocks=4, kv_dtype="int8"))
    fields = {**FAMILIES["llama"], "head_dim": 6, "model_type": "llama"}
    source = ModelSource(config=fields, weights="random")
    with pytest.raises(ConfigError, match=named):
        load_model(source, CacheConfig(device="cpu", dtype="float32", kv_dtype="int8"))


def test_a_gpu_without_fp8_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"kv_dtype='fp8'.*NVIDIA A100 has no fp8"):
        check_kv_dtype([KVSpec(2, 16, 16, "fp8")], torch.device("cuda", 0))
    check_kv_dtype([KVSpec(2, 16, 16, "int8")], torch.device("cuda", 0))


def test_a_model_that_eight_bits_would_ruin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # as keys with one huge channel do: what is left of the others is nothing
    def coarse(tokens: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale = quantise(tokens, dtype)
        return codes // 64 * 64, scale

    monkeypatch.setattr(reference, "quantise", coarse)
    with pytest.raises(ModelNotSupportedError, match="logits with kv_dtype=int8 differ by"):
        tiny_model("llama", kv_dtype="int8")


def test_blocks_of_other_forms_have_other_keys_and_names() -> None:
    infos = []
    for dtype in ("float32", *NARROW):
        with Harness(family_source("llama"), kv_dtype=dtype) as harness:
            infos.append(harness.engine.info)
    assert [info.kv_dtype for info in infos] == ["float32", *NARROW]
    assert len({info.roots("") for info in infos}) == len({info.label for info in infos}) == 3
