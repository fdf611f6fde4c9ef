"""Where a model comes from: what the driver sends and the actor loads.

A source is small and picklable; it imports nothing. Two sources that are equal load equal weights.
`preload` imports what loading one needs ahead of it: seconds, and a start has other waits.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any

from litecache.errors import ConfigError
from litecache.paths import short_model_name

logger = logging.getLogger(__name__)

WEIGHTS = ("auto", "random")
# Beside the weights of a module that was handed over: its buffers that no checkpoint holds.
BUFFERS_FILE = "litecache-buffers.safetensors"


@dataclass(frozen=True)
class ModelSource:
    """A folder, a hub name, or a configuration for random weights.

    Attributes:
        path: folder with a saved model, or a name on the hub. None with `config`.
        config: `PretrainedConfig.to_dict()` with its `model_type`; used with random weights.
            None = the configuration found at `path`.
        weights: "auto" loads them from `path`, "random" draws them (benchmarks, tests).
        seed: of random weights.
        revision: of a hub model; None = its default branch.
        trust_remote_code: whether Python code in the model's folder may run.
        fingerprint: what `model_fingerprint` must give where the weights are loaded; None = any.
        label: what people call it, where `path` does not say; the same model may have several.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    weights: str = "auto"
    seed: int = 0
    revision: str | None = None
    trust_remote_code: bool = False
    fingerprint: str | None = None
    label: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check that the fields fit together."""
        if self.weights not in WEIGHTS:
            raise ConfigError("weights", self.weights, f"one of {', '.join(WEIGHTS)}")
        if not isinstance(self.trust_remote_code, bool):
            raise ConfigError("trust_remote_code", self.trust_remote_code, "True or False")
        if (self.path is None) == (self.config is None):
            raise ConfigError("path", self.path, "either a path or a config, and not both")
        if self.config is not None:
            if self.weights != "random":
                raise ConfigError("weights", self.weights, '"random" when only a config is given')
            if not self.config.get("model_type"):
                valid = "a dict with the model's model_type"
                raise ConfigError("config", sorted(self.config), valid)

    @property
    def name(self) -> str:
        """For messages and logs."""
        if self.label is not None or self.path is not None:
            return self.label or str(self.path)
        assert self.config is not None
        return f"{self.config['model_type']} (random weights)"

    @property
    def short_name(self) -> str:
        """For the labels of a dashboard, see `short_model_name`."""
        return short_model_name(self.name)


def preload(source: ModelSource, *, cuda: bool) -> None:
    """Import torch, the engine and the model's classes, and open the GPU.

    Nothing is refused here: whatever is wrong shows again, with its message, in `load_model`. It
    must have ended before that begins: transformers cannot be imported by two threads at once.

    Args:
        source: the model that will be loaded.
        cuda: whether it will run on a GPU.
    """
    with contextlib.suppress(Exception):
        import torch

        if cuda:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        from litecache.engine.engine import Engine
        from litecache.engine.loading.model_checks import read_config

        config = read_config(source)
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        logger.debug("imported %s and %s", Engine, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
