"""Executes step plans on the model: owns the row tables, builds batches, decides nothing.

The engine calls `execute` once a step and reads the handle's result when it needs the tokens.
Sampled tokens are written into the row's token table on the device, so a plan that continues a row
may be executed before the result of the step that sampled its input was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from litecache.engine.kv_layout import KVLayout, KVPool
from litecache.engine.step_plan import StepPlan, StepResult

if TYPE_CHECKING:
    LoadedModel = Any


class StepHandle:
    """A step under way."""

    def result(self) -> StepResult:
        """Wait for the step's tokens."""
        raise NotImplementedError

    def ready(self) -> bool:
        """Whether `result` would return at once."""
        raise NotImplementedError


class ModelRunner:
    """Runs one model over the pools of its KV groups.

    Args:
        loaded: the model, from `load_model`.
        layout: its KV groups.
        pools: one per group, in the layout's order, on the model's device.
        max_requests: rows of the tables; plans use rows 0 to max_requests - 1.
        max_model_len: longest sequence in tokens.
        max_batch_tokens: most tokens of one step.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        layout: KVLayout,
        pools: Sequence[KVPool],
        *,
        max_requests: int,
        max_model_len: int,
        max_batch_tokens: int,
    ) -> None:
        raise NotImplementedError

    def execute(self, plan: StepPlan) -> StepHandle:
        """Start a step; steps run in the order of the calls."""
        raise NotImplementedError
