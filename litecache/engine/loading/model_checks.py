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
_TWO_CALLS = ("diffllama",)


def check_config(hf_config: Any) -> None:
    """Refuse what cannot run over paged KV.

    Args:
        hf_config: the model's `PretrainedConfig`.

    Raises:
        ModelNotSupportedError: with the reason.
    """
    text = hf_config.get_text_config(decoder=True)
    if getattr(hf_config, "is_encoder_decoder", False):
        raise refusal(hf_config, "an encoder-decoder model; only decoders have one KV sequence")
    if "dynamic" in _rope_types(text):
        raise refusal(
            hf_config,
            "rope_type 'dynamic': its frequencies depend on the longest position of the batch, so"
            " cached KV would be wrong for other lengths",
        )
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    recurrent = [kind for kind in kinds if _RECURRENT_LAYERS.search(kind)]
    if recurrent:
        raise refusal(hf_config, f"layers with recurrent state ({', '.join(recurrent)})")
    if "reference_sliding_attention" in kinds:
        raise refusal(hf_config, "attention that treats generated tokens otherwise than the prompt")
    if any(getattr(text, name, None) is not None for name in _RECURRENT_FIELDS):
        raise refusal(hf_config, "layers with recurrent state")
    if hf_config.model_type in _TWO_CALLS:
        raise refusal(hf_config, "two attention calls in a layer")


def check_shape(hf_config: Any, config: CacheConfig) -> None:
    """Compare the optional shape fields of a CacheConfig with the model.

    Raises:
        ConfigError: naming the field that disagrees.
    """
    text = hf_config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    shape = {
        "num_layers": getattr(text, "num_hidden_layers", None),
        "num_heads": heads,
        "num_kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": head_dim(text),
    }
    for name, actual in shape.items():
        given = getattr(config, name)
        if given is not None and actual is not None and given != actual:
            raise ConfigError(name, given, f"{actual}, as the model has it, or None")


def choose_max_model_len(hf_config: Any, config: CacheConfig) -> int:
    """The longest sequence: what the user set, bounded by what the model knows.

    Raises:
        ConfigError: longer than the model's positions, or neither side states a limit.
    """
    text = hf_config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    if config.max_model_len is None:
        if limit is None:
            raise ConfigError(
                "max_model_len", None, "a number of tokens, for a model that states no limit"
            )
        return int(limit)
    if limit is not None and config.max_model_len > limit:
        raise ConfigError(
            "max_model_len", config.max_model_len, f"at most {limit}, the model's positions"
        )
    return config.max_model_len


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
    missing, unused = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    other = [
        f"{key} is {list(there)}, not {list(here)}"
        for key, there, here in sorted(report["mismatched_keys"])
    ]
    if unused:
        logger.warning("%s: %d unused: %s", name, len(unused), _some(unused))
    faults = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("of another shape than the config's", other),
            ("unreadable", list(report.get("error_msgs", ()))),
        )
        if names
    ]
    if faults:
        valid = "a checkpoint that holds every tensor of the model"
        raise ConfigError("model", name, f"{valid}; {'; '.join(faults)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def head_dim(text_config: Any) -> int | None:
    """The head dimension a configuration implies, None when it does not say."""
    explicit = getattr(text_config, "head_dim", None)
    if explicit:
        return int(explicit)
    hidden = getattr(text_config, "hidden_size", None)
    heads = getattr(text_config, "num_attention_heads", None)
    return hidden // heads if hidden and heads else None


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
    parameters = getattr(text_config, "rope_parameters", None) or {}
    if not isinstance(parameters, Mapping):
        return
    # Some families nest one set per layer type.
    for entry in (parameters, *(v for v in parameters.values() if isinstance(v, Mapping))):
        if "rope_type" in entry:
            yield str(entry["rope_type"])


def loading_reason(error: Exception) -> str:
    """Why transformers does not load a model, on one line."""
    if "`trust_remote_code=True`" in str(error):
        return "code of its own runs only with trust_remote_code=True"
    return first_line(error)
