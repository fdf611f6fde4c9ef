"""Text that is streamed is the text that is decoded, for every kind of tokenizer."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import KINDS, small_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from litecache.adapter.streaming import TextDecoder

TEXTS = {
    "hangul": "안녕하세요 세계",
    "thai": "สวัสดีชาวโลก ทุกคน",
    "kana": "ひらがなとカタカナ",
    "emoji": "👩‍👩‍👧‍👦 ok 🏳️‍🌈🙂🙂🙂",
    "mixed": "the hello\n\n  né 🙂 (a) do not. it's\tfine",
}


def whole(tokenizer: Any, ids: list[int], skip: bool) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    return text


def pieces_of(tokenizer: Any, ids: list[int], skip: bool, sizes: list[int]) -> list[str]:
    decoder = TextDecoder.of(tokenizer, skip)
    pieces, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(decoder.add(ids[at : at + size]))
        at, turn = at + size, turn + 1
    return [*pieces, decoder.add([], last=True)]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_the_pieces_of_any_text_are_complete_characters_and_add_up(
    kind: str, data: st.DataObject
) -> None:
    tokenizer = small_tokenizer(kind)
    alphabet = st.one_of(st.characters(codec="utf-8"), st.sampled_from(" the\n'.安ส🙂ひé"))
    text = data.draw(st.text(alphabet, max_size=60))
    ids = tokenizer.encode(text, add_special_tokens=False)
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    pieces = pieces_of(tokenizer, ids, True, sizes)
    expected = whole(tokenizer, ids, True)
    assert "".join(pieces) == expected
    if "\ufffd" not in expected:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_the_pieces_of_any_tokens_add_up_to_the_whole_decode(
    kind: str, data: st.DataObject
) -> None:
    tokenizer = small_tokenizer(kind)
    # A model's vocabulary may be larger than its tokenizer's.
    token = st.one_of(st.integers(0, len(tokenizer) + 3), st.integers(0, 262))
    ids = data.draw(st.lists(token, max_size=90))
    skip = data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    assert "".join(pieces_of(tokenizer, ids, skip, sizes)) == whole(tokenizer, ids, skip)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_given_out_as_soon_as_nothing_can_change_it(kind: str, name: str) -> None:
    tokenizer = small_tokenizer(kind)
    ids = tokenizer.encode(TEXTS[name] * 3, add_special_tokens=False)
    decoder = TextDecoder.of(tokenizer, True)
    so_far, settled = "", 0
    for count, token in enumerate(ids, 1):
        so_far += decoder.add([token])
        if not tokenizer.convert_ids_to_tokens(token).startswith("<0x"):
            settled = count
        # In a run of byte tokens one wrong byte would turn all of it into replacement characters.
        assert so_far == whole(tokenizer, ids[:settled], True).rstrip("\ufffd")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["the hello ", "\n", "สวัสดี a"])
def test_the_work_for_a_token_does_not_grow_with_the_text(kind: str, text: str) -> None:
    tokenizer = small_tokenizer(kind)
    ids = tokenizer.encode(text * 400, add_special_tokens=False)
    decoder = TextDecoder.of(tokenizer, True)
    decoded = 0
    decode = decoder._decode

    def counting(window: list[int]) -> str:
        nonlocal decoded
        decoded += len(window)
        return decode(window)

    decoder._decode = counting
    given_out = [decoder.add([token]) for token in ids]
    given_out.append(decoder.add([], last=True))
    assert "".join(given_out) == whole(tokenizer, ids, True)
    assert decoded < 60 * len(ids) + 100


CHARACTERS = st.one_of(
    st.sampled_from(" the\n'.,()"),
    st.sampled_from("éñạ̈안ก日本🙂🏳👩\u200d\ufe0f\u0301\u0e33\u3099"),
    st.characters(codec="utf-8"),
)
_BYTES = [f"<0x{value:02X}>" for value in range(256)]


def learned(words: list[list[str]], picks: list[int]) -> list[tuple[str, str]]:
    """Merges as a trainer finds them, but of neighbours that `picks` choose."""
    merges: list[tuple[str, str]] = []
    for pick in picks:
        pairs = sorted({pair for word in words for pair in pairwise(word)})
        if not pairs:
            break
        first, second = pairs[pick % len(pairs)]
        merges.append((first, second))
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == (first, second):
                    word[at : at + 2] = [first + second]
                at += 1
    return list(dict.fromkeys(merges))


@st.composite
def tokenizers_of_any_kind(draw: st.DrawFn) -> tuple[Any, str]:
    """A BPE tokenizer, whose tokens may hold parts of several characters, and a text like those
    that it was made from."""
    texts = draw(st.lists(st.text(CHARACTERS, min_size=1, max_size=12), min_size=1, max_size=4))
    picks = draw(st.lists(st.integers(0, 1 << 16), max_size=24))
    special = ["<s>", "</s>", "<unk>"]
    if draw(st.booleans()):  # bytes are written as letters
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=draw(st.booleans()))
        words = [list(w) for text in texts for w, _ in split.pre_tokenize_str(text)]
        merges = learned(words, picks)
        pieces = [*special, *alphabet, *map("".join, merges)]
        vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
        made = Tokenizer(models.BPE(vocab, merges))
        made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    else:  # characters, and bytes of those that are not in the vocabulary
        known = draw(st.sets(st.sampled_from(sorted(set("".join(texts))))))
        words = [["▁", *("▁" if c == " " else c for c in text if c in known)] for text in texts]
        merges = learned(words, picks)
        fallback = draw(st.booleans())
        pieces = [*special, *(_BYTES if fallback else []), "▁", *sorted(known)]
        pieces += map("".join, merges)
        vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
        made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=fallback))
        metaspace = draw(st.booleans())
        if metaspace:
            made.pre_tokenizer = pre_tokenizers.Metaspace()
            made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        else:
            made.normalizer = normalizers.Replace(" ", "▁")
            steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            if draw(st.booleans()):
                steps.append(decoders.Strip(" ", 1, 0))
            made.decoder = decoders.Sequence(steps)
    added = draw(st.lists(st.sampled_from(["<think>", " <x>", "é🙂", "\n\n"]), unique=True))
    made.add_tokens([AddedToken(text, special=False) for text in added])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return fast, "".join(draw(st.permutations(texts)))


@given(made=tokenizers_of_any_kind(), data=st.data())
def test_the_pieces_add_up_with_any_tokenizer_and_no_character_is_split(
    made: tuple[Any, str], data: st.DataObject
) -> None:
    tokenizer, text = made
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    skip = data.draw(st.booleans())
    ids = tokenizer.encode(text * data.draw(st.integers(1, 4)), add_special_tokens=False)
    pieces = pieces_of(tokenizer, ids, skip, sizes)
    expected = whole(tokenizer, ids, skip)
    assert "".join(pieces) == expected
    if "\ufffd" not in expected:
        assert not any("\ufffd" in piece for piece in pieces)
    # what a model draws need not be the tokens of any text
    generator = random.Random(data.draw(st.integers(0, 1 << 32)))
    anything = [*ids, *range(len(tokenizer) + 3)]
    drawn = generator.choices(anything, k=data.draw(st.integers(0, 90)))
    assert "".join(pieces_of(tokenizer, drawn, skip, sizes)) == whole(tokenizer, drawn, skip)
