"""The operations of a fused decoder layer, chosen by device and dtype once per layer.

On a GPU in half precision they are Triton kernels, elsewhere torch operations with the same
meaning; matrix products of more tokens than stream well go to the library.
"""

from __future__ import annotations

import torch
from torch.nn import functional


class TorchOps:
    """Plain torch, for CPU and for float32; activations are `[T, width]`."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMS norm over the last dimension of a contiguous `x`."""
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """`x @ weight.T + bias`."""
        return functional.linear(x, weight, bias)

    def linear_add(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """`residual + x @ weight.T + bias`; may overwrite the residual."""
        return functional.linear(x, weight, bias).add_(residual)

    def gated_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """`silu(gate) * up` of the merged projection `[2 * width, in]`."""
        gate, up = self.linear(x, weight, bias).chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)


class TritonOps(TorchOps):
    """Triton kernels, and the library for products of many tokens."""

    def __init__(self, device: torch.device) -> None:
        from litecache.engine.running.passes import triton_elementwise, triton_linear

        self._elementwise = triton_elementwise
        self._stream = triton_linear.stream_linear
        self._most_streamed = triton_linear.MAX_TOKENS
        triton_linear.prepare(device)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """One kernel."""
        return self._elementwise.rms_norm(x, weight, eps)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The weights stream through once."""
        if x.shape[0] <= self._most_streamed:
            return self._stream(x, weight, bias)
        return functional.linear(x, weight, bias)

    def linear_add(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same, with the sum in the product's epilogue."""
        if x.shape[0] <= self._most_streamed:
            return self._stream(x, weight, bias, residual=residual)
        if bias is not None:
            residual = residual + bias
        return torch.addmm(residual, x, weight.t(), out=residual)

    def gated_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Gated in the product's epilogue, or by a kernel behind the library's product."""
        if x.shape[0] <= self._most_streamed:
            return self._stream(x, weight, bias, gated=True)
        return self._elementwise.silu_and_multiply(self.linear(x, weight, bias))


def choose_ops(weight: torch.Tensor) -> TorchOps:
    """The operations for weights like this one."""
    if weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
        return TritonOps(weight.device)
    return TorchOps()
