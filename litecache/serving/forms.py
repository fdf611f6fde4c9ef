"""Answers of a given form: a JSON schema, a pattern or a choice becomes a mask over the next token.

llguidance compiles lazily and within limits (`LLParserLimits`), so that a hostile schema is an
error and costs neither minutes nor gigabytes; its size is bounded before. An answer of a form is an
engine's sequence like any other, guided by a `Form` here: the engine tells each token that it has
drawn, the form answers with what must follow and with the bitmap of what may come then.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from litecache.serving.errors import ApiError
from litecache.serving.tokens import TokenBytes
from litecache.types import mask_bytes

MAX_DEPTH = 64


class FormSpec(NamedTuple):
    """A form as a request asks for it.

    Attributes:
        kind: "json" (a schema), "regex", "choice" (a list of texts) or "lark" (a grammar of ours,
            of which `value` is (text, the schemas in it)).
        value: of that kind.
        param: the request's field.
    """

    kind: str
    value: Any
    param: str


def grammar_of(form: FormSpec, max_bytes: int) -> str:
    """A grammar of llguidance.

    Raises:
        ApiError: 400, it is too large or too deep, or none.
    """
    from llguidance import LLMatcher

    schema = form.value[1] if form.kind == "lark" else form.value
    if _depth(schema) > MAX_DEPTH:
        raise _refused(form.param, f"at most {MAX_DEPTH} levels deep")
    text = schema if form.kind == "regex" else json.dumps(schema)
    if len(text) > max_bytes:
        raise _refused(form.param, f"at most {max_bytes:,} bytes; it has {len(text):,}")
    try:
        if form.kind == "json":
            return str(
                LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
            )
        if form.kind == "regex":
            return str(LLMatcher.grammar_from_regex(text))
        if form.kind == "lark":
            return str(LLMatcher.grammar_from_lark(form.value[0]))
        choices = " | ".join(map(lark_text, form.value))
        return str(LLMatcher.grammar_from_lark(f"start: {choices}"))
    except ValueError as error:
        raise _refused(form.param, f"a form of its kind ({str(error)[:300]})") from error


def lark_text(text: str) -> str:
    """A text as it stands in a grammar."""
    return json.dumps(text, ensure_ascii=False)


def _depth(value: Any) -> int:
    """Levels of a schema, counted without recursion."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += each.values()
            elif isinstance(each, list):
                below += each
        level = below
    return depth


def _refused(param: str, valid: str) -> ApiError:
    return ApiError(400, f"{param} must be {valid}", param=param, code="invalid_json_schema")


class Form:
    """What a grammar allows next; a `Guide` of one answer.

    Args:
        names: of the tokenizer.
        grammar: of `grammar_of`.
        param: the request's field, for errors.
        vocab_size: of the model.
        ends: tokens that end an answer: where only these may follow it is whole.

    Raises:
        ApiError: 400, llguidance does not take the form, or knows no such tokenizer.

    Attributes:
        mask: as in `Guide`.
    """

    def __init__(
        self,
        names: TokenBytes,
        grammar: str,
        *,
        param: str,
        vocab_size: int,
        ends: Collection[int] = (),
    ) -> None:
        from llguidance import LLMatcher, LLParserLimits

        guide = names.guide
        if isinstance(guide, Exception):
            valid = "left out: this model's tokenizer is of a kind that llguidance does not know"
            raise ApiError(400, f"{param} must be {valid}", param=param)
        limits = LLParserLimits(
            max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False
        )
        self._param, self._vocab_size = param, vocab_size
        self._ends = np.array([end for end in ends if end < vocab_size], dtype=np.int64)
        self._matcher = LLMatcher(guide, grammar, log_level=0, limits=limits)
        self._check()
        self.mask = self._mask()
        if not self.mask:
            raise _refused(param, "a form of at least one token")

    def again(self) -> Form:
        """The same form for another answer, before a token was taken."""
        other = object.__new__(Form)
        other.__dict__.update(self.__dict__)
        other._matcher = self._matcher.deep_copy()
        return other

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise _refused(self._param, f"a form that llguidance takes ({reason[:300]})")

    def _mask(self) -> bytes:
        if self._matcher.is_stopped():
            return b""
        bits = np.zeros(mask_bytes(self._vocab_size), dtype=np.uint8)
        found = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[: len(bits)]
        self._check()
        bits[: len(found)] = found
        # llguidance may know tokens that the model cannot draw
        whole, rest = divmod(self._vocab_size, 8)
        if rest:
            bits[whole] &= (1 << rest) - 1
        bits[whole + bool(rest) :] = 0
        if not bits.any():
            raise _refused(self._param, "a form that the model's tokens can spell")
        going_on = bits.copy()
        np.bitwise_and.at(going_on, self._ends >> 3, ~(1 << (self._ends & 7)).astype(np.uint8))
        return bits.tobytes() if going_on.any() else b""

    def take(self, tokens: Sequence[int]) -> list[int]:
        """As in `Guide`.

        Raises:
            ApiError: 400, the form is beyond llguidance's limits.
        """
        forced: list[int] = []
        self._matcher.consume_tokens(list(tokens))
        self._check()
        if not self._matcher.is_stopped():
            forced = self._matcher.compute_ff_tokens()
            if forced:
                self._matcher.consume_tokens(forced)
                self._check()
        self.mask = self._mask()
        return forced
