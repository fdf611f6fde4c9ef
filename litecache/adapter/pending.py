"""One request in flight, as the driver sees it: tokens so far, and how it ended.

The poll thread feeds it, the caller's thread waits on it. It carries what is needed to submit the
request again after its actor died: the prompt and every token received.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import StopStringCriteria

import litecache.errors
from litecache.actors.cluster import check_process
from litecache.errors import (
    ConfigError,
    GroupUnavailableError,
    LiteCacheError,
    RequestAborted,
    told,
)
from litecache.types import FinishReason, Guidance, Request, TokenDelta, TokenLogprobs

_LEAST_TIME_S = 1e-3
"""Of an attempt whose `max_time_s` is over: the engine ends it with what it has."""


class Guide(Protocol):
    """What a guided request may say; used by one thread at a time.

    Attributes:
        mask: of the tokens that may be next, see `litecache.types.mask_bytes`; empty: it is whole,
            and nothing follows.
    """

    @property
    def mask(self) -> bytes:
        """See above."""

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Go on by tokens that were drawn; those that must follow, by which it has gone on, too."""


class PendingRequest:
    """A request between submission and its last token.

    Attributes:
        request: as first submitted.
        request_id: its name; the same through all attempts.
        tokens: received so far; only ever appended to.
        logprobs: of these tokens, where the request asked for them; of the prompt's, where it asked
            for its logits by `Request.logits`.
        logits: what that gave, as `TokenDelta.logits`.
        reused_tokens: prompt tokens by tier that were not computed, from the first submission.
        found_tokens: where KV was found, those computed by plan included; from the same.
        ttft_s: seconds from submission to the first token, as the engine measured them.
        finish_reason: None while it goes on.
        epoch: of the replica's record that holds this attempt; None = not known yet.
        abandoned: an abort was asked for: it ends, whatever becomes of its replica.
        streaming: somebody looks at each token as it comes.
        first_token_at: `time.perf_counter()` of the first token's arrival.
        finished_at: the same of the last one's.
        tried: names of replicas that stopped answering while they had it.
        deaths: processes of replicas that ended while they had it, since its last token.
        pid: of the process that made it, the only one that receives its tokens.

    `stop` are texts that end it, looked for in the tokens as they arrive. `guide` says which tokens
    may come; what it leaves no choice about is appended here and told the engine, which draws the
    rest.
    """

    def __init__(
        self,
        request: Request,
        *,
        streaming: bool = False,
        stop: StopStrings | None = None,
        guide: Guide | None = None,
    ) -> None:
        self.request, self.request_id = request, request.request_id
        self.streaming = streaming or stop is not None
        self._stop = stop
        self._guide, self._guide_lock = guide, threading.Lock()
        self._mask, self._num_guided = request.mask, 0
        # The end of prompt and tokens, as far as a stop string may reach back.
        self._seen = [] if stop is None else stop.last_of(request.prompt)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.logits: bytes | None = None
        self.reused_tokens: dict[str, int] = {}
        self.found_tokens: dict[str, int] = {}
        self.ttft_s: float | None = None
        self.finish_reason: FinishReason | None = None
        self.epoch: str | None = None
        self.abandoned = False
        self.submitted_at = time.perf_counter()
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self.tried: set[str] = set()
        self.deaths = 0
        self._error: Exception | None = None
        self._attempt, self.pid = 0, os.getpid()
        self._condition = threading.Condition()
        self._wake: Callable[[], object] | None = None
        self._wake_at_end = False

    @property
    def wire_id(self) -> str:
        """The engine's name of the current attempt: output of an earlier one is told apart."""
        return f"{self.request_id}.{self._attempt}"

    @property
    def done(self) -> bool:
        """It has ended, well or not."""
        return self.finish_reason is not None

    def wire_request(self) -> Request:
        """The request as it has to be submitted now: prompt, the tokens and the time so far."""
        max_time_s = self.request.max_time_s
        if max_time_s is not None and self._attempt:
            spent_s = time.perf_counter() - self.submitted_at
            max_time_s = max(_LEAST_TIME_S, max_time_s - spent_s)
        return dataclasses.replace(
            self.request,
            request_id=self.wire_id,
            prompt=self.request.prompt + self.tokens,
            num_resumed_tokens=len(self.tokens),
            mask=self._mask,
            max_time_s=max_time_s,
        )

    def next_attempt(self) -> bool:
        """Prepare another submission; False when there is nothing left to do."""
        self._attempt += 1
        self.epoch = None
        sampling = self.request.sampling
        if self._guide is not None and not self.abandoned:
            with self._guide_lock:
                self._go_on(self._guide)
        if self.abandoned:
            self.abort()
        elif self.tokens and self.tokens[-1] in sampling.eos_token_ids:
            self._finish(FinishReason.STOP)
        elif not self.request.logits and len(self.tokens) >= sampling.max_new_tokens:
            self._finish(FinishReason.LENGTH)
        return not self.done

    def feed(self, delta: TokenDelta) -> None:
        """Take what one step produced."""
        with self._condition:
            if self.done:
                return
            if delta.token_ids:
                self.deaths = 0
                if self.first_token_at is None:
                    self.first_token_at = time.perf_counter()
            delta = self._cut(delta)
            self.tokens.extend(delta.token_ids)
            self.logprobs.extend(delta.logprobs)
            self.logits = delta.logits
            if self.ttft_s is None:  # else they are of a later attempt
                self.ttft_s = delta.ttft_s
                if delta.reused_tokens is not None:
                    self.reused_tokens = dict(delta.reused_tokens)
                    self.found_tokens = dict(delta.found_tokens or {})
            reason = delta.finish_reason
            if reason is None:
                if not delta.awaits_guidance:  # else what follows is told with it
                    self._tell()
            elif reason is FinishReason.ERROR:
                self.fail(remote_error(delta.error_type, delta.error))
            elif reason is FinishReason.ABORT:
                self.abort()
            else:
                self._finish(reason)

    def _cut(self, delta: TokenDelta) -> TokenDelta:
        """End it at the token that completes a stop string; later ones were drawn for nothing."""
        if self._stop is None or not delta.token_ids:
            return delta
        count = self._stop.first_end(self._seen, delta.token_ids)
        self._seen = self._stop.last_of([*self._seen, *delta.token_ids])
        if count is None:
            return delta
        return delta._replace(
            token_ids=delta.token_ids[:count],
            logprobs=delta.logprobs[:count],
            finish_reason=FinishReason.STOP,
            error=None,
        )

    def guidance(self, wire_id: str) -> Guidance | None:
        """How a guided request goes on behind the tokens that have come; None when nobody waits
        for it any more.

        Args:
            wire_id: of the attempt that waits.
        """
        assert self._guide is not None, "of a guided request"
        with self._guide_lock:
            if wire_id != self.wire_id or self.abandoned:
                return None
            drawn = len(self.tokens)
            self._go_on(self._guide)
            forced, mask = tuple(self.tokens[drawn:]), b"" if self.done else self._mask
            return Guidance(wire_id, len(self.request.prompt) + drawn, forced, mask or b"")

    def _go_on(self, guide: Guide) -> None:
        """Take what was drawn since the last call, and append what must follow."""
        new, sampling = self.tokens[self._num_guided :], self.request.sampling
        if not new or self.done:
            return
        try:
            forced, mask = guide.take(new), guide.mask
        except Exception as error:  # whatever it is: nobody knows what may follow
            self.fail(error)
            return
        with self._condition:
            if self.done:
                return
            end = next((i for i, each in enumerate(forced, 1) if each in sampling.eos_token_ids), 0)
            room = sampling.max_new_tokens - len(self.tokens)
            count = min(end or len(forced), room)
            certain = () if sampling.logprobs is None else (TokenLogprobs(0.0, ()),) * count
            made = self._cut(TokenDelta(self.wire_id, tuple(forced[:count]), logprobs=certain))
            self.tokens.extend(made.token_ids)
            self.logprobs.extend(made.logprobs)
            self._num_guided, self._mask = len(self.tokens), mask
            whole = count == (end or len(forced)) and (bool(end) or not mask)
            if whole or made.finish_reason is not None:
                self._finish(FinishReason.STOP)
            elif len(self.tokens) >= sampling.max_new_tokens:
                self._finish(FinishReason.LENGTH)
            else:
                self._tell()

    def abort(self) -> None:
        """End it for its caller, who is told so."""
        told = RequestAborted(f"request {self.request_id} was aborted")
        self._finish(FinishReason.ABORT, told)

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self._finish(FinishReason.ERROR, error)

    def _finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        with self._condition:
            if not self.done:
                self._error, self.finished_at = error, time.perf_counter()
                self.finish_reason = reason
            self._tell()

    def _tell(self) -> None:
        """Wake those who wait for news; the lock is held."""
        self._condition.notify_all()
        if self._wake is not None and (self.done or not self._wake_at_end):
            with contextlib.suppress(RuntimeError):  # the event loop has been closed
                self._wake()

    def wait(self) -> list[int]:
        """All tokens, when the request has ended.

        Raises:
            LiteCacheError: it failed or was aborted.
        """
        for _ in self.stream(whole=True):
            pass
        return self.tokens

    def stream(self, *, whole: bool = False) -> Iterator[list[int]]:
        """New tokens as they come, or all when it has ended, in lists of at least one.

        Raises:
            LiteCacheError: it failed or was aborted, after the tokens that came before.
        """
        taken, done = 0, False
        while not done:
            check_process(self.pid)
            with self._condition:
                self._condition.wait_for(
                    lambda: self.done or (not whole and len(self.tokens) > taken)  # noqa: B023
                )
                new, done = self.tokens[taken:], self.done
            if new:
                taken += len(new)
                yield new
        if self._error is not None:
            raise self._error

    async def astream(self) -> AsyncGenerator[list[int], None]:
        """`stream` for one reader on an event loop; no thread waits.

        Raises:
            LiteCacheError: as in `stream`.
        """
        loop, news, taken, done = asyncio.get_running_loop(), asyncio.Event(), 0, False
        self.on_news(lambda: loop.call_soon_threadsafe(news.set))
        while not done:
            check_process(self.pid)
            news.clear()
            new, _, done = self.since(taken)
            if new:
                taken += len(new)
                yield new
            elif not done:
                await news.wait()
        if self._error is not None:
            raise self._error

    def on_news(self, wake: Callable[[], object], *, whole: bool = False) -> None:
        """Call `wake`, on the poll thread, whenever there is news, or once it has ended.

        One reader alone; what came before the call is in `since`.
        """
        self._wake, self._wake_at_end = wake, whole

    def since(self, start: int) -> tuple[list[int], list[TokenLogprobs], bool]:
        """Tokens from `start` on, their log-probabilities where asked for, and whether all came."""
        with self._condition:
            return self.tokens[start:], self.logprobs[start:], self.done


def remote_error(kind: str | None, text: str | None) -> Exception:
    """The error of a class named by a message."""
    found = getattr(litecache.errors, kind or "", None)
    if isinstance(found, type) and issubclass(found, LiteCacheError):
        return found(text or found.__name__)
    return GroupUnavailableError(f"{kind}: {text}")


@contextlib.contextmanager
def aborting(rows: Sequence[PendingRequest], abort: Callable[[str], None]) -> Iterator[None]:
    """Abort what has not ended when the caller stops waiting: an error, or ctrl-C."""
    try:
        yield
    except BaseException:
        for row in rows:
            if not row.done:
                abort(row.request_id)
        raise


class StopStrings:
    """Looks for the end of a sequence: the token that completes any of some texts.

    Raises:
        ConfigError: no token of the tokenizer can ever complete one of them.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        try:
            with torch.device("cpu"):  # of the caller's default it makes tables, too
                self._criterion = StopStringCriteria(tokenizer, list(texts))
        except Exception as error:  # whatever it makes of the tokenizer or the texts
            valid = f"texts that the tokenizer can spell ({told(error)})"
            raise ConfigError("stop_strings", list(texts), valid) from error
        first = self._criterion.max_valid_positions * len(texts)
        ends = self._criterion.embedding_vec[:, first:-1] > 0
        self._can_end: list[bool] = ends.any(dim=1).tolist()

    def last_of(self, tokens: Sequence[int]) -> list[int]:
        """The end of a sequence, as far as `first_end` looks back."""
        return list(tokens[-self._criterion.maximum_token_len :])

    def first_end(self, before: Sequence[int], tokens: Sequence[int]) -> int | None:
        """How many of `tokens` belong to the sequence, None when none of them ends it.

        Of the tokens before them, prompt included, `last_of` them is enough.
        """
        width = self._criterion.maximum_token_len
        seen = self.last_of(before)
        for count, token in enumerate(tokens, 1):
            seen.append(token)
            if token < len(self._can_end) and self._can_end[token]:
                window = torch.tensor([seen[-width:]], device="cpu")
                if bool(self._criterion(window, None)[0]):
                    return count
        return None


@dataclass(frozen=True)
class ReuseReport:
    """What each row of a result reused, and how it ended: `.litecache` of a returned dict.

    Attributes:
        reused_tokens: per row, prompt tokens by tier that were not computed.
        found_tokens: per row, prompt tokens by tier where their KV was found; those that were not
            reused were computed by plan, since that was sooner than to load them.
        ttft_s: per row, seconds from submission to the first token's arrival here.
        total_s: per row, seconds from submission to the last token's arrival.
        logprobs: per row and new token, with `logprobs=k`; else empty rows.
        finish_reasons: per row, "stop" (an end token or a stop string) or "length" (of tokens, or
            of `max_time`); in the driver loop "length" where all tokens were drawn that the
            call allows, and "stop" for every other end.
        prompt_tokens: per row, tokens of the prompt, without padding.
        completion_tokens: per row, new tokens, the end token included.
        loop: which drew the tokens, "engine" or "driver".
        prompt_logprobs: per prompt and token of it, with `prompt_logprobs=k`, None for the first,
            which nothing tells of; else empty.
    """

    reused_tokens: tuple[dict[str, int], ...]
    found_tokens: tuple[dict[str, int], ...]
    ttft_s: tuple[float | None, ...]
    total_s: tuple[float | None, ...]
    logprobs: tuple[tuple[TokenLogprobs, ...], ...]
    finish_reasons: tuple[str | None, ...]
    prompt_tokens: tuple[int, ...]
    completion_tokens: tuple[int, ...]
    loop: str = "engine"
    prompt_logprobs: tuple[tuple[TokenLogprobs | None, ...], ...] = ()

    @classmethod
    def of(cls, rows: Sequence[PendingRequest]) -> ReuseReport:
        """The report of finished requests."""

        def since_submission(name: str) -> tuple[float | None, ...]:
            moments = ((row.submitted_at, getattr(row, name)) for row in rows)
            return tuple(None if moment is None else moment - start for start, moment in moments)

        return cls(
            tuple(row.reused_tokens for row in rows),
            tuple(row.found_tokens for row in rows),
            since_submission("first_token_at"),
            since_submission("finished_at"),
            tuple(tuple(row.logprobs) for row in rows),
            tuple(row.finish_reason and row.finish_reason.value for row in rows),
            tuple(len(row.request.prompt) for row in rows),
            tuple(len(row.tokens) for row in rows),
        )
