"""The exact reference of a `Forward`: a stock model, row by row, without any cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from litecache.token_ids import TokenIds


class StockForward:
    """Forward passes of a stock model, one row at a time.

    Attributes:
        calls: of each forward so far, its rows' lengths and the positions wanted of each.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        self.dtype = model.dtype
        self.calls: list[tuple[list[int], list[int]]] = []

    def __call__(
        self, rows: Sequence[TokenIds | Sequence[int]], wanted: Sequence[int]
    ) -> list[torch.Tensor]:
        self.calls.append(([len(row) for row in rows], list(wanted)))
        with torch.no_grad():
            return [
                self._model(
                    torch.tensor([list(row)]), use_cache=False, logits_to_keep=count
                ).logits[0]
                for row, count in zip(rows, wanted, strict=True)
            ]
