"""The endpoints over a real engine: OpenAI's shapes, equal tokens, errors with their fields."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from local_server import LocalAdapter, client_of, make_service

from litecache.serving import service as service_module
from litecache.serving.http_app import POSTS, HttpApp
from litecache.serving.keys import ApiKeys
from litecache.serving.schemas import TemplateFields
from litecache.serving.service import ModelService
from litecache.serving.settings import ServeSettings

COMPLETION = {"model": "tiny", "prompt": "hello world", "max_tokens": 12, "temperature": 0}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi é🙂"}],
    "max_tokens": 12,
    "temperature": 0,
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def post(service: ModelService, path: str, body: Any = None, **kwargs: Any) -> Any:
    """The answer to one request, and for a stream its events."""

    async def ask() -> Any:
        async with client_of(service) as client:
            given = {"json": body} if body is not None else {}
            answer = await client.post(path, **given, **kwargs)
            if answer.headers["content-type"] == "text/event-stream":
                return events(answer.text)
            return answer

    return asyncio.run(ask())


def events(text: str) -> list[dict[str, Any]]:
    *lines, end = [line for line in text.split("\n\n") if line]
    assert end == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def greedy(adapter: LocalAdapter, prompt: list[int], count: int = 12) -> list[int]:
    (row,) = adapter.submit([prompt], max_new_tokens=count, do_sample=False)
    return row.wait()


def test_a_greedy_completion_is_the_adapters(service: ModelService, adapter: LocalAdapter) -> None:
    ids = adapter.tokenizer("hello world")["input_ids"]
    expected = adapter.tokenizer.decode(greedy(adapter, ids), skip_special_tokens=True)
    for prompt in ("hello world", ids, ["hello world"], [ids]):
        answer = post(service, "/v1/completions", {**COMPLETION, "prompt": prompt}).json()
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (expected, "length")
        assert answer["usage"]["completion_tokens"] == 12
        assert answer["usage"]["prompt_tokens"] == len(ids)


def strip(entry: Any) -> Any:
    """Without the number, whose last digits follow from what else runs."""
    return entry if isinstance(entry, str) else (entry["token"], entry["bytes"])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_says_what_the_whole_answer_says(service: ModelService, path: str) -> None:
    body = {**(COMPLETION if path == "/v1/completions" else CHAT), "n": 2, "seed": 3}
    body |= {"temperature": 1.0, "logprobs": 2 if path == "/v1/completions" else True}
    whole = post(service, path, body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = post(service, path, {**body, **options})
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for index, choice in enumerate(whole["choices"]):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        text = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in mine)
        assert text == (choice.get("text") or choice.get("message", {}).get("content"))
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        key = "tokens" if path == "/v1/completions" else "content"
        told = [entry for c in mine if c["logprobs"] for entry in c["logprobs"][key]]
        assert [strip(entry) for entry in told] == [strip(e) for e in choice["logprobs"][key]]
    assert whole["choices"][0] != whole["choices"][1]


def test_cached_tokens_are_those_that_the_adapter_reuses(
    service: ModelService, adapter: LocalAdapter
) -> None:
    prompt = "a prompt of its own, long enough for a few blocks of tokens"
    counts = []
    for _ in range(2):
        answer = post(service, "/v1/completions", {**COMPLETION, "prompt": prompt}).json()
        usage = answer["usage"]
        tiers = usage["litecache"]["reused_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == sum(tiers.values())
        counts.append(tiers)
    (row,) = adapter.submit([adapter.tokenizer(prompt)["input_ids"]], max_new_tokens=1)
    row.wait()
    assert counts == [{}, row.reused_tokens]
    assert counts[1]["gpu"] > 0


def test_logprobs_are_the_adapters_with_the_bytes_of_each_token(
    service: ModelService, adapter: LocalAdapter
) -> None:
    body = {**CHAT, "logprobs": True, "top_logprobs": 3}
    (choice,) = post(service, "/v1/chat/completions", body).json()["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 12
    text = b"".join(bytes(entry["bytes"]) for entry in content).decode("utf-8", "replace")
    assert text == choice["message"]["content"]
    prompt = service.encode_chat(CHAT["messages"], TemplateFields(), None)
    (row,) = adapter.submit([prompt], max_new_tokens=12, do_sample=False, logprobs=3)
    row.wait()
    assert [e["logprob"] for e in content] == pytest.approx([p.logprob for p in row.logprobs])
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert all(entry["top_logprobs"][0]["logprob"] >= entry["logprob"] for entry in content)


def test_echo_scores_the_prompt_as_evaluations_ask_for_it(
    service: ModelService, adapter: LocalAdapter
) -> None:
    ids = [adapter.tokenizer(text)["input_ids"] for text in ("hello world", "h", "é🙂 abc")]
    body = {**COMPLETION, "prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True}
    answer = post(service, "/v1/completions", body).json()
    scored = adapter.prompt_logprobs([ids[0], ids[2]], 1)
    for choice, prompt, expected in zip(
        answer["choices"], ids, (scored[0], (), scored[1]), strict=True
    ):
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(prompt) + 1
        assert told["token_logprobs"][0] is None
        assert told["token_logprobs"][1:-1] == pytest.approx([p.logprob for p in expected])
        assert choice["text"].startswith(adapter.tokenizer.decode(prompt))
        assert len(told["top_logprobs"]) == len(told["tokens"])
    alone = post(service, "/v1/completions", {**body, "max_tokens": 0}).json()
    assert [len(c["logprobs"]["tokens"]) for c in alone["choices"]] == [len(p) for p in ids]


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(
    service: ModelService, adapter: LocalAdapter
) -> None:
    whole = post(service, "/v1/completions", {**COMPLETION, "max_tokens": 60}).json()
    text = whole["choices"][0]["text"]
    stop = text[10:13]
    expected = text[: text.index(stop)]
    for stream in (False, True):
        body = {**COMPLETION, "max_tokens": 60, "stop": ["never said", stop], "stream": stream}
        answer = post(service, "/v1/completions", body)
        choices = (
            [c for chunk in answer for c in chunk["choices"]]
            if stream
            else answer.json()["choices"]
        )
        assert "".join(choice["text"] for choice in choices) == expected
        assert choices[-1]["finish_reason"] == "stop"


def test_vllms_fields_and_penalties_reach_the_engine(service: ModelService) -> None:
    plain = post(service, "/v1/completions", COMPLETION).json()["choices"][0]["text"]
    for field, value in (
        ("repetition_penalty", 5.0),
        ("presence_penalty", 2.0),
        ("logit_bias", {"40": 100}),
        ("stop_token_ids", list(range(3, 266))),
    ):
        body = {**COMPLETION, "max_tokens": 40, field: value}
        answer = post(service, "/v1/completions", body).json()["choices"][0]
        assert not answer["text"].startswith(plain + plain), field
        if field == "logit_bias":
            assert len(set(answer["text"])) == 1
        if field == "stop_token_ids":
            assert (answer["text"], answer["finish_reason"]) == ("", "stop")
    greedy_by_filter = {**COMPLETION, "temperature": 1.5, "top_k": 1, "min_p": 0.1, "top_p": 0.5}
    assert post(service, "/v1/completions", greedy_by_filter).json()["choices"][0]["text"] == plain
    ends = {**COMPLETION, "logit_bias": {"2": 100}}
    assert post(service, "/v1/completions", ends).json()["usage"]["completion_tokens"] == 1
    more = {**ends, "min_tokens": 4}
    assert post(service, "/v1/completions", more).json()["usage"]["completion_tokens"] == 5
    ignoring = {**ends, "ignore_eos": True}
    assert post(service, "/v1/completions", ignoring).json()["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_a_schema_fits_it(service: ModelService, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    body = {**CHAT, "max_tokens": 100, "response_format": form, "stream": stream, "seed": 5}
    for temperature in (0, 1.5):
        answer = post(service, "/v1/chat/completions", {**body, "temperature": temperature})
        if stream:
            deltas = [c["delta"].get("content", "") for e in answer for c in e["choices"]]
            text, reason = "".join(deltas), answer[-1]["choices"][0]["finish_reason"]
        else:
            (choice,) = answer.json()["choices"]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        person = json.loads(text)
        assert list(person) == ["name", "age"]
        assert isinstance(person["age"], int)
        assert reason == "stop"


def test_a_schema_that_is_too_much_is_refused_and_nothing_is_drawn(service: ModelService) -> None:
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    wide = {"enum": ["x" * 1000] * 100}
    wrong = {"type": "nothing"}
    for schema in (deep, wide, wrong):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = post(service, "/v1/chat/completions", {**CHAT, "response_format": form})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].startswith("response_format")
    assert service.admission.running == 0
    assert service.forms == 0


WRONG_FIELDS = {
    "temperature": ["1", -1, 3, True, [1], {}],
    "top_p": [0, 1.1, "x"],
    "n": [0, 129, 1.5, "2"],
    "max_tokens": [-1, 1.5, "9", 2**40],
    "stop": [[""], [1], {}, ["x"] * 17],
    "logit_bias": [{"x": 1}, {"1": 101}, {"1": "2"}, [1], {"300": 1}],
    "seed": ["x", 2**64],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, {"other": 1}],
    "response_format": [{"type": "xml"}, {"type": "json_schema"}, "json"],
    "priority": [2**40],
    "cache": ["never"],
    "cache_ttl_s": [0, -1],
    "suffix": ["x"],
    "best_of": [3],
    "logprobs": [-1, 21, True],
    "prompt": ["", [], [[]], [-1], [1.5], {}, None, ["a", 1], [[1], "a"], [2**40], [[300]]],
    "stop_token_ids": [[-1], "x", [300]],
    "min_tokens": [100],
    "unknown": [1],
    "top_k": [-2],
    "cache_salt": ["x" * 5000],
}


@pytest.mark.parametrize("field", WRONG_FIELDS)
def test_a_wrong_field_is_400_and_named(service: ModelService, field: str) -> None:
    for value in WRONG_FIELDS[field]:
        answer = post(service, "/v1/completions", {**COMPLETION, field: value})
        error = answer.json()["error"]
        assert answer.status_code == 400, (value, error)
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        told = error["param"] or error["message"]
        assert field in told, error


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
        ),
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}],
                }
            ],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_a_wrong_message_is_named_by_its_place(
    service: ModelService, messages: Any, param: str
) -> None:
    answer = post(service, "/v1/chat/completions", {**CHAT, "messages": messages})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_too_long_is_400_with_the_numbers(service: ModelService) -> None:
    for body, numbers in (
        ({**COMPLETION, "prompt": "x" * 600}, ("512", "600")),
        ({**COMPLETION, "prompt": "x", "max_tokens": 600}, ("512", "601")),
    ):
        error = post(service, "/v1/completions", body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert all(number in error["message"] for number in numbers)


def test_megabytes_of_prompt_are_refused_before_they_are_tokenised(
    service: ModelService, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "x" * 4_000_000

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("tokenised")

    messages = [{"role": "user", "content": text}]
    for path, body in (
        ("/v1/completions", {**COMPLETION, "prompt": text}),
        ("/v1/chat/completions", {**CHAT, "messages": messages}),
        ("/tokenize", {"prompt": text}),
        ("/v1/cache/warm", {"messages": messages}),
    ):
        monkeypatch.setattr(service.llm.tokenizer, "_encode_plus", never)
        error = post(service, path, body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "512" in error["message"]


def test_a_template_gets_what_it_reads_and_nothing_that_is_made_here(
    service: ModelService,
) -> None:
    for name in ("tokenize", "tools", "return_dict", "conversation", "truncation", "padding"):
        for prompt in (True, False):
            body = {**CHAT, "chat_template_kwargs": {name: True}, "add_generation_prompt": prompt}
            answer = post(service, "/v1/chat/completions", body)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "chat_template_kwargs"
    body = {**CHAT, "chat_template_kwargs": {"enable_thinking": False}}
    assert post(service, "/v1/chat/completions", body).status_code == 200
    counts = [
        post(service, "/tokenize", {"messages": CHAT["messages"], "add_generation_prompt": end})
        for end in (True, False)
    ]
    assert counts[0].json()["count"] > counts[1].json()["count"]


def test_an_unknown_model_is_404_and_so_is_a_path(service: ModelService) -> None:
    answer = post(service, "/v1/completions", {**COMPLETION, "model": "gpt-9"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert post(service, "/v1/nothing", {}).status_code == 404
    assert post(service, "/v1/models", {}).status_code == 405


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"null", b"[]", b"3", b'"x"', b'{"model": "\xff"}', b'{"model": "\\ud800"}',
     b'{"model": "tiny", "prompt": "x", "temperature": NaN}', b"[" * 100_000, b'{"a":' * 100_000],
)  # fmt: skip
def test_a_body_that_is_no_request_is_400(service: ModelService, path: str, data: bytes) -> None:
    answer = post(service, path, content=data)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_gigantic_body_is_413_whether_it_says_so_or_not(adapter: LocalAdapter) -> None:
    service = make_service(adapter, max_body_bytes=2048)

    async def endless() -> Any:
        while True:
            yield b"x" * 1000

    for content in (b"x" * 3000, endless()):
        assert post(service, "/v1/completions", content=content).status_code == 413


def test_bodies_are_bounded_together_and_let_go_of(adapter: LocalAdapter) -> None:
    service = make_service(adapter, max_bodies_bytes=2048)
    large = {**COMPLETION, "user": "x" * 3000}
    assert post(service, "/v1/completions", large).status_code == 429
    for _ in range(30):
        assert post(service, "/v1/completions", COMPLETION).status_code == 200
    assert service.body_bytes == 0


def test_who_has_no_key_is_401_and_told_nothing(adapter: LocalAdapter, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice-secret-0123456789 alice\nbob-secret-0123456789 bob\n")
    service = make_service(adapter, ApiKeys.read(str(path)))

    async def ask() -> None:
        async with client_of(service) as client:
            for headers in ({}, {"authorization": "Bearer nobodys-key-0123456789"}):
                for url in ("/v1/models", "/metrics", "/openapi.json"):
                    assert (await client.get(url, headers=headers)).status_code == 401
                answer = await client.post("/v1/completions", json=COMPLETION, headers=headers)
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert "nobodys" not in answer.text
            assert (await client.get("/health")).status_code == 200
            reused = []
            for key in ("alice", "alice", "bob", "bob"):
                headers = {"authorization": f"Bearer {key}-secret-0123456789"}
                body = {**COMPLETION, "prompt": "a prompt that both keys send, of some length"}
                answer = await client.post("/v1/completions", json=body, headers=headers)
                reused.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
            body = {**COMPLETION, "priority": -1}
            answer = await client.post("/v1/completions", json=body, headers=headers)
            assert answer.json()["error"]["param"] == "priority"
            assert reused[0] == reused[2] == 0  # a tenant never sees what another one left
            assert reused[1] == reused[3] > 0

    asyncio.run(ask())


def test_other_machines_are_refused_unless_it_was_said_aloud(adapter: LocalAdapter) -> None:
    async def ask(service: ModelService) -> int:
        async with client_of(service, client=("10.1.2.3", 5)) as client:
            return (await client.post("/v1/completions", json=COMPLETION)).status_code

    assert asyncio.run(ask(make_service(adapter))) == 403
    assert asyncio.run(ask(make_service(adapter, no_auth=True))) == 200


def test_a_full_queue_is_429_with_when_to_come_back(adapter: LocalAdapter) -> None:
    service = make_service(adapter, max_running=1, max_waiting=2)

    async def ask() -> list[Any]:
        async with client_of(service) as client:
            body = {**COMPLETION, "max_tokens": 100, "ignore_eos": True}
            calls = (client.post("/v1/completions", json=body) for _ in range(8))
            return list(await asyncio.gather(*calls))

    answers = asyncio.run(ask())
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 5
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["type"] == "rate_limit_error"
    assert (service.admission.running, service.admission.waiting) == (0, 0)


def test_while_it_loads_it_is_healthy_and_not_ready(
    adapter: LocalAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    loading = ModelService(ServeSettings(model="tiny"), lambda: adapter)

    async def ask(service: ModelService) -> list[int]:
        async with client_of(service) as client:
            got = [(await client.get(path)).status_code for path in ("/health", "/ready")]
            answer = await client.post("/v1/completions", json=COMPLETION)
            return [*got, answer.status_code]

    assert asyncio.run(ask(loading)) == [200, 503, 503]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def fails() -> Any:
        raise ValueError("no such weights")

    failed = ModelService(ServeSettings(model="tiny"), fails)
    failed.start()
    assert failed.wait(60)
    assert asyncio.run(ask(failed)) == [200, 503, 503]
    assert "no such weights" in failed.failure


def test_an_adapter_that_cannot_be_served_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("no such tokenizer")

    closed: list[bool] = []
    opened: Any = SimpleNamespace(
        info=SimpleNamespace(max_requests=1, vocab_size=2),
        tokenizer=None,
        close=lambda: closed.append(True),
    )
    monkeypatch.setattr(service_module, "TokenBytes", fails)
    service = ModelService(ServeSettings(model="tiny"), lambda: opened)
    service.start()
    assert service.wait(60)
    assert (service.state, closed) == ("failed", [True])
    assert "no such tokenizer" in service.failure
    service.stop_threads()


@pytest.mark.parametrize("kind", ["stream", "whole", "form"])
def test_a_client_that_goes_away_leaves_no_request_behind(adapter: LocalAdapter, kind: str) -> None:
    service = make_service(adapter)
    body: dict[str, Any] = {**COMPLETION, "max_tokens": 480, "ignore_eos": True}
    body["stream"] = kind == "stream"
    if kind == "form":
        schema = {"type": "array", "items": {"type": "integer"}, "minItems": 400}
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
        del body["ignore_eos"]
    given = json.dumps(body).encode()

    async def ask() -> None:
        gone = asyncio.Event()
        told: list[Any] = []
        messages = iter([{"type": "http.request", "body": given, "more_body": False}])

        async def receive() -> Any:
            for message in messages:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            told.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        exchange = asyncio.create_task(HttpApp(service)(scope, receive, send))
        while not (service.forms if kind == "form" else adapter.engine.stats()["running"]):
            await asyncio.sleep(0.005)
        rows = list(adapter._replicas.rows.values())
        gone.set()
        await exchange
        assert service.open_streams == 0
        # it was not that the answer came to its end
        assert not any(b"[DONE]" in message.get("body", b"") for message in told)
        assert kind == "stream" or not told
        for _ in range(1000):
            blocks = adapter.engine.stats()["blocks"]
            if not blocks["private"] and not service.admission.running and not service.forms:
                assert kind == "form" or {row.finish_reason for row in rows} == {"abort"}
                return
            await asyncio.sleep(0.005)
        raise AssertionError((blocks, service.admission.running, service.forms))

    asyncio.run(ask())
    adapter.check()


def test_request_ids_come_back_and_logs_hold_no_prompt(
    service: ModelService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "a very private prompt"
    body = {**COMPLETION, "prompt": secret}
    answer = post(service, "/v1/completions", body, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    strange = post(service, "/v1/completions", body, headers={"x-request-id": "a b" * 200})
    assert len(strange.headers["x-request-id"]) == 32
    ours = [record.getMessage() for record in caplog.records if "litecache" in record.name]
    assert any("mine-1" in line and "200" in line for line in ours)
    assert not any(secret in line for line in ours)


def test_texts_and_tokens_go_both_ways(service: ModelService) -> None:
    told = post(service, "/tokenize", {"prompt": "é🙂 hello", "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    back = post(service, "/detokenize", {"tokens": told["tokens"]}).json()
    assert back == {"prompt": "é🙂 hello"}
    assert post(service, "/detokenize", {"tokens": [9999]}).status_code == 400
    chat = post(service, "/tokenize", {"messages": CHAT["messages"]}).json()
    assert chat["tokens"] == service.encode_chat(CHAT["messages"], TemplateFields(), None)
    assert post(service, "/tokenize", {}).status_code == 400


def test_a_warmed_prefix_is_found(service: ModelService) -> None:
    prompt = "a system prompt that is warmed before anybody asks for it"
    told = post(service, "/v1/cache/warm", {"prompt": prompt, "cache_salt": "w"}).json()
    assert told["tokens"]["computed"] == told["prompt_tokens"]
    body = {**COMPLETION, "prompt": prompt, "cache_salt": "w"}
    usage = post(service, "/v1/completions", body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 32
    none = post(service, "/v1/completions", {**body, "cache_salt": "v"}).json()["usage"]
    assert none["prompt_tokens_details"]["cached_tokens"] == 0


def test_what_a_client_sees_as_its_types_parse(service: ModelService) -> None:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    chat = {**CHAT, "logprobs": True, "top_logprobs": 1}
    ChatCompletion.model_validate(post(service, "/v1/chat/completions", chat).json(), strict=True)
    Completion.model_validate(post(service, "/v1/completions", COMPLETION).json(), strict=True)
    for chunk in post(service, "/v1/chat/completions", {**chat, "stream": True}):
        ChatCompletionChunk.model_validate(chunk, strict=True)
