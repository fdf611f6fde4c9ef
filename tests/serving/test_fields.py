"""Fields of requests, one by one: each does what it says, or is refused by its name."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from local_server import LocalAdapter, client_of
from prometheus_client.parser import text_string_to_metric_families
from test_http import CHAT, COMPLETION, post

from litecache.serving.http_app import ROUTES
from litecache.serving.schemas import TemplateFields
from litecache.serving.service import ModelService

PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
]


def said(answer: Any) -> list[str]:
    """The texts of an answer of either kind."""
    choices = answer.json()["choices"]
    return [c["text"] if "text" in c else c["message"]["content"] for c in choices]


def test_a_greedy_chat_is_the_adapters(service: ModelService, adapter: LocalAdapter) -> None:
    ids = adapter.tokenizer.apply_chat_template(
        CHAT["messages"], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    (row,) = adapter.submit([list(ids)], max_new_tokens=12, do_sample=False)
    expected = adapter.tokenizer.decode(row.wait(), skip_special_tokens=True)
    assert said(post(service, "/v1/chat/completions", CHAT)) == [expected]


@pytest.mark.parametrize("path", PATHS)
def test_a_seed_gives_the_same_answers_again_and_each_sample_its_own(
    service: ModelService, path: str
) -> None:
    body = {**PATHS[path], "temperature": 1.2, "n": 3}
    answers = [said(post(service, path, {**body, "seed": seed})) for seed in (7, 7, 8, -7)]
    assert answers[0] == answers[1]
    assert len({text for answer in answers for text in answer}) == 9
    assert said(post(service, path, body)) != said(post(service, path, body))


def test_best_of_is_n_or_refused(service: ModelService) -> None:
    plain = {**COMPLETION, "seed": 1, "temperature": 1.0, "n": 2}
    best = post(service, "/v1/completions", {**plain, "best_of": 2})
    assert said(best) == said(post(service, "/v1/completions", plain))
    for body in ({**COMPLETION, "best_of": 2}, {**plain, "best_of": 3}, {**plain, "best_of": 1}):
        error = post(service, "/v1/completions", body).json()["error"]
        assert (error["param"], error["type"]) == ("best_of", "invalid_request_error")


def test_a_frequency_penalty_counts_how_often_a_token_was_said(service: ModelService) -> None:
    biased = {**COMPLETION, "max_tokens": 40, "logit_bias": {"40": 30}}
    plain = said(post(service, "/v1/completions", biased))[0]
    assert len(set(plain)) == 1
    once = said(post(service, "/v1/completions", {**biased, "presence_penalty": 2.0}))[0]
    often = said(post(service, "/v1/completions", {**biased, "frequency_penalty": 2.0}))[0]
    assert set(once) == set(plain)  # taken off once it does not suffice
    assert 1 < often.count(plain[0]) < 40


def test_max_completion_tokens_is_the_newer_name_of_max_tokens(service: ModelService) -> None:
    plain = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    for given in ({"max_completion_tokens": 3}, {"max_tokens": 3}):
        answer = post(service, "/v1/chat/completions", {**plain, **given}).json()
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["choices"][0]["finish_reason"] == "length"
        more = {**plain, **given, "min_tokens": 4}
        error = post(service, "/v1/chat/completions", more).json()["error"]
        assert (error["param"], error["code"]) == ("min_tokens", "unsupported_value")
    room = post(service, "/v1/chat/completions", {**plain, "ignore_eos": True}).json()["usage"]
    assert room["total_tokens"] == 512


def test_stop_strings_of_parts_of_several_tokens_end_every_sample(service: ModelService) -> None:
    body = {**COMPLETION, "max_tokens": 60, "n": 4, "temperature": 1.0, "seed": 11}
    whole = said(post(service, "/v1/completions", body))
    stops = [text[i : i + 3] for text, i in zip(whole[:3], (5, 11, 20), strict=True)]
    cut = post(service, "/v1/completions", {**body, "stop": stops})
    for text, found, choice in zip(whole, said(cut), cut.json()["choices"], strict=True):
        ends = [text.index(stop) for stop in stops if stop in text]
        assert found == text[: min(ends, default=None)]
        assert choice["finish_reason"] == ("stop" if ends else "length")


class Says:
    """A decoder of a model that says what it is told to."""

    def __init__(self, text: str) -> None:
        self._rest = text

    def add(self, tokens: list[int], *, last: bool = False) -> str:
        size = len(self._rest) if last else 5 * len(tokens)
        found, self._rest = self._rest[:size], self._rest[size:]
        return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_tool_is_read_and_only_where_tools_were_given(
    service: ModelService, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    call = '<tool_call>{"name": "weather", "arguments": {"place": "hére"}}</tool_call>'
    monkeypatch.setattr(service, "decoder", lambda special: Says(f"Well. {call}"))
    for given in ({"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "auto"}, {}):
        answer = post(service, "/v1/chat/completions", {**CHAT, **given, "stream": stream})
        if stream:
            choices = [choice for chunk in answer for choice in chunk["choices"]]
            text = "".join(c["delta"].get("content") or "" for c in choices)
            calls = [each for c in choices for each in c["delta"].get("tool_calls", ())]
            assert [each.pop("index") for each in calls] == list(range(len(calls)))
            reason = choices[-1]["finish_reason"]
        else:
            (choice,) = answer.json()["choices"]
            text, reason = choice["message"]["content"], choice["finish_reason"]
            calls = choice["message"].get("tool_calls", [])
        if not given:
            assert (text, calls, reason) == (f"Well. {call}", [], "length")
            continue
        assert (text.strip(), reason) == ("Well.", "tool_calls")
        (found,) = calls
        assert found["id"].startswith("call_")
        assert found["function"] == {"name": "weather", "arguments": '{"place": "hére"}'}


def test_tools_reach_the_template_unless_none_may_be_called(service: ModelService) -> None:
    def size(**given: Any) -> int:
        answer = post(service, "/v1/chat/completions", {**CHAT, **given})
        return int(answer.json()["usage"]["prompt_tokens"])

    assert size(tools=TOOLS) == size(tools=TOOLS, tool_choice="auto") > size()
    assert size(tools=TOOLS, tool_choice="none") == size(tools=[]) == size()
    for wrong in ([{"x": 1}], [{"type": "function"}], [{**TOOLS[0], "type": "custom"}], [[]]):
        for path, body in (("/v1/chat/completions", CHAT), ("/tokenize", {"messages": []})):
            answer = post(service, path, {**body, "tools": wrong})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools[0]")


def test_a_message_is_continued_or_answered_and_not_both(service: ModelService) -> None:
    last = {"role": "assistant", "content": "It is"}
    body = {**CHAT, "messages": [*CHAT["messages"], last], "continue_final_message": True}
    asked = TemplateFields(continue_final_message=True)
    tokens = service.encode_chat(body["messages"], asked, None)
    answer = post(service, "/v1/chat/completions", body).json()
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    both = post(service, "/v1/chat/completions", {**body, "add_generation_prompt": True})
    assert (both.status_code, both.json()["error"]["param"]) == (400, "add_generation_prompt")


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_tells_usage_where_it_is_asked_to(service: ModelService, path: str) -> None:
    body = {**PATHS[path], "stream": True}
    assert not any("usage" in chunk for chunk in post(service, path, body))
    for option in ({"include_usage": True}, {"continuous_usage_stats": True}):
        *chunks, last = post(service, path, {**body, "stream_options": option})
        if "include_usage" in option:
            assert not any("usage" in chunk for chunk in chunks)
            assert last["choices"] == []
        usage = last["usage"]
        assert usage["completion_tokens"] == 12
        assert usage["total_tokens"] == usage["prompt_tokens"] + 12
        reused = usage["litecache"]["reused_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == sum(reused.values())


def test_a_salt_divides_what_is_reused(service: ModelService) -> None:
    body = {**COMPLETION, "prompt": "several salts divide what is found of this text, one by one"}
    found = []
    for salt in ("a", "b", "a", None, None):
        usage = post(service, "/v1/completions", {**body, "cache_salt": salt}).json()["usage"]
        found.append(usage["prompt_tokens_details"]["cached_tokens"] > 0)
    assert found == [False, False, True, False, True]


@pytest.mark.parametrize("path", PATHS)
def test_a_priority_reaches_the_engine(
    service: ModelService, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    sent: list[int] = []
    submit = service.llm._replicas.submit

    def spy(rows: list[Any], index: int | None = None) -> None:
        sent.extend(row.wire_request().priority for row in rows)
        submit(rows, index)

    monkeypatch.setattr(service.llm._replicas, "submit", spy)
    for given in ({"priority": -3}, {"priority": 5, "n": 2}, {}):
        post(service, path, {**PATHS[path], **given})
    assert sent == [-3, 5, 5, 0]


def test_metrics_are_prometheus_text_and_the_document_names_every_endpoint(
    service: ModelService,
) -> None:
    async def ask() -> tuple[str, Any]:
        async with client_of(service) as client:
            await client.post("/v1/completions", json=COMPLETION)
            document = (await client.get("/openapi.json")).json()
            return (await client.get("/metrics")).text, document

    text, document = asyncio.run(ask())
    families = {family.name: family for family in text_string_to_metric_families(text)}
    labels = {"path": "/v1/completions", "status": "200"}
    (count,) = [s for s in families["litecache_server_requests"].samples if s.labels == labels]
    assert count.value == 1
    assert families["litecache_server_ready"].samples[0].value == 1
    told = {path: next(iter(each)).upper() for path, each in document["paths"].items()}
    assert told == {**ROUTES, "/v1/models/{model}": "GET"}
