"""The seam to Hugging Face models: an attention function registered under the name "litecache".

The model calls it once per layer with the packed batch. What to attend to comes from a context
variable, not from keyword arguments, because some families drop those on the way. No mask function
is registered under the name, so that the model builds no mask at all. A second name,
`RECORDING`, is for the probe alone: under it the model builds its masks, and a `Recorder` notes the
rule of visibility that each layer was given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from litecache.engine.kv_layout import KVLayout, KVPool
from litecache.kernels import Attention, AttentionMetadata, AttentionPlan, dispatch
from litecache.kernels.checks import contents_checked

IMPLEMENTATION = "litecache"
RECORDING = "litecache_recording"

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`(batch, head, query position, key position) -> visible`, broadcast over int64 indices."""


class AttentionOptions(NamedTuple):
    """What a model's attention layer asks for beside its tensors.

    What is visible does not stand here: a layer's window is that of its KVSpec, found by the probe.

    Attributes:
        scale: factor of the scores.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[num_heads]`, extra logits of the softmax's denominator.
    """

    scale: float
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


_CONTEXT: ContextVar[Any] = ContextVar("litecache_attention")


@contextlib.contextmanager
def attention_context(context: AttentionContext | Recorder) -> Iterator[None]:
    """Make `context` compute the attention of all forwards inside the `with`."""
    token = _CONTEXT.set(context)
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def current_context() -> AttentionContext:
    """Who computes attention in the forward under way."""
    context: AttentionContext = _CONTEXT.get()
    return context


class PagedContext:
    """Attention over the pools of a model's KV groups, a plan a step and group.

    The kernels' arguments are checked at a layer's first call; after that only the step changes,
    which the runner builds itself.

    Args:
        layout: the model's KV groups.
        pools: one per group.

    Attributes:
        needed: int64 `[n]`: the positions of the batch whose logits are wanted; None = all may be.
    """

    def __init__(self, layout: KVLayout, pools: Sequence[KVPool]) -> None:
        self._layers = {
            layer: (group.index, group.spec.window, *pool.layer(layer))
            for group, pool in zip(layout.groups, pools, strict=True)
            for layer in group.layers
        }
        self._backend = dispatch.backend(pools[0].buffer.device)
        self._checked: set[int] = set()
        self._metadata: Sequence[AttentionMetadata] = ()
        self._plans: dict[tuple[int, int], AttentionPlan] = {}
        self.needed: torch.Tensor | None = None

    def begin(
        self, metadata: Sequence[AttentionMetadata], needed: torch.Tensor | None = None
    ) -> None:
        """Another step: its metadata for each group; plans are made as layers ask for them."""
        self._metadata, self.needed = metadata, needed
        self._plans.clear()

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        """The K and V views of a layer and the step's metadata of its group."""
        group, _, k_cache, v_cache = self._layers[layer]
        return k_cache, v_cache, self._metadata[group]

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
        group, window, k_cache, v_cache = self._layers[layer]
        scale, softcap, sinks = options
        asked = Attention(
            query, k_cache, v_cache, scale, window, softcap, sinks, key=key, value=value
        )
        # The other numbers of a geometry are those of the group.
        name, checked = (group, query.shape[1]), layer in self._checked
        plan = self._plans.get(name)
        if plan is None:
            metadata = self._metadata[group]
            if checked:
                plan = self._backend.plan_attention(metadata, asked.geometry)
            else:
                plan = dispatch.plan_attention(metadata, asked)
            self._plans[name] = plan
        if checked:
            return plan.attend(asked)
        if not contents_checked():
            self._checked.add(layer)
        return dispatch.paged_attention(asked, plan)


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
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
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        AttentionOptions(scaling, softcap, s_aux),
    )
    return out.unsqueeze(0), None


@dataclass(frozen=True)
class LayerCall:
    """What a layer gave to its attention in a recorded forward.

    Attributes:
        kv_heads: KV heads of key and value.
        k_dim: head dimension of K.
        v_dim: head dimension of V.
        mask: the rule behind the mask it was given; None when it came from elsewhere.
        window: the window it named beside the mask.
    """

    kv_heads: int
    k_dim: int
    v_dim: int
    mask: MaskFunction | None
    window: int | None


class Recorder:
    """Notes masks and calls of the forwards inside `attention_context(recorder)`."""

    def __init__(self) -> None:
        self.calls: dict[int, list[LayerCall]] = {}
        self._masks: list[tuple[torch.Tensor, MaskFunction]] = []

    def add_mask(self, mask: torch.Tensor, function: MaskFunction) -> None:
        """A mask that the model had made."""
        self._masks.append((mask, function))

    def add_call(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        window: int | None,
    ) -> None:
        """An attention call, key and value `[1, kv_heads, T, dim]`."""
        function = None
        if mask is not None:
            # A slice of a mask is still that mask; the tensors are kept, so addresses are unique.
            where = mask.untyped_storage().data_ptr()
            for made, rule in self._masks:
                if made.untyped_storage().data_ptr() == where:
                    function = rule
        call = LayerCall(key.shape[1], key.shape[3], value.shape[3], function, window)
        self.calls.setdefault(layer, []).append(call)


def _recording_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    recorder: Any = _CONTEXT.get()
    recorder.add_call(module.layer_idx, key, value, attention_mask, sliding_window)
    heads, tokens = query.shape[1:3]
    return query.new_zeros(query.shape[0], tokens, heads, value.shape[3]), None


def _recording_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
    from transformers.masking_utils import causal_mask_function, eager_mask

    mask: torch.Tensor = eager_mask(*args, **kwargs)
    recorder: Any = _CONTEXT.get()
    recorder.add_mask(mask, kwargs.get("mask_function", causal_mask_function))
    return mask


def register() -> None:
    """Make the functions known to transformers; harmless when done before."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention_forward)
    AttentionInterface.register(RECORDING, _recording_forward)
    AttentionMaskInterface.register(RECORDING, _recording_mask)
