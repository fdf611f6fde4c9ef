"""The rows of one request as they come, for one reader on the event loop.

A reader that is slow holds up nobody: rows go on without it, and their place in the queue is free
when they have ended. A reader that goes away ends its rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any

from litecache.adapter.pending import PendingRequest
from litecache.serving.answers import Answer, Piece
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
