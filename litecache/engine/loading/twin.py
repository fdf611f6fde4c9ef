"""A small model that behaves as a large one does: the same class, every behavioural field kept.

Real windows and original lengths are thousands of tokens, too long to try with real weights at each
start. A twin has them shrunk beside the widths, so that 150 tokens go far beyond each of them.
`shrink` makes its configuration, `build_twin` the model; what is done with it stands in
long_probe.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

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
_LABELS = ("id2label", "label2id")
_LAYER_INDEX = r"(layers|layer_ids|idxs)$"
"""Lists of indices of layers."""


def shrink(fields: Mapping[str, Any], keep: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields of a configuration's twin.

    Args:
        fields: `config.to_dict()`.
        keep: names of lengths that are to be far away instead.
    """
    layers = next((v for k, v in fields.items() if re.search(_LAYERS, k) and _is_int(v)), None)
    chosen = _choose_layers(fields, layers) if layers else []
    original = dict(_lengths(fields)).get("original_max_position_embeddings")
    out: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _LABELS:
            continue
        out[name] = _shrink_field(name, value, keep, chosen, layers or 0, original)
    _fit(out, fields)
    return out


def lengths(fields: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """By name the lengths of a configuration, the smallest of a name: in it, and in its twin."""
    found: dict[str, tuple[int, int]] = {}
    for name, value in _lengths(fields):
        if name not in found or value < found[name][0]:
            found[name] = value, _lower(_LENGTHS, name, value) or value
    return found


def _lengths(fields: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _lengths(value)
        elif _is_int(value) and value > 1 and _lower(_LENGTHS, name, value) is not None:
            yield name, value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _lower(table: tuple[tuple[str, int], ...], name: str, value: int) -> int | None:
    for pattern, small in table:
        if re.search(pattern, name):
            return min(value, small)
    return None


def _shrink_field(
    name: str,
    value: Any,
    keep: frozenset[str],
    chosen: list[int],
    layers: int,
    original: int | None,
) -> Any:
    if isinstance(value, Mapping):
        if value and all(str(key).isdigit() for key in value) and layers:
            # Exceptions by the index of a layer.
            places = {layer: new for new, layer in enumerate(chosen)}
            return {
                type(key)(places[int(key)]): shrink(entry, keep)
                if isinstance(entry, Mapping)
                else entry
                for key, entry in value.items()
                if int(key) in places
            }
        return shrink(value, keep)
    if isinstance(value, (list, tuple)) and layers:
        if len(value) == layers and not re.search(_LAYER_INDEX, name):
            value = [value[layer] for layer in chosen]
        elif re.search(_LAYER_INDEX, name) and all(_is_int(v) for v in value):
            if len(value) == layers and set(value) != set(range(layers)):
                value = [value[layer] for layer in chosen]  # flags, one per layer
            else:
                value = [new for new, layer in enumerate(chosen) if layer in value]
        size = [_lower(_SIZES, name, v) if _is_int(v) else None for v in value]
        return [v if s is None else s for v, s in zip(value, size, strict=True)]
    if not _is_int(value):
        return value
    if re.search(_LAYERS, name):
        return len(chosen) if value == layers else min(value, 2)
    if re.search(_POSITIONS, name):
        if original and original > 0 and value > original:
            return max(TWIN_TOKENS + 10, TWIN_LENGTH * value // original)
        return min(value, 2 * TWIN_TOKENS)
    if re.search(r"first_k_dense|num_dense_layers|moe_layer_start|num_kv_shared_layers", name):
        return min(value, 1)
    if name == "max_window_layers":
        return 1 if value < layers else value
    if name == "moe_layer_end_index":
        return min(value, len(chosen) - 1)
    if re.search(r"token_(id|index)$", name):
        return value if value < TWIN_VOCAB else TWIN_VOCAB - 1
    small = _lower(_LENGTHS, name, value)
    if small is not None and value > 1:
        return max(value, FAR) if name in keep else small
    small = _lower(_SIZES, name, value)
    return value if small is None else small


def _choose_layers(fields: Mapping[str, Any], layers: int) -> list[int]:
    """One layer of each kind in the model's order, two to four in all."""
    lists = [v for v in fields.values() if isinstance(v, (list, tuple)) and len(v) == layers]
    kinds: dict[str, int] = {}
    for layer in range(layers):
        kinds.setdefault(str([entry[layer] for entry in lists]), layer)
    first = sorted(kinds.values())[:MAX_LAYERS]
    for layer in range(layers):
        if len(first) >= min(3, layers):
            break
        if layer not in first:
            first.append(layer)
    return sorted(first)


def _fit(out: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Make shrunken sizes agree where one follows from others."""
    heads, hidden = (
        next((name for name in names if _is_int(fields.get(name))), None)
        for names in (
            ("num_attention_heads", "n_head", "n_heads"),
            ("hidden_size", "n_embd", "d_model"),
        )
    )
    for name in fields:
        # Multi-head attention stays that, and so does multi-query attention.
        if heads and re.search(r"(key_value|kv)_heads$", name) and fields[name] == fields[heads]:
            out[name] = out[heads]
    rope, nope = fields.get("qk_rope_head_dim"), fields.get("qk_nope_head_dim")
    if _is_int(rope) and _is_int(nope):
        for name in ("head_dim", "qk_head_dim"):
            if fields.get(name) == rope:
                out[name] = out["qk_rope_head_dim"]
            elif fields.get(name) == rope + nope:  # type: ignore[operator]
                out[name] = out["qk_rope_head_dim"] + out["qk_nope_head_dim"]
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
    with torch.device("meta"):
        size = sum(p.numel() for p in _make(model_class, copy.deepcopy(config)).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters are left when its known sizes are shrunk")
    with torch.random.fork_rng(devices=[]), torch.inference_mode(), torch.device("cpu"):
        torch.manual_seed(0)
        model = _make(model_class, config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # Wide, so that attention matters: at 0.02 it would hardly show in the logits.
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().requires_grad_(False)


def _make(model_class: Callable[..., Any], config: Any) -> Any:
    build = getattr(model_class, "_from_config", model_class)
    return build(config)
