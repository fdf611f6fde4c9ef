"""What a user may call a model, and what the actors load: names, paths, GGUF files, modules.

A module handed over is written once as safetensors to the cache folder, named by the fingerprint
of its config and weights, so that an actor that restarts can load it without the driver.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import cached_file

from litecache.adapter.gguf import held_conversion, without_bars
from litecache.adapter.module_checks import check_module
from litecache.checks import check_integer
from litecache.engine.loading.fingerprint import file_digest, model_fingerprint, module_fingerprint
from litecache.engine.loading.model_checks import read_config
from litecache.engine.loading.model_source import BUFFERS_FILE, WEIGHTS, ModelSource
from litecache.errors import ConfigError, LiteCacheError, told
from litecache.paths import ModelHold, find_or_make_model, hold_model, models_folder

logger = logging.getLogger(__name__)

_ADAPTER_FILE = "adapter_config.json"
# `save_pretrained` writes these into the module's own config; the second time they are there.
_SET_BY_SAVING = ("architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class ResolvedModel:
    """A model as the driver knows it, without its weights.

    Attributes:
        source: what the actors load.
        config: the model's configuration.
        generation_config: its defaults for `generate`.
        hold: on what was written for it.
    """

    source: ModelSource
    config: PretrainedConfig
    generation_config: GenerationConfig
    hold: ModelHold = field(default_factory=lambda: ModelHold(None))

    def __post_init__(self) -> None:
        # Defaults of a family may lie outside a shrunken vocabulary, where nothing is ever drawn.
        vocab_size = getattr(self.config.get_text_config(decoder=True), "vocab_size", None)
        ids = self.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        valid = [i for i in ids if not isinstance(i, int) or vocab_size is None or i < vocab_size]
        if len(valid) < len(ids):
            defaults = copy.copy(self.generation_config)
            defaults.eos_token_id = valid or None
            object.__setattr__(self, "generation_config", defaults)


def resolve_model(
    model: Any,
    *,
    weights: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    models_bytes: int | None = None,
) -> ResolvedModel:
    """Find out what to load; reads configuration files only (a GGUF file is converted once).

    Args:
        model: a name on the hub, a folder, a .gguf file, an `nn.Module` made by transformers, or
            a `PretrainedConfig` (with `weights="random"`).
        weights: "auto" or "random".
        seed: of random weights.
        trust_remote_code: let Python code that comes with the model run, here and in the actors.
        models_bytes: bound of what is written to `$LITECACHE_HOME/models`; None = no bound.

    Raises:
        ConfigError: there is no such model, or weights do not fit to it.
    """
    if weights not in WEIGHTS:
        raise ConfigError("weights", weights, f"one of {', '.join(WEIGHTS)}")
    seed = check_integer("seed", seed, 0, valid="an integer from 0 to 2**63 - 1")
    if isinstance(model, PretrainedConfig):
        if weights != "random":
            raise ConfigError("weights", weights, '"random", because a config has no weights')
        source = ModelSource(config=model.to_dict(), weights="random", seed=seed)
        return ResolvedModel(source, model, GenerationConfig.from_model_config(model))
    if isinstance(model, nn.Module):
        if weights != "auto":
            raise ConfigError("weights", weights, '"auto", because the module brings its own')
        module = check_module(model, trust_remote_code=trust_remote_code)
        folder, hold = _save_module(module, models_bytes)
        source = ModelSource(
            path=str(folder),
            label=_label(module),
            trust_remote_code=type(module).__module__.startswith("transformers_modules."),
        )
        defaults = getattr(module, "generation_config", None)
        defaults = defaults or GenerationConfig.from_model_config(module.config)
        # Of their own: what becomes of the module's later is not what the actors have.
        return ResolvedModel(source, copy.deepcopy(module.config), copy.deepcopy(defaults), hold)
    if isinstance(model, (str, os.PathLike)) and os.fspath(model):
        seed = seed if weights == "random" else 0
        loading = {"weights": weights, "seed": seed, "trust_remote_code": trust_remote_code}
        return _resolve_path(os.fspath(model), models_bytes, **loading)
    raise ConfigError("model", model, "a name, a path, an nn.Module or a PretrainedConfig")


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer that comes with a model.

    Raises:
        ConfigError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        if source.path is None:
            raise OSError("a bare config has no tokenizer")
        return AutoTokenizer.from_pretrained(
            source.path,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
    except Exception as error:  # whatever lies in the folder
        raise ConfigError("tokenizer", None, f"given for this model ({error})") from error


def _resolve_path(name: str, most_bytes: int | None, **loading: Any) -> ResolvedModel:
    path = os.path.expanduser(name)
    label, hold = None, None
    if path.endswith(".gguf"):
        label = os.path.basename(path)
        folder, hold = held_conversion(path, most_bytes=most_bytes)
        path = str(folder)
    elif os.path.isdir(path):
        path = os.path.abspath(path)
        holds = {name: os.path.exists(f"{path}/{name}") for name in (_ADAPTER_FILE, "config.json")}
        if holds == {_ADAPTER_FILE: True, "config.json": False}:
            valid = (
                "a folder with a whole model, and not an adapter alone: load the adapter with its"
                " model, as by PeftModel.from_pretrained, and give that"
            )
            raise ConfigError("model", name, valid)
    elif os.path.exists(path) or path.startswith((".", "/")) or path.count("/") > 1:
        raise ConfigError("model", name, "a folder with a saved model, or a file ending in .gguf")
    source = ModelSource(path=path, label=label, **loading)
    config = read_config(source)
    # What the actors load must be what is here now: names and paths may come to mean other weights.
    if not os.path.isdir(path):
        snapshot = Path(str(cached_file(path, "config.json"))).parent
        if snapshot.parent.name == "snapshots":
            source = replace(source, revision=snapshot.name)
    # Nothing is to be read of random weights, and those folders are named by their contents.
    elif source.weights != "random" and Path(path).parent != models_folder():
        trusted = source.trust_remote_code
        found = model_fingerprint(Path(path), trust_remote_code=trusted)
        source = replace(source, fingerprint=found)
    try:
        defaults = GenerationConfig.from_pretrained(path)
    except Exception as error:  # there is none, or anything may stand in it
        if not isinstance(error, OSError) or os.path.exists(f"{path}/generation_config.json"):
            valid = f"a generation config ({told(error)})"
            raise ConfigError("generation_config.json", name, valid) from error
        defaults = GenerationConfig.from_model_config(config)
    return ResolvedModel(source, config, defaults, hold or hold_model(path) or ModelHold(None))


def _label(module: Any) -> str:
    """The name that a module was loaded by, or its class's."""
    name = str(getattr(module, "name_or_path", "") or "")
    return name if name and Path(name).parent != models_folder() else type(module).__name__


def _save_module(module: Any, most_bytes: int | None) -> tuple[Path, ModelHold]:
    """Write a module to the cache folder as safetensors, or find it there."""
    config = {k: v for k, v in module.config.to_dict().items() if k not in _SET_BY_SAVING}
    kinds = {type(part) for part in module.modules()}
    own = {inspect.getfile(k) for k in kinds if k.__module__.startswith("transformers_modules.")}
    if own:
        config["code"] = sorted(file_digest(Path(file)) for file in own)

    def make(folder: Path) -> None:
        try:
            with without_bars():
                module.save_pretrained(folder)
        except OSError as error:
            raise LiteCacheError(f"cannot write {folder}: {error.strerror}") from error
        except Exception as error:  # transformers finds reasons of its own
            valid = f"a module that save_pretrained writes ({told(error)})"
            raise ConfigError("model", type(module).__name__, valid) from error
        saved = module.state_dict().keys()
        others = {k: v.detach().cpu() for k, v in module.named_buffers() if k not in saved}
        save_file({k: v.contiguous().clone() for k, v in others.items()}, folder / BUFFERS_FILE)
        logger.info("wrote the model to %s", folder)

    name = module_fingerprint(module, config)
    return find_or_make_model(name, make, label=_label(module), most_bytes=most_bytes)
