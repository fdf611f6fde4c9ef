"""`POST /v1/completions`: texts or token ids, continued."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from litecache.serving.answers import Piece
from litecache.serving.keys import Tenant
from litecache.serving.reader import Reader, open_reader
from litecache.serving.schemas import MAX_PROMPTS, CompletionRequest, refused
from litecache.serving.service import ModelService
from litecache.serving.tokens import completion_logprobs
from litecache.types import TokenLogprobs

_DEFAULT_MAX_TOKENS = 16


async def complete(
    service: ModelService, body: CompletionRequest, tenant: Tenant
) -> dict[str, Any] | AsyncIterator[dict[str, Any]]:
    """Answer a request: a body, or with `stream` the chunks of one.

    Raises:
        ApiError: the request is wrong, or too much.
        LiteCacheError: as in `KVCacheAdapter.submit`.
    """
    service.check_model(body.model)
    body.check()
    texts = _texts(body.prompt)
    if len(texts) * body.samples > MAX_PROMPTS:
        raise refused("n", f"at most {MAX_PROMPTS} answers in one request, over all prompts")
    special = body.add_special_tokens is not False
    size = sum(map(len, texts))
    prompts = await service.run_unless_short(size, _encode, service, texts, special)
    room = min(service.room_for(prompt, "prompt") for prompt in prompts)
    wanted = body.max_tokens if body.max_tokens is not None else min(_DEFAULT_MAX_TOKENS, room)
    echo = _Echo(service, body, tenant, texts, prompts)
    if wanted == 0:
        return await echo.alone()
    reader = await open_reader(
        service,
        tenant,
        body,
        prompts,
        max_tokens=wanted,
        logprobs=body.logprobs,
        skip_special_tokens=body.skip_special_tokens is not False,
    )
    if body.stream:
        return _stream(service, body, reader, echo)
    with reader:
        pieces = await reader.read()
    await echo.score()
    choices = [
        echo.choice(index, piece, reader.reasons[index]) for index, piece in enumerate(pieces)
    ]
    return {**_head(service), "choices": choices, "usage": reader.usage()}


def _texts(prompt: Any) -> list[Any]:
    """One prompt or several: each a text or a list of ids."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not all(prompt):
        raise refused("prompt", "a list of prompts, none of them empty")
    return list(prompt)


def _encode(service: ModelService, texts: Sequence[Any], special: bool) -> list[list[int]]:
    found = [service.encode(t, special) if isinstance(t, str) else list(t) for t in texts]
    if not all(found):
        raise refused("prompt", "of at least one token")
    return found


def _head(service: ModelService) -> dict[str, Any]:
    return service.answer_head("cmpl", "text_completion")


class _Echo:
    """Choices of a request, with their prompts in front where it asks for them."""

    def __init__(
        self,
        service: ModelService,
        body: CompletionRequest,
        tenant: Tenant,
        texts: Sequence[Any],
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self._service, self._body, self._prompts = service, body, prompts
        self._use = service.cache_use(body, tenant)
        self._scores: list[list[TokenLogprobs | None]] = []
        self._texts = [""] * len(prompts)
        if body.echo:
            tokenizer = service.llm.tokenizer
            self._texts = [
                text if isinstance(text, str) else tokenizer.decode(list(text)) for text in texts
            ]

    def text(self, index: int) -> str:
        """Of the prompt in front of a choice."""
        return self._texts[index // self._body.samples]

    async def score(self) -> None:
        """The log-probabilities of the prompts, where they are asked for."""
        body = self._body
        if body.echo and body.logprobs is not None:
            long = [list(prompt) for prompt in self._prompts if len(prompt) > 1]
            llm, top = self._service.llm, body.logprobs
            found = iter(
                await self._service.run_long(llm.prompt_logprobs, long, top, **self._use)
                if long
                else ()
            )
            self._scores = [
                [None, *(next(found) if len(prompt) > 1 else ())] for prompt in self._prompts
            ]

    def choice(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """One of `choices`, whole."""
        body, logprobs = self._body, None
        text = self.text(index)
        if body.logprobs is not None:
            tokens, scores = piece.tokens, list[TokenLogprobs | None](piece.logprobs)
            offset = len(text)
            if body.echo:
                place = index // body.samples
                tokens = [*self._prompts[place], *tokens]
                scores = [*self._scores[place], *scores]
                offset = 0
            names = self._service.names
            logprobs = completion_logprobs(names, tokens, scores, body.logprobs, offset)
        return {
            "index": index,
            "text": text + piece.text,
            "logprobs": logprobs,
            "finish_reason": reason,
        }

    async def alone(self) -> dict[str, Any]:
        """A request for no new tokens."""
        if self._body.stream:
            raise refused("max_tokens", "at least 1 in a stream")
        await self.score()
        count = len(self._prompts) * self._body.samples
        choices = [self.choice(index, Piece(), "length") for index in range(count)]
        total = sum(map(len, self._prompts))
        usage = {"prompt_tokens": total, "completion_tokens": 0, "total_tokens": total}
        return {**_head(self._service), "choices": choices, "usage": usage}


async def _stream(
    service: ModelService, body: CompletionRequest, reader: Reader, echo: _Echo
) -> AsyncIterator[dict[str, Any]]:
    head = _head(service)
    given = [0] * len(reader.rows)
    with reader:
        if body.echo:
            yield {
                **head,
                "choices": [
                    {"index": i, "text": echo.text(i), "logprobs": None, "finish_reason": None}
                    for i in range(len(reader.rows))
                ],
            }
        async for found in reader.pieces():
            choices = []
            for index, piece in found:
                reason, logprobs = reader.reasons[index], None
                if not (piece.text or piece.tokens or reason):
                    continue
                if body.logprobs is not None:
                    logprobs = completion_logprobs(
                        service.names, piece.tokens, piece.logprobs, body.logprobs, given[index]
                    )
                elif not piece.text and not reason:
                    continue
                given[index] += len(piece.text)
                choices.append(
                    {
                        "index": index,
                        "text": piece.text,
                        "logprobs": logprobs,
                        "finish_reason": reason,
                    }
                )
            if choices:
                chunk = {**head, "choices": choices}
                yield {**chunk, "usage": reader.usage()} if body.usage_in_chunks else chunk
        if body.usage_at_end:
            yield {**head, "choices": [], "usage": reader.usage()}
