"""Pass "fused": decoder layers of Llama's structure run with few, large operations.

A layer is replaced when its parts have the expected names and types and its output on random
input equals the original's; what the structure cannot tell (a residual multiplier, a layer without
rotation) shows there. The scale, window and so on are those that the original passed to attention.

Its operations are chosen by device and dtype once per layer: on a GPU in half precision Triton
kernels, elsewhere torch operations with the same meaning; matrix products of more tokens than
stream well go to the library.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from litecache.engine.running.hf_attention import (
    AttentionOptions,
    PagedContext,
    attention_context,
    current_context,
)
from litecache.engine.running.passes.merged_projections import (
    Linear,
    Undo,
    can_merge,
    merge,
    replace,
)

logger = logging.getLogger(__name__)

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
_PROBE_TOKENS = 5
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Of the relative error of what a layer adds to its input."""


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


class FusedDecoderLayer(nn.Module):
    """Drop-in for a pre-norm decoder layer; weights are shared with the original.

    Args:
        original: a layer for which `has_structure` holds.
        options: what the original's attention asks for.
        last: no layer follows, so that only the positions whose logits are wanted need its result.
    """

    def __init__(self, original: Any, options: AttentionOptions, *, last: bool = False) -> None:
        super().__init__()
        self._last = last
        attention, mlp = original.self_attn, original.mlp
        self._layer = attention.layer_idx
        self._dim = attention.head_dim
        self._heads = attention.q_proj.out_features // self._dim
        self._kv_heads = attention.k_proj.out_features // self._dim
        self._options = options
        self._qkv = merge([attention.q_proj, attention.k_proj, attention.v_proj])
        self._gate_up = merge([mlp.gate_proj, mlp.up_proj])
        self._out = _parameters(attention.o_proj)
        self._down = _parameters(mlp.down_proj)
        self._norms = [
            (norm.weight.data, norm.variance_epsilon)
            for norm in (original.input_layernorm, original.post_attention_layernorm)
        ]
        self._qk_norm: tuple[torch.Tensor, torch.Tensor, float] | None = None
        if hasattr(attention, "q_norm"):
            q_norm, k_norm = attention.q_norm, attention.k_norm
            self._qk_norm = (q_norm.weight.data, k_norm.weight.data, q_norm.variance_epsilon)
        self._ops = choose_ops(self._qkv[0])
        self._on_gpu = isinstance(self._ops, TritonOps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states `[1, T, width]`; cos and sin `[1, T, rotary_dim]`."""
        x = hidden_states[0]
        qkv = self._ops.linear(self._ops.norm(x, *self._norms[0]), *self._qkv)
        cos, sin = position_embeddings
        needed = getattr(current_context(), "needed", None) if self._last else None
        if needed is not None and 2 * len(needed) > x.shape[0]:
            needed = None
        attended = self._attend(qkv, cos[0], sin[0], needed is None or len(needed) > 0)
        if attended is None:
            return hidden_states
        attended = attended.reshape(x.shape[0], -1)
        if needed is None:
            return self._finish(x, attended)[None]
        rows = self._finish(x.index_select(0, needed), attended.index_select(0, needed))
        return x.index_copy_(0, needed, rows)[None]

    def _finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What follows attention, `[T, width]` from the residual and the heads' outputs."""
        ops = self._ops
        x = ops.linear_add(x, attended, *self._out)
        active = ops.gated_linear(ops.norm(x, *self._norms[1]), *self._gate_up)
        return ops.linear_add(x, active, *self._down)

    def _attend(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        """Store keys and values, and attend `[T, heads, dim]`; None when nobody needs a result."""
        context = current_context()
        queries, keys = self._heads, self._heads + self._kv_heads
        heads = qkv.view(qkv.shape[0], -1, self._dim)
        query_key, value = heads[:, :keys], heads[:, keys:]
        stored = self._on_gpu and isinstance(context, PagedContext)
        if stored:
            from litecache.engine.running.passes.triton_elementwise import rotate_and_store

            place = context.place(self._layer)
            rotate_and_store(qkv, cos, sin, *place, num_heads=queries, norm=self._qk_norm)
        else:
            query_key = self._normalise_and_rotate(query_key, cos, sin)
        query, key = query_key[:, :queries], query_key[:, queries:]
        if not wanted:
            if not stored:
                context.store(self._layer, key, value)
            return None
        attend = context.attend_stored if stored else context.attend
        attended: torch.Tensor = attend(self._layer, query, key, value, self._options)
        return attended

    def _normalise_and_rotate(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Norms of queries and keys `[T, heads, dim]`, then their rotary embedding."""
        if self._qk_norm is not None:
            q_weight, k_weight, eps = self._qk_norm
            parts = zip(
                (x[:, : self._heads], x[:, self._heads :]), (q_weight, k_weight), strict=True
            )
            x = torch.cat([self._ops.norm(p.contiguous(), w, eps) for p, w in parts], dim=1)
        rotary = cos.shape[-1]
        turned = x[..., :rotary] if rotary < x.shape[-1] else x
        low, high = turned.chunk(2, dim=-1)
        half = torch.cat((-high, low), dim=-1)
        turned = (turned * cos[:, None]).addcmul_(half, sin[:, None])
        return turned if rotary == x.shape[-1] else torch.cat((turned, x[..., rotary:]), dim=-1)


def _parameters(linear: nn.Linear) -> Linear:
    return linear.weight.data, None if linear.bias is None else linear.bias.data


def has_structure(layer: Any) -> bool:
    """Whether a layer's parts are those of a pre-norm decoder with rotary and gated MLP."""
    if _parts(layer) != _LAYER or _parts(layer.mlp) != _MLP:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    inner = _parts(attention)
    if inner == _ATTENTION | _NORMS:
        norms += [attention.q_norm, attention.k_norm]
    elif inner != _ATTENTION:
        return False
    return (
        isinstance(getattr(attention, "head_dim", None), int)
        and can_merge([attention.q_proj, attention.k_proj, attention.v_proj])
        and can_merge([mlp.gate_proj, mlp.up_proj])
        and type(attention.o_proj) is type(mlp.down_proj) is nn.Linear
        and "silu" in type(getattr(mlp, "act_fn", None)).__name__.lower()
        and all(hasattr(norm, "variance_epsilon") and hasattr(norm, "weight") for norm in norms)
    )


def _parts(module: nn.Module) -> set[str]:
    """Names of the children that have parameters; versions differ in the others."""
    return {n for n, child in module.named_children() if next(child.parameters(), None) is not None}


class _DenseContext:
    """Causal attention without a cache, which notes what the layer asked for."""

    options: AttentionOptions

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        self.options = options
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=options.scale, enable_gqa=True
        )
        return out.transpose(0, 1)


def fuse_layers(model: Any, max_model_len: int) -> Undo | None:
    """Replace every layer that has the structure and proves equal.

    Args:
        model: a causal language model.
        max_model_len: longest sequence in tokens.

    Returns:
        A function that puts the original layers back, or None when none was replaced.
    """
    changes: list[tuple[nn.Module, str, nn.Module]] = []
    stacks = list(_stacks(model))
    for layers, rotary in stacks:
        for index, layer in enumerate(layers):
            if has_structure(layer):
                last = len(stacks) == 1 and index == len(layers) - 1
                fused = _proven(layer, rotary, last, max_model_len)
                if fused is not None:
                    changes.append((layers, str(index), fused))
    return replace(changes)


def _stacks(model: nn.Module) -> Iterator[tuple[nn.ModuleList, nn.Module]]:
    """Lists of decoder layers beside a rotary embedding."""
    for module in model.modules():
        layers, rotary = getattr(module, "layers", None), getattr(module, "rotary_emb", None)
        if isinstance(layers, nn.ModuleList) and isinstance(rotary, nn.Module):
            yield layers, rotary


def _proven(
    layer: Any, rotary: nn.Module, last: bool, max_model_len: int
) -> FusedDecoderLayer | None:
    """The fused layer, or None when its output differs from the original's."""
    weight = layer.self_attn.q_proj.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _PROBE_TOKENS, weight.shape[1], generator=generator)
    hidden = hidden.to(weight.device, weight.dtype)
    # Up to the last one: some scale their queries by position, from a certain one on.
    spread = torch.linspace(3, max(max_model_len - 1, 3 + _PROBE_TOKENS), _PROBE_TOKENS)
    positions = spread.long().to(weight.device)[None]
    context = _DenseContext()
    try:
        with torch.inference_mode(), attention_context(context):
            embeddings = rotary(hidden, positions)
            arguments = {"position_embeddings": embeddings, "position_ids": positions}
            expected = layer(hidden, attention_mask=None, **arguments)
            fused = FusedDecoderLayer(layer, context.options, last=last)
            got = fused(hidden.clone(), **arguments)
            if not isinstance(expected, torch.Tensor):
                return None
            added = (expected - hidden).float().norm()
            difference = float((got - expected).float().norm() / added)
    except Exception as error:
        # A family whose layers are called in another way keeps them.
        logger.info("layer %s stays as it is: %s", type(layer).__name__, error)
        return None
    if not difference <= _TOLERANCE[weight.dtype]:
        logger.info("layer %s stays as it is: differs by %.1e", type(layer).__name__, difference)
        return None
    return fused
