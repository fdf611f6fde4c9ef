"""What a family does only beyond some length, tried on its twin and remembered.

Real windows and original lengths are thousands of tokens, too long to try with real weights at each
start. A twin is a small model of the same class with every behavioural field kept and the lengths
shrunk beside the widths, so that 150 tokens go far beyond each of them. Per model class, versions
and behavioural fields it is run once, packed, chunked and paged, with and without each pass;
`$LITECACHE_HOME/probes` keeps the outcome. A model that would be wrong is refused only where
`max_model_len` reaches the length in question, and a pass that is wrong there is left out.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from litecache.engine.kv_layout import KVSpec
from litecache.engine.loading.fingerprint import write_kept
from litecache.engine.loading.model_checks import refusal
from litecache.engine.loading.probe import (
    PROBE_TOKENS,
    ProbePlan,
    Way,
    check_own_cache,
    check_prefix,
    ordinary_logits,
    verify,
)
from litecache.engine.running.passes import PASSES, apply_passes
from litecache.errors import ModelNotSupportedError, told
from litecache.paths import litecache_home

OWN_WEIGHTS_TOKENS = 512
"""A model without a twin is tried over its whole `max_model_len`, up to so many tokens."""
_BLOCK_SIZE = 16

TWIN_WINDOW = 8
TWIN_LENGTH = 40
TWIN_TOKENS = 150
FAR = 4096
TWIN_VOCAB = 128
MAX_LAYERS = 4
MAX_PARAMETERS = 8_000_000
"""A configuration whose sizes go by names unknown here stays larger than this; it has no twin."""

_SIZES = (
    (r"vocab", TWIN_VOCAB),
    (r"(key_value|kv|query)_(heads|groups)", 2),
    (r"index_n_heads|n_group$", 2),
    (r"heads(_per_layer)?$|n_head$", 4),
    (r"topk_group$", 1),
    (r"experts_per_tok|topk_blocks$|top_?k$|top_?k_experts|num_shared|n_shared", 2),
    (r"experts$|expert_num", 8),
    (r"qk_(rope|nope)_head_dim|qk_head_dim|rotary_dim|pe_dim", 8),
    (r"rank$", 16),
    (r"head_(dim|size)$|d_head|dim_head|kv_channels|v_head_dim|d_kv$", 16),
    (r"hidden_size_per_layer_input|laurel", 16),
    (r"intermediate|ffn?_dim|ffn_hidden|d_inner|dff$|dim_ff|n_inner|feed_forward|mlp_.*size", 64),
    (r"hidden_(size|dim)|n_embd|d_model|embed?(ding)?s?_(dim|size)|embed_proj_dim|width", 64),
    (r"emb_dim", 64),
    (r"state(_size)?$|d_state|conv_dim", 16),
    (r"(^|_)depth$|(vision|audio|encoder|decoder|text)_layers$", 2),
)  # fmt: skip
"""Sizes by name, the first that matches; a value is only ever lowered."""

_LENGTHS = (
    (r"^(original_max_position_embeddings|floor_scale|log_scaling_n_floor)$", TWIN_LENGTH),
    (
        r"window(_size|_len)?$|window_size|^chunk_size$|chunk_length$|attention_chunk|^local_attention$"
        r"|^block_size$|index_(topk|block_size)$|max_distance$|rel_extent|compress",
        TWIN_WINDOW,
    ),
)
"""Lengths beyond which a family does something else."""

_POSITIONS = (
    r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length"
    r"|max_target_positions)$"
)
_LAYERS = r"^(num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers)$"
_FEW_LAYERS = r"first_k_dense|num_dense_layers|moe_layer_start|num_kv_shared_layers"
_LABELS = ("id2label", "label2id")
_LAYER_INDEX = r"(layers|layer_ids|idxs)$"
"""Lists of indices of layers."""


@dataclass(frozen=True)
class TwinOutcome:
    """What a twin showed.

    Attributes:
        wrong: what is wrong over long sequences; empty when nothing is.
        fields: the lengths, by name, beyond each of which it is wrong, with the number of tokens
            before it where that begins; none with `wrong` set: it is wrong whatever they are.
        wrong_passes: passes that change the logits.
        no_twin: why there is no twin; empty when there is one.
    """

    wrong: str = ""
    fields: Mapping[str, int] = field(default_factory=dict)
    wrong_passes: Sequence[str] = ()
    no_twin: str = ""


def probe_model(
    model: Any, way: Way, kv_dtype: str, block_size: int, max_model_len: int
) -> tuple[tuple[KVSpec, ...], tuple[str, ...]]:
    """Refuse a model that is not right over the pool at every length up to `max_model_len`.

    Args:
        model: a causal language model.
        way: how its attention is to reach the pool.
        kv_dtype: of the pool, by name.
        block_size: tokens per block.
        max_model_len: longest sequence in tokens.

    Returns:
        Each layer's KV shape, and the passes that its twin has not shown to be wrong.

    Raises:
        ModelNotSupportedError: with the `max_model_len` that would be accepted, if there is one.
    """
    way.choose(model)
    outcome = twin_outcome(type(model), model.config, way)
    real = lengths(model.config.to_dict())
    ends = sorted((real[name][0] - less, name) for name, less in outcome.fields.items())
    if ends and max_model_len > ends[0][0]:
        right_to, name = ends[0]
        reason = f"beyond its {name} of {real[name][0]} tokens, {outcome.wrong}"
        raise refusal(model.config, reason, right_to)
    specs = way.record(model, kv_dtype, max_model_len)
    if outcome.wrong and not ends and max_model_len > PROBE_TOKENS:
        raise refusal(model.config, outcome.wrong)
    if outcome.no_twin and max_model_len > OWN_WEIGHTS_TOKENS:
        raise refusal(
            model.config,
            "what it does over long sequences cannot be tried, as no small model of its class can"
            f" be made ({outcome.no_twin}), and its own weights are tried over a few hundred"
            " tokens at most",
            OWN_WEIGHTS_TOKENS,
        )
    verify(model, way, specs, block_size, ProbePlan.reaching(max_model_len))
    if outcome.no_twin:
        plan = ProbePlan((0, 0), max_model_len)
        verify(model, way, specs, block_size, plan)
        check_prefix(model, plan)
        check_own_cache(model, plan)
    return specs, tuple(name for name in PASSES if name not in outcome.wrong_passes)


def twin_outcome(model_class: type, config: Any, way: Way) -> TwinOutcome:
    """What the twin of a model shows, from disk where it has been tried before."""
    fields = config.to_dict()
    try:
        key = _key(model_class, way, shrink(fields))
    except Exception as error:  # a configuration of any kind of class
        return TwinOutcome(no_twin=told(error))
    file = litecache_home() / "probes" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return TwinOutcome(**json.loads(file.read_text(encoding="utf-8")))
    threads = torch.get_num_threads()
    # So small a model takes ten times as long with two threads on a busy machine.
    torch.set_num_threads(1)
    try:
        found = _try(model_class, config, way, fields)
    finally:
        torch.set_num_threads(threads)
    write_kept(file, asdict(found))
    return found


def _try(model_class: type, config: Any, way: Way, fields: dict[str, Any]) -> TwinOutcome:
    sizes = lengths(fields)

    def twin(keep: Iterable[str] = ()) -> Any:
        made = build_twin(model_class, type(config).from_dict(shrink(fields, frozenset(keep))))
        way.choose(made)
        return made

    try:
        model = twin()
        ordinary_logits(model, ProbePlan((0,), 2))
    except Exception as error:
        return TwinOutcome(no_twin=told(error))
    specs, wrong = _verify(model, way)
    found: dict[str, int] = {}
    if wrong:
        # Which of the lengths is it that the family does not stand?
        if not sizes or _verify(twin(sizes), way)[1]:
            return TwinOutcome(wrong)
        for name in [n for n in sizes if _verify(twin(set(sizes) - {n}), way)[1]] or [*sizes]:
            alone = twin(set(sizes) - {name})
            below = [_verify(alone, way, sizes[name][1] - less)[1] for less in (0, 1)]
            if all(below):  # not even right up to the length
                return TwinOutcome(f"also below its {name}, {below[1]}")
            found[name] = below.index("")
        model = twin(found)
        specs, _ = _verify(model, way)
    if way.name != "paged":
        return TwinOutcome(wrong, found)  # passes change paged forwards alone
    plan = ProbePlan((0, 0, 0), TWIN_TOKENS)
    results = apply_passes(model, specs, _BLOCK_SIZE, TWIN_TOKENS, names=PASSES, plan=plan)
    return TwinOutcome(wrong, found, [name for name, right in results.items() if not right])


def _verify(model: Any, way: Way, tokens: int = TWIN_TOKENS) -> tuple[tuple[KVSpec, ...], str]:
    """The KV shapes of a float32 model, and what is wrong over so many tokens."""
    plan = ProbePlan((0, 0, 0), tokens)
    try:
        specs = way.record(model, "float32", tokens)
        check_prefix(model, plan)
        verify(model, way, specs, _BLOCK_SIZE, plan)
        check_own_cache(model, plan)
    except ModelNotSupportedError as error:
        return (), error.reason
    return specs, ""


def _key(model_class: type, way: Way, twin_fields: dict[str, Any]) -> str:
    import transformers

    source = inspect.getsourcefile(model_class)
    parts = [
        transformers.__version__,
        torch.__version__,
        _own_code(),
        way.name,
        f"{model_class.__module__}.{model_class.__qualname__}",
        xxhash.xxh3_128_hexdigest(Path(source).read_bytes()) if source else "",
        {k: v for k, v in twin_fields.items() if k not in ("_name_or_path", "dtype")},
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


@functools.cache
def _own_code() -> str:
    """A digest of the code that a probe tries."""
    state = xxhash.xxh3_128()
    package = Path(__file__).parents[2]
    for folder in ("engine", "kernels"):
        for file in sorted((package / folder).rglob("*.py")):
            state.update(file.read_bytes())
    return state.hexdigest()


def shrink(fields: Mapping[str, Any], keep: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields of a configuration's twin.

    Args:
        fields: `config.to_dict()`.
        keep: names of lengths that are to be far away instead.
    """
    layers = next((v for k, v in fields.items() if re.search(_LAYERS, k) and _is_int(v)), 0)
    chosen = _choose_layers(fields, layers)
    original = dict(_lengths(fields)).get("original_max_position_embeddings", 0)

    def small(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            if not (layers and value and all(str(key).isdigit() for key in value)):
                return shrink(value, keep)
            # Exceptions by the index of a layer.
            return {
                type(key)(chosen.index(int(key))): shrink(v, keep) if isinstance(v, Mapping) else v
                for key, v in value.items()
                if int(key) in chosen
            }
        if isinstance(value, (list, tuple)) and layers:
            indices = re.search(_LAYER_INDEX, name) and all(_is_int(v) for v in value)
            if indices and (len(value) != layers or set(value) == set(range(layers))):
                value = [new for new, layer in enumerate(chosen) if layer in value]
            elif len(value) == layers and (indices or not re.search(_LAYER_INDEX, name)):
                value = [value[layer] for layer in chosen]
            return [_size(name, v) for v in value]
        if not _is_int(value):
            return value
        if re.search(_LAYERS, name):
            return len(chosen) if value == layers else min(value, 2)
        if re.search(_POSITIONS, name):
            if original > 0 and value > original:
                return max(TWIN_TOKENS + 10, TWIN_LENGTH * value // original)
            return min(value, 2 * TWIN_TOKENS)
        if re.search(_FEW_LAYERS, name):
            return min(value, 1)
        if name == "max_window_layers":
            return 1 if value < layers else value
        if name == "moe_layer_end_index":
            return min(value, len(chosen) - 1)
        if re.search(r"token_(id|index)$", name):
            return min(value, TWIN_VOCAB - 1)
        if value > 1 and (short := _lower(_LENGTHS, name, value)) is not None:
            return max(value, FAR) if name in keep else short
        return _size(name, value)

    out = {name: small(name, value) for name, value in fields.items() if name not in _LABELS}
    _fit(out, fields)
    return out


def lengths(fields: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """By name the lengths of a configuration, the smallest of a name: in it, and in its twin."""
    # Of a name's values the last one stays: the smallest.
    smallest = dict(sorted(_lengths(fields), key=lambda found: -found[1]))
    return {name: (v, _lower(_LENGTHS, name, v) or v) for name, v in smallest.items()}


def _lengths(fields: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _lengths(value)
        elif _is_int(value) and value > 1 and _lower(_LENGTHS, name, value) is not None:
            yield name, value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _lower(table: tuple[tuple[str, int], ...], name: str, value: int) -> int | None:
    """The value that a table gives a name, at most the present one; None = it is not in there."""
    return next((min(value, small) for pattern, small in table if re.search(pattern, name)), None)


def _size(name: str, value: Any) -> Any:
    small = _lower(_SIZES, name, value) if _is_int(value) else None
    return value if small is None else small


def _choose_layers(fields: Mapping[str, Any], layers: int) -> list[int]:
    """One layer of each kind in the model's order, two to four in all."""
    lists = [v for v in fields.values() if isinstance(v, (list, tuple)) and len(v) == layers]
    kinds: dict[str, int] = {}
    for layer in range(layers):
        kinds.setdefault(str([entry[layer] for entry in lists]), layer)
    first = sorted(kinds.values())[:MAX_LAYERS]
    others = [layer for layer in range(layers) if layer not in first]
    return sorted(first + others[: max(0, 3 - len(first))])


def _fit(out: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Make shrunken sizes agree where one follows from others."""

    def known(*names: str) -> str | None:
        return next((name for name in names if _is_int(fields.get(name))), None)

    heads = known("num_attention_heads", "n_head", "n_heads")
    hidden = known("hidden_size", "n_embd", "d_model")
    for name in fields:
        # Multi-head attention stays that, and so does multi-query attention.
        if heads and re.search(r"(key_value|kv)_heads$", name) and fields[name] == fields[heads]:
            out[name] = out[heads]
    rope, nope = fields.get("qk_rope_head_dim"), fields.get("qk_nope_head_dim")
    if _is_int(rope) and _is_int(nope):
        small = out["qk_rope_head_dim"]
        for name in ("head_dim", "qk_head_dim"):
            if fields.get(name) == rope:
                out[name] = small
            elif fields.get(name) == rope + nope:  # type: ignore[operator]
                out[name] = small + out["qk_nope_head_dim"]
    dim = out.get("head_dim") or (out[hidden] // out[heads] if hidden and heads else None)
    parameters = out.get("rope_parameters")
    for entry in (parameters, *(parameters.values() if isinstance(parameters, dict) else ())):
        if not isinstance(entry, dict) or not dim:
            continue
        rotary = out.get("qk_rope_head_dim") or int(dim * (entry.get("partial_rotary_factor") or 1))
        for name in ("short_factor", "long_factor"):
            if isinstance(entry.get(name), list):
                entry[name] = entry[name][: rotary // 2]
        if isinstance(section := entry.get("mrope_section"), list):
            part = rotary // 2 // len(section)
            rest = rotary // 2 - part * (len(section) - 1)
            entry["mrope_section"] = [rest] + [part] * (len(section) - 1)


def build_twin(model_class: type, config: Any) -> Any:
    """A float32 model on the CPU from a shrunken configuration, its weights wide.

    Raises:
        Exception: whatever the class raises for such a configuration.
    """
    make = getattr(model_class, "_from_config", model_class)
    with torch.device("meta"):
        size = sum(p.numel() for p in make(copy.deepcopy(config)).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters are left when its known sizes are shrunk")
    with torch.random.fork_rng(devices=[]), torch.inference_mode(), torch.device("cpu"):
        torch.manual_seed(0)
        model = make(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # Wide, so that attention matters: at 0.02 it would hardly show in the logits.
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().requires_grad_(False)
