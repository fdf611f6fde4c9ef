"""The seam to Hugging Face models: an attention function registered under the name "litecache".

The model calls it once per layer with the packed batch. What to attend to comes from a context
variable, not from keyword arguments, because some families drop those on the way. No mask function
is registered under the name, so that the model builds no mask at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from litecache.engine.kv_layout import KVLayout, KVPool
from litecache.kernels import AttentionMetadata, dispatch
from litecache.kernels.checks import contents_checked

IMPLEMENTATION = "litecache"


@dataclass(frozen=True)
class AttentionOptions:
    """What a model's attention layer asks for beside its tensors.

    Attributes:
        scale: factor of the scores.
        window: sliding window in tokens, None = all.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[num_heads]`, extra logits of the softmax's denominator.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class AttentionContext(Protocol):
    """Who computes attention during a forward."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attention of one layer.

        Args:
            layer: the model's layer index.
            query: `[T, num_heads, k_dim]`.
            key: `[T, kv_heads, k_dim]`.
            value: `[T, kv_heads, v_dim]`.
            options: scale, window and so on.

        Returns:
            `[T, num_heads, v_dim]`.
        """
        ...


_CONTEXT: ContextVar[AttentionContext] = ContextVar("litecache_attention")


@contextlib.contextmanager
def attention_context(context: AttentionContext) -> Iterator[None]:
    """Make `context` compute the attention of all forwards inside the `with`."""
    token = _CONTEXT.set(context)
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def current_context() -> AttentionContext:
    """Who computes attention in the forward under way."""
    return _CONTEXT.get()


class PagedContext:
    """Attention over the pools of a model's KV groups.

    The kernels' arguments are checked at a layer's first call; after that only the step changes,
    which the runner builds itself, and the calls go to the backend at once.

    Args:
        layout: the model's KV groups.
        pools: one per group.
    """

    def __init__(self, layout: KVLayout, pools: Sequence[KVPool]) -> None:
        self._layers = {
            layer: (group.index, *pool.layer(layer))
            for group, pool in zip(layout.groups, pools, strict=True)
            for layer in group.layers
        }
        self._backend = dispatch.backend(pools[0].buffer.device)
        self._checked: set[int] = set()
        self.metadata: Sequence[AttentionMetadata] = ()
        """One per group; set before each forward."""
        self.needed: torch.Tensor | None = None
        """int64 `[n]`: the positions of the batch whose logits are wanted; None = all may be."""

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        """The K and V views of a layer and the step's metadata of its group."""
        group, k_cache, v_cache = self._layers[layer]
        return k_cache, v_cache, self.metadata[group]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Write this step's KV to its slots, then attend to all that is visible."""
        self.store(layer, key, value)
        return self.attend_stored(layer, query, key, value, options)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write this step's KV to its slots."""
        k_cache, v_cache, metadata = self.layer(layer)
        kernels = self._backend if layer in self._checked else dispatch
        kernels.store_kv(key, value, k_cache, v_cache, metadata.slot_mapping)

    def attend_stored(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """As `attend`, for KV that is in its slots already."""
        k_cache, v_cache, metadata = self.layer(layer)
        kernels = self._backend if layer in self._checked else dispatch
        if not contents_checked():
            self._checked.add(layer)
        out: torch.Tensor = kernels.paged_attention(
            query,
            k_cache,
            v_cache,
            metadata,
            scale=options.scale,
            window=options.window,
            softcap=options.softcap,
            sinks=options.sinks,
            key=key,
            value=value,
        )
        return out


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The signature of transformers' attention functions: `[1, heads, T, dim]` in,
    `[1, T, heads, dim]` out.
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    out = _CONTEXT.get().attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        AttentionOptions(scaling, sliding_window, softcap, s_aux),
    )
    return out.unsqueeze(0), None


def register() -> None:
    """Make the function known to transformers; harmless when done before."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _attention_forward)
