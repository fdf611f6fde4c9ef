"""Settings about logits: what reaches the engine, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from litecache.adapter.generation import translate
from litecache.errors import ConfigError
from litecache.types import SamplingParams

MODEL = GenerationConfig(eos_token_id=2, pad_token_id=0)


def params(given: GenerationConfig | None = None, **overrides: Any) -> SamplingParams:
    settings = translate(given, {"max_new_tokens": 4, **overrides}, MODEL)
    return settings.sampling_params(8, max_positions=None, seed=0, sample_index=0)


def test_rules_reach_the_engine() -> None:
    sampling = params(
        GenerationConfig(repetition_penalty=1.2, no_repeat_ngram_size=3, suppress_tokens=[7, 8]),
        bad_words_ids=[[5], [6, 7], [2], [2, 2]],
        begin_suppress_tokens=[4],
        sequence_bias=[[[9], 1.5], [[3, 4], -2.0], [[9], 2.5]],
        logit_bias={11: -1, 9: 0.5},
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logprobs=2,
        stop_token_ids=[12],
    )
    assert sampling == SamplingParams(
        max_new_tokens=4,
        eos_token_ids=(2, 12),
        logprobs=2,
        # An end token alone is no bad word, as in transformers.
        bad_words_ids=((5,), (6, 7), (2, 2)),
        suppress_tokens=(7, 8),
        begin_suppress_tokens=(4,),
        sequence_bias=(((9,), 2.5), ((3, 4), -2.0), ((11,), -1.0), ((9,), 0.5)),
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
    )
    assert sampling.any_rules


def test_sequence_bias_may_be_a_dict_and_nothing_given_means_no_rules() -> None:
    assert params(sequence_bias={(1, 2): -3.0}).sequence_bias == (((1, 2), -3.0),)
    assert params() == SamplingParams(max_new_tokens=4, eos_token_ids=(2,))
    assert not params().any_rules
    nothing = {"presence_penalty": None, "frequency_penalty": None, "logit_bias": None}
    assert params(**nothing, stop_token_ids=None, logprobs=None) == params()


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("repetition_penalty", 0.0, "above 0"),
        ("repetition_penalty", "x", "above 0"),
        ("repetition_penalty", float("inf"), "finite"),
        ("presence_penalty", float("nan"), "finite"),
        ("frequency_penalty", "much", "finite"),
        ("no_repeat_ngram_size", -1, "at least 0"),
        ("bad_words_ids", [], "at least one"),
        ("bad_words_ids", [5], "a list of at least one token id"),
        ("bad_words_ids", [[]], "at least one token id"),
        ("bad_words_ids", [[-1]], "at least 0"),
        ("suppress_tokens", [1.5], "at least 0"),
        ("begin_suppress_tokens", [-2], "at least 0"),
        ("sequence_bias", [], "not empty"),
        ("sequence_bias", [[5, 1.0]], "token id"),
        ("sequence_bias", [[[5], float("inf")]], "finite number or -inf"),
        ("sequence_bias", [[[5], True]], "finite number or -inf"),
        ("logit_bias", [(5, 1.0)], "{token id: bias}"),
        ("logit_bias", {5: "x"}, "finite number or -inf"),
        ("logit_bias", {-5: 1.0}, "at least 0"),
        ("logprobs", -1, "at least 0"),
        ("logprobs", True, "at least 0"),
        ("stop_token_ids", ["x"], "at least 0"),
        ("stop_strings", [""], "none of them empty"),
        ("stop_strings", 5, "a text or a list of texts"),
    ],
)
def test_bad_values_are_refused_by_name(name: str, value: Any, valid: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        params(**{name: value})
    assert refusal.value.field == name
    assert valid in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("logit_bias", {5: 1.0, 97: 1.0}), ("stop_token_ids", [5, 97]), ("eos_token_id", 97)],
)
def test_tokens_beyond_the_vocabulary_are_refused_by_the_name_that_they_were_given_by(
    name: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=f"{name}=97 .*from 0 to 96"):
        translate(None, {name: value}, MODEL, 97)
    translate(None, {name: value}, MODEL, 98)
