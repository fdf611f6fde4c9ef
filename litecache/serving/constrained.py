"""Answers of a given form: a JSON schema becomes a mask over the next token, by llguidance.

llguidance compiles lazily and within limits (`LLParserLimits`), so that a hostile schema is an
error and costs neither minutes nor gigabytes; its size is bounded before. Masks are applied in the
server's process, in threads of its own: each step is a forward pass of the engine, which hands out
logits, and nothing of the grammar runs on an engine's thread. What the form leaves no choice about
is appended without a forward pass.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from litecache.adapter.forward import logits_tensor
from litecache.adapter.pending import PendingRequest
from litecache.engine.engine_info import EngineInfo
from litecache.engine.running.logit_rules import RowRules, RuleBook, RuledSample
from litecache.errors import RequestAborted
from litecache.serving.errors import ApiError
from litecache.serving.schemas import ResponseFormat
from litecache.serving.tokens import TokenBytes
from litecache.types import FinishReason, SamplingParams, TokenLogprobs

MAX_DEPTH = 64


def grammar_of(form: ResponseFormat, max_bytes: int) -> str:
    """A grammar of llguidance for a `response_format` of JSON.

    Raises:
        ApiError: 400, the schema is too large or too deep, or no schema.
    """
    from llguidance import LLMatcher

    schema: Any = {"type": "object"}
    if form.json_schema is not None:
        schema = {} if form.json_schema.schema_ is None else form.json_schema.schema_
    if _depth(schema) > MAX_DEPTH:
        raise _refused(f"at most {MAX_DEPTH} levels deep")
    text = json.dumps(schema)
    if len(text) > max_bytes:
        raise _refused(f"at most {max_bytes:,} bytes; it has {len(text):,}")
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(
            text, overrides={"whitespace_flexible": False}
        )
    except ValueError as error:
        raise _refused(f"a JSON schema ({str(error)[:300]})") from error
    return grammar


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


def _refused(valid: str) -> ApiError:
    param = "response_format.json_schema.schema"
    return ApiError(400, f"{param} must be {valid}", param=param, code="invalid_json_schema")


class Form:
    """What a grammar allows next.

    Args:
        names: of the tokenizer.
        grammar: of `grammar_of`.

    Raises:
        ApiError: 400, llguidance does not take the schema, or knows no such tokenizer.
    """

    def __init__(self, names: TokenBytes, grammar: str) -> None:
        from llguidance import LLMatcher, LLParserLimits

        guide = names.guide
        if isinstance(guide, Exception):
            valid = "left out: this model's tokenizer is of a kind that llguidance does not know"
            raise ApiError(400, f"response_format must be {valid}", param="response_format")
        limits = LLParserLimits(
            max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False
        )
        self._matcher = LLMatcher(guide, grammar, log_level=0, limits=limits)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise _refused(f"a schema that llguidance takes ({reason[:300]})")

    @property
    def is_whole(self) -> bool:
        """Nothing may follow."""
        return bool(self._matcher.is_stopped())

    def mask(self, vocab_size: int) -> torch.Tensor:
        """Which tokens may be next, bool `[vocab_size]`.

        Raises:
            ApiError: 400, the form is beyond llguidance's limits.
        """
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        found = allowed.flatten()[:vocab_size].bool()
        missing = vocab_size - len(found)
        return torch.nn.functional.pad(found, (0, missing)) if missing else found

    def take(self, token: int) -> list[int]:
        """Go on by a token; the tokens that must follow it.

        Raises:
            ApiError: 400, as in `mask`.
        """
        self._matcher.consume_token(token)
        self._check()
        forced: list[int] = [] if self.is_whole else self._matcher.compute_ff_tokens()
        if forced:
            self._matcher.consume_tokens(forced)
            self._check()
        return forced


class ConstrainedRow:
    """One answer of a form, as it is drawn; read as a `PendingRequest` is, on its event loop.

    Args:
        forward: starts a forward pass over all tokens of a row.
        form: of the answer.
        prompt: token ids.
        sampling: as an engine's.
        info: the engine's.
        run: calls a function in a thread.
        abort: ends a request that is under way.

    Attributes:
        request_id: its name.
        tokens: drawn so far.
        reused_tokens, found_tokens: of the prompt, by tier.
        finish_reason: None while it goes on.
    """

    def __init__(
        self,
        forward: Callable[[Sequence[int]], Awaitable[PendingRequest]],
        form: Form,
        prompt: Sequence[int],
        sampling: SamplingParams,
        info: EngineInfo,
        run: Callable[..., Awaitable[Any]],
        abort: Callable[[str], None],
    ) -> None:
        self.request_id = f"form-{uuid.uuid4().hex[:12]}"
        self.tokens: list[int] = []
        self.reused_tokens: dict[str, int] = {}
        self.found_tokens: dict[str, int] = {}
        self.finish_reason: FinishReason | None = None
        self._forward, self._form, self._info, self._run = forward, form, info, run
        self._prompt, self._sampling, self._abort = list(prompt), sampling, abort
        self._logprobs: list[TokenLogprobs] = []
        self._error: Exception | None = None
        self._wake: Callable[[], object] = lambda: None
        self._wake_at_end = False
        self._under_way: str | None = None
        self._ended: Callable[[], None] = lambda: None
        filters = LogitsProcessorList()
        if sampling.temperature > 0:
            filters.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                filters.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                filters.append(TopPLogitsWarper(sampling.top_p))
            if sampling.min_p:
                filters.append(MinPLogitsWarper(sampling.min_p))
        self._filters = filters
        seed = (sampling.seed + sampling.sample_index) & (2**63 - 1)
        self._random = torch.Generator().manual_seed(seed)
        self._task = asyncio.create_task(self._draw())

    def on_news(self, wake: Callable[[], object], *, whole: bool = False) -> None:
        """As in `PendingRequest`."""
        self._wake, self._wake_at_end = wake, whole

    def on_end(self, ended: Callable[[], None]) -> None:
        """Call `ended` when it is over, in any way."""
        self._ended = ended

    def since(self, start: int) -> tuple[list[int], list[TokenLogprobs], bool]:
        """As in `PendingRequest`."""
        return self.tokens[start:], self._logprobs[start:], self.finish_reason is not None

    def wait(self) -> list[int]:
        """As in `PendingRequest`, of a row that has ended."""
        if self._error is not None:
            raise self._error
        return self.tokens

    def close(self) -> None:
        """Stop drawing."""
        # a task that has not begun would not learn of it
        self._end(FinishReason.ABORT, RequestAborted(f"{self.request_id} was aborted"))
        self._task.cancel()
        if self._under_way is not None:
            self._abort(self._under_way)

    async def _draw(self) -> None:
        reason = FinishReason.LENGTH
        try:
            while len(self.tokens) < self._sampling.max_new_tokens:
                logits = await self._logits()
                new = await self._run(self._step, logits)
                if self._take(new):
                    reason = FinishReason.STOP
                    break
        except asyncio.CancelledError:
            self.close()
            raise
        except Exception as error:  # whoever waits must not wait for ever
            self._end(FinishReason.ERROR, error)
        else:
            self._end(reason, None)

    async def _logits(self) -> torch.Tensor:
        row = await self._forward([*self._prompt, *self.tokens])
        self._under_way = row.request_id
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        row.on_news(lambda: loop.call_soon_threadsafe(ended.set), whole=True)
        if not row.done:
            await ended.wait()
        self._under_way = None
        row.wait()
        if not self.tokens:
            self.reused_tokens, self.found_tokens = row.reused_tokens, row.found_tokens
        assert row.logits is not None
        dtype = getattr(torch, self._info.dtype)
        return logits_tensor(row.logits, 1, self._info.vocab_size, dtype)

    def _step(self, logits: torch.Tensor) -> list[tuple[int, TokenLogprobs | None]]:
        """The next tokens by the logits `[1, vocab]`: one is drawn, the form may force others."""
        given = logits.float()
        sampling, vocab = self._sampling, given.shape[1]
        scores = given.clone()
        if sampling.any_rules:
            tokens = [*self._prompt, *self.tokens]
            rules = dataclasses.replace(sampling, max_new_tokens=1)
            row = RowRules(rules, tokens, len(self._prompt))
            book = RuleBook(len(tokens) + 1, scores.device)
            scores = book.apply(scores, [RuledSample(0, 0, len(tokens), row)])
        mask = self._form.mask(vocab)
        if len(self.tokens) < sampling.min_new_tokens and len(sampling.eos_token_ids) < int(
            mask.sum()
        ):
            mask[list(sampling.eos_token_ids)] = False
        scores = scores.masked_fill(~mask[None], float("-inf"))
        if sampling.temperature > 0:
            scores = self._filters(torch.empty((1, 0), dtype=torch.int64), scores)
            chosen = torch.multinomial(scores.softmax(dim=-1), 1, generator=self._random)
            token = int(chosen)
        else:
            token = int(scores.argmax())
        logprob = None
        if sampling.logprobs is not None:
            all_logprobs = given.log_softmax(dim=-1)[0]
            values, ids = all_logprobs.topk(min(sampling.logprobs, vocab))
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
            logprob = TokenLogprobs(float(all_logprobs[token]), top)
        forced: list[int] = []
        if token not in sampling.eos_token_ids:
            forced = self._form.take(token)
            if sampling.logprobs is not None:
                return [(token, logprob), *((each, TokenLogprobs(0.0, ())) for each in forced)]
        return [(token, logprob), *((each, None) for each in forced)]

    def _take(self, new: Sequence[tuple[int, TokenLogprobs | None]]) -> bool:
        """Append tokens; whether the answer is over."""
        left = self._sampling.max_new_tokens - len(self.tokens)
        over = False
        for token, logprob in new[:left]:
            self.tokens.append(token)
            if logprob is not None:
                self._logprobs.append(logprob)
            over = over or token in self._sampling.eos_token_ids
        over = over or (len(new) <= left and self._form.is_whole)
        if not self._wake_at_end:
            self._wake()
        return over

    def _end(self, reason: FinishReason, error: Exception | None) -> None:
        if self.finish_reason is not None:
            return
        self._error, self.finish_reason = error, reason
        self._ended()
        self._wake()
