"""Pass "merged": q, k, v and gate, up run as one matrix product each, in any family that has them.

The first projection of a family's forward computes all of them and keeps the others' parts until
they are asked for with the same input. Nothing of the model's code changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from litecache.engine.running.passes.merge import can_merge, merge

FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of projections that share an input, in the order in which models call them."""


class _Shared:
    """A merged product and the input it belongs to."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.weight, self.bias = merge(layers)
        self._input: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, ...] = ()

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self._input is not x:
            product = functional.linear(x, self.weight, self.bias)
            self._input, self._parts = x, product.split(self.sizes, dim=-1)  # type: ignore[no-untyped-call]
        part = self._parts[index]
        if index == len(self.sizes) - 1:
            # The last one asked: nothing of the activations is kept alive.
            self._input, self._parts = None, ()
        return part


class MergedProjection(nn.Module):
    """One of several projections of the same input."""

    def __init__(self, shared: _Shared, index: int, original: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        self.weight, self.bias = original.weight, original.bias
        self._shared = shared
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        return self._shared.part(self._index, x)


def merge_projections(model: nn.Module) -> Any:
    """Merge wherever the structure allows.

    Returns:
        A function that puts the original modules back, or None when nothing was merged.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for module in list(model.modules()):
        for names in FAMILIES:
            layers = [getattr(module, name, None) for name in names]
            if any(layer is None for layer in layers) or not can_merge(layers):  # type: ignore[arg-type]
                continue
            shared = _Shared(layers)  # type: ignore[arg-type]
            for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
                assert isinstance(layer, nn.Linear)
                replaced.append((module, name, layer))
                setattr(module, name, MergedProjection(shared, index, layer))

    def undo() -> None:
        for module, name, layer in replaced:
            setattr(module, name, layer)

    return undo if replaced else None
