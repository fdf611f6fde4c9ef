"""Whether a module in memory is what its class, its config and its tensors say: those travel.

The actors build the model from its config and load its tensors. Whatever else was done to a module
would be lost on that way, and other tokens would come back; so it is refused here, by name. A
second module of the same config, built without weights, tells what belongs to it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from litecache.engine.loading.model_checks import loading_reason
from litecache.errors import ConfigError, shown

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Attributes of modules that change nothing in eval mode.
_WITHOUT_EFFECT = (
    "training", "gradient_checkpointing", "name_or_path", "padding_idx", "p", "loss_type",
)  # fmt: skip
# The shapes of tensors tell it; resizing the embeddings leaves it behind in an inner module.
_IN_SHAPES = ("vocab_size",)
_PLAIN = (bool, int, float, str, type(None))


def check_module(module: nn.Module, *, trust_remote_code: bool = False) -> Any:
    """Refuse a module that its config and its tensors do not tell whole.

    Args:
        module: as a user loaded or made it, on any device.
        trust_remote_code: whether it may be of a class that came with its weights.

    Returns:
        The module, or the one that `torch.compile` wrapped.

    Raises:
        ConfigError: names the hook, the method, the attribute or the tensor, and what to do.
    """
    module = getattr(module, "_orig_mod", module)
    for valid in _faults(module, trust_remote_code):
        raise ConfigError("model", type(module).__name__, valid)
    return module


def _faults(module: Any, trust_remote_code: bool) -> Iterator[str]:
    """What a module should be and is not, the cheapest to find first."""
    if (
        hasattr(module, "peft_config")
        or getattr(module, "_hf_peft_config_loaded", False) is True
        or any(type(each).__module__.startswith("peft.") for each in module.modules())
    ):
        yield "a model without adapters: merge the adapter first, as by merge_and_unload()"
    config: Any = getattr(module, "config", None)
    if not isinstance(config, PretrainedConfig) or not hasattr(module, "save_pretrained"):
        yield "a transformers model with a config"
    yield from _tensor_faults(module)
    if type(module).__module__.startswith("transformers_modules.") and not trust_remote_code:
        yield "of a class of transformers, or with trust_remote_code=True"
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    try:
        with torch.device("meta"):  # what the actors will build, without memory for its tensors
            plain: nn.Module = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # transformers raises whatever the config makes it trip over
        yield f"a causal language model of transformers ({loading_reason(error)})"
        return
    for difference in _differences(module, plain):
        what = "just what its class, config and weights say, which alone reach the actors"
        yield f"{what}; {difference}"


def _tensor_faults(module: Any) -> Iterator[str]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    meta = [key for key, tensor in tensors.items() if tensor.is_meta]
    if meta:
        lacking = f"{len(meta)} tensors are on the meta device ({meta[0]})"
        yield f"a model with its weights in memory: {lacking}; load it without offloading"
    integers = [k for k, p in module.named_parameters() if not p.is_floating_point()]
    if getattr(module, "is_quantized", False) or integers:
        yield "a model that is not quantised: dequantize() it first, or give its name or folder"
    fields = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    kept = [part for field in fields for part in getattr(module, field, None) or ()]
    dtypes: dict[torch.dtype, str] = {}
    for key, parameter in module.named_parameters():
        if not any(part in key for part in kept):
            dtypes.setdefault(parameter.dtype, key)
    if len(dtypes) > 1:
        found = ", ".join(f"{key} is {dtype}" for dtype, key in dtypes.items())
        yield f"a model of one dtype: {found}; .to() one of them"


def _differences(module: nn.Module, plain: nn.Module) -> Iterator[str]:
    """Sentences about what the one has and the other has not."""
    for field in _HOOKS:
        for hook in getattr(nn.modules.module, f"_global{field}").values():
            yield f"a hook for all modules, {_name(hook)}, would be lost"
    ours = dict(plain.named_modules(remove_duplicate=False))
    theirs = dict(module.named_modules(remove_duplicate=False))
    for name, part in theirs.items():
        place = name or "the model"
        if name not in ours:
            yield f"{place} ({type(part).__name__}) is no part of it"
            continue
        yield from _class_differences(place, type(part), type(ours[name]))
        yield from _own_differences(place, part, ours[name])
    yield from (f"{name} is missing" for name in ours if name not in theirs)
    yield from _tensor_differences(module, plain)


def _class_differences(place: str, theirs: type, ours: type) -> Iterator[str]:
    if theirs is ours:
        return
    if not issubclass(theirs, ours):
        yield f"{place} is a {theirs.__name__}, not a {ours.__name__}"
    for kind in theirs.__mro__:
        if kind is ours:
            break
        for name, value in vars(kind).items():
            bound = isinstance(value, (property, classmethod, staticmethod))
            method = bound or (callable(value) and not isinstance(value, type))
            if method and name != "__init__" and hasattr(ours, name):
                yield f"{kind.__name__}.{name} replaces that of {ours.__name__} in {place}"


def _own_differences(place: str, theirs: nn.Module, ours: nn.Module) -> Iterator[str]:
    for field in _HOOKS:
        for hook in getattr(theirs, field).values():
            # Those of transformers only look on.
            if not getattr(hook, "__module__", "").startswith("transformers."):
                yield f"the hook {_name(hook)} of {place} would be lost"
    for name, value in vars(theirs).items():
        if callable(getattr(type(ours), name, None)) and not _is_own_method(theirs, value, name):
            yield f"the method {name} of {place} was replaced by {_name(value)}"
        if name.startswith("_") or name in _WITHOUT_EFFECT + _IN_SHAPES or "dropout" in name:
            continue
        expected = vars(ours).get(name)
        if type(value) in _PLAIN and type(expected) in _PLAIN and value != expected:
            yield f"{name} of {place} is {shown(value)}, not {shown(expected)}"


def _is_own_method(part: nn.Module, value: Any, name: str) -> bool:
    """Whether it is the class's method all the same, compiled or wrapped by accelerate."""
    if hasattr(part, "_hf_hook") and name in ("forward", "_old_forward"):
        value = vars(part).get("_old_forward", value)
    value = getattr(value, "_torchdynamo_orig_callable", value)
    return getattr(value, "__func__", None) is getattr(type(part), name)


def _tensor_differences(module: nn.Module, plain: nn.Module) -> Iterator[str]:
    expected = plain.state_dict()
    for key, tensor in module.state_dict().items():
        if key not in expected:
            yield f"the tensor {key} is no part of it"
        elif tensor.shape != expected[key].shape:
            yield f"{key} is {list(tensor.shape)}, not {list(expected[key].shape)}"
    tied: dict[int, list[str]] = {}
    for key, parameter in plain.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(key)
    values = dict(module.named_parameters(remove_duplicate=False))
    for first, *others in tied.values():
        for key in others:
            if values[key] is not values[first] and not torch.equal(values[key], values[first]):
                yield f"{key} is not {first}, to which its config ties it"


def _name(hook: Callable[..., Any]) -> str:
    if isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__qualname__", None) or type(hook).__name__
