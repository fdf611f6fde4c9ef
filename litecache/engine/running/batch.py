"""A step's inputs where the model runs, and the memory they travel through.

All inputs of a step lie in one run of 64-bit words, cut into named fields at offsets that depend on
the step's sizes alone: one host buffer, one copy to the device. A captured graph reads the device
fields in place. On CPU host and device are the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from litecache.engine.running.logit_rules import RuledSample

_RING = 4
"""Host buffers in turn: a copy may still read the last ones while the next step is built."""

_CACHED_SIZES = 512

STRUCK_TOKENS = 4
"""Tokens a row cannot draw that the drawing kernels know of; -1 = none."""

EVERY_TOKEN = 1 << 62
"""As `Batch.num_sorted`: the whole vocabulary."""

Fields = dict[str, npt.NDArray[Any]]
Ints = npt.NDArray[np.int64]

Sizes = tuple[int, int, int, int, int]
"""Tokens, sequences, samples (with padding, all three), KV groups, table entries to change."""


def _fields(sizes: Sizes) -> tuple[tuple[str, str, int], ...]:
    """Name, dtype and length of every field, in order; deltas last, they move no other."""
    tokens, seqs, samples, groups, deltas = sizes
    return (
        ("ids", "int64", tokens),
        ("id_index", "int64", tokens),
        ("positions", "int64", tokens),
        ("slots", "int64", tokens * groups),
        ("rows", "int64", seqs),
        ("logit_index", "int64", samples),
        ("sample_rows", "int64", samples),
        ("keys", "int64", samples),
        ("top_k", "int64", samples),
        ("temperature", "float32", samples),
        ("top_p", "float32", samples),
        ("min_p", "float32", samples),
        ("struck", "int32", samples * STRUCK_TOKENS),
        ("context_lens", "int32", seqs),
        ("cu_seqlens", "int32", seqs + 1),
        ("delta_index", "int64", deltas),
        ("delta_value", "int32", deltas),
    )


@dataclass(frozen=True)
class Batch:
    """A plan made ready: the step's tensors, and what the host knows of them.

    Attributes:
        fields: the inputs on the device by name, see `_fields`. Of the samples `[S]`: temperature
            (0 = greedy), top_k (0 = off), top_p (1 = off), min_p (0 = off) and the generator's
            keys; they are not read when `all_greedy`.
        query_lens: tokens of each sequence, a graph's padded decodes included.
        context_lens: visible tokens of each sequence, likewise.
        lives: life of each sequence's row, likewise.
        sampled_rows: row of each token that is drawn, without padding.
        handed_out: (place in the plan, first of its logits, how many) of the sequences whose logits
            are handed out; they lie behind those of the samples.
        following: of the sequences that get log-probabilities instead, by place in the plan: the
            tokens behind these positions (-1 = not known), and how many of the likeliest.
        places: int64: the token of the batch that each row of the logits is of.
        every_token_sampled: logits are wanted at all tokens, in order.
        all_greedy: no sample draws.
        num_sorted: how many of the likeliest tokens must be put in order for top-k and top-p: the
            largest top-k, or `EVERY_TOKEN` when a sample has top-p alone; 0 = none has either.
        any_min_p: some sample has min-p.
        masked: (sample, token) pairs whose logits are struck out.
        allowed: of guided samples, (sample, bitmap of the tokens it may draw): all others are
            struck out.
        masks_fit: the drawing kernels find all that is struck out in the field "struck".
        ruled: samples with rules.
        logprobs: (sample, number of the likeliest) of those that report log-probabilities.
    """

    fields: dict[str, torch.Tensor]
    query_lens: tuple[int, ...] = ()
    context_lens: tuple[int, ...] = ()
    lives: tuple[int, ...] = ()
    sampled_rows: tuple[int, ...] = ()
    handed_out: tuple[tuple[int, int, int], ...] = ()
    following: dict[int, tuple[Ints, int]] = field(default_factory=dict)
    places: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    every_token_sampled: bool = False
    all_greedy: bool = False
    num_sorted: int = 0
    any_min_p: bool = False
    masked: tuple[tuple[int, int], ...] = ()
    allowed: tuple[tuple[int, bytes], ...] = ()
    masks_fit: bool = True
    ruled: tuple[RuledSample, ...] = ()
    logprobs: tuple[tuple[int, int], ...] = ()

    @property
    def needs_torch(self) -> bool:
        """Whether drawing takes what the drawing kernels do not have: an order, or rules."""
        return bool(self.num_sorted or self.any_min_p or self.ruled)


class StepBuffers:
    """Buffers for steps of any sizes up to the largest.

    Args:
        largest: bounds all later sizes.
        num_rows: rows of the engine; each has a word with its last sampled token.
        device: where the model runs.

    Attributes:
        words: int64: the last tokens of all rows, then the fields of the step, `ids` first.
        first_id: index in `words` of the first entry of `ids`.
        last_tokens: int64 `[num_rows + 1]`: the last sampled token of each row and, behind them,
            of the padding row.
        separate: host and device have memory of their own.
    """

    def __init__(self, largest: Sizes, num_rows: int, device: torch.device) -> None:
        self.first_id = _words("int64", num_rows + 1)
        words = self.first_id + _total_words(largest)
        self.words = torch.zeros(words, dtype=torch.int64, device=device)
        self.last_tokens = self.words[: num_rows + 1]
        self.separate = device.type == "cuda"
        self._ring = [self.words]
        if self.separate:
            self._ring = [torch.zeros(words, dtype=torch.int64).pin_memory() for _ in range(_RING)]
            self._copied = [torch.cuda.Event() for _ in range(_RING)]  # type: ignore[no-untyped-call]
        self._turn = 0
        # Steps of equal sizes come again and again, and cutting views costs more than filling them.
        self._fields: dict[tuple[int, Sizes], tuple[Fields, dict[str, torch.Tensor]]] = {}

    def begin(self, sizes: Sizes) -> tuple[Fields, dict[str, torch.Tensor]]:
        """The next host buffer's fields, to be filled before `upload`, and those on the device."""
        self._turn = (self._turn + 1) % len(self._ring)
        if self.separate:
            self._copied[self._turn].synchronize()
        key = (self._turn, sizes)
        found = self._fields.get(key)
        if found is None:
            if len(self._fields) >= _CACHED_SIZES:
                self._fields.clear()  # eager steps have filled it with sizes of their own
            host = self._cut(self._ring[self._turn], sizes)
            fields = {name: part.numpy() for name, part in host.items()}
            found = self._fields[key] = (fields, self._cut(self.words, sizes))
        return found

    def upload(self, sizes: Sizes) -> None:
        """Copy the filled fields to the device, in stream order."""
        if self.separate:
            own = slice(self.first_id, self.first_id + _total_words(sizes))
            self.words[own].copy_(self._ring[self._turn][own], non_blocking=True)
            self._copied[self._turn].record()

    def _cut(self, buffer: torch.Tensor, sizes: Sizes) -> dict[str, torch.Tensor]:
        fields = {}
        start = self.first_id
        for name, dtype, length in _fields(sizes):
            end = start + _words(dtype, length)
            fields[name] = buffer[start:end].view(getattr(torch, dtype))[:length]
            start = end
        return fields


def _total_words(sizes: Sizes) -> int:
    return sum(_words(dtype, length) for _, dtype, length in _fields(sizes))


def _words(dtype: str, length: int) -> int:
    """In whole 16 bytes: kernels are compiled by whether a field begins at a multiple of them."""
    return -(-length // 2) * 2 if dtype == "int64" else -(-length // 4) * 2
