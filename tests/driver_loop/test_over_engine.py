"""The driver loop over an engine in this process: stock results, and what forwards reuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_harness import EngineForward, Harness, family_source
from features import ALL, FEATURES
from plan_driver import stock_model
from scene import tiny_scene
from tiny_models import assert_same, ragged

from litecache.adapter.driver_loop import generate_in_driver
from litecache.adapter.proxy import ModelProxy

BATCH, ECHO = tiny_scene().batch, tiny_scene().echo
SLOW = pytest.mark.slow
FAMILIES = (
    "gemma2",
    pytest.param("llama", marks=SLOW),
    pytest.param("gpt2", marks=SLOW),
    pytest.param("mistral", marks=SLOW),
)
NAMES = (
    "output_logits",
    "do_sample",
    "num_beams, all of them",
    "num_beams, sampling",
    "prompt_lookup_num_tokens",
    "negative_prompt_ids",
    "guidance_scale, beams",
    "prefix_allowed_tokens_fn, beams",
    "logits_processor",
    "use_cache",
    "prefill_chunk_size",
    "custom_generate",
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def harness(family: str) -> Iterator[Harness]:
    with Harness(family_source(family)) as started:
        yield started


def drive(forward: Any, model: Any, **arguments: Any) -> Any:
    proxy = ModelProxy(model.config, model.generation_config, forward)
    arguments = {"max_new_tokens": 9, "pad_token_id": 0, **arguments}
    return generate_in_driver(proxy, arguments.pop("input_ids"), None, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_a_feature_over_the_engine_gives_what_stock_generate_gives(
    harness: Harness, family: str, name: str
) -> None:
    feature, scene = FEATURES[name], tiny_scene()
    call = {**getattr(scene, feature.inputs), **feature.settings(scene)}
    model = stock_model(family, 0, "cpu")
    torch.manual_seed(17)
    expected = model.generate(**{"max_new_tokens": 9, "pad_token_id": 0, **call})
    torch.manual_seed(17)
    assert_same(drive(EngineForward(harness), model, **call), expected)
    harness.check()


def test_an_assistant_over_the_engine(harness: Harness, family: str) -> None:
    model, assistant = stock_model(family, 0, "cpu"), stock_model(family, 1, "cpu")
    inputs = {**ragged(30, seed=6), "assistant_model": assistant, "do_sample": True, **ALL}
    torch.manual_seed(17)
    expected = model.generate(**inputs, max_new_tokens=9, pad_token_id=0)
    torch.manual_seed(17)
    assert_same(drive(EngineForward(harness), model, **inputs), expected)


def test_the_next_turn_of_a_batch_over_the_engine(harness: Harness, family: str) -> None:
    model = stock_model(family, 0, "cpu")
    results = []
    for loop in (lambda **kw: model.generate(**kw, max_new_tokens=9, pad_token_id=0), None):
        run = loop or (lambda **kw: drive(EngineForward(harness), model, **kw))
        first = run(**BATCH, **ALL)
        ids = torch.cat([first.sequences, ragged(4, 4, 4, seed=7)["input_ids"]], dim=1)
        mask = torch.ones_like(ids)
        mask[:, :12] = BATCH["attention_mask"]
        if getattr(model.config, "sliding_window", None) is None:  # stock cannot crop a full window
            first.past_key_values.crop(-3)
        past = first.past_key_values
        results.append(run(input_ids=ids, attention_mask=mask, past_key_values=past, **ALL))
    assert_same(results[1], results[0])


def test_each_step_computes_one_token_a_row(harness: Harness, family: str) -> None:
    model = stock_model(family, 0, "cpu")
    for settings in ({}, {"num_beams": 3, "num_return_sequences": 3}):
        forward = EngineForward(harness)
        out = drive(forward, model, **ragged(40, 23, seed=9), **settings)
        prompts = sorted({23, 40}, reverse=True)
        for step, reused in enumerate(forward.reused[1:], 1):
            assert {*reused} == {length + step - 1 for length in prompts}, step
        assert len(forward.reused) == out.shape[1] - 40


def test_drafts_that_were_wrong_leave_nothing_wrong_behind(harness: Harness, family: str) -> None:
    model = stock_model(family, 0, "cpu")
    plain = drive(EngineForward(harness), model, **ECHO, max_new_tokens=24)
    drafted = drive(
        EngineForward(harness), model, **ECHO, max_new_tokens=24, prompt_lookup_num_tokens=4
    )
    assert torch.equal(drafted, plain)
    assert torch.equal(drive(EngineForward(harness), model, **ECHO, max_new_tokens=24), plain)
