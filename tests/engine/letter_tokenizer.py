"""A tokenizer over the tokens of the tests' tiny models, most of them short texts."""

from __future__ import annotations

import itertools

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


def letter_tokenizer(size: int = 211) -> PreTrainedTokenizerFast:
    """One to three letters of "abcde" a token, so that texts run over the bounds of tokens."""
    texts = ["".join(t) for size in (1, 2, 3) for t in itertools.product("abcde", repeat=size)]
    texts = texts[: size - 4]
    texts.append("f")  # transformers tokenises "abcdef" to learn how the tokenizer joins
    vocab = {f"<{i}>": i for i in range(3)} | {text: 3 + i for i, text in enumerate(texts)}
    vocab |= {f"x{i}": i for i in range(len(vocab), size)}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)
