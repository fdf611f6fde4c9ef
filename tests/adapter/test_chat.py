"""Conversations through real actors, against stock `transformers`."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import pytest
import torch
from any_values import ANYTHING, good_or_refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from letter_tokenizer import letter_tokenizer
from transformers import LlamaForCausalLM, TextIteratorStreamer, TextStreamer

from litecache.adapter import KVCacheAdapter
from litecache.adapter.chat_replies import ChatReply, ChatStream, Message
from litecache.adapter.chat_surface import ChatSession
from litecache.errors import CapacityError, ConfigError, RequestAborted

TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}"
    "{% if documents %}{% for d in documents %}{{ d.text }}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ '<1>' if m.role == 'assistant' else '<0>' }}{{ m.content }}<2>"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ opening or '<1>' }}{% endif %}"
)
LONG: dict[str, Any] = {"max_new_tokens": 400, "eos_token_id": 210, "suppress_tokens": [210]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Answers of the model have tokens of two and three letters, texts are encoded by letters."""
    made = letter_tokenizer()
    made.add_special_tokens({"bos_token": "<0>", "unk_token": "<1>", "eos_token": "<2>"})
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def chat_llm(
    llm: KVCacheAdapter, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> KVCacheAdapter:
    monkeypatch.setattr(llm, "_tokenizer", tokenizer)
    return llm


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def stock(model: LlamaForCausalLM, prompt: list[int], **kwargs: Any) -> list[int]:
    ids = torch.tensor([prompt])
    kwargs = {"max_new_tokens": 20, "do_sample": False, **kwargs}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs)
    new: list[int] = out[0, len(prompt) :].tolist()
    return new


def prompt_of(tokenizer: Any, messages: list[Message], **kwargs: Any) -> list[int]:
    kwargs = {"add_generation_prompt": True, **kwargs}
    ids: list[int] = tokenizer.apply_chat_template(messages, **kwargs)["input_ids"]
    return ids


def running(llm: KVCacheAdapter) -> int:
    return llm.stats().running


def test_an_answer_is_stock_generates_with_its_usage(
    chat_llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, tokenizer: Any
) -> None:
    messages = [{"role": "system", "content": "abcdeabcde"}, user("edcba" * 4)]
    prompt = prompt_of(tokenizer, messages)
    assert len(prompt) == 35
    wanted = stock(tiny_llama, prompt)
    text = tokenizer.decode(wanted, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    reply = chat_llm.chat(messages, max_new_tokens=20, logprobs=1)
    assert list(reply.token_ids) == wanted
    assert reply.text == text
    assert reply.message == {"role": "assistant", "content": text}
    assert reply.finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (35, 20)
    assert (reply.usage.total_tokens, reply.usage.cached_tokens) == (55, {})
    assert len(reply.logprobs) == 20
    end = wanted[5]
    reply = chat_llm.chat(messages, max_new_tokens=20, eos_token_id=end)
    assert list(reply.token_ids) == wanted[: wanted.index(end) + 1]
    assert reply.finish_reason == "stop"
    assert reply.usage.cached_tokens == {"gpu": 34}


def test_several_conversations_are_one_batch_and_each_is_as_if_alone(
    chat_llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, tokenizer: Any
) -> None:
    conversations = [[user("a" * n), user("bcd")] for n in (1, 40, 7)]
    alone = [stock(tiny_llama, prompt_of(tokenizer, each)) for each in conversations]
    ends = {"eos_token_id": [alone[0][3], alone[2][8]]}
    before = chat_llm.stats().requests
    replies = chat_llm.chat(conversations, max_new_tokens=20, **ends)
    for each, reply in zip(conversations, replies, strict=True):
        prompt = prompt_of(tokenizer, each)
        assert list(reply.token_ids) == stock(tiny_llama, prompt, pad_token_id=0, **ends)
        assert reply.usage.prompt_tokens == len(prompt)
    assert sum(chat_llm.stats().requests.values()) - sum(before.values()) == 3
    (single,) = chat_llm.chat(conversations[:1], max_new_tokens=3)
    assert list(single.token_ids) == alone[0][:3]
    samples = chat_llm.chat(
        conversations[:2], max_new_tokens=6, do_sample=True, num_return_sequences=2, seed=1
    )
    assert [reply.usage.prompt_tokens for reply in samples] == [9, 9, 48, 48]
    assert samples[0].token_ids != samples[1].token_ids


def test_what_a_template_reads_reaches_it(
    chat_llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, tokenizer: Any
) -> None:
    def abcd(a: int) -> None:
        """Do it.

        Args:
            a: a number.
        """

    messages = [user("ab")]
    for ours, theirs in (
        ({"tools": [abcd]}, {"tools": [abcd]}),
        ({"documents": [{"title": "c", "text": "ee"}]}, {"documents": [{"text": "ee"}]}),
        ({"chat_template": "{{ messages[0].content }}"},) * 2,
        ({"chat_template_kwargs": {"opening": "<1>abc"}}, {"opening": "<1>abc"}),
    ):
        prompt = prompt_of(tokenizer, messages, **theirs)
        assert prompt != prompt_of(tokenizer, messages)
        reply = chat_llm.chat(messages, max_new_tokens=8, **ours)
        assert list(reply.token_ids) == stock(tiny_llama, prompt, max_new_tokens=8)
        tools = ours.pop("tools", None)
        assert chat_llm.chat(messages, tools, max_new_tokens=8, **ours).text == reply.text
        session = chat_llm.session(tools=tools, max_new_tokens=8, **ours)
        assert session.send("ab").token_ids == reply.token_ids


def test_the_last_message_is_continued(
    chat_llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, tokenizer: Any
) -> None:
    messages = [user("ab"), {"role": "assistant", "content": "ccd", "name": "x"}]
    prompt = prompt_of(
        tokenizer, messages, add_generation_prompt=False, continue_final_message=True
    )
    assert tokenizer.decode(prompt).endswith("ccd")
    reply = chat_llm.chat(messages, continue_final_message=True, max_new_tokens=8)
    assert list(reply.token_ids) == stock(tiny_llama, prompt, max_new_tokens=8)
    assert reply.message == {"role": "assistant", "content": "ccd" + reply.text, "name": "x"}


@pytest.mark.parametrize("tier", ["gpu", "ram", "disk"])
def test_every_turn_finds_all_whole_blocks_of_the_turns_before_it_the_answers_among_them(
    chat_llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, tokenizer: Any, tier: str
) -> None:
    # Special tokens are no part of the answer's text.
    options = {"max_new_tokens": 37, "suppress_tokens": [0, 1]}
    session = chat_llm.session("abcde" * 3, cache_salt=f"turns {tier}", **options)
    sent: list[int] = []
    ended: str | None = None
    for turn, words in enumerate(["edcba" * 5, "bb", "cc"]):
        for emptied in {"gpu": (), "ram": ("gpu",), "disk": ("gpu", "ram")}[tier]:
            assert chat_llm.flush()["complete"]
            chat_llm.clear(emptied)
        reply = session.send(words)
        # the last token's KV has not been computed
        whole = max(0, len(sent) - 1) // 16 * 16
        assert sum(reply.usage.cached_tokens.values()) == whole
        assert set(reply.usage.cached_tokens) == ({tier} if turn else set())
        opening = [] if turn else prompt_of(tokenizer, session.messages[:1])[:-1]
        ending = tokenizer.encode("<2>") if ended == "length" else []
        new = prompt_of(tokenizer, [user(words)])
        prompt = [*sent, *opening, *ending, *new]
        assert list(reply.token_ids) == stock(tiny_llama, prompt, **options)
        assert reply.usage.prompt_tokens == len(prompt)
        sent, ended = [*prompt, *reply.token_ids], reply.finish_reason
    texts = tokenizer(reply.text, add_special_tokens=False)["input_ids"]
    assert texts != list(reply.token_ids), "the answer's own tokens made no difference"
    assert [m["role"] for m in session.messages] == ["system", *["user", "assistant"] * 3]


def test_an_answer_comes_in_pieces_and_is_the_same(chat_llm: KVCacheAdapter) -> None:
    messages = [user("abc")]
    whole = chat_llm.chat(messages, max_new_tokens=30)
    stream = chat_llm.chat(messages, max_new_tokens=30, stream=True)
    assert isinstance(stream, ChatStream)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == whole.text == stream.reply.text
    assert stream.reply.token_ids == whole.token_ids
    assert (stream.reply.finish_reason, stream.reply.message) == ("length", whole.message)
    assert stream.reply.usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_session_streams_and_goes_on_from_what_was_streamed(chat_llm: KVCacheAdapter) -> None:
    plain = chat_llm.session("ab", max_new_tokens=20)
    streamed = chat_llm.session("ab", max_new_tokens=20)
    for words in ("cd", "ee"):
        reply = plain.send(words)
        stream = streamed.send(words, stream=True)
        assert "".join(stream) == reply.text
        assert streamed.messages == plain.messages


def test_a_turn_that_is_left_leaves_the_conversation_as_it_was(chat_llm: KVCacheAdapter) -> None:
    session = chat_llm.session("ab", max_new_tokens=5)
    session.send("cd")
    before = session.messages

    def close() -> None:
        stream = session.send("ee", stream=True, **LONG)
        next(stream)
        stream.close()

    def drop() -> None:
        next(session.send("ee", stream=True, **LONG))

    def abort() -> None:
        stream = session.send("ee", stream=True, **LONG)
        chat_llm.abort(stream.request_id)
        with pytest.raises(RequestAborted):
            list(stream)

    def fail() -> None:
        with pytest.raises(CapacityError):
            session.send("e" * 600)
        with pytest.raises(ConfigError, match="temperature"):
            session.send("e", do_sample=True, temperature=-1)
        with pytest.raises(ConfigError, match="temperature"):
            session.send("e", do_sample=True, temperature=-1, stream=True)

    async def cancel_at_once() -> None:
        task = asyncio.ensure_future(session.asend("ee", **LONG))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def cancel_later() -> None:
        stream, begun = await session.asend("ee", stream=True, **LONG), asyncio.Event()

        async def read() -> None:
            async for _ in stream:
                begun.set()

        task = asyncio.ensure_future(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    cancels = [lambda: asyncio.run(cancel_at_once()), lambda: asyncio.run(cancel_later())]
    for leave in (close, drop, abort, fail, *cancels):
        leave()
        gc.collect()
        assert session.messages == before
    assert session.send("cc").finish_reason == "length"
    assert running(chat_llm) == 0


def test_one_turn_at_a_time_and_a_fork_is_another_conversation(chat_llm: KVCacheAdapter) -> None:
    session = chat_llm.session("ab", max_new_tokens=6)
    session.send("cd")
    before = session.messages
    stream = session.send("ee", stream=True, **LONG)
    told: list[Exception] = []

    def send() -> None:
        try:
            session.send("dd")
        except ConfigError as error:
            told.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    thread.join(60)
    with pytest.raises(ConfigError, match=r"session=.*midst of a turn"):
        session.undo()
    assert "midst of a turn" in str(told[0])
    fork = session.fork()
    other = fork.send("ee")
    stream.close()
    assert session.messages == before
    assert fork.messages[: len(before)] == before
    assert session.send("ee").token_ids == other.token_ids
    assert session.messages == fork.messages


def test_a_turn_that_is_taken_back_is_forgotten(chat_llm: KVCacheAdapter) -> None:
    session = chat_llm.session(messages=[user("ab")], max_new_tokens=6)
    first = session.send("cd")
    kept = session.messages
    session.send("ee")
    assert session.undo()[0] == user("ee")
    assert session.messages == kept
    assert session.undo() == [user("cd"), first.message]
    assert session.send("cd").token_ids == first.token_ids
    session.undo()
    with pytest.raises(ConfigError, match="without a turn"):
        session.undo()
    several = [{"role": "tool", "content": "d"}, user("e")]
    reply = session.send(several)
    assert session.messages == [user("ab"), *several, reply.message]
    assert session.undo() == [*several, reply.message]


def test_an_event_loop_asks_many_at_once_and_streams(chat_llm: KVCacheAdapter) -> None:
    conversations = [[user(letter * 9)] for letter in "abcd"]
    expected = chat_llm.chat(conversations, max_new_tokens=12)
    sessions = [chat_llm.session(max_new_tokens=12) for _ in conversations]

    async def ask() -> list[list[ChatReply]]:
        one = await asyncio.gather(*(chat_llm.achat(m, max_new_tokens=12) for m in conversations))
        turns = zip(sessions, conversations, strict=True)
        other = await asyncio.gather(*(s.asend(m[0]["content"]) for s, m in turns))
        stream = await chat_llm.achat(conversations[0], max_new_tokens=12, stream=True)
        assert "".join([piece async for piece in stream]) == expected[0].text
        assert stream.reply.token_ids == expected[0].token_ids
        stream = await sessions[0].asend("e", stream=True)
        assert "".join([piece async for piece in stream]) == sessions[0].messages[-1]["content"]
        async for _ in await chat_llm.achat(conversations[1], stream=True, **LONG):
            break
        return [one, other]

    for replies in asyncio.run(ask()):
        assert [r.token_ids for r in replies] == [r.token_ids for r in expected]
    gc.collect()


@pytest.mark.parametrize("loop", ["engine", "driver"])
def test_streamers_and_stop_strings_work_in_a_chat(
    chat_llm: KVCacheAdapter, tokenizer: Any, loop: str
) -> None:
    options = {"max_new_tokens": 30, "loop": loop}
    plain = chat_llm.chat([user("abc")], **options)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    reply = chat_llm.chat([user("abc")], streamer=streamer, **options)
    assert "".join(streamer) == reply.text == plain.text
    stop = plain.text[5:8]
    reply, other = chat_llm.chat([[user("abc")], [user("d")]], stop_strings=stop, **options)
    assert reply.finish_reason == "stop"
    assert stop in reply.text
    assert plain.text.startswith(reply.text)
    assert len(other.token_ids) > len(reply.token_ids) == reply.usage.completion_tokens


@pytest.mark.parametrize("loop", ["engine", "driver"])
def test_a_streamer_of_one_row_refuses_two_in_its_own_words(
    chat_llm: KVCacheAdapter, tokenizer: Any, loop: str
) -> None:
    for made in (TextStreamer, TextIteratorStreamer):
        with pytest.raises(ValueError, match="TextStreamer only supports batch size 1"):
            chat_llm.generate(
                torch.tensor([[3, 4], [5, 6]]), streamer=made(tokenizer), loop=loop, **LONG
            )
    assert chat_llm.chat([user("a")], max_new_tokens=1).finish_reason == "length"


def test_beams_and_python_processors_answer_and_a_session_goes_on_from_them(
    chat_llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, tokenizer: Any
) -> None:
    def only_letters(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, :8] = scores[:, 158:] = -torch.inf
        return scores

    options: dict[str, Any] = {"num_beams": 3, "logits_processor": [only_letters]}
    conversations = [[user("abc")], [user("dd" * 9)]]
    replies = chat_llm.chat(conversations, max_new_tokens=20, **options)
    for each, reply in zip(conversations, replies, strict=True):
        assert list(reply.token_ids) == stock(tiny_llama, prompt_of(tokenizer, each), **options)
        assert reply.finish_reason == "length"
    session = chat_llm.session(max_new_tokens=20, **options)
    first = session.send("abc")
    assert first.token_ids == replies[0].token_ids
    known = session._state.transcript.tokens
    second = session.send("e")
    assert session._state.transcript.tokens[: len(known)] == known
    assert sum(second.usage.cached_tokens.values()) >= (len(known) - 1) // 16 * 16


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "messages=<list of 0 items>.*a list of messages"),
        ("hello", {}, "messages=<str of 5 characters>"),
        ({"role": "user"}, {}, "messages="),
        ([{"content": "a"}], {}, r"messages\[0\]=.*a dict with a role"),
        ([user("a"), 7], {}, r"messages\[1\]=7"),
        ([[user("a")], []], {}, "messages="),
        ([[user("a")], [user("b")]], {"stream": True}, "one conversation with stream"),
        ([user("a")], {"input_ids": [1]}, "input_ids=.*made from the messages"),
        ([user("a")], {"attention_mask": [1]}, "attention_mask="),
        ([user("a")], {"stream": 1}, "stream=1"),
        ([user("a")], {"continue_final_message": "x"}, "continue_final_message='x'"),
        ([user("a")], {"tools": [7]}, "messages=.*JSON schema"),
        ([user("a")], {"chat_template": "{% if %}"}, "messages=.*TemplateSyntaxError"),
        ([user("a")], {"no_such_argument": 1}, "no_such_argument=1"),
        ([user("a")], {"tokenizer": 7}, "chat_template=None"),
    ],
)
def test_a_chat_that_cannot_be_is_refused_by_name(
    chat_llm: KVCacheAdapter, messages: Any, options: dict[str, Any], message: str
) -> None:
    before = chat_llm.stats().prompt_tokens
    with pytest.raises(ConfigError, match=message):
        chat_llm.chat(messages, max_new_tokens=2, **options)
    assert chat_llm.stats().prompt_tokens == before


def test_a_session_takes_one_answer_a_turn(chat_llm: KVCacheAdapter) -> None:
    session = chat_llm.session(do_sample=True, max_new_tokens=2)
    with pytest.raises(ConfigError, match=r"num_return_sequences=2.*fork"):
        session.send("a", num_return_sequences=2)
    with pytest.raises(ConfigError, match="input_ids="):
        chat_llm.session(input_ids=[1])
    with pytest.raises(ConfigError, match="system=7"):
        chat_llm.session(7)  # type: ignore[arg-type]


MESSAGES = st.one_of(
    ANYTHING,
    st.lists(st.one_of(ANYTHING, st.just(user("ab"))), max_size=2),
    st.lists(st.dictionaries(st.sampled_from(["role", "content", "x"]), ANYTHING), max_size=2),
)
NAMES = ["tools", "documents", "chat_template", "chat_template_kwargs", "continue_final_message"]
NAMES += ["stream", "tokenizer"]


@settings(suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_given_to_a_chat(chat_llm: KVCacheAdapter, data: st.DataObject) -> None:
    messages = data.draw(st.one_of(st.just([user("ab")]), MESSAGES))
    name = data.draw(st.sampled_from(NAMES))
    options = {name: data.draw(ANYTHING)} if data.draw(st.booleans()) else {}

    def chat() -> None:
        answer = chat_llm.chat(messages, max_new_tokens=2, **options)
        if isinstance(answer, ChatStream):
            list(answer)

    def session() -> None:
        options.pop("continue_final_message", None)
        stream = options.pop("stream", False)
        made: ChatSession = chat_llm.session(max_new_tokens=2, **options)
        made.send(messages, stream=stream)

    good_or_refused(chat)
    good_or_refused(session)
