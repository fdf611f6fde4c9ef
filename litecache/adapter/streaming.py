"""Tokens to text as they arrive, and to Hugging Face's streamers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch

from litecache.adapter.pending import PendingRequest
from litecache.types import TokenLogprobs

# An unfinished UTF-8 sequence decodes to this.
_REPLACEMENT = "�"


class TextDecoder:
    """Decodes a growing list of token ids piece by piece.

    Only the tokens since the last clean boundary are decoded again, so the cost of a piece does
    not grow with the text. A piece that ends inside a character is held back.

    Args:
        decode: token ids to text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = ""

    def add(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """The text that these tokens add; "" while a character is incomplete.

        Args:
            token_ids: the next tokens.
            last: no more follow; an incomplete character is given out as it is.
        """
        self._window.extend(token_ids)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and not last:
            return ""
        new = text[len(self._shown) :]
        if len(self._window) > 16:
            # Keep some tokens as context: many tokenizers decode a leading space by what precedes.
            self._window = self._window[-8:]
            text = self._decode(self._window)
        self._shown = text
        return new


class TokenStream:
    """Iterator over one request's output, text or token ids.

    Attributes:
        request_id: for `KVCacheAdapter.abort`.
    """

    def __init__(
        self,
        pending: PendingRequest,
        decode: Callable[[list[int]], str] | None,
        abandon: Callable[[str], None],
    ) -> None:
        self.request_id = pending.request_id
        self._pending = pending
        self._abandon = abandon
        self._items: Generator[Any, None, None]
        # No reference back to self: a stream that is dropped has to end at once.
        self._items = _text(pending, decode) if decode is not None else _one_by_one(pending)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._items)

    @property
    def reused_tokens(self) -> dict[str, int]:
        """Prompt tokens by tier that were not computed; known from the first token on."""
        return self._pending.reused_tokens

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token inside the engine; None before it."""
        return self._pending.ttft_s

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

    Rows that have ended are filled with the pad token, as HF does.

    Args:
        streamer: with `put` and `end`.
        input_ids: `[batch, tokens]`.
        rows: the requests, one per row.
        pad_token_id: fills ended rows.
    """
    streamer.put(input_ids)
    streams = [_one_by_one(row) for row in rows]
    fill = 0 if pad_token_id is None else pad_token_id
    while True:
        step = [next(stream, None) for stream in streams]
        if all(token is None for token in step):
            break
        streamer.put(torch.tensor([fill if token is None else token for token in step]))
    streamer.end()


def _text(row: PendingRequest, decode: Callable[[list[int]], str]) -> Generator[str, None, None]:
    decoder = TextDecoder(decode)
    for tokens in row.stream():
        piece = decoder.add(tokens)
        if piece:
            yield piece
    rest = decoder.add([], last=True)
    if rest:
        yield rest


def _one_by_one(row: PendingRequest) -> Generator[int, None, None]:
    for tokens in row.stream():
        yield from tokens
