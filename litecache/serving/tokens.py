"""Tokens as OpenAI's answers show them: a text, its bytes, its log-probability.

A token may be part of a character, so its bytes are the truth and its text is what they spell,
with replacement characters where they spell nothing.
"""

from __future__ import annotations

import codecs
import functools
import threading
from collections.abc import Sequence
from typing import Any

from litecache.types import TokenLogprobs

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has not."""


class TokenBytes:
    """The bytes of each token of a tokenizer.

    llguidance reads them from the tokenizer's own vocabulary, and so do forms; of a tokenizer that
    it does not know, a token's bytes are those of its text.

    Args:
        tokenizer: of transformers.
        vocab_size: of the model, which may be more than the tokenizer's.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self.of = functools.lru_cache(maxsize=1 << 16)(self._of)

    @functools.cached_property
    def guide(self) -> Any:
        """llguidance's `LLTokenizer`, or the error that says why there is none; about a second."""
        with self._lock:
            try:
                from llguidance.hf import from_tokenizer

                size = max(self._vocab_size, len(self._tokenizer))
                return from_tokenizer(self._tokenizer, n_vocab=size)
            except Exception as error:  # whatever it makes of a tokenizer
                return error

    def _of(self, token: int) -> bytes:
        if not isinstance(self.guide, Exception):
            found: bytes = self.guide.decode_bytes([token])
            return found
        return str(self._tokenizer.decode([token])).encode()

    def text(self, token: int) -> str:
        """What its bytes spell."""
        return self.of(token).decode("utf-8", "replace")

    def spelling(self, token: int) -> str:
        """Its text; of a part of a character "bytes:" and what it consists of, as OpenAI has it."""
        data = self.of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    """A number that JSON has."""
    return max(float(logprob), LEAST_LOGPROB) if logprob == logprob else LEAST_LOGPROB


def chat_logprobs(
    names: TokenBytes, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], top: int
) -> list[dict[str, Any]]:
    """Entries of `choices[].logprobs.content`.

    Args:
        names: of the tokenizer.
        tokens: of an answer, or a piece of it.
        logprobs: of each.
        top: how many alternatives each one shows.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        told = {"token": names.text(token), "logprob": finite(logprob)}
        return {**told, "bytes": list(names.of(token))}

    return [
        {
            **entry(token, each.logprob),
            "top_logprobs": [entry(*other) for other in each.top[:top]],
        }
        for token, each in zip(tokens, logprobs, strict=True)
    ]


def completion_logprobs(
    names: TokenBytes,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    top: int,
    offset: int,
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion.

    Args:
        names: of the tokenizer.
        tokens: of the text, or a piece of it.
        logprobs: of each; None for the first token of a prompt, of which nothing tells.
        top: how many alternatives each one shows.
        offset: of the first token's text, in characters.
    """
    texts = [names.spelling(token) for token in tokens]
    offsets = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        offsets.append(offset)
        offset += len(decoder.decode(names.of(token)))
    tops: list[dict[str, float] | None] = []
    for token, each in zip(tokens, logprobs, strict=True):
        if each is None:
            tops.append(None)
            continue
        found: dict[str, float] = {}
        # two tokens of one text: the likelier one stands
        for other, logprob in (*each.top[:top], (token, each.logprob)):
            found.setdefault(names.spelling(other), finite(logprob))
        tops.append(found)
    return {
        "tokens": texts,
        "token_logprobs": [None if each is None else finite(each.logprob) for each in logprobs],
        "top_logprobs": tops if top else None,
        "text_offset": offsets,
    }
