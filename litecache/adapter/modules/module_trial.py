"""A few tokens through a user's module and through what the actors will build: the same logits?

The comparison of their parts finds what it looks for; a patched function, a closure or a class that
another library exchanged may hide from it. It cannot hide from the logits.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from litecache.engine.loading.probe import TOLERANCE, ProbePlan, relative_error
from litecache.errors import told

logger = logging.getLogger(__name__)

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
