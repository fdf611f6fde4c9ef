"""Penalties, biases, forbidden words and n-grams, applied to a step's logits where they lie.

The tokens of the rows that have such rules lie on the device, in a history that grows by what each
step samples: the host never waits to learn a token, and a resumed request brings its history along
in its `NewRow`. Rows without rules cost nothing; the history is allocated when the first row needs
it. The order is that of transformers' processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from litecache.types import LogitRules

_NEVER = float("-inf")


class RowRules:
    """The rules of one row, from the `NewRow` that brought them to the next.

    Args:
        rules: what applies.
        tokens: all tokens known when the request took the row; its next one follows them.
        num_prompt: how many of them are prompt.

    Attributes:
        tokens: the same with the prompt as the rules see it.
        num_prompt: how many of these are prompt, `num_more` more than the model sees.
    """

    def __init__(self, rules: LogitRules, tokens: Sequence[int], num_prompt: int) -> None:
        columns = rules.columns or tokens[:num_prompt]
        self.rules, self.tokens = rules, (*columns, *tokens[num_prompt:])
        self.num_prompt, self.num_more = len(columns), len(columns) - num_prompt
        self.biases = [
            *rules.sequence_bias,
            *((ids, _NEVER) for ids in rules.bad_words_ids),
            *(((token,), _NEVER) for token in rules.suppress_tokens),
        ]


class RuledSample(NamedTuple):
    """A sampled row with rules: its place among the step's samples, and how long it is now."""

    sample: int
    row: int
    length: int
    rules: RowRules


class RuleBook:
    """Histories of the rows with rules, and what they do to logits.

    Args:
        max_model_len: longest sequence.
        device: where the logits are.
    """

    def __init__(self, max_model_len: int, device: torch.device) -> None:
        self._device = device
        self._width = max_model_len + 1
        self._slots: dict[int, int] = {}
        self._current: dict[int, RowRules] = {}
        self._history = torch.zeros((0, self._width), dtype=torch.int32, device=device)
        self._batch = _Batch((), (), device)

    def apply(self, logits: torch.Tensor, samples: Sequence[RuledSample]) -> torch.Tensor:
        """Apply the rules of a step's rows.

        Args:
            logits: `[S, vocab]`; may be overwritten.
            samples: the rows with rules, at least one.

        Returns:
            float32 `[S, vocab]`.
        """
        for sample in samples:
            if self._current.get(sample.row) is not sample.rules:
                self._enter(sample)
        batch = self._batch = self._batch.following(samples, self._slots, self._device)
        logits = logits.float()
        scores = logits.index_select(0, batch.samples)
        longest = max(sample.length + sample.rules.num_more for sample in samples)
        history = self._history[:, :longest].index_select(0, batch.slots).long()
        scores = batch.add_biases(scores, history)
        scores = batch.penalise(scores, history)
        scores = batch.forbid_ngrams(scores, history)
        return logits.index_copy_(0, batch.samples, scores)

    def remember(self, tokens: torch.Tensor) -> None:
        """Append what the rows of the last `apply` have drawn, int64 `[S]`."""
        batch = self._batch
        drawn = tokens.index_select(0, batch.samples).clamp(min=0).int()
        self._history.index_put_((batch.slots, batch.lengths), drawn)

    def _enter(self, sample: RuledSample) -> None:
        """A request has taken the row: its tokens so far become the history."""
        slot = self._slots.setdefault(sample.row, len(self._slots))
        count, width = self._history.shape
        wanted = max(width, self._width + sample.rules.num_more)
        if slot >= count or wanted > width:
            grown = torch.zeros(
                (count if slot < count else max(4, 2 * count), wanted),
                dtype=torch.int32,
                device=self._device,
            )
            grown[:count, :width] = self._history
            self._history = grown
        tokens = torch.tensor(sample.rules.tokens, dtype=torch.int32)
        self._history[slot, : len(tokens)] = tokens.to(self._device, non_blocking=True)
        self._current[sample.row] = sample.rules


class _Batch:
    """The rules of one combination of rows, as tensors; a run of decodes makes them once.

    Attributes:
        samples: int64 `[R]`, the rows' places in the logits.
        slots: int64 `[R]`, their places in the history.
        lengths: int64 `[R]`, tokens of each row in this step.
    """

    def __init__(
        self, samples: Sequence[RuledSample], slots: Sequence[int], device: torch.device
    ) -> None:
        self._device = device
        self._made_for = [(s.sample, s.row, s.rules) for s in samples]
        rules = [s.rules.rules for s in samples]
        self.samples = self._ints([s.sample for s in samples])
        self.slots = self.lengths = self._ints(slots)
        self._num_prompt = self._ints([s.rules.num_prompt for s in samples])
        self._padding = self._ints([r.padding for r in rules])
        self._repetition = self._penalty([r.repetition_penalty for r in rules], 1.0)
        self._presence = self._penalty([r.presence_penalty for r in rules], 0.0)
        self._frequency = self._penalty([r.frequency_penalty for r in rules], 0.0)
        sizes = [r.no_repeat_ngram_size for r in rules]
        self._ngrams = [
            (size, self._ints([i for i, own in enumerate(sizes) if own == size]))
            for size in sorted(set(sizes) - {0})
        ]
        biases = [(i, ids, b) for i, s in enumerate(samples) for ids, b in s.rules.biases]
        self._rows = self._ints([i for i, _, _ in biases])
        self._last = self._ints([ids[-1] for _, ids, _ in biases])
        self._bias = self._to_device([b for _, _, b in biases], torch.float32)
        self._prefix_len = max((len(ids) - 1 for _, ids, _ in biases), default=0)
        self._prefixes = self._ints(
            [[-1] * (self._prefix_len - len(ids) + 1) + list(ids[:-1]) for _, ids, _ in biases]
        )

    def following(
        self, samples: Sequence[RuledSample], slots: dict[int, int], device: torch.device
    ) -> _Batch:
        """The batch of the next step: this one with new lengths where the rows are the same."""
        batch = self
        if self._made_for != [(s.sample, s.row, s.rules) for s in samples]:
            batch = _Batch(samples, [slots[s.row] for s in samples], device)
        batch.lengths = batch._ints([s.length + s.rules.num_more for s in samples])
        return batch

    def add_biases(self, scores: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """Add each bias whose prefix is at the end of its row's history."""
        if not len(self._rows):
            return scores
        bias = self._bias
        if self._prefix_len:
            back = torch.arange(-self._prefix_len, 0, device=self._device)
            place = self.lengths[self._rows, None] + back
            tail = history[self._rows[:, None], place.clamp(min=0)]
            wanted = self._prefixes
            met = ((wanted == -1) | ((wanted == tail) & (place >= 0))).all(dim=1)
            bias = torch.where(met, bias, 0.0)
        return scores.index_put_((self._rows, self._last), bias, accumulate=True)

    def penalise(self, scores: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """Repetition penalty over prompt and output, the other two over the output."""
        if self._repetition is not None:
            counts = self._counts(scores, history, self._padding)
            penalised = torch.where(
                scores < 0, scores * self._repetition, scores / self._repetition
            )
            scores = torch.where(counts > 0, penalised, scores)
        if self._presence is not None or self._frequency is not None:
            counts = self._counts(scores, history, self._num_prompt)
            if self._frequency is not None:
                scores = scores - self._frequency * counts
            if self._presence is not None:
                scores = scores - self._presence * (counts > 0)
        return scores

    def forbid_ngrams(self, scores: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """Strike out each token that would repeat a run of the row's n-gram size."""
        vocab = scores.shape[1]
        for size, rows in self._ngrams:
            if history.shape[1] < size:
                continue
            lengths = self.lengths[rows]
            windows = history[rows].unfold(1, size, 1)
            back = torch.arange(1 - size, 0, device=self._device)
            place = (lengths[:, None] + back).clamp(min=0)
            suffix = history[rows].gather(1, place)
            starts = torch.arange(windows.shape[1], device=self._device)
            met = (windows[..., :-1] == suffix[:, None]).all(dim=-1)
            met &= starts + size <= lengths[:, None]
            # What does not match goes to a column behind the vocabulary.
            banned = torch.where(met, windows[..., -1].clamp(max=vocab), vocab)
            mask = torch.zeros((len(rows), vocab + 1), dtype=torch.bool, device=self._device)
            mask.scatter_(1, banned, True)
            struck = scores.index_select(0, rows).masked_fill(mask[:, :vocab], _NEVER)
            scores = scores.index_copy(0, rows, struck)
        return scores

    def _counts(
        self, scores: torch.Tensor, history: torch.Tensor, first: torch.Tensor
    ) -> torch.Tensor:
        """How often each token occurs from position `first` on, float32 `[R, vocab]`."""
        vocab = scores.shape[1]
        place = torch.arange(history.shape[1], device=self._device)
        counted = (place >= first[:, None]) & (place < self.lengths[:, None])
        # An embedding may know more tokens than the head.
        index = torch.where(counted, history.clamp(max=vocab), vocab)
        counts = torch.zeros((len(history), vocab + 1), device=self._device)
        ones = torch.ones((), device=self._device).expand(index.shape)
        return counts.scatter_add_(1, index, ones)[:, :vocab]

    def _penalty(self, values: Sequence[float], off: float) -> torch.Tensor | None:
        if all(value == off for value in values):
            return None
        return self._to_device(values, torch.float32)[:, None]

    def _ints(self, values: Sequence[object]) -> torch.Tensor:
        return self._to_device(values, torch.int64)

    def _to_device(self, values: Sequence[object], dtype: torch.dtype) -> torch.Tensor:
        host = torch.from_numpy(np.array(values, dtype=str(dtype).removeprefix("torch.")))
        # From pageable memory the driver takes its own copy at once: nothing waits for the device.
        return host.to(self._device, non_blocking=True)
