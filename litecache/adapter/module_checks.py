"""Whether a module in memory is what its class, its config and its tensors say: those travel.

The actors build the model from its config and load its tensors. Whatever else was done to a module
would be lost on that way, and other tokens would come back; so it is refused here, by name. A
second module of the same config, built without weights, tells what belongs to it; given the same
tensors, it must give the same logits: a patched function, a closure or a class that another library
exchanged may hide from a comparison of parts, but not from those.

Adapters of PEFT are merged into the weights of a copy, by PEFT's own layers of whichever kind
(LoRA, DoRA, IA3 and so on): merged, they cost no step of the engine anything, and are part of the
model's fingerprint, so that no block of one adapter is ever found for another. Nothing of PEFT is
imported here: whoever hands over such a model has done that.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from litecache.engine.loading.model_checks import loading_reason
from litecache.engine.loading.probe import TOLERANCE, ProbePlan, relative_error
from litecache.errors import ConfigError, shown, told

logger = logging.getLogger(__name__)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Attributes of modules that change nothing in eval mode.
_WITHOUT_EFFECT = (
    "training", "gradient_checkpointing", "name_or_path", "padding_idx", "p", "loss_type",
    "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit",
)  # fmt: skip
# The shapes of tensors tell it; resizing the embeddings leaves it behind in an inner module.
_IN_SHAPES = ("vocab_size", "in_features", "out_features", "num_embeddings", "embedding_dim")
_PLAIN = (bool, int, float, str, type(None))
# Packages that the actors have, too, with code as it was installed.
_INSTALLED = ("transformers", "transformers_modules", "torch")
_STANDARD = sys.stdlib_module_names - {"__main__"}
# Of a module, and replaced by accelerate on one that it placed.
_PLACING = ("to", "cuda", "cpu", "hpu", "mlu", "musa", "neuron", "npu", "sdaa", "xpu")
# Hooks of these packages look on, or prepare a backward pass.
_ONLOOKERS = ("transformers.", "peft.")
# What these do to a forward is move tensors between devices.
_MOVERS = (
    "AlignDevicesHook", "CpuOffload", "UserCpuOffloadHook",
    "SequentialHook",
)  # fmt: skip


def check_module(module: nn.Module, *, trust_remote_code: bool = False) -> Any:
    """Refuse a module that its config and its tensors do not tell whole.

    Args:
        module: as a user loaded or made it, on any device; it stays as it is.
        trust_remote_code: whether it may be of a class that came with its weights.

    Returns:
        The module, the one that `torch.compile` or `DataParallel` wrapped, or a copy on the CPU
        with the adapters of PEFT that are active merged into its weights.

    Raises:
        ConfigError: names the hook, the method, the attribute or the tensor, and what to do.
    """
    inner = _unwrapped(module)
    for valid in _early_faults(inner):
        raise ConfigError("model", type(inner).__name__, valid)
    plain = merged_copy(inner) if has_adapters(inner) else inner
    for valid in _faults(plain, inner, trust_remote_code):
        raise ConfigError("model", type(plain).__name__, valid)
    return plain


def _unwrapped(module: Any) -> Any:
    """What `torch.compile` and torch's wrappers for many GPUs hold."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            inner = module._orig_mod
        else:
            return module
        for difference in _hook_differences("its wrapper", module):
            raise ConfigError("model", type(inner).__name__, f"without hooks; {difference}")
        module = inner


def _early_faults(module: Any) -> Iterator[str]:
    """What a module should be and is not, before anything is copied."""
    config: Any = getattr(module, "config", None)
    if not isinstance(config, PretrainedConfig) or not hasattr(module, "save_pretrained"):
        yield "a transformers model with a config"
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    meta = [key for key, tensor in tensors.items() if tensor.is_meta]
    if meta:
        lacking = f"{len(meta)} tensors are on the meta device ({meta[0]})"
        yield f"a model with its weights in memory: {lacking}; load it without offloading"
    integers = [k for k, p in module.named_parameters() if not p.is_floating_point()]
    if getattr(module, "is_quantized", False) or integers:
        yield (
            "a model that is not quantised: give its name or folder, so that the actors load it"
            " as it is, or dequantize(dtype=...) it first"
        )
    for key, tensor in tensors.items():
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            what = f"{key} is a {type(tensor).__name__}"
            yield f"a model of plain tensors: {what}; gather it first, or give its name or folder"
    for name, part in module.named_modules():
        if is_peft(part):  # merging leaves nothing of it that could be looked at later
            yield from (f"without hooks; {found}" for found in _hook_differences(name, part))
            if _home(vars(part).get("forward")) not in (None, "peft"):
                yield f"with its own methods; forward of {name or 'the model'} was replaced"


def _faults(module: Any, original: Any, trust_remote_code: bool) -> Iterator[str]:
    """The same of what will be saved, the cheapest to find first."""
    yield from _dtype_faults(module)
    if type(module).__module__.startswith("transformers_modules.") and not trust_remote_code:
        yield "of a class of transformers, or with trust_remote_code=True"
    config = copy.deepcopy(module.config)
    config._attn_implementation = "eager"
    try:
        with torch.device("meta"):  # what the actors will build, without memory for its tensors
            plain: Any = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # transformers raises whatever the config makes it trip over
        reason = loading_reason(error)
        yield f"a model that AutoModelForCausalLM builds from its config alone ({reason})"
        return
    yield from _code_faults(plain)
    what = "just what its class, config and weights say, which alone reach the actors"
    yield from (f"{what}; {difference}" for difference in _differences(module, plain))
    if module is original:
        _use_tensors(plain, module)
    else:  # merged, and of the same parts
        plain = module
    tried = trial_error(original, plain)
    if tried is None and module is not original:
        yield "a model whose merged adapters can be tried here: its forward fails; merge them first"
    if tried is not None and not tried[0] <= tried[1]:
        yield f"{what}; its logits differ from theirs by {tried[0]:.1e} relative"


def _dtype_faults(module: Any) -> Iterator[str]:
    fields = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    kept = [part for field in fields for part in getattr(module, field, None) or ()]
    dtypes: dict[torch.dtype, str] = {}
    for key, parameter in module.named_parameters():
        if not any(part in key for part in kept):
            dtypes.setdefault(parameter.dtype, key)
    if len(dtypes) > 1:
        found = ", ".join(f"{key} is {dtype}" for dtype, key in dtypes.items())
        yield f"a model of one dtype: {found}; .to() one of them"


def _code_faults(plain: nn.Module) -> Iterator[str]:
    """Classes that are only in this process, and methods that were exchanged in it."""
    for kind in dict.fromkeys(type(part) for part in plain.modules()):
        package = kind.__module__.partition(".")[0]
        if package not in _INSTALLED:
            where = f"{kind.__name__} of {kind.__module__} is not in the actors"
            way = "save it with its code (register_for_auto_class, save_pretrained)"
            yield f"of a class of transformers: {where}; {way} and give the folder"
        for owner in kind.__mro__:
            for name, value in vars(owner).items():
                home = _home(value)
                if home is not None and owner.__module__.partition(".")[0] in _INSTALLED:
                    what = f"{owner.__name__}.{name} was replaced by {_name(value)} of {home}"
                    yield f"of a class as it was installed: {what}"
    for module in dict.fromkeys(type(part).__module__ for part in plain.modules()):
        for name, value in vars(sys.modules[module]).items():
            home = _home(value)
            if home is not None and _defines(sys.modules[module], name):
                what = f"{module}.{name} was replaced by {_name(value)} of {home}"
                yield f"of a class as it was installed: {what}"


def _defines(module: types.ModuleType, name: str) -> bool:
    """Whether a function stands in a module's source; those that it imports are not replaced."""
    try:
        return f"\ndef {name}(" in inspect.getsource(module)
    except (OSError, TypeError):
        return False


def _home(value: Any) -> str | None:
    """The package of a method, None where that says nothing."""
    value = getattr(value, "__func__", getattr(value, "fget", value))
    if not isinstance(value, types.FunctionType) or value.__module__ is None:
        return None
    package = value.__module__.partition(".")[0]
    return None if package in _INSTALLED or package in _STANDARD else package


def _use_tensors(plain: nn.Module, module: nn.Module) -> None:
    """Give a model without weights those of another of the same parts, shared."""
    theirs = dict(module.named_modules(remove_duplicate=False))
    for name, part in plain.named_modules(remove_duplicate=False):
        part._parameters.update(theirs[name]._parameters)
        part._buffers.update(theirs[name]._buffers)


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
    yield from _hook_differences(place, theirs)
    for name, value in vars(theirs).items():
        if name in _PLACING:
            continue
        if callable(getattr(type(ours), name, None)) and not _is_own_method(theirs, value, name):
            yield f"the method {name} of {place} was replaced by {_name(value)}"
        if name.startswith("_") or name in _WITHOUT_EFFECT + _IN_SHAPES or "dropout" in name:
            continue
        expected = vars(ours).get(name)
        if type(value) in _PLAIN and type(expected) in _PLAIN and value != expected:
            yield f"{name} of {place} is {shown(value)}, not {shown(expected)}"


def _hook_differences(place: str, part: nn.Module) -> Iterator[str]:
    for field in _HOOKS:
        for hook in getattr(part, field).values():
            if not (getattr(hook, "__module__", None) or "").startswith(_ONLOOKERS):
                yield f"the hook {_name(hook)} of {place} would be lost"
    moving = [vars(part)["_hf_hook"]] if "_hf_hook" in vars(part) else []
    while moving:  # accelerate's
        hook = moving.pop()
        kind = type(hook)
        moving += getattr(hook, "hooks", ())
        if kind.__module__ != "accelerate.hooks" or kind.__name__ not in _MOVERS:
            yield f"the hook {kind.__name__} of {place} would be lost"


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
    yield from _shared_tensors(module, plain)
    tied: dict[int, list[str]] = {}
    for key, parameter in plain.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(key)
    values = dict(module.named_parameters(remove_duplicate=False))
    for first, *others in tied.values():
        for key in others:
            if values[key] is not values[first] and not torch.equal(values[key], values[first]):
                yield f"{key} is not {first}, to which its config ties it"


def _shared_tensors(module: nn.Module, plain: nn.Module) -> Iterator[str]:
    """Tensors under two names that would be two tensors there, and cannot be saved as one."""
    ours = dict(plain.named_parameters(remove_duplicate=False))
    seen: dict[int, str] = {}
    for key, parameter in module.named_parameters(remove_duplicate=False):
        other = seen.setdefault(parameter.data_ptr() or id(parameter), key)
        if other != key and ours.get(other) is not ours.get(key):
            yield f"{key} is {other}, to which its config does not tie it: give it a copy"


def _name(hook: Callable[..., Any]) -> str:
    if isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__qualname__", None) or type(hook).__name__


_PLAN = ProbePlan((0,), 8)
# Matrix products of a GPU may round to fewer bits than those of a CPU, float32 ones included.
_TOLERANCE_BETWEEN_DEVICES = 1e-2


def trial_error(module: nn.Module, plain: nn.Module) -> tuple[float, float] | None:
    """Relative difference between the logits of two models, in eval mode and eagerly.

    Both are left as they were, torch's generators too.

    Args:
        module: the user's.
        plain: with the same tensors, on any device.

    Returns:
        The difference and what rounding may make of it; None where one of them does not run here.
    """
    theirs, ours = _logits(module, plain), _logits(plain, plain)
    if theirs is None or ours is None:
        return None
    first = next(plain.parameters())
    allowed = TOLERANCE.get(first.dtype, TOLERANCE[torch.float32])
    if next(module.parameters()).device != first.device:
        allowed = max(allowed, _TOLERANCE_BETWEEN_DEVICES)
    if theirs.shape != ours.shape:
        return float("inf"), allowed
    return relative_error(theirs, ours), allowed


def _logits(model: Any, plain: nn.Module) -> torch.Tensor | None:
    """Float32 on the CPU, of tokens that are valid ones of `plain`."""
    tokens, _ = _PLAN.inputs(plain)
    device = next(model.parameters()).device
    try:
        with _undisturbed(model, device), torch.no_grad():
            logits: torch.Tensor = model(input_ids=tokens.to(device), use_cache=False).logits
            return logits.float().cpu()
    except Exception as error:  # whatever a model of the user's trips over
        logger.debug("%s does not run here: %s", type(model).__name__, told(error))
        return None


@contextlib.contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """In eval mode, in its own dtype and without compiling; afterwards as before."""
    training = [part for part in model.modules() if part.training]
    devices = [device] if device.type == "cuda" else []
    # What is not imported has compiled nothing, and to import it takes seconds.
    compiler = "torch._dynamo" in sys.modules
    eagerly = torch.compiler.set_stance("force_eager") if compiler else contextlib.nullcontext()
    try:
        for part in training:
            part.training = False
        with (
            torch.random.fork_rng(devices=devices),
            torch.autocast(device.type, enabled=False),
            eagerly,
        ):
            yield
    finally:
        for part in training:
            part.training = True


def has_adapters(model: nn.Module) -> bool:
    """Whether a part of the model is a layer, a wrapper or a model of PEFT."""
    return any(is_peft(part) for part in model.modules())


def merged_copy(model: Any) -> Any:
    """What the model computes now, as a plain model: active adapters merged, others left out.

    Adapters that are disabled or not active count as PEFT counts them. The user's model stays as it
    is; tensors on the CPU that nothing is merged into are shared with it.

    Args:
        model: of PEFT, or of transformers with adapters in it.

    Returns:
        A model of transformers, on the CPU.

    Raises:
        ConfigError: the adapters change more than weights, or PEFT cannot merge them.
    """
    valid = "a model whose adapters are merged into its weights, as by merge_and_unload()"
    configs = getattr(model, "peft_config", None)
    for each in configs.values() if isinstance(configs, dict) else ():
        if getattr(each, "is_prompt_learning", False):
            why = f"{type(each).__name__} gives the model other inputs and cannot be merged"
            raise ConfigError("model", type(model).__name__, f"{valid}; {why}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT tells what is merged already
            return _merge(_copy_on_cpu(_base(model)))
    except Exception as error:  # each kind of adapter has reasons of its own
        why = f"PEFT does not merge these ({told(error)})"
        raise ConfigError("model", type(model).__name__, f"{valid}; {why}") from error


def is_peft(part: nn.Module) -> bool:
    """Whether it is of a class of PEFT."""
    return type(part).__module__.partition(".")[0] == "peft"


def _base(model: Any) -> Any:
    """The model of transformers inside, its layers still PEFT's."""
    while is_peft(model):
        model = model.base_model if "base_model" in model._modules else model.model
    return model


def _copy_on_cpu(model: nn.Module) -> Any:
    """A copy of all parts over the same tensors; those in parts of PEFT are copied, each alone.

    Each alone, because a tied tensor is not tied where an adapter adds to one use of it.
    """
    tensors = (*model.parameters(), *model.buffers())
    shared: dict[int, Any] = {id(tensor): _on_cpu(tensor) for tensor in tensors}
    made = copy.deepcopy(model, shared)
    for part in made.modules():
        if is_peft(part):
            for inner in part.modules():
                for name, tensor in inner._parameters.items():
                    if tensor is not None:
                        inner._parameters[name] = nn.Parameter(tensor.detach().clone(), False)
    return made


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor
    moved = tensor.detach().cpu()
    return nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved


def _merge(model: Any) -> Any:
    """Replace all parts of PEFT by what they compute now, in place."""
    merged: tuple[str, ...] = ()
    for name, part in list(model.named_modules()):
        if is_peft(part) and not name.startswith(merged):
            owner, _, own_name = name.rpartition(".")
            model.get_submodule(owner)._modules[own_name] = _merged_part(part)
            merged += (f"{name}.",)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(name, None)
    _untie(model)
    return model


def _merged_part(part: Any) -> nn.Module:
    """A plain module with the part's effect; the part itself is of no use afterwards."""
    for layer in part.modules():
        if not is_peft(layer) or not hasattr(layer, "_active_adapter"):
            continue
        merged = getattr(layer, "merged", False)
        if layer.disable_adapters:
            if merged:
                layer.unmerge()
            layer._active_adapter = []
        elif merged:  # then a forward adds no others
            layer._active_adapter = list(layer.merged_adapters)
    if hasattr(part, "unload_and_optionally_merge_module"):
        plain = part.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
    else:
        part.merge()
        plain = part.get_base_layer()
    return plain  # type: ignore[no-any-return]


def _untie(model: Any) -> None:
    """Let the config say that an embedding and a head which differ now are not tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or torch.equal(embedding.weight, head.weight):
        return
    for config in (model.config, model.config.get_text_config(decoder=True)):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
