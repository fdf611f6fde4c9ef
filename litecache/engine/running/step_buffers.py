"""The memory that a step's inputs travel through: one host buffer, one copy to the device.

All inputs of a step lie in one run of 64-bit words, cut into named fields at offsets that depend on
the step's shape alone. A captured graph reads the device fields in place. On CPU host and device
are the same memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

_RING = 4
"""Host buffers in turn: a copy may still read the last ones while the next step is built."""

_CACHED_SHAPES = 512

STRUCK_TOKENS = 4
"""Tokens a row cannot draw that the drawing kernels know of; -1 = none."""

Fields = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step's inputs.

    Attributes:
        tokens: positions computed, padding included.
        seqs: sequences, padding included.
        samples: rows whose next token is drawn, padding included.
        groups: KV groups.
        deltas: entries of the device's block tables that change.
    """

    tokens: int
    seqs: int
    samples: int
    groups: int
    deltas: int = 0

    def fields(self) -> tuple[tuple[str, str, int], ...]:
        """Name, dtype and length of every field, in order; deltas last, they move no other."""
        return (
            ("ids", "int64", self.tokens),
            ("id_index", "int64", self.tokens),
            ("positions", "int64", self.tokens),
            ("slots", "int64", self.tokens * self.groups),
            ("rows", "int64", self.seqs),
            ("logit_index", "int64", self.samples),
            ("sample_rows", "int64", self.samples),
            ("keys", "int64", self.samples),
            ("top_k", "int64", self.samples),
            ("temperature", "float32", self.samples),
            ("top_p", "float32", self.samples),
            ("min_p", "float32", self.samples),
            ("struck", "int32", self.samples * STRUCK_TOKENS),
            ("context_lens", "int32", self.seqs),
            ("cu_seqlens", "int32", self.seqs + 1),
            ("delta_index", "int64", self.deltas),
            ("delta_value", "int32", self.deltas),
        )


class StepBuffers:
    """Buffers for steps of any shape up to a largest one.

    Args:
        largest: bounds every later shape.
        num_rows: rows of the engine; each has a word with its last sampled token.
        device: where the model runs.
    """

    def __init__(self, largest: StepShape, num_rows: int, device: torch.device) -> None:
        # One more word receives the tokens of padded rows.
        self._offset = num_rows + 1
        words = self._offset + _total_words(largest)
        self._device = torch.zeros(words, dtype=torch.int64, device=device)
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._ring = [torch.zeros(words, dtype=torch.int64).pin_memory() for _ in range(_RING)]
            self._copied = [torch.cuda.Event() for _ in range(_RING)]  # type: ignore[no-untyped-call]
        else:
            self._ring = [self._device]
        self._turn = 0
        # Steps of one shape come again and again, and cutting views costs more than filling them.
        self._host_fields: dict[tuple[int, StepShape], Fields] = {}
        self._device_fields: dict[StepShape, dict[str, torch.Tensor]] = {}

    @property
    def words(self) -> torch.Tensor:
        """int64: the last tokens of all rows, then the fields of the step, `ids` first."""
        return self._device

    @property
    def last_tokens(self) -> torch.Tensor:
        """int64 `[num_rows + 1]`: the last sampled token of each row and of the padding row."""
        return self._device[: self._offset]

    @property
    def first_id(self) -> int:
        """Index in `words` of the first entry of `ids`."""
        return self._offset

    @property
    def separate(self) -> bool:
        """Whether host and device have memory of their own."""
        return self._on_gpu

    def host(self, shape: StepShape) -> Fields:
        """The next host buffer's fields, to be filled before `upload`."""
        self._turn = (self._turn + 1) % len(self._ring)
        if self._on_gpu:
            self._copied[self._turn].synchronize()
        key = (self._turn, shape)
        fields = self._host_fields.get(key)
        if fields is None:
            _bound(self._host_fields)
            cut = self._cut(self._ring[self._turn], shape)
            fields = self._host_fields[key] = {name: part.numpy() for name, part in cut.items()}
        return fields

    def upload(self, shape: StepShape) -> None:
        """Copy the filled fields to the device, in stream order."""
        if not self._on_gpu:
            return
        end = self._offset + _total_words(shape)
        source = self._ring[self._turn][self._offset : end]
        self._device[self._offset : end].copy_(source, non_blocking=True)
        self._copied[self._turn].record()

    def device(self, shape: StepShape) -> dict[str, torch.Tensor]:
        """The fields on the device, as views."""
        fields = self._device_fields.get(shape)
        if fields is None:
            _bound(self._device_fields)
            fields = self._device_fields[shape] = self._cut(self._device, shape)
        return fields

    def _cut(self, buffer: torch.Tensor, shape: StepShape) -> dict[str, torch.Tensor]:
        fields = {}
        start = self._offset
        for name, dtype, length in shape.fields():
            end = start + _words(dtype, length)
            fields[name] = buffer[start:end].view(getattr(torch, dtype))[:length]
            start = end
        return fields


@functools.lru_cache(maxsize=_CACHED_SHAPES)
def _total_words(shape: StepShape) -> int:
    return sum(_words(dtype, length) for _, dtype, length in shape.fields())


def _bound(cache: dict[Any, Any]) -> None:
    """Forget everything when eager steps have filled a cache with shapes of their own."""
    if len(cache) >= _CACHED_SHAPES:
        cache.clear()


def _words(dtype: str, length: int) -> int:
    return length if dtype == "int64" else -(-length // 2)
