"""Pass "merged": q, k, v and gate, up run as one matrix product each, in any family that has them.

The first projection of a family's forward computes all of them and keeps the others' parts until
they are asked for with the same input. Nothing of the model's code changes, and no weight is in
memory twice: the modules' own parameters become views of the merged matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of projections that share an input, in the order in which models call them."""

Linear = tuple[torch.Tensor, torch.Tensor | None]
"""Weight `[out, in]` and bias `[out]`."""

Undo = Callable[[], None]


def replace(changes: Sequence[tuple[nn.Module, str, nn.Module]]) -> Undo | None:
    """Put new children (parent, name, child) in place.

    Returns:
        A function that puts the former ones back, or None when there is nothing to replace.
    """
    former = [(parent, name, getattr(parent, name)) for parent, name, _ in changes]

    def put(children: Sequence[tuple[nn.Module, str, nn.Module]]) -> None:
        for parent, name, child in children:
            setattr(parent, name, child)

    put(changes)
    return (lambda: put(former)) if former else None


def can_merge(layers: Sequence[Any]) -> bool:
    """Whether all are plain linear layers of one input, all or none with a bias."""
    return all(type(layer) is nn.Linear for layer in layers) and (
        len({(x.in_features, x.bias is None, x.weight.dtype) for x in layers}) == 1
    )


def merge(layers: Sequence[nn.Linear]) -> Linear:
    """Weight and bias of all layers, one below the other, which become views of them."""
    weight = torch.cat([layer.weight.data for layer in layers])
    biases = [layer.bias.data for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    start = 0
    for layer in layers:
        end = start + layer.out_features
        layer.weight.data = weight[start:end]
        if bias is not None:
            layer.bias.data = bias[start:end]
        start = end
    return weight, bias


class _Shared:
    """A merged product and the input it belongs to."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
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


def merge_projections(model: nn.Module) -> Undo | None:
    """Merge wherever the structure allows; returned is what undoes it, if anything was merged."""
    changes: list[tuple[nn.Module, str, nn.Module]] = []
    for module in list(model.modules()):
        for names in FAMILIES:
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if can_merge(layers):
                shared = _Shared(layers)
                changes += [
                    (module, name, MergedProjection(shared, index, layer))
                    for index, (name, layer) in enumerate(zip(names, layers, strict=True))
                ]
    return replace(changes)
