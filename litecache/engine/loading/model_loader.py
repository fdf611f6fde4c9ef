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
from typing import Any, NamedTuple

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
from litecache.engine.loading.probe import GATHERED, OWN_CODE, PAGED, verify_narrow
from litecache.engine.loading.twin import probe_model
from litecache.engine.running.passes import apply_passes, chosen_passes
from litecache.errors import ConfigError, ModelNotSupportedError

logger = logging.getLogger(__name__)

# Where transformers puts the modules of code that comes with a model.
_REMOTE_CODE = "transformers_modules."


@dataclass(frozen=True)
class LoadedModel:
    """A model that passed the probe.

    Attributes:
        model: the Hugging Face model in eval mode, with its attention chosen and the passes
            applied.
        specs: KV shape of each layer.
        device: where weights and pool are.
        dtype: of weights and activations.
        max_model_len: longest sequence in tokens.
        vocab_size: number of logits.
        fingerprint: digest of config and all weights, equal for equal models.
        passes: names of the passes that made its forward faster.
        attention: "paged" = by this package's attention function, over the blocks as they lie;
            "gathered" = by the model's own code, which is given the KV of whole contexts.
    """

    model: Any
    specs: tuple[KVSpec, ...]
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    vocab_size: int
    fingerprint: str
    passes: tuple[str, ...] = ()
    attention: str = "paged"

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
    if source.weights == "random":
        model = random_model(hf_config, source.seed, device, dtype)
        identity = {**hf_config.to_dict(), "dtype": str(dtype), "device": device.type}
        fingerprint = random_fingerprint(identity, source.seed)
    else:
        model = _pretrained_model(source, hf_config, device, dtype)
        fingerprint = _fingerprint(source, model)
    model.eval().requires_grad_(False)
    specs, passes, attention = admit(model, config, max_model_len)
    made = ", ".join(passes) or "none"
    logger.info("%s: %d layers, %s attention, passes: %s", source.name, len(specs), attention, made)
    return LoadedModel(
        model=model,
        specs=specs,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        vocab_size=hf_config.get_text_config(decoder=True).vocab_size,
        fingerprint=fingerprint,
        passes=passes,
        attention=attention,
    )


class Admission(NamedTuple):
    """How a model was admitted; the fields are those of `LoadedModel`."""

    specs: tuple[KVSpec, ...]
    passes: tuple[str, ...]
    attention: str


def admit(model: Any, config: CacheConfig, max_model_len: int) -> Admission:
    """Probe a model in eval mode and make it faster.

    It is run paged where that is right, else over gathered KV where that is.

    Args:
        model: a causal language model.
        config: block size and KV dtype.
        max_model_len: longest sequence in tokens.

    Raises:
        ModelNotSupportedError: it would be wrong in both ways, with the reason.
        ConfigError: its heads, its attention code or the device cannot have KV of
            `config.kv_dtype`.
    """
    own = str(model.dtype).removeprefix("torch.")
    # An eight-bit pool would hide in its own error what is wrong otherwise.
    narrow = config.kv_dtype if config.kv_dtype in ("int8", "fp8") else None
    kv_dtype = own if narrow else config.kv_dtype or own
    chosen = model.config._attn_implementation
    try:
        specs, right = probe_model(model, PAGED, kv_dtype, config.block_size, max_model_len)
    except ModelNotSupportedError as refused:
        if model.config._attn_implementation != chosen:
            model.set_attn_implementation(chosen)
        try:
            specs, _ = probe_model(model, GATHERED, kv_dtype, config.block_size, max_model_len)
        except ModelNotSupportedError as second:
            if refused.reason == OWN_CODE or (second.right_to or 0) > (refused.right_to or 0):
                raise second from None
            reason = f"{refused.reason}; over gathered KV, {second.reason}"
            raise refusal(model.config, reason, refused.right_to) from None
        if narrow is not None:
            valid = f"a dtype of 16 or 32 bits for gathered KV ({refused.reason})"
            raise ConfigError("kv_dtype", narrow, valid) from None
        logger.info("run over gathered KV, as paged attention is not for it: %s", refused)
        return Admission(specs, (), GATHERED.name)
    narrow_specs = specs if narrow is None else tuple(replace(s, dtype=narrow) for s in specs)
    check_kv_dtype(narrow_specs, next(model.parameters()).device)
    names = [name for name in chosen_passes() if name in right]
    tried = apply_passes(model, specs, config.block_size, max_model_len, names=names)
    if narrow is not None:
        verify_narrow(model, narrow_specs, specs, config.block_size, max_model_len)
    passes = tuple(name for name, kept in tried.items() if kept)
    return Admission(narrow_specs, passes, PAGED.name)


def random_model(hf_config: Any, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Draw weights where they stay, in their final dtype, leaving torch's generator untouched."""
    from transformers import AutoModelForCausalLM

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
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
    reason = f"it does not load as a causal language model: {loading_reason(error)}"
    return refusal(hf_config, reason)
