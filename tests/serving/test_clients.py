"""Clients that people have, against a running server: answers equal to the adapter's own."""

from __future__ import annotations

import asyncio
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from local_server import model_config, tokenizer
from pydantic import BaseModel
from transformers import LlamaForCausalLM

from litecache import KVCacheAdapter

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it asks the network while it is imported
ALICE, BOB = "alice-secret-0123456789", "bob-secret-0123456789"
GROUP = "clients"
COUNT = 14
MESSAGES: list[Any] = [
    {"role": "system", "content": "short answers"},
    {"role": "user", "content": "hi é🙂"},
]


@dataclass
class Served:
    """A server in the shared cluster, and an adapter of the same group."""

    url: str
    folder: str
    adapter: KVCacheAdapter

    def chat_ids(self, messages: list[Any]) -> list[int]:
        ids = self.adapter.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return list(ids)

    def text(self, ids: list[int], count: int = COUNT) -> str:
        """The adapter's greedy answer."""
        (row,) = self.adapter.submit([ids], max_new_tokens=count, do_sample=False)
        return str(self.adapter.tokenizer.decode(row.wait(), skip_special_tokens=True))

    def chat(self, messages: list[Any], count: int = COUNT) -> str:
        return self.text(self.chat_ids(messages), count)


@pytest.fixture(scope="module")
def served(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from ray import serve

    from litecache.actors.found_groups import stop_group
    from litecache.serving import build_app

    folder = tmp_path_factory.mktemp("clients")
    model = folder / "tiny"
    torch.manual_seed(1)
    LlamaForCausalLM(model_config()).save_pretrained(model)
    tokenizer().save_pretrained(model)
    keys = folder / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"{ALICE} alice\n{BOB} bob\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": "127.0.0.1", "port": port},
        logging_config={"log_level": "WARNING"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        cache = {"num_blocks": 256, "device": "cpu", "dtype": "float32", "ram_bytes": "16MB"}
        settings = {"model": str(model), "group": GROUP, "num_threads": 1, "cache": cache}
        serve.run(build_app({**settings, "api_keys": str(keys)}), name=GROUP, route_prefix="/")
        wait_until_ready(url)
        with KVCacheAdapter(str(model), group=GROUP) as adapter:
            yield Served(url, str(model), adapter)
    finally:
        serve.shutdown()
        stop_group(GROUP)


def wait_until_ready(url: str) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=10).close()
            return
        except (OSError, urllib.error.HTTPError):
            assert time.monotonic() < until
            time.sleep(0.1)


# -- openai


@pytest.fixture
def openai(served: Served) -> Any:
    from openai import OpenAI

    with OpenAI(base_url=f"{served.url}/v1", api_key=ALICE, max_retries=0) as client:
        yield client


def test_openai_answers_are_the_adapters_whole_and_streamed(served: Served, openai: Any) -> None:
    asked = {"model": "tiny", "max_tokens": COUNT, "temperature": 0}
    usage = {"stream_options": {"include_usage": True}}
    expected = served.text(served.adapter.tokenizer("hello world")["input_ids"])
    whole = openai.completions.create(prompt="hello world", **asked)
    assert whole.choices[0].text == expected
    parts = list(openai.completions.create(prompt="hello world", stream=True, **usage, **asked))
    assert "".join(p.choices[0].text for p in parts if p.choices) == expected
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens == COUNT

    expected = served.chat(MESSAGES)
    asked = {"model": "tiny", "max_completion_tokens": COUNT, "temperature": 0}
    answer = openai.chat.completions.create(messages=MESSAGES, **asked)
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens == len(served.chat_ids(MESSAGES))
    chunks = list(openai.chat.completions.create(messages=MESSAGES, stream=True, **usage, **asked))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == expected
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens
    with openai.chat.completions.stream(messages=MESSAGES, **asked) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
    assert "".join(deltas) == expected


def test_openai_async_answers_come_side_by_side(served: Served) -> None:
    from openai import AsyncOpenAI

    asked = [[{"role": "user", "content": f"question {number}"}] for number in range(8)]

    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key=ALICE) as client:

            async def one(messages: list[Any], stream: bool) -> str:
                create = client.chat.completions.create
                fixed: Any = {"model": "tiny", "max_tokens": COUNT, "temperature": 0}
                if not stream:
                    answer = await create(messages=messages, **fixed)
                    return answer.choices[0].message.content or ""
                chunks = await create(messages=messages, stream=True, **fixed)
                return "".join([c.choices[0].delta.content or "" async for c in chunks])

            return await asyncio.gather(*(one(m, i % 2 == 0) for i, m in enumerate(asked)))

    assert asyncio.run(ask()) == [served.chat(messages) for messages in asked]


class Weather(BaseModel):
    """As people write it for `parse`."""

    sky: Literal["clear", "cloudy"]
    rain: bool
    wind: Literal[1, 2, 3] | None


def test_openai_parses_structured_output(openai: Any) -> None:
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200, "temperature": 0}
    answer = openai.chat.completions.parse(response_format=Weather, **asked)
    assert isinstance(answer.choices[0].message.parsed, Weather)
    with openai.chat.completions.stream(response_format=Weather, **asked) as stream:
        final = stream.get_final_completion().choices[0].message
    assert final.parsed == answer.choices[0].message.parsed


def test_openai_reads_logprobs_of_both_endpoints(served: Served, openai: Any) -> None:
    ids = served.chat_ids(MESSAGES)
    (row,) = served.adapter.submit([ids], max_new_tokens=COUNT, do_sample=False, logprobs=2)
    row.wait()
    expected = [each.logprob for each in row.logprobs]
    asked = {"model": "tiny", "max_tokens": COUNT, "temperature": 0}
    (choice,) = openai.chat.completions.create(
        messages=MESSAGES, logprobs=True, top_logprobs=2, **asked
    ).choices
    assert [e.logprob for e in choice.logprobs.content] == pytest.approx(expected, abs=1e-4)
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    (choice,) = openai.completions.create(prompt=ids, logprobs=2, **asked).choices
    assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert all(len(tops) >= 2 for tops in choice.logprobs.top_logprobs)
    assert choice.logprobs.text_offset[0] == 0


def test_openai_sends_what_else_it_has(served: Served, openai: Any) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a place",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
            "strict": True,
        },
    }
    asked = {"model": "tiny", "max_completion_tokens": 4, "temperature": 0}
    answer = openai.chat.completions.create(
        messages=[
            *MESSAGES,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"place": "here"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "clear"},
            {"role": "user", "content": [{"type": "text", "text": "and now?"}], "name": "alice"},
        ],
        tools=[tool],
        tool_choice="auto",
        parallel_tool_calls=False,
        n=2,
        stop=["zzz"],
        seed=3,
        user="someone",
        metadata={"a": "b"},
        logit_bias={"5": -1.0},
        frequency_penalty=0.1,
        presence_penalty=0.1,
        top_p=0.9,
        service_tier="auto",
        store=False,
        prompt_cache_key="x",
        reasoning_effort="low",
        extra_body={"top_k": 5, "min_p": 0.0, "repetition_penalty": 1.1, "cache_salt": "s"},
        **asked,
    )
    assert len(answer.choices) == 2
    assert [model.id for model in openai.models.list()] == ["tiny"]
    assert openai.models.retrieve("tiny").id == "tiny"


def test_openai_raises_its_own_errors(served: Served, openai: Any) -> None:
    from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI

    create = openai.chat.completions.create
    with pytest.raises(NotFoundError, match="other"):
        create(model="other", messages=MESSAGES)
    with pytest.raises(NotFoundError):
        openai.models.retrieve("other")
    with pytest.raises(NotFoundError, match="/v1/embeddings"):
        openai.embeddings.create(model="tiny", input="a")
    with pytest.raises(NotFoundError, match="/v1/responses"):
        openai.responses.create(model="tiny", input="a")
    with pytest.raises(BadRequestError) as wrong:
        create(model="tiny", messages=MESSAGES, temperature=7)
    assert wrong.value.param == "temperature"
    with pytest.raises(BadRequestError) as wrong:
        create(model="tiny", messages=[{"role": "user", "content": "long " * 400}])
    assert wrong.value.code == "context_length_exceeded"
    with (
        OpenAI(base_url=f"{served.url}/v1", api_key="nobody") as nobody,
        pytest.raises(AuthenticationError),
    ):
        nobody.models.list()


# -- others


def test_litellm_answers_are_the_adapters(served: Served) -> None:
    litellm = pytest.importorskip("litellm", reason="needs pip install litellm")
    expected = served.chat(MESSAGES)
    for provider in ("openai", "hosted_vllm"):
        asked: dict[str, Any] = {
            "model": f"{provider}/tiny",
            "messages": MESSAGES,
            "api_base": f"{served.url}/v1",
            "api_key": ALICE,
            "max_tokens": COUNT,
            "temperature": 0,
        }
        answer = litellm.completion(**asked)
        assert answer.choices[0].message.content == expected
        assert answer.usage.completion_tokens == COUNT
        assert answer.usage.prompt_tokens_details.cached_tokens > 0
        chunks = litellm.completion(**asked, stream=True, stream_options={"include_usage": True})
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(texts) == expected
        later = asyncio.run(litellm.acompletion(**asked, n=2, stop=["zzzz"]))
        assert [choice.message.content for choice in later.choices] == [expected] * 2
        scored = litellm.completion(**asked, logprobs=True, top_logprobs=2)
        assert len(scored.choices[0].logprobs.content) == COUNT
    formed = litellm.completion(**{**asked, "max_tokens": 200}, response_format=Weather)
    Weather.model_validate_json(formed.choices[0].message.content)
    text = litellm.text_completion(
        model="text-completion-openai/tiny",
        prompt="hello world",
        **{name: asked[name] for name in ("api_base", "api_key", "max_tokens", "temperature")},
    )
    ids = served.adapter.tokenizer("hello world")["input_ids"]
    assert text.choices[0].text == served.text(ids)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**asked, "api_key": "nobody"})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**asked, "model": "openai/other"})


def test_langchain_answers_are_the_adapters(served: Served) -> None:
    langchain_openai = pytest.importorskip(
        "langchain_openai", reason="needs pip install langchain-openai"
    )
    from langchain_core.tools import tool

    reached = {"base_url": f"{served.url}/v1", "api_key": ALICE, "model": "tiny"}
    model = langchain_openai.ChatOpenAI(**reached, temperature=0, max_completion_tokens=COUNT)
    expected = served.chat(MESSAGES)
    pairs = [(message["role"], message["content"]) for message in MESSAGES]
    answer = model.invoke(pairs)
    assert answer.content == expected
    assert answer.usage_metadata["input_tokens"] == len(served.chat_ids(MESSAGES))
    again = model.invoke(pairs)
    assert again.usage_metadata["input_token_details"]["cache_read"] > 0
    assert "".join(chunk.content for chunk in model.stream(pairs)) == expected
    assert [each.content for each in model.batch([pairs, pairs])] == [expected] * 2
    assert asyncio.run(model.ainvoke(pairs)).content == expected

    @tool
    def weather(place: str) -> str:
        """Of a place."""
        return place

    assert isinstance(model.bind_tools([weather]).invoke(pairs).content, str)
    scored = model.bind(logprobs=True, top_logprobs=2).invoke(pairs)
    assert len(scored.response_metadata["logprobs"]["content"]) == COUNT
    longer = langchain_openai.ChatOpenAI(**reached, temperature=0, max_completion_tokens=200)
    assert isinstance(longer.with_structured_output(Weather).invoke(pairs), Weather)
    formed = longer.with_structured_output(Weather, method="json_schema").invoke(pairs)
    assert isinstance(formed, Weather)
    texts = langchain_openai.OpenAI(**reached, temperature=0, max_tokens=COUNT)
    ids = served.adapter.tokenizer("hello world")["input_ids"]
    assert texts.invoke("hello world") == served.text(ids)
    assert "".join(texts.stream("hello world")) == served.text(ids)


def test_lm_eval_scores_and_answers_are_the_adapters(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason='needs pip install "litecache[eval]"')
    pytest.importorskip("tenacity", reason="needs pip install tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", ALICE)
    llm = served.adapter
    for concurrent in (1, 4):
        lm = LocalCompletionsAPI(
            base_url=f"{served.url}/v1/completions",
            model="tiny",
            tokenizer=served.folder,
            tokenizer_backend="huggingface",
            num_concurrent=concurrent,
            max_length=256,
            batch_size=2,
        )
        pairs = [("the owl hunts", " at night"), ("the owl hunts", " by day"), ("a", "b")]
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        told = lm.loglikelihood(asked, disable_tqdm=True)
        for (context, rest), (score, is_greedy) in zip(pairs, told, strict=True):
            ids = llm.tokenizer(context + rest)["input_ids"]
            behind = len(llm.tokenizer(context)["input_ids"])
            (scores,) = llm.prompt_logprobs([ids], 1)
            mine = scores[behind - 1 :]
            assert score == pytest.approx(sum(each.logprob for each in mine), abs=1e-3)
            first = [each.top[0][0] for each in mine]
            assert is_greedy == (first == ids[behind:])
        options = {"until": ["zzzz"], "max_gen_toks": COUNT, "do_sample": False}
        texts = ["the owl hunts", "hello world", "the mill"]
        asked = [Instance("generate_until", {}, (t, options), i) for i, t in enumerate(texts)]
        answers = lm.generate_until(asked, disable_tqdm=True)
        assert answers == [served.text(llm.tokenizer(t)["input_ids"]) for t in texts]
    chat = LocalChatCompletion(
        base_url=f"{served.url}/v1/chat/completions", model="tiny", num_concurrent=1
    )
    messages = [[{"role": "user", "content": text}] for text in texts]
    asked = [
        Instance("generate_until", {}, (chat.apply_chat_template(each), options), i)
        for i, each in enumerate(messages)
    ]
    assert chat.generate_until(asked, disable_tqdm=True) == [served.chat(m) for m in messages]


# -- what is reused


def test_cached_tokens_over_the_turns_of_a_chat_are_the_adapters(
    served: Served, openai: Any
) -> None:
    messages: list[Any] = [{"role": "system", "content": "a text that all turns begin with"}]
    told, reused = [], []
    for turn in range(4):
        messages.append({"role": "user", "content": f"and what about number {turn}?"})
        answer = openai.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=COUNT,
            temperature=0,
            extra_body={"cache_salt": "turns"},
        )
        assert answer.usage.prompt_tokens_details.cached_tokens == sum(
            answer.usage.model_extra["litecache"]["reused_tokens"].values()
        )
        told.append(answer.usage.prompt_tokens_details.cached_tokens)
        (row,) = served.adapter.submit(
            [served.chat_ids(messages)],
            max_new_tokens=COUNT,
            do_sample=False,
            cache_salt="the adapter's own",
        )
        row.wait()
        reused.append(sum(row.reused_tokens.values()))
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    assert told == reused
    assert told[0] == 0
    assert told == sorted(told)
    assert told[-1] > told[1] > 0
