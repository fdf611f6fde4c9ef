"""What a session sends: the tokens of earlier turns where the template keeps their text."""

from __future__ import annotations

from itertools import takewhile
from operator import eq
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import KINDS, small_tokenizer

from litecache.adapter.chat_replies import ChatTemplate, Message
from litecache.adapter.chat_surface import Transcript

PLAIN = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TRIMS = PLAIN.replace("m.content }}", "m.content | trim }}")
# An answer loses what it thought as soon as another one is asked for.
FORGETS = PLAIN.replace(
    "m.content }}",
    "m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}",
)


# Of the others a text may have tokens that stand for another one.
LOSSLESS = ("byte-level", "byte-fallback")


def template_of(kind: str, template: str = PLAIN) -> ChatTemplate:
    return ChatTemplate(small_tokenizer(kind), chat_template=template)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(template: ChatTemplate, answer: list[int]) -> Message:
    text = template.decode(answer, skip_special_tokens=True)
    return {"role": "assistant", "content": text}


def tokens_of(template: ChatTemplate, *pieces: str) -> list[int]:
    """Each piece by tokens of its own, so that they are not those that the tokenizer would take."""
    return [token for piece in pieces for token in template.encode(piece)]


WORDS = st.text(st.one_of(st.sampled_from(" the\n'.é🙂"), st.characters(codec="utf-8")), max_size=8)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_the_next_prompt_says_what_the_template_says_and_goes_on_from_the_answers_own_tokens(
    kind: str, data: st.DataObject
) -> None:
    template = template_of(kind, data.draw(st.sampled_from([PLAIN, TRIMS, FORGETS])))
    size = len(template.tokenizer)
    end = template.tokenizer.eos_token_id
    messages: list[Message] = []
    known = Transcript()
    for _ in range(3):
        messages.append(user(data.draw(WORDS)))
        before, known = known, known.with_prompt(template, messages)
        rendered, plain = template.text(messages), template.tokens(messages)
        if kind in LOSSLESS and "\ufffd" not in rendered:
            assert template.decode(known.tokens, skip_special_tokens=False) == template.decode(
                plain, skip_special_tokens=False
            )
        same = sum(1 for _ in takewhile(bool, map(eq, known.tokens, before.tokens)))
        rest = list(known.tokens[same:])
        assert rest == plain[len(plain) - len(rest) :], "neither the template's nor said before"
        # Text that byte tokens stand for is itself whatever is in front of it.
        if kind == "byte-level" and rendered.startswith(before.text):
            assert known.tokens[: len(before.tokens)] == before.tokens
        answer = data.draw(
            st.one_of(
                WORDS.map(template.encode),
                st.lists(st.integers(3, size - 1), min_size=1, max_size=6),
            )
        )
        answer = answer + data.draw(st.sampled_from([[], [end]]))
        prompt, known = known.tokens, known.with_answer(template, answer)
        assert known.tokens == (*prompt, *answer)
        messages.append(said(template, answer))


def test_an_answers_tokens_are_sent_again_though_its_text_has_others() -> None:
    template = template_of("byte-level")
    (end,) = template.encode("</s>")
    answer = [*tokens_of(template, "h", "e", " ", "t"), end]
    assert template.encode("he t</s>") != answer
    first = Transcript().with_prompt(template, [user("hello")])
    assert first.tokens == tuple(template.tokens([user("hello")]))
    turns = [user("hello"), said(template, answer), user("the")]
    second = first.with_answer(template, answer).with_prompt(template, turns)
    rest = template.encode("\n<s>user\nthe</s>\n<s>assistant\n")
    assert second.tokens == (*first.tokens, *answer, *rest)


def test_an_answer_that_was_cut_off_goes_on_with_the_templates_end() -> None:
    template = template_of("byte-level")
    answer = tokens_of(template, "h", "e")
    first = Transcript().with_prompt(template, [user("hello")])
    turns = [user("hello"), said(template, answer), user("the")]
    second = first.with_answer(template, answer).with_prompt(template, turns)
    rest = template.encode("</s>\n<s>user\nthe</s>\n<s>assistant\n")
    assert second.tokens == (*first.tokens, *answer, *rest)


def test_another_end_token_than_the_templates_is_replaced_by_it() -> None:
    template = template_of("byte-level")
    answer = [*tokens_of(template, "h", "e"), *template.encode("<s>")]
    first = Transcript().with_prompt(template, [user("hello")])
    turns = [user("hello"), said(template, answer), user("the")]
    second = first.with_answer(template, answer).with_prompt(template, turns)
    rest = template.encode("</s>\n<s>user\nthe</s>\n<s>assistant\n")
    assert second.tokens == (*first.tokens, *answer[:-1], *rest)


def test_a_turn_that_the_template_rewrites_is_the_templates_and_those_before_it_are_kept() -> None:
    for text, thinks in ((TRIMS, "{} "), (FORGETS, "hm</think>{}")):
        template = template_of("byte-level", text)
        (end,) = template.encode("</s>")
        kept = [*tokens_of(template, "h", "e"), end]
        rewritten = [*template.encode(thinks.format("hello")), end]
        turns = [user("one")]
        known = Transcript().with_prompt(template, turns).with_answer(template, kept)
        first = known.tokens
        turns += [said(template, kept), user("two")]
        known = known.with_prompt(template, turns).with_answer(template, rewritten)
        assert known.tokens[: len(first)] == first
        turns += [said(template, rewritten), user("three")]
        third = known.with_prompt(template, turns)
        plain = template.tokens(turns)
        assert third.tokens[: len(first)] == first
        # one more than the template's: "h", "e" for "he"
        assert list(third.tokens[len(first) :]) == plain[len(first) - 1 :]
        assert template.decode(third.tokens, skip_special_tokens=False) == template.text(turns)


def test_a_token_that_crosses_the_end_of_an_answer_is_not_cut() -> None:
    # nothing stands between an answer and what follows, so that "h" and "e" become one token
    template = template_of("byte-level", "{% for m in messages %}{{ m.content }}{% endfor %}")
    answer = template.encode("h")
    first = Transcript().with_prompt(template, [user("a")])
    turns = [user("a"), said(template, answer), user("ello")]
    second = first.with_answer(template, answer).with_prompt(template, turns)
    assert list(second.tokens) == template.encode("ahello")
    assert second.tokens[:2] != first.tokens + tuple(answer)


def test_what_a_template_cannot_do_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from litecache.errors import ConfigError

    tokenizer: Any = small_tokenizer("byte-level")
    with pytest.raises(ConfigError, match=r"chat_template=None.*without one"):
        ChatTemplate(tokenizer)
    with pytest.raises(ConfigError, match="chat_template_kwargs=7"):
        ChatTemplate(tokenizer, chat_template=PLAIN, options=7)  # type: ignore[arg-type]
    raising = ChatTemplate(tokenizer, chat_template="{{ raise_exception('roles alternate') }}")
    with pytest.raises(ConfigError, match=r"messages=<list of 1 items>.*roles alternate"):
        raising.tokens([user("a")])
    twice = ChatTemplate(tokenizer, chat_template=PLAIN, options={"padding": True})
    with pytest.raises(ConfigError, match="padding"):
        twice.tokens([user("a")])
    trims = ChatTemplate(tokenizer, chat_template="{{ 1 }} content")
    with pytest.raises(ConfigError, match="does not appear") as caught:
        trims.tokens([user("x" * 300), {"role": "assistant", "content": "my secret"}], True)
    assert "secret" not in str(caught.value)
