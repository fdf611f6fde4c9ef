"""The operations of a fused decoder layer, chosen by device and dtype once per layer.

On a GPU in half precision they are Triton kernels, elsewhere torch operations with the same
meaning; matrix products of more tokens than `MAX_TOKENS` go to the library.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

from litecache.engine.running.passes.linear_tuning import MAX_TOKENS


class LayerOps(Protocol):
    """What a decoder layer computes beside attention; activations are `[T, width]`."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMS norm over the last dimension of a contiguous `x`."""
        ...

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """`x @ weight.T + bias`."""
        ...

    def linear_add(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """`residual + x @ weight.T + bias`; may overwrite the residual."""
        ...

    def gated_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """`silu(gate) * up` of the merged projection `[2 * width, in]`."""
        ...


class TorchOps:
    """Plain torch, for CPU and for float32."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See LayerOps."""
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See LayerOps."""
        return functional.linear(x, weight, bias)

    def linear_add(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """See LayerOps."""
        return functional.linear(x, weight, bias).add_(residual)

    def gated_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See LayerOps."""
        gate, up = self.linear(x, weight, bias).chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)


class TritonOps:
    """Triton kernels, and the library for products of many tokens."""

    def __init__(self, device: torch.device) -> None:
        from litecache.engine.running.passes import triton_elementwise, triton_linear

        self._elementwise = triton_elementwise
        self._stream = triton_linear.stream_linear
        triton_linear.prepare(device)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See LayerOps."""
        return self._elementwise.rms_norm(x, weight, eps)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See LayerOps."""
        if x.shape[0] <= MAX_TOKENS:
            return self._stream(x, weight, bias)
        return functional.linear(x, weight, bias)

    def linear_add(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """See LayerOps."""
        if x.shape[0] <= MAX_TOKENS:
            return self._stream(x, weight, bias, residual=residual)
        if bias is not None:
            residual = residual + bias
        # The product's epilogue adds the residual: no pass of its own over the activations.
        return torch.addmm(residual, x, weight.t(), out=residual)

    def gated_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See LayerOps."""
        if x.shape[0] <= MAX_TOKENS:
            return self._stream(x, weight, bias, gated=True)
        return self._elementwise.silu_and_multiply(self.linear(x, weight, bias))


def choose_ops(device: torch.device, dtype: torch.dtype) -> LayerOps:
    """The operations for weights of this kind."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return TritonOps(device)
    return TorchOps()
