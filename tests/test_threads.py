"""No thread of the product ends by an exception unseen."""

from __future__ import annotations

import ast
import logging
import threading
from pathlib import Path

import pytest

import litecache
from litecache import threads
from litecache.threads import fault_counts, start_job, start_service

SOURCES = sorted(Path(litecache.__file__).parent.rglob("*.py"))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_PAUSE_S", (0.001, 0.004))


def test_a_service_that_raises_goes_on_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def run() -> None:
        calls.append(1)
        if len(calls) < 4:
            raise [RuntimeError("a defect"), SystemExit(3), MemoryError()][len(calls) - 1]

    before = fault_counts().get("frail", 0)
    with caplog.at_level(logging.ERROR):
        start_service(run, "frail").join(20)
    assert len(calls) == 4
    assert fault_counts()["frail"] - before == 3
    assert "thread frail failed" in caplog.text
    assert "a defect" in caplog.text


def test_a_job_that_raises_tells_who_started_it() -> None:
    told: list[BaseException] = []

    def run() -> None:
        raise RuntimeError("a defect")

    start_job(run, "frail-job", told.append).join(20)
    assert [str(error) for error in told] == ["a defect"]
    assert fault_counts()["frail-job"] >= 1


def test_every_thread_of_the_product_is_started_in_this_way() -> None:
    for path in SOURCES:
        if path.name == "threads.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", getattr(node, "id", None))
            if isinstance(node, (ast.Attribute, ast.Name)):
                assert name not in ("start_new_thread", "Timer"), f"{path}:{node.lineno}"
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", None))
                assert called != "Thread", f"{path}:{node.lineno}"


def test_threads_are_named_and_ended_with_the_process() -> None:
    go = threading.Event()
    thread = start_service(go.wait, "named")  # type: ignore[arg-type]
    assert (thread.name, thread.daemon) == ("litecache-named", True)
    go.set()
    thread.join(20)
