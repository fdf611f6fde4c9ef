"""Guided requests over an engine in this process: a guide that is easy to compute, and its loop."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from engine_harness import ANSWER_TIMEOUT_S, Harness

from litecache.adapter.pending import PendingRequest
from litecache.types import Request, SamplingParams, mask_bytes

_NUMBERS = itertools.count()


class ToyGuide:
    """Allows about a third of the tokens, and appends up to 19 at once, by a hash of the output.

    Args:
        vocab_size: of the model.
        never: a token that it never allows or appends: the end.
        most: tokens after which it is whole; None = it never is.
    """

    def __init__(self, vocab_size: int, never: int = -1, most: int | None = None) -> None:
        self._vocab_size, self._never, self._most = vocab_size, never, most
        self.tokens: list[int] = []

    @property
    def mask(self) -> bytes:
        if self._most is not None and len(self.tokens) >= self._most:
            return b""
        allowed = [(t * 7 + self._hash(1)) % 3 == 0 for t in range(self._vocab_size)]
        if self._never >= 0:
            allowed[self._never] = False
        packed = np.packbits(allowed, bitorder="little").tobytes()
        return packed.ljust(mask_bytes(self._vocab_size), b"\0")

    def take(self, tokens: Sequence[int]) -> list[int]:
        self.tokens += tokens
        count = self._hash(2) % 20 if self._hash(3) % 3 == 0 else 0
        forced = [(self._hash(4) + 11 * i) % self._vocab_size for i in range(count)]
        forced = [token for token in forced if token != self._never]
        self.tokens += forced
        return forced

    def _hash(self, salt: int) -> int:
        return zlib.crc32(np.array([salt, *self.tokens], dtype=np.int64).tobytes())


def pending(
    name: str, prompt: Sequence[int], guide: Any = None, max_new_tokens: int = 40, **fields: Any
) -> PendingRequest:
    """A request, guided if there is a guide."""
    mask = None if guide is None else guide.mask
    sampling, name = SamplingParams(max_new_tokens, **fields), f"{name}-{next(_NUMBERS)}"
    return PendingRequest(Request(name, "c", tuple(prompt), sampling, mask=mask), guide=guide)


def run_rows(
    harness: Harness,
    rows: Sequence[PendingRequest],
    moves: Callable[[PendingRequest], bool] = lambda row: False,
) -> list[list[int]]:
    """Answer requests, all at once; a row that `moves` after a token is submitted anew."""
    engine, open_rows = harness.engine, {row.wire_id: row for row in rows}
    engine.submit([row.wire_request() for row in rows])
    while open_rows:
        for _, delta in harness.deltas.get(timeout=ANSWER_TIMEOUT_S):
            row = open_rows[delta.request_id]
            if delta.request_id == row.wire_id:
                row.feed(delta)
            if delta.finish_reason is not None:
                del open_rows[delta.request_id]
            elif delta.request_id != row.wire_id:
                continue  # it has moved, and not ended yet
            elif moves(row):
                engine.abort([delta.request_id])
                if row.next_attempt():
                    open_rows[row.wire_id] = row
                    engine.submit([row.wire_request()])
            elif delta.awaits_guidance:
                guidance = row.guidance(delta.request_id)
                assert guidance is not None
                engine.guide([guidance])
    return [row.tokens for row in rows]


def reference(
    model: Any,
    prompt: Sequence[int],
    guide: Any,
    count: int,
    change: Callable[[torch.Tensor, list[int]], torch.Tensor] = lambda logits, tokens: logits,
) -> list[int]:
    """Greedy tokens of unmodified transformers: a forward, the mask, the largest logit.

    Args:
        model: stock.
        prompt: token ids.
        guide: fresh.
        count: most new tokens.
        change: what rules make of the logits, given all tokens.
    """
    tokens = list(prompt)
    while len(tokens) - len(prompt) < count and guide.mask:
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0, -1].float()
        logits = change(logits, tokens)
        bits = np.unpackbits(np.frombuffer(guide.mask, np.uint8), bitorder="little")
        allowed = torch.from_numpy(bits[: len(logits)].astype(bool))
        token = int(logits.masked_fill(~allowed, float("-inf")).argmax())
        tokens += [token, *guide.take([token])]
    return tokens[len(prompt) : len(prompt) + count]
