"""The load-time probe: what KV a model makes, and proof that it is right when paged.

Reading a model's source is no basis for running it: some ignore the attention function, some call
it twice, some keep state elsewhere. So the model is asked. One forward with a recording function
gives each layer's KV shape; then two sequences run packed and in chunks over a small pool and must
give the logits of the model's own attention. A model that fails is refused with the reason.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from litecache.engine.hf_attention import (
    IMPLEMENTATION,
    AttentionOptions,
    PagedContext,
    attention_context,
    register,
)
from litecache.engine.kv_layout import KVLayout, KVPool, KVSpec
from litecache.engine.model_checks import refusal
from litecache.kernels import AttentionMetadata

PROBE_TOKENS = 24
FIRST_CHUNK = 17
"""Not a multiple of a block, so that the second chunk starts inside one."""
OTHER_CHUNK = 9

TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the relative error `|out - reference| / |reference|` over all logits."""


class _Recorder:
    """Notes the shapes that each layer hands to attention."""

    def __init__(self, kv_dtype: str) -> None:
        self.specs: dict[int, list[KVSpec]] = {}
        self._kv_dtype = kv_dtype

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        spec = KVSpec(
            key.shape[1], key.shape[2], value.shape[2], self._kv_dtype, window=options.window
        )
        self.specs.setdefault(layer, []).append(spec)
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])


def record_specs(model: Any, kv_dtype: str) -> tuple[KVSpec, ...]:
    """Each layer's KV shape and window, by running the model on a few tokens.

    Args:
        model: a causal language model with this package's attention function chosen.
        kv_dtype: of the pool, by name.

    Raises:
        ModelNotSupportedError: the function did not run exactly once per layer.
    """
    config = model.config
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    recorder = _Recorder(kv_dtype)
    tokens = _probe_tokens(model, 1)[:, :2]
    try:
        _forward(model, tokens, torch.arange(2, device=tokens.device)[None], recorder)
    except Exception as error:
        raise refusal(config, f"a packed forward fails: {error}") from error
    if not recorder.specs:
        raise refusal(config, "it has attention code of its own and ignores attention functions")
    if sorted(recorder.specs) != list(range(num_layers)):
        raise refusal(
            config,
            f"attention functions ran in layers {sorted(recorder.specs)} of {num_layers}; the"
            " others keep state in another way",
        )
    twice = [layer for layer, specs in recorder.specs.items() if len(specs) != 1]
    if twice:
        raise refusal(config, f"layers {twice} call attention more than once")
    return tuple(recorder.specs[layer][0] for layer in range(num_layers))


def verify_paged(model: Any, specs: tuple[KVSpec, ...], block_size: int) -> float:
    """Compare a packed, chunked, paged run with the model's own attention.

    Args:
        model: as for `record_specs`.
        specs: what `record_specs` found.
        block_size: tokens per block.

    Returns:
        The relative error of the logits.

    Raises:
        ModelNotSupportedError: the error is above the tolerance of the dtype.
    """
    paged = paged_logits(model, specs, block_size)
    reference = _ordinary_forward(model, _probe_tokens(model, 2))
    error = float((paged - reference).norm() / reference.norm())
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    if not error <= tolerance:
        raise refusal(
            model.config,
            f"its logits over paged KV differ from its own attention by {error:.1e} relative"
            f" (allowed: {tolerance:.0e})",
        )
    return error


def paged_logits(model: Any, specs: tuple[KVSpec, ...], block_size: int) -> torch.Tensor:
    """Logits of two sequences, run packed and in chunks over a small pool.

    Args:
        model: as for `record_specs`.
        specs: what `record_specs` found.
        block_size: tokens per block.

    Returns:
        float32 `[2, PROBE_TOKENS, vocab]`.
    """
    tokens = _probe_tokens(model, 2)
    device = tokens.device
    layout = KVLayout.from_specs(specs, block_size)
    blocks_each = -(-PROBE_TOKENS // block_size)
    pools = [KVPool(group, 2 * blocks_each + 1, device) for group in layout.groups]
    # Scattered and interleaved, as in a pool that has been in use.
    tables = [list(range(2 * blocks_each, 0, -2)), list(range(1, 2 * blocks_each, 2))]
    context = PagedContext(layout, pools)
    parts: list[list[torch.Tensor]] = [[], []]
    for chunks in (
        ((0, 0, FIRST_CHUNK), (1, 0, OTHER_CHUNK)),
        ((1, OTHER_CHUNK, PROBE_TOKENS), (0, FIRST_CHUNK, PROBE_TOKENS)),
    ):
        ids = torch.cat([tokens[row, start:end] for row, start, end in chunks])
        positions = torch.cat([torch.arange(start, end, device=device) for _, start, end in chunks])
        metadata = AttentionMetadata.build(
            [end - start for _, start, end in chunks],
            [end for _, _, end in chunks],
            [tables[row] for row, _, _ in chunks],
            block_size,
            device,
        )
        # Groups have tables of their own, here with equal numbers; scratch is per group.
        context.metadata = [replace(metadata, scratch={}) for _ in layout.groups]
        logits = _forward(model, ids[None], positions[None], context)[0]
        first = 0
        for row, start, end in chunks:
            parts[row].append(logits[first : first + end - start])
            first += end - start
    return torch.stack([torch.cat(row) for row in parts])


def _probe_tokens(model: Any, rows: int) -> torch.Tensor:
    """Fixed, varied ids `[rows, PROBE_TOKENS]`."""
    vocab = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.arange(rows * PROBE_TOKENS, dtype=torch.int64) * 7919 + 11
    device: torch.device = next(model.parameters()).device
    return (ids % vocab).view(rows, PROBE_TOKENS).to(device)


def _forward(model: Any, ids: torch.Tensor, positions: torch.Tensor, context: Any) -> torch.Tensor:
    with torch.inference_mode(), attention_context(context):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    out: torch.Tensor = logits.float()
    return out


def _ordinary_forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[rows, tokens, vocab]` by the model's eager attention."""
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return model(input_ids=tokens, use_cache=False).logits.float()  # type: ignore[no-any-return]
    except Exception as error:
        raise refusal(model.config, f"its own forward fails: {error}") from error
    finally:
        use_paged_attention(model)


def use_paged_attention(model: Any) -> None:
    """Choose this package's attention function for all layers of `model`.

    Raises:
        ModelNotSupportedError: the model cannot exchange its attention.
    """
    register()
    try:
        model.set_attn_implementation(IMPLEMENTATION)
    except Exception as error:
        raise refusal(model.config, f"its attention cannot be exchanged: {error}") from error
    if model.config._attn_implementation != IMPLEMENTATION:
        raise refusal(model.config, "it has attention code of its own")
