"""Models with adapters of PEFT: merged into the weights of a copy, as the actors can load them.

A merged adapter costs no step of the engine anything, and its weights are part of the model's
fingerprint, so that no block of one adapter is ever found for another. PEFT's own layers do the
merging, whichever kind they are (LoRA, DoRA, IA3 and so on); what they cannot merge is refused.
Nothing of PEFT is imported here: whoever hands over such a model has done that.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from litecache.errors import ConfigError, told


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
