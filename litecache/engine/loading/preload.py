"""Imports that loading a model needs, ahead of it: seconds, and a start has other waits."""

from __future__ import annotations

import contextlib
import logging

from litecache.engine.loading.model_source import ModelSource

logger = logging.getLogger(__name__)


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
