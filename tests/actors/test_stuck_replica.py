"""A replica whose device hangs: its process answers, and no step ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_config import TINIEST

from litecache.actors import gpu_cache
from litecache.actors.gpu_cache import GpuCache
from litecache.config import CacheConfig
from litecache.engine.engine import Engine
from litecache.engine.loading.model_source import ModelSource
from litecache.types import Request, SamplingParams


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(gpu_cache, "REPORT_INTERVAL_S", 0.01)
    monkeypatch.setattr(gpu_cache, "STUCK_S", 0.1)
    source = ModelSource(config=TINIEST, weights="random")
    config = CacheConfig(num_blocks=16, dtype="float32", device="cpu")
    made = Engine(source, config, sink=lambda _: None, num_threads=1)
    yield made
    made.close()


def watch(engine: Engine, device: str) -> tuple[threading.Event, queue.Queue[BaseException]]:
    """Run what a replica's report thread runs; its stop, and what ended its process."""
    ended: queue.Queue[BaseException] = queue.Queue()
    stopped = threading.Event()

    def end(error: BaseException) -> None:
        ended.put(error)
        stopped.set()

    fields = {"_report": lambda _: None, "_look_at_node": lambda _: None}
    replica: Any = SimpleNamespace(_stopped=stopped, _end_process=end, **fields)
    watched: Any = SimpleNamespace(turn=engine.turn, info=SimpleNamespace(device=device))
    args = replica, watched
    threading.Thread(target=GpuCache._keep_reporting, args=args, daemon=True).start()
    return stopped, ended


def test_a_step_that_never_ends_on_a_gpu_ends_the_process(engine: Engine) -> None:
    real = engine._runner.execute
    goes_on = threading.Event()

    def execute(plan: Any) -> Any:
        goes_on.wait(60)
        return real(plan)

    engine._runner.execute = execute  # type: ignore[method-assign]
    _, ended = watch(engine, "cuda:0")
    engine.submit([Request("r", "c", (1, 2, 3), SamplingParams(2))])
    try:
        assert "cuda:0 hangs: a step has not ended" in str(ended.get(timeout=30))
    finally:
        goes_on.set()


def test_an_engine_that_waits_for_work_or_computes_on_a_cpu_is_left_alone(engine: Engine) -> None:
    idle, ended = watch(engine, "cuda:0")
    real = engine._runner.execute
    goes_on, hangs = threading.Event(), threading.Event()

    def execute(plan: Any) -> Any:
        hangs.set()
        goes_on.wait(60)
        return real(plan)

    with pytest.raises(queue.Empty):
        ended.get(timeout=0.5)
    idle.set()
    engine._runner.execute = execute  # type: ignore[method-assign]
    slow, ended = watch(engine, "cpu")
    engine.submit([Request("r", "c", (1, 2, 3), SamplingParams(2))])
    try:
        assert hangs.wait(30)
        with pytest.raises(queue.Empty):
            ended.get(timeout=0.5)
    finally:
        slow.set()
        goes_on.set()
