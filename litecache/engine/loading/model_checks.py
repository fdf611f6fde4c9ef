"""What can be told from a configuration alone: which models are refused before weights are read.

The rest is found by the probe (probe.py). Each refusal names the model type and the reason.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from litecache.config import CacheConfig
from litecache.engine.loading.model_source import ModelSource
from litecache.errors import ConfigError, ModelNotSupportedError, first_line

logger = logging.getLogger(__name__)

_RECURRENT_LAYERS = re.compile(r"linear|mamba|recurrent|conv|hybrid|ssm|rwkv")
_RECURRENT_FIELDS = ("ssm_cfg", "mamba_d_state", "mamba_expand", "state_size", "conv_L_cache")

_POSITION_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "context_length",
    "model_max_length",
    "max_target_positions",
)
"""Where families state how many positions they have, the first that is there."""

UNSTATED_POSITIONS = 2048
"""Of a model that states no limit, as with ALiBi, when the user states none either."""


def check_config(hf_config: Any) -> None:
    """Refuse what cannot run over paged KV.

    Raises:
        ModelNotSupportedError: with the reason.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = hf_config.get_text_config(decoder=True)
    own_code = getattr(hf_config, "auto_map", None)
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    recurrent = ", ".join(kind for kind in kinds if _RECURRENT_LAYERS.search(kind))
    reasons = {
        "an encoder-decoder model; only decoders have one KV sequence": getattr(
            hf_config, "is_encoder_decoder", False
        ),
        f"layers with recurrent state ({recurrent})": recurrent,
        "an index beside the keys and values, which picks what its layers attend to": getattr(
            text, "index_topk", None
        ),
        "attention that treats generated tokens otherwise than the prompt": (
            "reference_sliding_attention" in kinds
        ),
        "layers with recurrent state": any(
            getattr(text, name, None) is not None for name in _RECURRENT_FIELDS
        ),
        "transformers has no causal language model of this configuration": (
            type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise refusal(hf_config, reason)


def check_limits(hf_config: Any, config: CacheConfig) -> int:
    """Compare the shape and length in a CacheConfig with the model's.

    Returns:
        The longest sequence in tokens: what the user set, bounded by what the model knows. Where
        neither says anything it is `UNSTATED_POSITIONS`.

    Raises:
        ConfigError: naming the field that disagrees, or longer than the model's positions.
    """
    text = hf_config.get_text_config(decoder=True)
    heads = common_field(text, "num_attention_heads")
    shape = {
        "num_layers": common_field(text, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": _kv_heads(text) or heads,
        "head_dim": _head_dim(text),
    }
    for name, actual in shape.items():
        given = getattr(config, name)
        if given is not None and actual is not None and given != actual:
            raise ConfigError(name, given, f"{actual}, as the model has it, or None")
    limit, length = stated_positions(text), config.max_model_len
    if length is None:
        length = limit
    if length is None:
        length = UNSTATED_POSITIONS
        logger.info(
            "model type %r states no number of positions: max_model_len is %d unless it is set",
            hf_config.model_type,
            length,
        )
    if limit is not None and length > limit:
        valid = f"at most {limit}, the model's positions"
        if "dynamic" in _rope_types(text):
            # Frequencies that follow the length: keys of the cache would be those of a shorter one.
            valid += "; beyond them its dynamic rope turns cached keys otherwise"
        raise ConfigError("max_model_len", length, valid)
    return int(length)


def common_field(text_config: Any, name: str) -> Any:
    """A field that all layers share; None where there is none, or each layer has its own."""
    try:
        return getattr(text_config, name, None)
    except RuntimeError:  # transformers says so of a field that differs from layer to layer
        return None


def stated_positions(text_config: Any) -> int | None:
    """How many positions a text configuration states, under whatever name; None = it does not."""
    for name in _POSITION_FIELDS:
        value = getattr(text_config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _head_dim(text_config: Any) -> int | None:
    try:
        stated = getattr(text_config, "head_dim", None)
    except RuntimeError:
        return None
    hidden, heads = (common_field(text_config, n) for n in ("hidden_size", "num_attention_heads"))
    if stated is not None or not isinstance(hidden, int) or not isinstance(heads, int):
        return stated
    return hidden // heads if heads else None


def _kv_heads(text_config: Any) -> int | None:
    if getattr(text_config, "multi_query", False) and not getattr(
        text_config, "new_decoder_architecture", False
    ):
        return 1
    for name in ("num_key_value_heads", "num_kv_heads"):
        if heads := common_field(text_config, name):
            return int(heads)
    return None


def read_config(source: ModelSource) -> Any:
    """The model's `PretrainedConfig`, without reading weights.

    Raises:
        ConfigError: no such folder or hub model, or no such model type.
    """
    from transformers import AutoConfig

    if source.config is not None:
        fields = dict(source.config)
        model_type = fields.pop("model_type")
        try:
            return AutoConfig.for_model(model_type, **fields)
        except ValueError as error:
            raise ConfigError("config", model_type, f"a known model_type ({error})") from error
    assert source.path is not None
    valid = "a folder with a saved model, a .gguf file or the name of a model on the hub"
    if os.path.isabs(source.path) and not os.path.isdir(source.path):
        raise ConfigError("model", source.path, valid)
    try:
        return AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except Exception as error:  # transformers raises whatever a damaged file makes it trip over
        raise ConfigError("model", source.path, f"{valid} ({loading_reason(error)})") from error


def check_complete(name: str, report: Mapping[str, Any]) -> None:
    """Refuse a model of which transformers would have drawn some weights at random.

    Tensors of the checkpoint that the model has no use for are only logged: it computes without.

    Args:
        name: of the model.
        report: what `from_pretrained` tells with `output_loading_info`.

    Raises:
        ConfigError: names up to ten tensors, and how many are missing or of another shape.
    """
    if unused := sorted(report["unexpected_keys"]):
        logger.warning("%s: %d unused: %s", name, len(unused), _some(unused))
    faults = {
        "missing": sorted(report["missing_keys"]),
        "of another shape than the config's": [
            f"{key} is {list(there)}, not {list(here)}"
            for key, there, here in sorted(report["mismatched_keys"])
        ],
        "unreadable": list(report.get("error_msgs", ())),
    }
    found = [f"{len(names)} {what}: {_some(names)}" for what, names in faults.items() if names]
    if found:
        valid = "a checkpoint that holds every tensor of the model"
        raise ConfigError("model", name, f"{valid}; {'; '.join(found)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def refusal(hf_config: Any, reason: str, right_to: int | None = None) -> ModelNotSupportedError:
    """The error for a model that LiteCache does not run.

    Args:
        hf_config: of the model.
        reason: in a few words.
        right_to: the sequence length in tokens up to which it would run, if there is one.
    """
    accepted = f"; a max_model_len of up to {right_to} tokens is accepted" if right_to else ""
    error = ModelNotSupportedError(
        f"model type {hf_config.model_type!r} is not supported: {reason}{accepted}"
    )
    error.reason, error.right_to = reason, right_to
    return error


def _rope_types(text_config: Any) -> Iterator[str]:
    parameters = getattr(text_config, "rope_parameters", None)
    nested = parameters.values() if isinstance(parameters, Mapping) else ()
    # Some families nest one set per layer type.
    for entry in (parameters, *nested):
        if isinstance(entry, Mapping) and "rope_type" in entry:
            yield str(entry["rope_type"])


def loading_reason(error: Exception) -> str:
    """Why transformers does not load a model, on one line."""
    if "`trust_remote_code=True`" in str(error):
        return "code of its own runs only with trust_remote_code=True"
    return first_line(error)
