"""Pass "small": what lies around the layers costs one kernel each.

The rotary embedding becomes a table that is gathered by position; on a GPU in half precision norms
outside fused layers become one kernel, and the output head streams its weights for few tokens. Each
replacement must give the original's values on a test input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from litecache.engine.running.passes.fused_layers import TorchOps, TritonOps, choose_ops
from litecache.engine.running.passes.merged_projections import Undo, replace

_TABLE_BYTES = 256 << 20
_TOLERANCE = 1e-2


class TableRotary(nn.Module):
    """cos and sin of all positions, computed once by the original module."""

    def __init__(self, original: nn.Module, max_positions: int, like: torch.Tensor) -> None:
        super().__init__()
        positions = torch.arange(max_positions, device=like.device)[None]
        cos, sin = original(like, positions)
        self._cos, self._sin = cos[0], sin[0]

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[1, T, rotary_dim]` each, for positions `[1, T]`."""
        index = position_ids[0]
        return self._cos.index_select(0, index)[None], self._sin.index_select(0, index)[None]


class KernelNorm(nn.Module):
    """An RMS norm as one kernel."""

    def __init__(self, original: Any, ops: TorchOps) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = original.weight, original.variance_epsilon
        self._ops = ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., width]` to the same shape."""
        return self._ops.norm(x.contiguous(), self.weight, self.variance_epsilon)


class StreamHead(nn.Module):
    """An output projection that streams its weights."""

    def __init__(self, original: nn.Linear, ops: TorchOps) -> None:
        super().__init__()
        self.weight, self.bias = original.weight, original.bias
        self._ops = ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[1, T, width]` to `[1, T, vocab]`."""
        return self._ops.linear(x[0], self.weight, self.bias)[None]


def replace_small_modules(model: Any, max_positions: int) -> Undo | None:
    """Replace what proves equal; returned is what undoes it, if anything was replaced.

    Args:
        model: a causal language model.
        max_positions: positions the rotary tables cover.
    """
    weight, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    ops = choose_ops(weight)
    on_gpu = isinstance(ops, TritonOps)
    changes: list[tuple[nn.Module, str, nn.Module]] = []
    with torch.inference_mode():
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                new: nn.Module | None = None
                if name == "rotary_emb" and hasattr(child, "inv_freq"):
                    new = _rotary_table(child, max_positions, weight)
                elif on_gpu and type(child).__name__.endswith("RMSNorm"):
                    new = _kernel_norm(child, ops)
                elif on_gpu and child is head and type(head) is nn.Linear:
                    new = StreamHead(head, ops)
                if new is not None:
                    changes.append((parent, name, new))
    return replace(changes)


def _rotary_table(
    original: nn.Module, max_positions: int, weight: torch.Tensor
) -> TableRotary | None:
    like = weight[:1, None, :]
    positions = torch.tensor([[max_positions - 1, 0, max_positions // 2]], device=weight.device)
    try:
        expected = original(like, positions)
        width = expected[0].shape[-1]
        if 2 * max_positions * width * weight.dtype.itemsize > _TABLE_BYTES:
            return None
        table = TableRotary(original, max_positions, like)
        same = all(torch.equal(a, b) for a, b in zip(table(like, positions), expected, strict=True))
    except Exception:
        return None  # called in another way in this family
    return table if same else None


def _kernel_norm(original: Any, ops: TorchOps) -> KernelNorm | None:
    weight = getattr(original, "weight", None)
    if weight is None or weight.ndim != 1 or not hasattr(original, "variance_epsilon"):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, weight.shape[0], generator=generator).to(weight.device, weight.dtype)
    expected = original(x)
    fast = KernelNorm(original, ops)
    error = (fast(x) - expected).float().norm() / expected.float().norm()
    return fast if bool(error <= _TOLERANCE) else None
