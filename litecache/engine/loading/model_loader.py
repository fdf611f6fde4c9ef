"""Loads a model for the engine: weights on the device, checked, probed, with its KV shapes.

Everything that can be refused is refused here, the cheapest check first, before the pool or any
other resource exists.
"""

from __future__ import annotations

import inspect
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from litecache.config import CacheConfig
from litecache.engine.kv_layout import KVSpec, check_kv_dtype, choose_device
from litecache.engine.loading.fingerprint import (
    combined_fingerprint,
    file_digest,
    model_fingerprint,
    random_fingerprint,
)
from litecache.engine.loading.model_checks import (
    check_complete,
    check_config,
    check_limits,
    loading_reason,
    read_config,
    refusal,
)
from litecache.engine.loading.model_source import BUFFERS_FILE, ModelSource
from litecache.engine.loading.probe import use_paged_attention, verify_narrow
from litecache.engine.loading.twin import probe_model
from litecache.engine.running.hf_attention import IMPLEMENTATION, register
from litecache.engine.running.passes import apply_passes, chosen_passes
from litecache.errors import ConfigError, ModelNotSupportedError

logger = logging.getLogger(__name__)

# Where transformers puts the modules of code that comes with a model.
_REMOTE_CODE = "transformers_modules."


@dataclass(frozen=True)
class LoadedModel:
    """A model that passed the probe.

    Attributes:
        model: the Hugging Face model in eval mode, with paged attention chosen and the passes
            applied.
        specs: KV shape of each layer.
        device: where weights and pool are.
        dtype: of weights and activations.
        max_model_len: longest sequence in tokens.
        vocab_size: number of logits.
        fingerprint: digest of config and all weights, equal for equal models.
        passes: names of the passes that made its forward faster.
    """

    model: Any
    specs: tuple[KVSpec, ...]
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    vocab_size: int
    fingerprint: str
    passes: tuple[str, ...] = ()

    @property
    def keeps_logits(self) -> bool:
        """Whether the model computes logits at chosen positions only when asked to."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters


def load_model(source: ModelSource, config: CacheConfig) -> LoadedModel:
    """Load and probe a model.

    Args:
        source: where it comes from.
        config: device, dtypes, block size and limits.

    Raises:
        ConfigError: no such model, a device that is not there, or fields of `config` that
            disagree with the model.
        ModelNotSupportedError: the model cannot run over paged KV, with the reason.
    """
    device = choose_device(config.device)
    hf_config = read_config(source)
    check_config(hf_config)
    max_model_len = check_limits(hf_config, config)
    name = config.dtype or str(getattr(hf_config, "dtype", None) or "float32")
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    register()
    if source.weights == "random":
        model = random_model(hf_config, source.seed, device, dtype)
        identity = {**hf_config.to_dict(), "dtype": str(dtype), "device": device.type}
        fingerprint = random_fingerprint(identity, source.seed)
    else:
        model = _pretrained_model(source, hf_config, device, dtype)
        fingerprint = _fingerprint(source, model)
    model.eval().requires_grad_(False)
    specs, passes = admit(model, config, max_model_len)
    logger.info("%s: %d layers, passes: %s", source.name, len(specs), ", ".join(passes) or "none")
    return LoadedModel(
        model=model,
        specs=specs,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        vocab_size=hf_config.get_text_config(decoder=True).vocab_size,
        fingerprint=fingerprint,
        passes=passes,
    )


def admit(
    model: Any, config: CacheConfig, max_model_len: int
) -> tuple[tuple[KVSpec, ...], tuple[str, ...]]:
    """Probe a model in eval mode and make it faster.

    Args:
        model: a causal language model.
        config: block size and KV dtype.
        max_model_len: longest sequence in tokens.

    Returns:
        Each layer's KV shape, and the names of the passes that were applied.

    Raises:
        ModelNotSupportedError: it would be wrong over paged KV, with the reason.
        ConfigError: its heads, or the device, cannot have KV of `config.kv_dtype`.
    """
    use_paged_attention(model)
    own = str(model.dtype).removeprefix("torch.")
    # An eight-bit pool would hide in its own error what is wrong otherwise.
    narrow = config.kv_dtype if config.kv_dtype in ("int8", "fp8") else None
    kv_dtype = own if narrow else config.kv_dtype or own
    specs, right = probe_model(model, kv_dtype, config.block_size, max_model_len)
    narrow_specs = specs if narrow is None else tuple(replace(s, dtype=narrow) for s in specs)
    check_kv_dtype(narrow_specs, next(model.parameters()).device)
    names = [name for name in chosen_passes() if name in right]
    tried = apply_passes(model, specs, config.block_size, max_model_len, names=names)
    if narrow is not None:
        verify_narrow(model, narrow_specs, specs, config.block_size, max_model_len)
    return narrow_specs, tuple(name for name, kept in tried.items() if kept)


def random_model(hf_config: Any, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Draw weights where they stay, in their final dtype, leaving torch's generator untouched."""
    from transformers import AutoModelForCausalLM

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(
                hf_config, dtype=dtype, attn_implementation=IMPLEMENTATION
            )
        except (KeyError, ValueError) as error:
            raise _not_a_decoder(hf_config, error) from error


def _pretrained_model(
    source: ModelSource, hf_config: Any, device: torch.device, dtype: torch.dtype
) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_accelerate_available, is_peft_available

    beside = os.path.join(str(source.path), "adapter_config.json")
    if os.path.exists(beside) and not is_peft_available():
        # transformers would load the base model alone, and say nothing.
        valid = "weights without an adapter beside them: merge it first, or pip install peft"
        raise ConfigError("adapter_config.json", beside, valid)
    # With accelerate, transformers copies each tensor to the device as it reads it.
    direct = {"device_map": {"": device}} if is_accelerate_available() else {}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source.path,
            config=hf_config,
            dtype=dtype,
            revision=source.revision,
            attn_implementation=IMPLEMENTATION,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
            # Not ignored: `check_complete` names them.
            ignore_mismatched_sizes=True,
            **direct,
        )
    except (KeyError, ValueError) as error:
        raise _not_a_decoder(hf_config, error) from error
    except Exception as error:  # safetensors raises a class of its own for damaged files
        valid = f"a model whose weights can be read ({loading_reason(error)})"
        raise ConfigError("model", source.path, valid) from error
    check_complete(source.name, report)
    model.to(device)
    if os.path.exists(buffers := os.path.join(str(source.path), BUFFERS_FILE)):
        for name, tensor in load_file(buffers, device=str(device)).items():
            owner, _, own_name = name.rpartition(".")
            model.get_submodule(owner).register_buffer(own_name, tensor, persistent=False)
    return model


def _fingerprint(source: ModelSource, model: Any) -> str:
    """Of what was loaded, code that came from another place than the folder included.

    Raises:
        ConfigError: another one than the source says.
    """
    from transformers.utils import cached_file

    folder = str(source.path)
    if not os.path.isdir(folder):  # the hub's snapshot of it
        folder = os.path.dirname(str(cached_file(folder, "config.json", revision=source.revision)))
    found = model_fingerprint(Path(folder), trust_remote_code=source.trust_remote_code)
    if source.fingerprint not in (None, found):
        valid = f"the model with fingerprint {source.fingerprint}; it has changed to {found}"
        raise ConfigError("model", source.path, valid)
    if source.trust_remote_code:
        own = {c for c in map(type, model.modules()) if c.__module__.startswith(_REMOTE_CODE)}
        code = sorted({file_digest(Path(inspect.getfile(c))) for c in own})
        if any("--" in str(p) for p in (getattr(model.config, "auto_map", None) or {}).values()):
            return combined_fingerprint({"folder": found}, {"code": ",".join(code)})
    return found


def _not_a_decoder(hf_config: Any, error: Exception) -> ModelNotSupportedError:
    if IMPLEMENTATION in str(error):
        return refusal(hf_config, "it has attention code of its own")
    reason = f"it does not load as a causal language model: {loading_reason(error)}"
    return refusal(hf_config, reason)
