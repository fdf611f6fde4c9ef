"""What a user may call a model, and what the actors load: names, paths, GGUF files, modules.

A module handed over is written once as safetensors to the cache folder, named by the fingerprint
of its config and weights, so that an actor that restarts can load it without the driver.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from litecache.adapter.gguf import convert_gguf
from litecache.engine.loading.fingerprint import module_fingerprint
from litecache.engine.loading.model_source import WEIGHTS, ModelSource
from litecache.errors import ConfigError, LiteCacheError, first_line, told
from litecache.paths import models_folder

logger = logging.getLogger(__name__)

# `save_pretrained` writes these into the module's own config; the second time they are there.
_SET_BY_SAVING = ("architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class ResolvedModel:
    """A model as the driver knows it, without its weights.

    Attributes:
        source: what the actors load.
        config: the model's configuration.
        generation_config: its defaults for `generate`.
    """

    source: ModelSource
    config: PretrainedConfig
    generation_config: GenerationConfig

    def __post_init__(self) -> None:
        # Defaults of a family may lie outside a shrunken vocabulary, where nothing is ever drawn.
        defaults = self.generation_config
        vocab_size = getattr(self.config.get_text_config(decoder=True), "vocab_size", None)
        ids = defaults.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        valid = [i for i in ids if not isinstance(i, int) or vocab_size is None or i < vocab_size]
        if len(valid) < len(ids):
            defaults = copy.copy(defaults)
            defaults.eos_token_id = valid or None
            object.__setattr__(self, "generation_config", defaults)

    @property
    def max_positions(self) -> int | None:
        """The model's own limit, where its configuration states one."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None


def resolve_model(model: Any, *, weights: str = "auto", seed: int = 0) -> ResolvedModel:
    """Find out what to load; reads configuration files only (a GGUF file is converted once).

    Args:
        model: a name on the hub, a folder, a .gguf file, an `nn.Module` made by transformers, or
            a `PretrainedConfig` (with `weights="random"`).
        weights: "auto" or "random".
        seed: of random weights.

    Raises:
        ConfigError: there is no such model, or weights do not fit to it.
    """
    if weights not in WEIGHTS:
        raise ConfigError("weights", weights, f"one of {', '.join(WEIGHTS)}")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 63:
        raise ConfigError("seed", seed, "an integer from 0 to 2**63 - 1")
    if isinstance(model, PretrainedConfig):
        if weights != "random":
            raise ConfigError("weights", weights, '"random", because a config has no weights')
        source = ModelSource(config=model.to_dict(), weights="random", seed=seed)
        return ResolvedModel(source, model, GenerationConfig.from_model_config(model))
    if isinstance(model, nn.Module):
        if weights != "auto":
            raise ConfigError("weights", weights, '"auto", because the module brings its own')
        return _resolve_module(model)
    if isinstance(model, (str, os.PathLike)) and os.fspath(model):
        return _resolve_path(os.fspath(model), weights, seed)
    raise ConfigError("model", model, "a name, a path, an nn.Module or a PretrainedConfig")


def _resolve_path(name: str, weights: str, seed: int) -> ResolvedModel:
    path = os.path.expanduser(name)
    if path.endswith(".gguf"):
        path = str(convert_gguf(path))
    elif os.path.isdir(path):
        path = os.path.abspath(path)
    elif os.path.exists(path) or path.startswith((".", "/")) or path.count("/") > 1:
        raise ConfigError("model", name, "a folder with a saved model, or a file ending in .gguf")
    valid = "a folder with a saved model, a .gguf file, or a model of the Hugging Face hub"
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError("model", name, f"{valid} ({first_line(error)})") from error
    try:
        generation_config = GenerationConfig.from_pretrained(path)
    except Exception as error:  # there is none, or anything may stand in it
        if not isinstance(error, OSError) or os.path.exists(f"{path}/generation_config.json"):
            valid = f"a generation config ({told(error)})"
            raise ConfigError("generation_config.json", name, valid) from error
        generation_config = GenerationConfig.from_model_config(config)
    source = ModelSource(path=path, weights=weights, seed=seed if weights == "random" else 0)
    return ResolvedModel(source, config, generation_config)


def _resolve_module(module: nn.Module) -> ResolvedModel:
    config = getattr(module, "config", None)
    if not isinstance(config, PretrainedConfig) or not hasattr(module, "save_pretrained"):
        raise ConfigError("model", type(module).__name__, "a transformers model with a config")
    folder = save_module(module)
    generation_config = getattr(module, "generation_config", None)
    if generation_config is None:
        generation_config = GenerationConfig.from_model_config(config)
    return ResolvedModel(ModelSource(path=str(folder)), config, generation_config)


def save_module(module: Any) -> Path:
    """Write a module to the cache folder as safetensors, or find it there.

    Returns:
        A folder for `from_pretrained`, complete: it appears by one rename.

    Raises:
        LiteCacheError: the folder cannot be written.
    """
    config = {k: v for k, v in module.config.to_dict().items() if k not in _SET_BY_SAVING}
    target = models_folder() / module_fingerprint(module, config)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=target.parent))
    except OSError as error:
        raise LiteCacheError(f"cannot write {target.parent}: {error.strerror}") from error
    try:
        module.save_pretrained(scratch)
        scratch.chmod(0o755)
        scratch.rename(target)
    except OSError as error:
        if not target.is_dir():  # else another process was faster
            raise LiteCacheError(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("wrote the model to %s", target)
    return target
