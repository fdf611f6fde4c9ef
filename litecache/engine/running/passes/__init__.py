"""Faster bodies under the same model: each pass is a module of its own and proves itself on load.

A pass replaces parts of the model where their structure allows it and leaves the rest alone. After
each one the logits of a packed, chunked, paged run are compared with those before; a pass that
changes them is undone. `LITECACHE_PASSES` lists the passes to run (comma-separated, "none" = none).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from litecache.engine.kv_layout import KVSpec
from litecache.engine.loading.probe import TOLERANCE, ProbePlan, paged_logits, relative_error
from litecache.engine.running.passes.fused_layers import fuse_layers
from litecache.engine.running.passes.merged_projections import merge_projections
from litecache.engine.running.passes.small_modules import replace_small_modules
from litecache.errors import ConfigError

logger = logging.getLogger(__name__)

PASSES = ("fused", "merged", "small")
"""In the order in which they run: "merged" takes what "fused" left."""


def chosen_passes() -> tuple[str, ...]:
    """The passes that `LITECACHE_PASSES` asks for, all by default.

    Raises:
        ConfigError: it names none that exists.
    """
    text = os.environ.get("LITECACHE_PASSES")
    if text is None:
        return PASSES
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in PASSES:
            raise ConfigError("LITECACHE_PASSES", name, f'"none", or some of {", ".join(PASSES)}')
    return tuple(name for name in PASSES if name in names)


def apply_passes(
    model: Any,
    specs: tuple[KVSpec, ...],
    block_size: int,
    max_model_len: int,
    *,
    names: Sequence[str] | None = None,
    plan: ProbePlan | None = None,
) -> dict[str, bool]:
    """Run passes.

    Args:
        model: passed the probe.
        specs: its KV shapes.
        block_size: tokens per block.
        max_model_len: longest sequence in tokens.
        names: the passes to run, None = `chosen_passes()`.
        plan: the sequences whose logits must stay, None = short ones at both ends of
            `max_model_len`.

    Returns:
        By name, of the passes that found something to replace: whether the logits stayed. Those
        that changed them are undone.
    """
    runs: dict[str, Callable[[], Callable[[], None] | None]] = {
        "fused": lambda: fuse_layers(model, max_model_len),
        "merged": lambda: merge_projections(model),
        "small": lambda: replace_small_modules(model, max_model_len),
    }
    plan = plan or ProbePlan.reaching(max_model_len)
    reference: torch.Tensor | None = None
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    kept: dict[str, bool] = {}
    for name in chosen_passes() if names is None else names:
        if reference is None:
            reference = paged_logits(model, specs, block_size, plan)
        undo = runs[name]()
        if undo is None:
            continue
        try:
            error = relative_error(paged_logits(model, specs, block_size, plan), reference)
        except Exception:
            logger.exception("pass %s breaks the forward", name)
            error = float("inf")
        kept[name] = error <= tolerance
        if kept[name]:
            logger.info("pass %s: logits within %.1e", name, error)
        else:
            undo()
            logger.warning("pass %s is undone: it changes the logits by %.1e", name, error)
    return kept
