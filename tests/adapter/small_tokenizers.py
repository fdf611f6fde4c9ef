"""One small tokenizer of each kind that models come with, made here."""

from __future__ import annotations

import string
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

KINDS = ("byte-level", "byte-fallback", "metaspace", "unigram-fallback", "wordpiece")
_SPECIAL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{value:02X}>" for value in range(256)]
_LETTERS = [*string.ascii_letters, *string.digits, *string.punctuation, "é", "に", "ห"]


def _byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("Ġ", "t"), ("Ġ", "Ġ"), ("ã", "ģ"), ("ð", "Ł")]
    pieces = [*_SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_fallback() -> Tokenizer:
    merges = [("▁", "t"), ("h", "e"), ("▁", "▁"), ("l", "l")]
    pieces = [*_SPECIAL, *_BYTES, "▁", *_LETTERS, *("".join(pair) for pair in merges)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _unigram(byte_fallback: bool) -> Tokenizer:
    pieces = [*_SPECIAL, *(_BYTES if byte_fallback else []), "▁", "▁the", "▁▁", "he", *_LETTERS]
    vocab = [(piece, -float(index % 7)) for index, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocab, 0, byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.ByteFallback(), decoders.Metaspace()]
    tokenizer.decoder = decoders.Sequence(steps) if byte_fallback else decoders.Metaspace()
    return tokenizer


def _wordpiece() -> Tokenizer:
    words = [*_LETTERS, "the", "do", "not", "n", "'", "s"]
    pieces = [*_SPECIAL, *dict.fromkeys(words), *(f"##{letter}" for letter in _LETTERS), "##ing"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


@cache
def small_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    tokenizer = {
        "byte-level": _byte_level,
        "byte-fallback": _byte_fallback,
        "metaspace": lambda: _unigram(False),
        "unigram-fallback": lambda: _unigram(True),
        "wordpiece": _wordpiece,
    }[kind]()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
