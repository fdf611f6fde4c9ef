"""The load-time probe: what KV a model makes, and proof that it is right when paged.

Reading a model's source is no basis for running it: some ignore the attention function, some call
it twice, some keep state elsewhere. So the model is asked. One forward with a recording function
gives each layer's KV shape; then two sequences run packed and in chunks over a small pool and must
give the logits of the model's own attention. A model that fails is refused with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from litecache.engine.kv_layout import KVLayout, KVPool, KVSpec
from litecache.engine.loading.model_checks import refusal
from litecache.engine.running.hf_attention import (
    IMPLEMENTATION,
    RECORDING,
    LayerCall,
    MaskFunction,
    PagedContext,
    Recorder,
    attention_context,
    register,
)
from litecache.kernels import AttentionMetadata

PROBE_TOKENS = 24
_MASK_STEP = 1 << 20

TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the relative error `|out - reference| / |reference|` over all logits."""


@dataclass(frozen=True)
class ProbePlan:
    """The sequences of a probe.

    Attributes:
        starts: each one's first position.
        tokens: of each one.
    """

    starts: tuple[int, ...] = (0, 0)
    tokens: int = PROBE_TOKENS

    @classmethod
    def reaching(cls, max_model_len: int) -> ProbePlan:
        """Two sequences from the front and one that ends at the last position."""
        tokens = max(2, min(PROBE_TOKENS, max_model_len))
        return cls((0, 0, max(0, max_model_len - tokens)), tokens)

    def cut(self, row: int) -> int:
        """Where a row is cut in two: inside a block, or before its last token."""
        return (self.tokens * 17 // 24, self.tokens * 9 // 24, self.tokens - 1)[row % 3]

    def inputs(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Fixed, varied ids and the positions, `[rows, tokens]` each, on the model's device."""
        ids = _probe_tokens(model, len(self.starts), self.tokens)
        starts = torch.tensor(self.starts, device=ids.device)[:, None]
        return ids, starts + torch.arange(self.tokens, device=ids.device)


def _probe_tokens(model: Any, rows: int, tokens: int) -> torch.Tensor:
    vocab = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.arange(rows * tokens, dtype=torch.int64) * 7919 + 11
    device: torch.device = next(model.parameters()).device
    return (ids % vocab).view(rows, tokens).to(device)


def record_specs(
    model: Any, kv_dtype: str, max_model_len: int = PROBE_TOKENS
) -> tuple[KVSpec, ...]:
    """Each layer's KV shape and window, by running the model on a few tokens.

    The window is that of the rule behind the layer's mask, at its real size: no run is as long as
    a window of thousands of tokens, but the rule can be asked about any position.

    Args:
        model: a causal language model with this package's attention function chosen.
        kv_dtype: of the pool, by name.
        max_model_len: longest sequence in tokens.

    Raises:
        ModelNotSupportedError: the function did not run exactly once per layer, or a layer sees
            something else than all tokens or the last ones.
    """
    config = model.config
    num_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(num_layers, int):
        raise refusal(config, "its configuration does not tell the number of its layers")
    recorder = Recorder()
    model.set_attn_implementation(RECORDING)
    try:
        with torch.inference_mode(), attention_context(recorder):
            model(input_ids=_probe_tokens(model, 1, 2), use_cache=False)
    except Exception as error:
        raise refusal(config, f"its forward fails: {error}") from error
    finally:
        use_paged_attention(model)
    calls = recorder.calls
    if not calls:
        raise refusal(config, "it has attention code of its own and ignores attention functions")
    if sorted(calls) != list(range(num_layers)):
        less = len(calls) < num_layers
        raise refusal(
            config,
            f"attention functions ran in layers {sorted(calls)} of {num_layers}"
            + ("; the others keep state in another way" if less else ""),
        )
    twice = [layer for layer, made in calls.items() if len(made) != 1]
    if twice:
        raise refusal(config, f"layers {twice} call attention more than once")
    windows: dict[int, int | None] = {}
    specs = []
    for layer in range(num_layers):
        call = calls[layer][0]
        window = call.window
        if call.mask is not None:
            if id(call.mask) not in windows:
                windows[id(call.mask)] = _window(config, layer, call, max_model_len)
            window = windows[id(call.mask)]
        specs.append(KVSpec(call.kv_heads, call.k_dim, call.v_dim, kv_dtype, window=window))
    return tuple(specs)


def _window(config: Any, layer: int, call: LayerCall, max_model_len: int) -> int | None:
    """The window that the rule of a call's mask gives, None = everything before is visible.

    Raises:
        ModelNotSupportedError: it is neither within `max_model_len` tokens.
    """
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    # As far as the model can go, so that its layout is the same for every `max_model_len`.
    longest = max(max_model_len, positions or 0)
    mask = call.mask
    assert mask is not None
    try:
        _visible(mask, torch.tensor([2]), torch.tensor([0]))
    except (IndexError, RuntimeError):
        return call.window  # a rule over the tokens of this run: the twin tells whether it counts
    first_hidden = None
    for start in range(0, longest, _MASK_STEP):
        queries = torch.arange(start, min(start + _MASK_STEP, longest))
        hidden = ~_visible(mask, queries, torch.zeros_like(queries))
        if bool(hidden.any()):
            first_hidden = start + int(hidden.int().argmax())
            break
    reach = min(longest, max_model_len)
    window = first_hidden
    samples = {0, 1, reach // 2, reach - 1}
    if window is not None:
        samples |= {window - 1, window, window + 1, 2 * window}
    for query in sorted(q for q in samples if 0 <= q < reach):
        keys = torch.arange(min(query + 2, reach))
        expected = keys <= query
        if window is not None:
            expected &= keys > query - window
        if not torch.equal(_visible(mask, torch.full_like(keys, query), keys), expected):
            raise refusal(
                config,
                f"layer {layer} sees something else than all tokens before it or the last ones",
                window if window is not None and query >= window else None,
            )
    return window


def _visible(mask: MaskFunction, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros((), dtype=torch.int64)
    return mask(zero, zero, queries, keys).expand(queries.shape)


def verify_paged(
    model: Any,
    specs: tuple[KVSpec, ...],
    block_size: int,
    plan: ProbePlan = ProbePlan(),
    *,
    positions: bool = True,
) -> float:
    """Compare a packed, chunked, paged run with the model's own attention.

    Args:
        model: as for `record_specs`.
        specs: what `record_specs` found.
        block_size: tokens per block.
        plan: the sequences.
        positions: hand the positions to the model's own run, too, or let it count them itself.

    Returns:
        The relative error of the logits.

    Raises:
        ModelNotSupportedError: the error is above the tolerance of the dtype.
    """
    reference = ordinary_logits(model, plan, positions=positions)
    try:
        logits = paged_logits(model, specs, block_size, plan)
    except Exception as error:
        raise refusal(model.config, f"a packed forward fails: {error}") from error
    _compare(model, logits, reference, "over paged KV differ from its own attention")
    return relative_error(logits, reference)


def check_prefix(model: Any, plan: ProbePlan) -> None:
    """Refuse a model whose own logits depend on what comes later, as some rotations do.

    Raises:
        ModelNotSupportedError: those of the first tokens change when more follow.
    """
    one = ProbePlan((0,), plan.tokens)
    few = ProbePlan((0,), plan.tokens // 4)
    whole, part = (ordinary_logits(model, each, positions=False) for each in (one, few))
    _compare(model, part, whole[:, : few.tokens], "differ when more tokens follow, in its own code")


def _compare(model: Any, logits: torch.Tensor, reference: torch.Tensor, what: str) -> None:
    dtype = next(model.parameters()).dtype
    error, tolerance = relative_error(logits, reference), TOLERANCE[dtype]
    if dtype == torch.float32 and error <= tolerance:
        # The worst position counts: few may lie beyond a window.
        norms = reference.norm(dim=-1).clamp_min(1e-30)  # padding may give nothing but zeros
        error = float(((logits - reference).norm(dim=-1) / norms).max())
    if not error <= tolerance:
        raise refusal(
            model.config,
            f"its logits {what} by {error:.1e} relative (allowed: {tolerance:.0e})",
        )


def relative_error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """`|logits - reference| / |reference|` over all logits; infinity where there is no number."""
    error = float((logits - reference).norm() / reference.norm())
    return error if error == error else float("inf")


def paged_logits(
    model: Any, specs: tuple[KVSpec, ...], block_size: int, plan: ProbePlan = ProbePlan()
) -> torch.Tensor:
    """Logits of a plan's sequences, run packed and in chunks over a small pool.

    Args:
        model: as for `record_specs`.
        specs: what `record_specs` found.
        block_size: tokens per block.
        plan: the sequences.

    Returns:
        float32 `[rows, tokens, vocab]`.
    """
    tokens, positions = plan.inputs(model)
    device, rows = tokens.device, len(plan.starts)
    layout = KVLayout.from_specs(specs, block_size)
    blocks_each = -(-plan.tokens // block_size)
    pools = [KVPool(group, rows * blocks_each + 1, device) for group in layout.groups]
    # Scattered and interleaved, as in a pool that has been in use.
    tables = [list(range(rows * blocks_each - row, 0, -rows)) for row in range(rows)]
    context = PagedContext(layout, pools)
    parts: list[list[torch.Tensor]] = [[] for _ in range(rows)]
    cuts = [plan.cut(row) for row in range(rows)]
    for chunks in (
        [(row, 0, cuts[row]) for row in range(rows)],
        [(row, cuts[row], plan.tokens) for row in reversed(range(rows))],
    ):
        metadata = AttentionMetadata.build(
            [end - start for _, start, end in chunks],
            [end for _, _, end in chunks],
            [tables[row] for row, _, _ in chunks],
            block_size,
            device,
        )
        # Groups have tables of their own, here with equal numbers; scratch is per group.
        context.metadata = [replace(metadata, scratch={}) for _ in layout.groups]
        ids, places = (
            torch.cat([part[row, start:end] for row, start, end in chunks])[None]
            for part in (tokens, positions)
        )
        with torch.inference_mode(), attention_context(context):
            logits = model(input_ids=ids, position_ids=places, use_cache=False).logits[0].float()
        for (row, start, end), part in zip(
            chunks, logits.split([end - start for _, start, end in chunks]), strict=True
        ):
            del start, end
            parts[row].append(part)
    return torch.stack([torch.cat(row) for row in parts])


def ordinary_logits(
    model: Any, plan: ProbePlan = ProbePlan(), *, positions: bool = True
) -> torch.Tensor:
    """Logits `[rows, tokens, vocab]` of a plan's sequences by the model's eager attention.

    Args:
        model: as for `record_specs`.
        plan: the sequences.
        positions: hand them over, or let the model count them itself.

    Raises:
        ModelNotSupportedError: that fails.
    """
    tokens, places = plan.inputs(model)
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            extra = {"position_ids": places} if positions else {}
            out = model(input_ids=tokens, use_cache=False, **extra)
            logits: torch.Tensor = out.logits.float()
            return logits
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
