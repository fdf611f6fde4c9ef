"""Steps on the device: launched in order, finished in order, and what copies wait for meanwhile."""

from __future__ import annotations

import time
from collections import deque

import torch

from litecache.engine.scheduling.orders import Executor, Step, StepPlan, StepResult
from litecache.metrics import Metrics
from litecache.spans import note_span


class StepsInFlight:
    """What was launched and has not been finished, oldest first.

    Args:
        runner: executes plans.
        metrics: where to count.
        with_events: copies on other streams wait for steps, by `events`.

    Attributes:
        events: behind each step that has not been finished, by its number.
    """

    def __init__(self, runner: Executor, metrics: Metrics, *, with_events: bool) -> None:
        self._runner, self._metrics, self._with_events = runner, metrics, with_events
        self.events: dict[int, torch.cuda.Event] = {}
        # number, handle, tokens of prefills, and when it was launched
        self._steps: deque[tuple[int, Step, int, float]] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def oldest(self) -> int:
        """The number of the step that `finish` would take."""
        return self._steps[0][0]

    def ready(self) -> bool:
        """Whether the oldest step has ended."""
        return self._steps[0][1].ready()

    def launch(self, plan: StepPlan) -> None:
        """Start a step; one that raises is not in flight."""
        begun = time.perf_counter()
        # a row of one token decodes
        prefill = sum(row.num_tokens for row in plan.rows if row.num_tokens > 1)
        self._steps.append((plan.step, self._runner.execute(plan), prefill, begun))
        if prefill:
            self._metrics.inc("litecache_computed_tokens", prefill)
        if self._with_events:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self.events[plan.step] = event

    def finish(self) -> tuple[StepResult, float]:
        """The oldest step's result, and the seconds that it was waited for.

        Raises:
            Exception: what the step raised; it is in flight no more.
        """
        step, handle, prefill, begun = self._steps.popleft()
        started = time.perf_counter()
        try:
            result = handle.result()
        finally:
            self.events.pop(step, None)
        waited_s = time.perf_counter() - started
        self._metrics.observe("litecache_step_seconds", waited_s, kind="wait")
        if prefill:
            note_span("prefill", begun, tokens=prefill)
        return result, waited_s
