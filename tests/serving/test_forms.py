"""Answers of a form: they fit it, and are the tokens that a plain loop of forwards would draw."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from local_server import LocalAdapter, client_of, make_service

from litecache.config import CacheConfig
from litecache.engine.loading.model_loader import load_model
from litecache.serving.errors import ApiError
from litecache.serving.forms import Form, FormSpec, grammar_of
from litecache.serving.service import ModelService
from litecache.serving.tool_calls import tool_format

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi é"}], "max_tokens": 160}
PROMPT = [9, 40, 77, 120, 33, 61] * 3
SCHEMAS: dict[str, Any] = {
    "record": {
        "type": "object",
        "properties": {
            "given_name": {"enum": ["Ada", "Grace", "Alan"]},
            "year_of_birth": {"type": "integer", "minimum": 1900, "maximum": 1999},
            "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
        },
        "required": ["given_name", "year_of_birth", "tags"],
        "additionalProperties": False,
    },
    "choice of two": {"anyOf": [{"const": "yes, of course"}, {"type": "null"}]},
    "references": {
        "$defs": {"leaf": {"type": "object", "properties": {"on": {"type": "boolean"}},
                           "required": ["on"], "additionalProperties": False}},
        "type": "array", "items": {"$ref": "#/$defs/leaf"}, "minItems": 2, "maxItems": 3,
    },
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "$defs": {"unit": {"enum": ["C", "F"]}},
                "type": "object",
                "properties": {
                    "city": {"enum": ["Rome", "Oslo"]},
                    "unit": {"$ref": "#/$defs/unit"},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "time \"now\""}},
]  # fmt: skip


def post(service: ModelService, body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
    async def ask() -> Any:
        async with client_of(service) as client:
            return await client.post(path, json=body)

    return asyncio.run(ask())


def form_of(service: ModelService, kind: str, value: Any, **options: Any) -> Form:
    options = {"param": "x", "vocab_size": service.llm.info.vocab_size, "ends": (2,), **options}
    return Form(service.names, grammar_of(FormSpec(kind, value, "x"), 1 << 16), **options)


@pytest.fixture(scope="module")
def stock(adapter: LocalAdapter) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITECACHE_PASSES", "none")
        model = load_model(adapter._source, CacheConfig(device="cpu", dtype="float32")).model
    model.set_attn_implementation("sdpa")
    return model


def plain_loop(model: Any, service: ModelService, grammar: str, count: int) -> list[int]:
    """Greedy: unmodified transformers' forward, llguidance's mask, the largest logit."""
    from llguidance import LLMatcher

    matcher, tokens = LLMatcher(service.names.guide, grammar, log_level=0), list(PROMPT)
    while len(tokens) - len(PROMPT) < count and not matcher.is_stopped():
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0, -1].float()
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(logits)] == 1)
        tokens.append(int(logits.masked_fill(~allowed, float("-inf")).argmax()))
        matcher.consume_token(tokens[-1])
        if not matcher.is_stopped():
            forced = matcher.compute_ff_tokens()
            matcher.consume_tokens(forced)
            tokens += forced
    return tokens[len(PROMPT) :][:count]


@pytest.mark.parametrize("name", SCHEMAS)
def test_greedy_answers_equal_a_plain_loop_token_for_token_and_fit(
    service: ModelService, stock: Any, name: str
) -> None:
    grammar = grammar_of(FormSpec("json", SCHEMAS[name], "x"), 1 << 16)
    forms = [form_of(service, "json", SCHEMAS[name]) for _ in range(2)]
    rows = service.llm.submit([PROMPT], samples=2, guides=forms, max_new_tokens=160)
    wanted = plain_loop(stock, service, grammar, 160)
    assert [row.wait() for row in rows] == [wanted, wanted]
    text = service.llm.tokenizer.decode(wanted, skip_special_tokens=True)
    jsonschema.validate(json.loads(text), SCHEMAS[name])


@pytest.mark.parametrize("name", SCHEMAS)
def test_samples_differ_by_seed_alone_and_all_fit(service: ModelService, name: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[name]}}
    body = {**CHAT, "response_format": form, "temperature": 1.5, "n": 4, "seed": 7}
    answers = [post(service, {**body, **more}).json() for more in ({}, {}, {"seed": 8})]
    texts = [[c["message"]["content"] for c in answer["choices"]] for answer in answers]
    assert texts[0] == texts[1] != texts[2]
    for text in (*texts[0], *texts[2]):
        jsonschema.validate(json.loads(text), SCHEMAS[name])
    assert service.forms == 0


def test_the_prompt_is_accounted_once_and_found_by_the_next_answer(service: ModelService) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS["record"]}}
    messages = [{"role": "user", "content": "what was accounted once " * 4}]
    body = {**CHAT, "messages": messages, "response_format": form, "temperature": 0}
    first, second = (post(service, body).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] < 20
    assert second["prompt_tokens_details"]["cached_tokens"] == second["prompt_tokens"] - 1
    assert first["completion_tokens"] == second["completion_tokens"]


def test_texts_that_end_an_answer_and_least_lengths_hold(service: ModelService) -> None:
    body = {**CHAT, "guided_json": SCHEMAS["record"], "temperature": 0}
    answer = post(service, {**body, "stop": "_of_birth"}).json()["choices"][0]
    assert answer["message"]["content"].endswith('"year')
    assert answer["finish_reason"] == "stop"
    digits = {**CHAT, "guided_regex": "[0-9]{2,40}", "temperature": 0, "logit_bias": {"2": 100}}
    assert len(post(service, digits).json()["choices"][0]["message"]["content"]) == 2
    longer = post(service, {**digits, "min_tokens": 9}).json()["choices"][0]
    assert len(longer["message"]["content"]) == 9


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_choice": ["red", 'gre"en', "blau é"]}, 'red|gre"en|blau é'),
        ({"guided_regex": "[ab]{3}-(x|yz)"}, "[ab]{3}-(x|yz)"),
        ({"guided_json": '{"enum": [12]}'}, "12"),
        ({"structured_outputs": {"choice": ["one"]}}, "one"),
        ({"structured_outputs": {"regex": "[0-9]{4}"}}, "[0-9]{4}"),
        ({"structured_outputs": {"json": {"const": 5}}}, "5"),
    ],
)
def test_forms_as_vllm_has_them(
    service: ModelService, fields: dict[str, Any], pattern: str
) -> None:
    for temperature in (0, 1.5):
        body = {**CHAT, **fields, "temperature": temperature}
        (choice,) = post(service, body).json()["choices"]
        assert re.fullmatch(pattern, choice["message"]["content"]), choice
        assert choice["finish_reason"] == "stop"
    several = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 60, **fields}
    answer = post(service, several, "/v1/completions").json()
    assert all(re.fullmatch(pattern, choice["text"]) for choice in answer["choices"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_json": {"type": "nothing"}}, "guided_json"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_regex": "a" * 70_000}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice[0]"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, "guided_json"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
        ({"n": 100, "guided_regex": "a"}, "n"),
    ],
)
def test_a_form_that_is_none_is_refused_by_its_field(
    service: ModelService, fields: dict[str, Any], param: str
) -> None:
    answer = post(service, {**CHAT, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert service.forms == service.admission.running == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_forced_call_is_one_of_the_tools_with_arguments_that_fit(
    service: ModelService, choice: str, stream: bool
) -> None:
    asked: Any = choice
    if choice == "named":
        asked = {"type": "function", "function": {"name": "weather"}}
    body = {**CHAT, "tools": TOOLS, "tool_choice": asked, "parallel_tool_calls": False}
    body["max_tokens"] = 100
    schemas = {each["function"]["name"]: each["function"].get("parameters", {}) for each in TOOLS}
    for seed in range(4):
        answer = post(service, {**body, "stream": stream, "temperature": 1.2, "seed": seed})
        if stream:
            events = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
            choices = [c for event in events for c in event["choices"]]
            (calls,) = [c["delta"]["tool_calls"] for c in choices if "tool_calls" in c["delta"]]
            reason = choices[-1]["finish_reason"]
        else:
            (one,) = answer.json()["choices"]
            assert one["message"]["content"] is None, one
            calls, reason = one["message"]["tool_calls"], one["finish_reason"]
        assert reason == "tool_calls"
        (call,) = calls
        assert call["function"]["name"] in (["weather"] if choice == "named" else list(schemas))
        jsonschema.validate(
            json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]]
        )


TEMPLATES = {
    "mistral": "[TOOL_CALLS]",
    "llama": "<|python_tag|>",
    "hermes": "<tool_call>",
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_each_known_format_is_forced_in_its_own_form(adapter: LocalAdapter, family: str) -> None:
    service = make_service(adapter)
    original = adapter.tokenizer.chat_template
    adapter.tokenizer.chat_template = original.replace("<tool_call>", TEMPLATES[family])
    try:
        body = {**CHAT, "tools": TOOLS[:1], "tool_choice": "required", "temperature": 0}
        body["parallel_tool_calls"] = False
        (one,) = post(service, body).json()["choices"]
    finally:
        adapter.tokenizer.chat_template = original
        adapter.check()
        service.stop_threads()
    assert one["finish_reason"] == "tool_calls", one
    for call in one["message"]["tool_calls"]:
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, TOOLS[0]["function"]["parameters"])


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("family", TEMPLATES)
def test_several_calls_may_come_where_they_are_wanted(
    service: ModelService, family: str, several: bool
) -> None:
    from llguidance import LLMatcher

    format = tool_format(TEMPLATES[family])
    assert format is not None
    calls = [f'{{"name": "f", "{format.key}": {{"x": {value}}}}}' for value in ("1", "2")]
    texts = {
        "mistral": f"[TOOL_CALLS][{', '.join(calls)}]",
        "llama": calls[0],
        "hermes": "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls),
    }
    schema = {"properties": {"x": {"type": "integer"}}, "required": ["x"]}
    form = format.form({"f": schema, "g": {}}, several=several, special=lambda text: None)
    matcher = LLMatcher(service.names.guide, grammar_of(form, 1 << 16), log_level=0)
    tokens = service.llm.tokenizer.encode(texts[family], add_special_tokens=False)
    taken = matcher.try_consume_tokens(tokens)
    assert (taken == len(tokens)) == (several or family == "llama"), matcher.get_error()
    if taken == len(tokens):
        assert matcher.is_accepting()
        found = format.read(texts[family])
        assert found == [{"name": "f", "arguments": {"x": 1 + i}} for i in range(len(found or ()))]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": "required", "tools": [{"type": "function"}]}, "tools[0]"),
        ({"tool_choice": "required", "tools": None}, "tool_choice"),
        ({"tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
    ],
)
def test_a_call_that_cannot_be_forced_is_refused(
    service: ModelService, fields: dict[str, Any], param: str
) -> None:
    answer = post(service, {**CHAT, "tools": TOOLS, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_where_the_format_of_calls_is_unknown_none_is_forced(adapter: LocalAdapter) -> None:
    service = make_service(adapter)
    original = adapter.tokenizer.chat_template
    adapter.tokenizer.chat_template = original.replace("tool_call", "other")
    try:
        answer = post(service, {**CHAT, "tools": TOOLS, "tool_choice": "required"})
    finally:
        adapter.tokenizer.chat_template = original
        service.stop_threads()
    assert answer.status_code == 400
    assert "how this model writes calls is not known" in answer.json()["error"]["message"]


def test_a_form_that_fails_on_the_way_ends_its_own_answer_alone(service: ModelService) -> None:
    class Failing:
        mask = form_of(service, "regex", "[ab]+").mask

        def take(self, tokens: Any) -> list[int]:
            raise ApiError(400, "beyond the limits", param="guided_regex")

    bad, good = service.llm.submit(
        [PROMPT],
        samples=2,
        guides=[Failing(), form_of(service, "regex", "[ab]{30}")],
        max_new_tokens=30,
    )
    assert len(good.wait()) == 30
    with pytest.raises(ApiError, match="beyond the limits"):
        bad.wait()
