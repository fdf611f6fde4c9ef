"""Tokens to text as they arrive, and to Hugging Face's streamers."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from typing import Any

import torch

from litecache.actors.cluster import check_process
from litecache.adapter.pending import PendingRequest
from litecache.errors import ConfigError
from litecache.types import TokenLogprobs

# An unfinished UTF-8 sequence decodes to this.
_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# So many tokens are decoded again with each piece, and so many of them stay as context.
_WINDOW_TOKENS, _CONTEXT_TOKENS = 24, 8


class TextDecoder:
    """Decodes a growing list of token ids piece by piece; the pieces together are the whole text.

    What later tokens may still change is held back: an unfinished character, and a run of byte
    tokens ("<0xE3>") until it ends, since one wrong byte turns all characters of a run into
    replacement characters. Only the tokens since a settled one are decoded again, so the cost of a
    piece does not grow with the text.

    Args:
        decode: token ids to text.
        is_byte: whether a token stands for one byte of a character.
        is_silent: whether a token is no part of the text, nor ends a run.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        is_byte: Callable[[int], bool] = lambda token: False,
        is_silent: Callable[[int], bool] = lambda token: False,
    ) -> None:
        self._decode = decode
        self._is_byte, self._is_silent = is_byte, is_silent
        self._window: list[int] = []
        self._bytes: list[bool] = []
        self._given = ""

    @classmethod
    def of(cls, tokenizer: Any, skip_special_tokens: bool) -> TextDecoder:
        """For a tokenizer of transformers, or anything else with `decode`."""
        decode: Callable[[list[int]], str] = functools.partial(
            tokenizer.decode,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        name_of = getattr(tokenizer, "convert_ids_to_tokens", lambda token: "")
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token for token, entry in added.items() if entry.special}
        special |= set(getattr(tokenizer, "all_special_ids", ()))

        @functools.lru_cache(maxsize=4096)
        def is_byte(token: int) -> bool:
            return _BYTE_TOKEN.fullmatch(str(name_of(token))) is not None

        @functools.lru_cache(maxsize=4096)
        def is_silent(token: int) -> bool:
            # A vocabulary padded beyond its tokenizer has ids without a name.
            skipped = (skip_special_tokens and token in special) or name_of(token) is None
            return skipped and not decode([token])

        return cls(decode, is_byte, is_silent)

    def add(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """The text that these tokens settle; "" where they leave all open.

        Args:
            token_ids: the next tokens.
            last: no more follow; what is unfinished is given out as it is.
        """
        new = [token for token in token_ids if not self._is_silent(token)]
        self._window += new
        self._bytes += map(self._is_byte, new)
        settled = len(self._window)
        while settled and self._bytes[settled - 1] and not last:
            settled -= 1
        if not last and settled <= len(self._window) - len(new):
            return ""  # all of the new ones belong to an open run
        text = self._decode(self._window[:settled])
        whole = text if last else text.rstrip(_REPLACEMENT)
        if not last and not whole.startswith(self._given):
            return ""
        piece, self._given = whole[len(self._given) :], whole
        if whole == text and len(self._window) == settled >= _WINDOW_TOKENS:
            self._forget(text)
        return piece

    def _forget(self, text: str) -> None:
        """Keep the last settled tokens alone, from one that no character and no run crosses."""
        for start in range(len(self._window) - _CONTEXT_TOKENS, len(self._window)):
            if self._bytes[start - 1] and self._bytes[start]:
                continue
            context = self._decode(self._window[start:])
            # Its first token may look otherwise than behind others, but what follows does not.
            if context and text.endswith(context):
                self._window, self._bytes = self._window[start:], self._bytes[start:]
                self._given = context
                return


class TokenStream:
    """Iterator over one request's output, text or token ids; `async for` reads it, too.

    Attributes:
        request_id: for `KVCacheAdapter.abort`.
    """

    def __init__(
        self,
        pending: PendingRequest,
        decoder: TextDecoder | None,
        abandon: Callable[[str], None],
    ) -> None:
        self.request_id, self._pending, self._abandon = pending.request_id, pending, abandon
        self._decoder = decoder
        self._items: Generator[Any, None, None]
        self._async_items: AsyncGenerator[Any, None] | None = None
        # No reference back to self: a stream that is dropped has to end at once.
        self._items = _text(pending, decoder) if decoder is not None else _one_by_one(pending)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._async_items is not None:
            raise ConfigError("stream", "read by `async for`", "read in one way alone")
        check_process(self._pending.pid)  # tokens that came before the fork are not its own either
        return next(self._items)

    def __aiter__(self) -> AsyncIterator[Any]:
        """On one event loop, where an earlier `async for` left off.

        Raises:
            ConfigError: it has been read without `async`.
        """
        if self._async_items is None:
            if inspect.getgeneratorstate(self._items) != inspect.GEN_CREATED:
                raise ConfigError("stream", "read by `for`", "read in one way alone")
            self._async_items = _pieces(self._pending, self._decoder)
        return self._async_items

    @property
    def reused_tokens(self) -> dict[str, int]:
        """Prompt tokens by tier that were not computed; known from the first token on."""
        return self._pending.reused_tokens

    @property
    def found_tokens(self) -> dict[str, int]:
        """Prompt tokens by tier where their KV was found, loaded or not; known as the others."""
        return self._pending.found_tokens

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token inside the engine; None before it."""
        return self._pending.ttft_s

    @property
    def finish_reason(self) -> str | None:
        """As in `ReuseReport`, or "abort" or "error"; None while the request goes on."""
        reason = self._pending.finish_reason
        return reason and reason.value

    @property
    def token_ids(self) -> list[int]:
        """All tokens received so far."""
        return list(self._pending.tokens)

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Of all tokens received so far, with `logprobs=k`."""
        return list(self._pending.logprobs)

    def close(self) -> None:
        """Stop early: the request is aborted unless it has ended."""
        self._items.close()
        if not self._pending.done:
            self._abandon(self.request_id)

    def __del__(self) -> None:
        if hasattr(self, "_items"):
            self.close()


def feed_streamer(
    streamer: Any, input_ids: torch.Tensor, rows: Sequence[PendingRequest], pad_token_id: int | None
) -> None:
    """Give a Hugging Face streamer what `generate` would: the prompt, then one `[batch]` a step.

    Rows that have ended are filled with the pad token, as HF does; without one all end with the
    first (see `append_rows`).

    Args:
        streamer: with `put` and `end`.
        input_ids: `[batch, tokens]`.
        rows: the requests, one per row.
        pad_token_id: fills ended rows; None = there is no such token.
    """
    streamer.put(input_ids)
    streams = [_one_by_one(row) for row in rows]
    over = all if pad_token_id is not None else any
    while True:
        step = [next(stream, None) for stream in streams]
        if over(token is None for token in step):
            break
        tokens = [pad_token_id if token is None else token for token in step]
        streamer.put(torch.tensor(tokens, device="cpu"))
    streamer.end()


def _text(row: PendingRequest, decoder: TextDecoder) -> Generator[str, None, None]:
    for tokens in row.stream():
        if piece := decoder.add(tokens):
            yield piece
    if rest := decoder.add([], last=True):
        yield rest


def _one_by_one(row: PendingRequest) -> Generator[int, None, None]:
    for tokens in row.stream():
        yield from tokens


async def _pieces(row: PendingRequest, decoder: TextDecoder | None) -> AsyncGenerator[Any, None]:
    async for tokens in row.astream():
        if decoder is None:
            for token in tokens:
                yield token
        elif piece := decoder.add(tokens):
            yield piece
    if decoder is not None and (rest := decoder.add([], last=True)):
        yield rest
