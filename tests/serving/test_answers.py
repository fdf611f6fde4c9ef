"""Answers as they grow: no stop string leaks, no character is split, however tokens come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import small_tokenizer

from litecache.adapter.streaming import TextDecoder
from litecache.serving.answers import Answer, StopFinder
from litecache.serving.tool_calls import CallFinder, tool_format
from litecache.types import TokenLogprobs

TEXTS = st.text("ab<|", max_size=30)


def cut_at_first(text: str, stops: list[str]) -> str:
    """Letter by letter: the text before the first stop string that is complete."""
    for end in range(1, len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            return text[: end - max(map(len, whole))]
    return text


@given(
    st.lists(st.text("ab<|", min_size=1, max_size=4), max_size=12),
    st.lists(st.text("ab<|", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_text_ends_before_the_first_stop_string_in_whatever_pieces_it_comes(
    pieces: list[str], stops: list[str]
) -> None:
    finder, given_out = StopFinder(stops), ""
    expected = cut_at_first("".join(pieces), stops)
    for piece in pieces:
        text, stopped = finder.add(piece)
        given_out += text
        assert expected.startswith(given_out)  # nothing has to be taken back
        if stopped:
            break
    else:
        given_out += finder.rest()
    assert given_out == expected


def row_of(text: str) -> tuple[list[int], list[TokenLogprobs]]:
    tokens = small_tokenizer("byte-level")(text)["input_ids"]
    return tokens, [TokenLogprobs(-float(index), ()) for index in range(len(tokens))]


def answer(*stops: str, silent: tuple[int, ...] = ()) -> Answer:
    return Answer(TextDecoder.of(small_tokenizer("byte-level"), True), stops, silent)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_character_of_several_tokens_is_given_out_whole(size: int) -> None:
    tokens, _ = row_of("aé🙂にb")
    grown = answer()
    pieces = [grown.add(tokens[i : i + size]).text for i in range(0, len(tokens), size)]
    pieces.append(grown.add([], last=True).text)
    assert "".join(pieces) == "aé🙂にb"
    assert not any("�" in piece for piece in pieces)


def test_logprobs_of_a_stop_string_are_not_told_and_its_tokens_count() -> None:
    tokens, logprobs = row_of("abcENDxyz")
    grown = answer("END")
    told, text = [], ""
    for token, logprob in zip(tokens, logprobs, strict=True):
        piece = grown.add([token], [logprob])
        text += piece.text
        told += piece.logprobs
    assert (text, grown.stopped, grown.num_tokens) == ("abc", True, 6)
    assert told == logprobs[:3]


def test_what_only_looks_like_a_stop_string_comes_in_the_end() -> None:
    tokens, logprobs = row_of("abEN")
    grown = answer("END")
    first = grown.add(tokens, logprobs)
    rest = grown.add([], last=True)
    assert (first.text, rest.text) == ("ab", "EN")
    assert first.logprobs + rest.logprobs == logprobs


def test_end_tokens_count_and_are_no_text() -> None:
    grown = answer(silent=(2,))
    tokens, logprobs = row_of("ab")
    piece = grown.add([*tokens, 2], [*logprobs, logprobs[0]], last=True)
    assert (piece.text, grown.num_tokens, len(piece.logprobs)) == ("ab", 3, 3)


HERMES = 'Well. <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
CASES = {
    "hermes": ("<tool_call>", HERMES, "Well. ", [("f", '{"x": 1}')]),
    "a list of calls": (
        "<tool_call>",
        '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"y": "é"}}]',
        "",
        [("f", "{}"), ("g", '{"y": "é"}')],
    ),
    "mistral": (
        "[TOOL_CALLS]",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"x": [1]}}]',
        "",
        [("f", '{"x": [1]}')],
    ),
    "llama": (
        "<|python_tag|>",
        '{"name": "f", "parameters": {"x": null}}',
        "",
        [("f", '{"x": null}')],
    ),
    "llama, two": (
        "<|python_tag|>",
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
        "",
        [("f", "{}"), ("g", "{}")],
    ),
    "no call": ("<tool_call>", "1 < 2 <tool", "1 < 2 <tool", []),
    "no JSON": ("<tool_call>", "a <tool_call>{x}", "a <tool_call>{x}", []),
    "an unknown format": ("", HERMES, HERMES, []),
}


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("case", CASES)
def test_calls_of_tools_are_read_and_what_is_none_stays_text(case: str, size: int) -> None:
    template, said, text, calls = CASES[case]
    finder = CallFinder(tool_format(template))
    given_out = "".join(finder.add(said[i : i + size]) for i in range(0, len(said), size))
    assert text.startswith(given_out)
    rest, found = finder.end()
    assert given_out + rest == text
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in found] == calls
    assert len({call["id"] for call in found}) == len(calls)
