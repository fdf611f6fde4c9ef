from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, LogitsProcessorList

from litecache.adapter.generation import (
    NEITHER_LOOP,
    NEUTRAL_VALUES,
    NEUTRAL_WHEN_SAMPLING,
    GenerationSettings,
    draw_seed,
    needs_driver,
    translate,
)
from litecache.errors import ConfigError
from litecache.types import SamplingParams

MODEL = GenerationConfig(eos_token_id=2, pad_token_id=0)


def settings(given: GenerationConfig | None = None, **overrides: Any) -> GenerationSettings:
    return translate(given, overrides, MODEL)


def params(width: int, limit: int | None = None, **overrides: Any) -> SamplingParams:
    return settings(**overrides).sampling_params(width, max_positions=limit, seed=0, sample_index=0)


def test_arguments_go_before_the_given_config_before_the_model_before_the_defaults() -> None:
    model = GenerationConfig(temperature=0.3, top_p=0.4, top_k=7, do_sample=True)
    given = GenerationConfig(temperature=0.5, top_p=0.6)
    merged = translate(given, {"temperature": 0.9}, model).sampling
    assert (merged.temperature, merged.top_p, merged.top_k) == (
        0.9,
        0.6,
        7,
    )
    assert merged.min_p == 0.0


def test_sampling_without_settings_uses_hugging_faces_top_k_of_50() -> None:
    merged = settings(do_sample=True).sampling
    assert (merged.temperature, merged.top_k, merged.top_p) == (
        1.0,
        50,
        1.0,
    )


def test_greedy_settings_are_neutral() -> None:
    model = GenerationConfig(temperature=0.6, top_p=0.9, top_k=40)
    sampling = translate(None, {"max_new_tokens": 3}, model).sampling_params(
        5, max_positions=None, seed=9, sample_index=1
    )
    assert sampling == SamplingParams(max_new_tokens=3, seed=9, sample_index=1)


@pytest.mark.parametrize(
    ("overrides", "width", "limit", "expected"),
    [
        ({"max_new_tokens": 7}, 10, None, 7),
        ({"max_length": 30}, 10, None, 20),
        ({"max_new_tokens": 7, "max_length": 12}, 10, None, 7),
        ({}, 10, None, 20),
        ({}, 10, 25, 15),
    ],
)
def test_lengths_count_as_in_hugging_face(
    overrides: dict[str, Any], width: int, limit: int | None, expected: int
) -> None:
    assert params(width, limit, **overrides).max_new_tokens == expected


@pytest.mark.parametrize(
    ("overrides", "width", "expected"),
    [({"min_new_tokens": 4}, 10, 4), ({"min_length": 12}, 10, 2), ({"min_length": 5}, 10, 0)],
)
def test_minimum_lengths(overrides: dict[str, Any], width: int, expected: int) -> None:
    assert params(width, max_new_tokens=20, **overrides).min_new_tokens == expected


def test_a_prompt_as_long_as_max_length_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_length=10.*more than the 10 tokens"):
        params(10, max_length=10)


@pytest.mark.parametrize(
    ("eos", "expected"),
    [(5, (5,)), ([5, 6], (5, 6)), (torch.tensor([7]), (7,)), (-1, ()), ([-1, 5], (5,))],
)
def test_end_tokens_may_be_one_or_several(eos: Any, expected: tuple[int, ...]) -> None:
    assert settings(eos_token_id=eos).sampling.eos_token_ids == expected


def test_the_pad_token_falls_back_to_the_first_end_token() -> None:
    merged = translate(None, {}, GenerationConfig(eos_token_id=[4, 5]))
    assert (merged.pad_token_id, merged.mask_pad_token) == (4, None)
    assert (settings().pad_token_id, settings().mask_pad_token) == (0, 0)
    assert settings(pad_token_id=2).mask_pad_token is None


def test_temperature_without_do_sample_is_ignored_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"temperature=0.7 has no effect without do_sample=True"):
        merged = settings(temperature=0.7)
    assert not merged.do_sample


def test_a_models_own_sampling_settings_warn_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        translate(None, {"do_sample": False}, GenerationConfig(temperature=0.6, top_p=0.9))


def driven(given: GenerationConfig | None = None, **overrides: Any) -> bool:
    return needs_driver(given, overrides, MODEL)


@pytest.mark.parametrize("name", sorted(NEUTRAL_VALUES))
def test_settings_that_the_engine_loop_lacks_are_refused_there_by_name(name: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        settings(**{name: 2})
    assert refusal.value.field == name
    assert ("loop='driver'" in str(refusal.value)) == (name not in NEITHER_LOOP)


@pytest.mark.parametrize("name", sorted(NEUTRAL_VALUES.keys() - NEITHER_LOOP.keys()))
def test_they_make_a_call_one_of_the_driver_loop(name: str) -> None:
    given = GenerationConfig()
    setattr(given, name, 2)
    assert driven(**{name: 2})
    assert driven(given)
    assert needs_driver(None, {}, given)


@pytest.mark.parametrize("name", sorted(NEITHER_LOOP))
def test_what_neither_loop_has_is_refused_with_what_to_do_instead(name: str) -> None:
    value = torch.ones(1, 2) if name == "token_type_ids" else 2
    for call in (settings, driven):
        with pytest.raises(ConfigError) as refusal:
            call(**{name: value})
        assert refusal.value.field == name
        assert "loop=" not in str(refusal.value)


@pytest.mark.parametrize("name", sorted(NEUTRAL_VALUES))
def test_the_same_settings_at_their_neutral_values_pass(name: str) -> None:
    for value in NEUTRAL_VALUES[name]:
        assert settings(**{name: value}) == settings()
        assert not driven(**{name: value})


@pytest.mark.parametrize(
    ("name", "values", "bad"),
    [
        ("cache_implementation", ("static", "offloaded", "dynamic", "paged"), "quantized"),
        ("cache_implementation", ("hybrid",), 3),
        ("compile_config", (CompileConfig(),), {"fullgraph": True}),
        ("prefill_chunk_size", (1, 512), 0),
        ("use_cache", (True,), 2),
    ],
)
def test_settings_of_how_transformers_computes_change_nothing(
    name: str, values: tuple[Any, ...], bad: Any
) -> None:
    for value in values:
        assert settings(**{name: value}) == settings()
        assert not driven(**{name: value})
    for call in (settings, driven):
        with pytest.raises(ConfigError) as refusal:
            call(**{name: bad})
        assert refusal.value.field == name


@pytest.mark.parametrize("name", sorted(NEUTRAL_WHEN_SAMPLING))
def test_sampling_methods_that_are_missing_are_refused_only_when_they_would_act(name: str) -> None:
    assert not settings(**{name: 0.5}).do_sample
    assert not driven(**{name: 0.5})
    assert driven(do_sample=True, **{name: 0.5})
    with pytest.raises(ConfigError) as refusal:
        settings(do_sample=True, **{name: 0.5})
    assert refusal.value.field == name


def test_a_refusal_in_the_models_own_config_counts_too() -> None:
    with pytest.raises(ConfigError, match=r"guidance_scale=1\.5"):
        translate(None, {}, GenerationConfig(guidance_scale=1.5))
    translate(None, {"guidance_scale": 1.0}, GenerationConfig(guidance_scale=1.5))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits_processor", LogitsProcessorList([lambda ids, scores: scores])),
        ("stopping_criteria", [lambda ids, scores: True]),
        ("prefix_allowed_tokens_fn", lambda batch, ids: [1]),
        ("assistant_model", object()),
        ("past_key_values", DynamicCache()),
        ("position_ids", torch.zeros(1, 2)),
        ("negative_prompt_ids", torch.ones(1, 2)),
        ("custom_generate", lambda model, input_ids: input_ids),
        ("synced_gpus", True),
    ],
)
def test_arguments_that_the_engine_loop_lacks_are_the_drivers(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*not supported by the engine.*loop='driver'"):
        settings(**{name: value})
    assert driven(**{name: value})


def test_arguments_without_effect_pass() -> None:
    nothing = {
        "logits_processor": LogitsProcessorList(),
        "stopping_criteria": None,
        "synced_gpus": False,
        "token_type_ids": torch.zeros(1, 3, dtype=torch.int64),
    }
    settings(**nothing)
    assert not driven(**nothing)


def test_what_the_engine_loop_has_stays_there() -> None:
    assert not driven(
        do_sample=True,
        top_k=5,
        repetition_penalty=1.2,
        num_return_sequences=3,
        stop_strings=["a"],
        max_time=2.0,
        logprobs=2,
        return_dict_in_generate=True,
    )


def test_a_mistyped_argument_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_new_token=3"):
        settings(max_new_token=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 1.5),
        ("top_k", -3),
        ("top_k", 2.5),
        ("min_p", 1.1),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("max_length", -1),
        ("min_new_tokens", -1),
        ("eos_token_id", -5),
        ("pad_token_id", "x"),
        ("num_return_sequences", 0),
        ("max_time", 0.0),
        ("do_sample", 1),
    ],
)
def test_invalid_values_are_refused_by_name(name: str, value: Any) -> None:
    overrides = {"do_sample": True, name: value}
    with pytest.raises(ConfigError) as refusal:
        settings(**overrides)
    assert refusal.value.field == name


def test_several_samples_need_sampling() -> None:
    assert settings(num_return_sequences=3, do_sample=True).num_return_sequences == 3
    with pytest.raises(ConfigError, match="num_return_sequences=3"):
        settings(num_return_sequences=3)


def test_the_seed_comes_from_torchs_generator_when_sampling_only() -> None:
    torch.manual_seed(5)
    first = draw_seed(None, sampling=True)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert draw_seed(None, sampling=False) == 0
    assert draw_seed(None, sampling=True) == first
    assert torch.equal(torch.rand(1), after)
    assert draw_seed(77, sampling=True) == 77
    with pytest.raises(ConfigError, match="seed=-1"):
        draw_seed(-1, sampling=True)


def test_the_callers_settings_stay_as_they_were() -> None:
    given = GenerationConfig(max_new_tokens=3, eos_token_id=[5], bad_words_ids=[[7]])
    before = given.to_dict()
    settings(given, max_new_tokens=9, eos_token_id=4, repetition_penalty=1.5)
    assert given.to_dict() == before


def test_something_else_than_a_generation_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="generation_config"):
        settings({"max_new_tokens": 3})  # type: ignore[arg-type]
