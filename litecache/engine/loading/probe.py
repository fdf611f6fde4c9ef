"""The load-time probe: what KV a model makes, and proof that it is right when paged.

Reading a model's source is no basis for running it: some ignore the attention function, some call
it twice, some keep state elsewhere. So the model is asked. One forward with a recording function
gives each layer's KV shape; then two sequences run packed and in chunks over a small pool and must
give the logits of the model's own attention. A model that fails is refused with the reason.

The second way is that of a model with its own attention code, over gathered KV: asked for are the
calls that it makes to a transformers `Cache`, where one `update` per layer tells that layer's KV
shape. Then sequences run in chunks and as ragged batches of decodes, as the runner does it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from litecache.engine.kv_layout import KVLayout, KVPool, KVSpec
from litecache.engine.loading.model_checks import refusal, stated_positions
from litecache.engine.running.batch import Batch
from litecache.engine.running.hf_attention import (
    IMPLEMENTATION,
    RECORDING,
    LayerCall,
    PagedContext,
    Recorder,
    attention_context,
    register,
)
from litecache.kernels import AttentionMetadata

PROBE_TOKENS = 24
OWN_CODE = "it has attention code of its own"
_MASK_STEP = 1 << 20

TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the relative error `|out - reference| / |reference|` over all logits."""

NARROW_TOLERANCE = {"int8": 0.1, "fp8": 0.4}
"""The same for an eight-bit pool against a wide one: SmolLM2 shows 0.012 and 0.03, random models of
three layers with wide weights up to 0.022 and 0.11, a wrong kernel more than 1."""


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


class Way(NamedTuple):
    """How a model's attention reaches the pool, for those who try whether it is right.

    Attributes:
        name: "paged" or "gathered", as in `LoadedModel.attention`.
        choose: makes a model take this way; raises ModelNotSupportedError.
        record: of model, dtype of the pool and `max_model_len`: each layer's KV shape.
        logits: of model, KV shapes, block size and plan: float32 `[rows, tokens, vocab]`, run in
            chunks over a small pool.
    """

    name: str
    choose: Callable[[Any], None]
    record: Callable[[Any, str, int], tuple[KVSpec, ...]]
    logits: Callable[[Any, tuple[KVSpec, ...], int, ProbePlan], torch.Tensor]


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
    num_layers = number_of_layers(config)
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
        raise refusal(config, f"{OWN_CODE} and ignores attention functions")
    if sorted(calls) != list(range(num_layers)):
        rest = "; the others keep state in another way" if len(calls) < num_layers else ""
        ran = f"attention functions ran in layers {sorted(calls)} of {num_layers}"
        raise refusal(config, ran + rest)
    twice = [layer for layer, made in calls.items() if len(made) != 1]
    if twice:
        raise refusal(config, f"layers {twice} call attention more than once")
    windows: dict[int, int | None] = {}  # layers of one kind are given one mask
    specs = []
    for layer, (call,) in sorted(calls.items()):
        key = id(call.mask) if call.mask is not None else ~layer
        if key not in windows:
            windows[key] = _window(config, layer, call, max_model_len)
        specs.append(KVSpec(call.kv_heads, call.k_dim, call.v_dim, kv_dtype, window=windows[key]))
    return tuple(specs)


def number_of_layers(config: Any) -> int:
    """How many decoder layers a configuration has.

    Raises:
        ModelNotSupportedError: it does not tell.
    """
    num_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(num_layers, int):
        raise refusal(config, "its configuration does not tell the number of its layers")
    return num_layers


def _window(config: Any, layer: int, call: LayerCall, max_model_len: int) -> int | None:
    """The window that the rule of a call's mask gives, None = everything before is visible.

    Raises:
        ModelNotSupportedError: it is neither within `max_model_len` tokens.
    """
    mask = call.mask
    if mask is None:
        return call.window

    def visible(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros((), dtype=torch.int64)
        return mask(zero, zero, queries, keys).expand(queries.shape)

    try:
        visible(torch.tensor([2]), torch.tensor([0]))
    except (IndexError, RuntimeError):
        return call.window  # a rule over the tokens of this run: the twin tells whether it counts
    # As far as the model can go, so that its layout is the same for every `max_model_len`.
    positions = stated_positions(config.get_text_config(decoder=True))
    longest = max(max_model_len, positions or 0)
    window = None
    for start in range(0, longest, _MASK_STEP):
        queries = torch.arange(start, min(start + _MASK_STEP, longest))
        hidden = ~visible(queries, torch.zeros_like(queries))
        if bool(hidden.any()):
            window = start + int(hidden.int().argmax())
            break
    samples = {0, 1, max_model_len // 2, max_model_len - 1}
    if window is not None:
        samples |= {window - 1, window, window + 1, 2 * window}
    for query in sorted(q for q in samples if 0 <= q < max_model_len):
        keys = torch.arange(min(query + 2, max_model_len))
        expected = keys <= query
        if window is not None:
            expected &= keys > query - window
        if not torch.equal(visible(torch.full_like(keys, query), keys), expected):
            what = "sees something else than all tokens before it or the last ones"
            right_to = window if window is not None and query >= window else None
            raise refusal(config, f"layer {layer} {what}", right_to)
    return window


def verify(
    model: Any, way: Way, specs: tuple[KVSpec, ...], block_size: int, plan: ProbePlan = ProbePlan()
) -> float:
    """Compare a chunked run over the pool with the model's own attention.

    Args:
        model: takes `way`.
        way: how its attention reaches the pool.
        specs: what `way.record` found.
        block_size: tokens per block.
        plan: the sequences.

    Returns:
        The relative error of the logits.

    Raises:
        ModelNotSupportedError: the error is above the tolerance of the dtype.
    """
    reference = ordinary_logits(model, plan)
    try:
        logits = way.logits(model, specs, block_size, plan)
    except Exception as error:
        raise refusal(model.config, f"a {way.name} forward fails: {error}") from error
    what = f"over {way.name} KV differ from its own attention"
    return _compare(model, logits, reference, what)


def verify_narrow(
    model: Any,
    specs: tuple[KVSpec, ...],
    wide: tuple[KVSpec, ...],
    block_size: int,
    max_model_len: int,
) -> float:
    """Compare logits over an eight-bit pool with those over a wide one, passes and all.

    Args:
        model: passed the probe.
        specs: KV shapes of the eight-bit pool.
        wide: of the other.
        block_size: tokens per block.
        max_model_len: longest sequence in tokens.

    Returns:
        The relative error of the logits.

    Raises:
        ModelNotSupportedError: it is more than eight bits may cost.
    """
    plan = ProbePlan.reaching(max_model_len)
    logits, reference = (paged_logits(model, each, block_size, plan) for each in (specs, wide))
    error, dtype = relative_error(logits, reference), specs[0].dtype
    if not error <= NARROW_TOLERANCE[dtype]:
        raise refusal(
            model.config,
            f"its logits with kv_dtype={dtype} differ by {error:.1e} relative from those with"
            f" {wide[0].dtype} (allowed: {NARROW_TOLERANCE[dtype]:.0e})",
        )
    return error


def check_prefix(model: Any, plan: ProbePlan) -> None:
    """Refuse a model whose own logits depend on what comes later, as some rotations do.

    Raises:
        ModelNotSupportedError: those of the first tokens change when more follow.
    """
    few = plan.tokens // 4
    whole, part = (ordinary_logits(model, ProbePlan((0,), n)) for n in (plan.tokens, few))
    _compare(model, part, whole[:, :few], "differ when more tokens follow, in its own code")


def check_own_cache(model: Any, plan: ProbePlan) -> None:
    """Refuse a model whose tokens depend on whether its own cache is used.

    Some let their cache drop what their masks show: what stock `generate` says is then not what
    the model says of the whole sequence. A model that takes no cache passes.

    Raises:
        ModelNotSupportedError: the last logits are others when it decodes with its own cache.
    """
    tokens, _ = ProbePlan((0,), plan.tokens).inputs(model)
    whole, cut, cache = ordinary_logits(model, ProbePlan((0,), plan.tokens)), plan.tokens - 2, None
    with own_attention(model), torch.inference_mode():
        try:
            cache = model(input_ids=tokens[:, :cut], use_cache=True).past_key_values
            found = []
            for place in range(cut, plan.tokens):
                ids = tokens[:, place : place + 1]
                found.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits)
        except Exception:
            return
    if cache is not None:
        what = "differ when it decodes with its own cache, in its own code"
        _compare(model, torch.cat(found, dim=1).float(), whole[:, cut:], what)


def _compare(model: Any, logits: torch.Tensor, reference: torch.Tensor, what: str) -> float:
    dtype = next(model.parameters()).dtype
    error, tolerance = relative_error(logits, reference), TOLERANCE[dtype]
    worst = error
    if dtype == torch.float32 and error <= tolerance:
        # The worst position counts: few may lie beyond a window.
        norms = reference.norm(dim=-1).clamp_min(1e-30)  # padding may give nothing but zeros
        worst = float(((logits - reference).norm(dim=-1) / norms).max())
    if not worst <= tolerance:
        reason = f"its logits {what} by {worst:.1e} relative (allowed: {tolerance:.0e})"
        raise refusal(model.config, reason)
    return error


def relative_error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """`|logits - reference| / |reference|` over all logits; infinity where there is no number."""
    error = float((logits - reference).norm() / reference.norm())
    return error if error == error else float("inf")


def paged_logits(
    model: Any, specs: tuple[KVSpec, ...], block_size: int, plan: ProbePlan = ProbePlan()
) -> torch.Tensor:
    """Logits of a plan's sequences, run packed and in chunks over a small pool.

    Arguments as of `verify`; float32 `[rows, tokens, vocab]`.
    """
    tokens, positions = plan.inputs(model)
    rows = len(plan.starts)
    layout = KVLayout.from_specs(specs, block_size)
    blocks_each = -(-plan.tokens // block_size)
    pools = [KVPool(group, rows * blocks_each + 1, tokens.device) for group in layout.groups]
    # Scattered and interleaved, as in a pool that has been in use.
    tables = [list(range(rows * blocks_each - row, 0, -rows)) for row in range(rows)]
    context = PagedContext(layout, pools)
    first = [(row, slice(0, plan.cut(row))) for row in range(rows)]
    rest = [(row, slice(plan.cut(row), plan.tokens)) for row in reversed(range(rows))]
    parts: list[list[torch.Tensor]] = [[] for _ in range(rows)]
    for chunks in (first, rest):
        lengths = [part.stop - part.start for _, part in chunks]
        metadata = AttentionMetadata.build(
            lengths,
            [part.stop for _, part in chunks],
            [tables[row] for row, _ in chunks],
            block_size,
            tokens.device,
        )
        # Groups have tables of their own, here with equal numbers.
        context.begin([metadata] * len(layout.groups))
        ids, places = (
            torch.cat([values[row, part] for row, part in chunks])[None]
            for values in (tokens, positions)
        )
        with torch.inference_mode(), attention_context(context):
            logits = model(input_ids=ids, position_ids=places, use_cache=False).logits[0].float()
        for (row, _), part in zip(chunks, logits.split(lengths), strict=True):
            parts[row].append(part)
    return torch.stack([torch.cat(row) for row in parts])


def ordinary_logits(model: Any, plan: ProbePlan = ProbePlan()) -> torch.Tensor:
    """Logits `[rows, tokens, vocab]` of a plan's sequences by the model's own attention.

    That is eager attention where it can be exchanged. Positions are handed over where a sequence
    does not start at 0; else the model counts them.

    Raises:
        ModelNotSupportedError: that fails.
    """
    tokens, places = plan.inputs(model)
    taken = "position_ids" in inspect.signature(model.forward).parameters
    extra = {"position_ids": places} if any(plan.starts) and taken else {}
    with own_attention(model), torch.inference_mode():
        try:
            logits: torch.Tensor = model(input_ids=tokens, use_cache=False, **extra).logits
        except Exception as error:
            raise refusal(model.config, f"its own forward fails: {error}") from error
    return logits.float()


@contextlib.contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Have a model attend by itself, eagerly where its attention had been exchanged."""
    chosen = model.config._attn_implementation
    if chosen == IMPLEMENTATION:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if chosen == IMPLEMENTATION:
            model.set_attn_implementation(chosen)


def use_paged_attention(model: Any) -> None:
    """Choose this package's attention function for all layers of `model`.

    Raises:
        ModelNotSupportedError: the model cannot exchange its attention.
    """
    register()
    # Asked first, because transformers only logs that it was told in vain.
    if not getattr(model, "_can_set_attn_implementation", lambda: True)():
        raise refusal(model.config, OWN_CODE)
    try:
        model.set_attn_implementation(IMPLEMENTATION)
    except Exception as error:
        raise refusal(model.config, f"its attention cannot be exchanged: {error}") from error
    if model.config._attn_implementation != IMPLEMENTATION:
        raise refusal(model.config, OWN_CODE)


PAGED = Way("paged", use_paged_attention, record_specs, paged_logits)
"""The model calls this package's attention function with a packed batch."""


def record_updates(model: Any, kv_dtype: str, max_model_len: int) -> tuple[KVSpec, ...]:
    """Each layer's KV shape, by what the model gives to its cache in a forward of two tokens.

    A window stays the model's own affair: it is given all keys, and masks what it does not see.

    Args:
        model: a causal language model with its own attention.
        kv_dtype: of the pool, by name.
        max_model_len: longest sequence in tokens; it changes nothing here.

    Raises:
        ModelNotSupportedError: it does not update a cache exactly once per layer.
    """
    from transformers import DynamicCache

    calls: dict[int, list[tuple[int, int, int]]] = {}

    class Recording(DynamicCache):  # type: ignore[misc]
        def update(
            self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any
        ) -> Any:
            calls.setdefault(layer, []).append((key.shape[1], key.shape[3], value.shape[3]))
            return super().update(key, value, layer, *args, **kwargs)

    ids, _ = ProbePlan((0,), 2).inputs(model)
    try:
        with torch.inference_mode():
            model(input_ids=ids, past_key_values=Recording(), use_cache=True)
    except Exception as error:
        raise refusal(model.config, f"its forward with a cache fails: {error}") from error
    num_layers = number_of_layers(model.config)
    if not calls:
        raise refusal(model.config, "it keeps no keys and values in a transformers cache")
    if sorted(calls) != list(range(num_layers)) or any(len(made) > 1 for made in calls.values()):
        made = {layer: len(found) for layer, found in sorted(calls.items())}
        raise refusal(
            model.config,
            f"its {num_layers} layers do not update a cache once each (calls by layer: {made})",
        )
    return tuple(KVSpec(*found, kv_dtype) for _, (found,) in sorted(calls.items()))


def gathered_logits(
    model: Any, specs: tuple[KVSpec, ...], block_size: int, plan: ProbePlan
) -> torch.Tensor:
    """Logits of a plan's sequences, each in two chunks and then together in ragged decodes.

    Arguments as of `verify`; float32 `[rows, tokens, vocab]`.
    """
    from litecache.engine.running.gather_cache import GatheredForward

    tokens, positions = plan.inputs(model)
    rows, device = len(plan.starts), tokens.device
    layout = KVLayout.from_specs(specs, block_size)
    width = -(-plan.tokens // block_size)
    pools = [KVPool(group, rows * width + 1, device) for group in layout.groups]
    # Scattered and interleaved, as in a pool that has been in use.
    table = torch.arange(rows * width, 0, -1, device=device).view(width, rows).T
    tables = table.expand(len(pools), rows, width)
    run = GatheredForward(model, layout, pools, tokens.reshape(-1), tables)
    # Different ends, so that the decodes are ragged and rows leave the batch one by one.
    ends = [max(1, plan.tokens - 3 - row % 3) for row in range(rows)]
    cuts = [min(plan.cut(row), end) for row, end in enumerate(ends)]
    steps = [
        [(row, 0, cut) for row, cut in enumerate(cuts)],
        [(row, cut, end) for row, (cut, end) in enumerate(zip(cuts, ends, strict=True))],
    ]
    longest = plan.tokens - min(ends)
    steps += [[(r, end + n, end + n + 1) for r, end in enumerate(ends)] for n in range(longest)]
    parts: list[list[torch.Tensor]] = [[] for _ in range(rows)]
    for step in steps:
        chunks = [(row, a, min(b, plan.tokens)) for row, a, b in step if a < min(b, plan.tokens)]
        batch = _batch(chunks, plan.tokens, positions, tables, block_size)
        with torch.inference_mode():
            found = torch.split(run(batch).float(), list(batch.query_lens))
        for (row, _, _), part in zip(chunks, found, strict=True):
            parts[row].append(part)
    return torch.stack([torch.cat(row) for row in parts])


def _batch(
    chunks: list[tuple[int, int, int]],
    tokens: int,
    positions: torch.Tensor,
    tables: torch.Tensor,
    block_size: int,
) -> Batch:
    """Chunks (row, first token, end) as the runner packs them, logits wanted everywhere."""
    device = positions.device
    rows = torch.cat([torch.full((b - a,), row) for row, a, b in chunks]).to(device)
    places = torch.cat([torch.arange(a, b) for _, a, b in chunks]).to(device)
    slots = tables[:, rows, places // block_size] * block_size + places % block_size
    fields = {
        "id_index": rows * tokens + places,
        "positions": positions[rows, places],
        "slots": slots.reshape(-1),
        "rows": torch.tensor([row for row, _, _ in chunks], device=device),
    }
    return Batch(
        fields,
        query_lens=tuple(b - a for _, a, b in chunks),
        context_lens=tuple(b for _, _, b in chunks),
        lives=tuple(row for row, _, _ in chunks),
        places=torch.arange(len(places)).numpy(),
    )


GATHERED = Way("gathered", lambda model: None, record_updates, gathered_logits)
"""The model keeps its attention code and is given the keys and values of whole contexts."""
