"""The rows of one request: from its fields to the adapter's arguments, and read as they come.

Defaults are the model's own `generation_config`, where it has one, then OpenAI's: temperature 1,
and no filter. Rows are for one reader on the event loop. One that is slow holds up nobody: rows
go on without it, and their place in the queue is free when they have ended. A reader that goes away
ends its rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any

from litecache.adapter.generation import end_ids
from litecache.adapter.pending import PendingRequest
from litecache.serving.answers import Answer, Piece
from litecache.serving.forms import FormSpec
from litecache.serving.keys import Tenant
from litecache.serving.schemas import Drawing, refused
from litecache.serving.service import ModelService
from litecache.types import FinishReason


class Reader:
    """Rows in flight; leaving its `with` block ends those that have not ended.

    Args:
        service: whose they are.
        prompts: of a request, token ids.
        rows: as many for each prompt, in its order.
        answers: the text of each.
        leave: called once, when all rows have ended.
        whole: only the end is of interest.

    Attributes:
        prompts, rows, answers: as given.
        reasons: why each answer ended; None while it goes on.
        first_at: `time.perf_counter()` of the first token, None before.
    """

    def __init__(
        self,
        service: ModelService,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[PendingRequest],
        answers: Sequence[Answer],
        leave: Callable[[], None],
        *,
        whole: bool,
    ) -> None:
        self.prompts, self.rows, self.answers = prompts, rows, answers
        self.reasons: list[str | None] = [None] * len(rows)
        self.first_at: float | None = None
        self._service, self._leave, self._whole = service, leave, whole
        self._taken = [0] * len(rows)
        self._loop = asyncio.get_running_loop()
        self._news, self._all_ended = asyncio.Event(), asyncio.Event()
        for row in rows:
            row.on_news(self._wake, whole=whole)
        self._look()

    def _wake(self) -> None:
        # on the poll's thread; the reader clears the event before it looks
        if not self._news.is_set() or all(row.finish_reason is not None for row in self.rows):
            self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._news.set()
        if all(row.finish_reason is not None for row in self.rows):
            self._all_ended.set()
            self._leave()

    async def pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """What is new of each answer, in lists of at least one; tokens are gathered when busy.

        Raises:
            LiteCacheError: a row failed.
        """
        last = 0.0
        while None in self.reasons:
            wait_s = last + self._service.merge_s() - time.perf_counter()
            if wait_s > 0 and not self._whole and self.first_at is not None:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._all_ended.wait(), wait_s)
            await self._news.wait()
            self._news.clear()
            found = [(i, piece) for i in range(len(self.rows)) if (piece := self._take(i))]
            if found:
                last = time.perf_counter()
                self.first_at = self.first_at or last
                yield found

    async def read(self) -> list[Piece]:
        """Everything of each answer, when all have ended.

        Raises:
            LiteCacheError: a row failed.
        """
        whole = [Piece() for _ in self.rows]
        async for found in self.pieces():
            for index, piece in found:
                whole[index].add(piece)
        return whole

    def _take(self, index: int) -> Piece | None:
        """What is new of one answer; None = nothing."""
        if self.reasons[index] is not None:
            return None
        row, answer = self.rows[index], self.answers[index]
        tokens, logprobs, ended = row.since(self._taken[index])
        if self._whole and not ended:
            return None
        if not tokens and not ended:
            return None
        self._taken[index] += len(tokens)
        piece = answer.add(tokens, logprobs, last=ended)
        if answer.stopped:
            self.reasons[index] = FinishReason.STOP.value
            self._service.abandon([row])
        elif ended:
            row.wait()
            assert row.finish_reason is not None
            self.reasons[index] = row.finish_reason.value
        return piece

    def usage(self) -> dict[str, Any]:
        """`usage` so far, by tier in `litecache`; a prompt counts once, whatever its answers."""
        samples = len(self.rows) // len(self.prompts)
        prompt = sum(map(len, self.prompts))
        completion = sum(answer.num_tokens for answer in self.answers)
        reused: Counter[str] = Counter()
        found: Counter[str] = Counter()
        # of the first answer to each prompt: the others share its prefill
        for row in self.rows[::samples]:
            reused.update(row.reused_tokens)
            found.update(row.found_tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": reused.total()},
            "litecache": {"reused_tokens": dict(reused), "found_tokens": dict(found)},
        }

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._service.abandon(self.rows)
        self._leave()


_GREEDY_BELOW = 1e-5


def draw_settings(
    body: Drawing, defaults: Any, max_tokens: int, logprobs: int | None
) -> dict[str, Any]:
    """Arguments of `KVCacheAdapter.submit` that say how tokens are drawn.

    Args:
        body: the request.
        defaults: the model's `generation_config`.
        max_tokens: of each answer.
        logprobs: also of so many of the likeliest tokens; None = of none.
    """

    def chosen(name: str, neutral: float) -> Any:
        given = getattr(body, name)
        value = given if given is not None else getattr(defaults, name, None)
        return neutral if value is None else value

    temperature = chosen("temperature", 1.0)
    settings: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        "do_sample": temperature >= _GREEDY_BELOW,
        "logprobs": logprobs,
        "stop_token_ids": body.stop_token_ids or None,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "min_new_tokens": body.min_tokens,
    }
    if settings["do_sample"]:
        filters = {"top_k": max(0, chosen("top_k", 0)), "top_p": chosen("top_p", 1.0)}
        settings |= {"temperature": temperature, **filters, "min_p": chosen("min_p", 0.0)}
    if body.logit_bias:
        settings["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    settings = {name: value for name, value in settings.items() if value is not None}
    if body.ignore_eos:
        settings["eos_token_id"] = []
    return settings


def ends_of(settings: Mapping[str, Any], defaults: Any) -> Collection[int]:
    """Tokens that end an answer and are no part of its text."""
    given = "eos_token_id" in settings
    fields = settings if given else {"eos_token_id": getattr(defaults, "eos_token_id", None)}
    return frozenset((*end_ids(fields), *settings.get("stop_token_ids", ())))


async def open_reader(
    service: ModelService,
    tenant: Tenant,
    body: Drawing,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    logprobs: int | None,
    skip_special_tokens: bool,
    form: FormSpec | None = None,
) -> Reader:
    """Wait for a turn, then start all answers of a request.

    Args:
        service: of the model.
        tenant: who asks.
        body: the request.
        prompts: token ids.
        max_tokens: of each answer.
        logprobs: as in `draw_settings`.
        skip_special_tokens: leave them out of the text.
        form: of all answers; None = the request's own, if it has one.

    Raises:
        ApiError: the queue is full, or a field is wrong.
        LiteCacheError: a field is wrong, or the engine is not there.
    """
    llm = service.llm
    if tenant.salt and (body.priority or 0) < 0:
        # or a key would take what is another one's share
        raise refused("priority", "0 or more: a key cannot put itself before others")
    settings = draw_settings(body, llm.generation_config, max_tokens, logprobs)
    samples, size = body.samples, body.samples * len(prompts)
    silent = ends_of(settings, llm.generation_config)
    use = service.cache_use(body, tenant)
    leave = await service.admission.enter(tenant.name, size)
    end = leave
    try:
        guided: dict[str, Any] = {}
        form = form or body.form
        if form is not None:
            guided["guides"], end_forms = await service.make_forms(form, size, silent)

            def end() -> None:
                leave()
                end_forms()

        rows = await service.draw(
            prompts,
            {
                **settings,
                **use,
                **guided,
                "samples": samples,
                "streaming": bool(body.stream or body.stops),
                "priority": body.priority or 0,
                # as the engine takes it
                "seed": None if body.seed is None else body.seed & (2**63 - 1),
            },
        )
        answers = [Answer(service.decoder(skip_special_tokens), body.stops, silent) for _ in rows]
        whole = not (body.stream or body.stops)
        return Reader(service, prompts, rows, answers, end, whole=whole)
    except BaseException:
        end()
        raise
