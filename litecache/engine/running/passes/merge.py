"""Merged weights: projections of one input become one matrix, without a second copy in memory.

The modules' own parameters become views of the merged matrix, so the unmodified model runs on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def can_merge(layers: Sequence[nn.Module]) -> bool:
    """Whether all are plain linear layers of one input, all or none with a bias."""
    if any(type(layer) is not nn.Linear for layer in layers):
        return False
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return (
        len({layer.in_features for layer in linears}) == 1
        and len({layer.bias is None for layer in linears}) == 1
        and len({layer.weight.dtype for layer in linears}) == 1
    )


def merge(layers: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight `[sum(out), in]` and bias `[sum(out)]` of all layers, which become views of them."""
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
