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
from typing import Any, NamedTuple

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


_CONTEXT: ContextVar[Any] = ContextVar("litecache_attention")


@contextlib.contextmanager
def attention_context(context: Any) -> Iterator[None]:
    """Have `context` compute the attention of all forwards inside the `with`.

    It has an `attend` like `PagedContext.attend`, or is a `Recorder`.
    """
    token = _CONTEXT.set(context)
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def current_context() -> Any:
    """Who computes attention in the forward under way."""
    return _CONTEXT.get()


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
            layer: (group.index, group.spec.window, *pool.layer(layer), *pool.scales(layer))
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

    def place(
        self, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The K and V views of a layer, the slots of the step's tokens in them, and the scales."""
        group, _, k_cache, v_cache, k_scale, v_scale = self._layers[layer]
        return k_cache, v_cache, self._metadata[group].slot_mapping, k_scale, v_scale

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Write this step's KV to its slots, then attend to all that is visible.

        Args:
            layer: the model's layer index.
            query: `[T, num_heads, k_dim]`.
            key: `[T, kv_heads, k_dim]`.
            value: `[T, kv_heads, v_dim]`.
            options: what the model asks for.

        Returns:
            `[T, num_heads, v_dim]`.
        """
        self.store(layer, key, value)
        return self.attend_stored(layer, query, key, value, options)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write this step's KV to its slots."""
        kernels = self._backend if layer in self._checked else dispatch
        kernels.store_kv(key, value, *self.place(layer))

    def attend_stored(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """As `attend`, for KV that is in its slots already."""
        group, window, k_cache, v_cache, k_scale, v_scale = self._layers[layer]
        scale, softcap, sinks = options
        asked = Attention(
            query, k_cache, v_cache, scale, window, softcap, sinks, None, key, value,
            k_scale, v_scale,
        )  # fmt: skip
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
    out = current_context().attend(
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
    """What the forwards inside `attention_context(recorder)` gave to their attention.

    Attributes:
        calls: by layer, in order.
        masks: what the model had made, with the rules behind them.
    """

    def __init__(self) -> None:
        self.calls: dict[int, list[LayerCall]] = {}
        self.masks: list[tuple[torch.Tensor, MaskFunction]] = []

    def rule(self, mask: torch.Tensor | None) -> MaskFunction | None:
        """The rule behind a mask, or a slice of one; None for what came from elsewhere."""
        # The masks are kept, so addresses are unique.
        where = None if mask is None else mask.untyped_storage().data_ptr()
        found = [rule for made, rule in self.masks if made.untyped_storage().data_ptr() == where]
        return found[-1] if found else None


def _recording_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    recorder, (kv_heads, _, k_dim), v_dim = current_context(), key.shape[1:], value.shape[3]
    call = LayerCall(kv_heads, k_dim, v_dim, recorder.rule(attention_mask), sliding_window)
    recorder.calls.setdefault(module.layer_idx, []).append(call)
    heads, tokens = query.shape[1:3]
    return query.new_zeros(query.shape[0], tokens, heads, v_dim), None


def _recording_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
    from transformers.masking_utils import causal_mask_function, eager_mask

    mask: torch.Tensor = eager_mask(*args, **kwargs)
    rule = kwargs.get("mask_function", causal_mask_function)
    current_context().masks.append((mask, rule))
    return mask


def register() -> None:
    """Make the functions known to transformers; harmless when done before."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention_forward)
    AttentionInterface.register(RECORDING, _recording_forward)
    AttentionMaskInterface.register(RECORDING, _recording_mask)
