"""Which errors end a device's use in a process, and which end with the call."""

from __future__ import annotations

import queue

import pytest
import torch
from engine_harness import Harness, family_source

from litecache.engine.running import device_errors
from litecache.engine.running.device_errors import check_device, is_out_of_memory, is_sticky
from litecache.errors import LiteCacheError
from litecache.types import FinishReason, Request, SamplingParams

ADVICE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side "
    "assertions.\n"
)
STICKY = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered" + ADVICE),
    torch.AcceleratorError("CUDA error: device-side assert triggered" + ADVICE),
    torch.AcceleratorError("CUDA error: unspecified launch failure" + ADVICE),
    torch.AcceleratorError("CUDA error: misaligned address"),
    torch.AcceleratorError("CUDA error: an illegal instruction was encountered"),
    torch.AcceleratorError("CUDA error: the launch timed out and was terminated"),
    torch.AcceleratorError("CUDA error: hardware stack error"),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    torch.AcceleratorError("CUDA error: uncorrectable NVLink error detected during the execution"),
    torch.AcceleratorError("CUDA error: unknown error"),
    torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]
PASSING = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ..."),
    torch.AcceleratorError("CUDA error: out of memory" + ADVICE),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: invalid argument" + ADVICE),
    torch.AcceleratorError("CUDA error: invalid configuration argument"),
    torch.AcceleratorError("CUDA error: too many resources requested for launch"),
    torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
    torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("an illegal memory access was encountered"),  # of nobody who knows a device
    ValueError("CUDA error: device-side assert triggered"),
    IndexError("index out of range in self"),
]


@pytest.mark.parametrize("error", STICKY, ids=str)
def test_an_error_that_stays_with_the_process_is_known_by_its_text(error: Exception) -> None:
    assert is_sticky(error)
    with pytest.raises(LiteCacheError, match=r"cpu has failed: .*[eE]rror"):
        check_device(torch.device("cpu"), error)


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_short_memory_and_wrong_arguments_end_with_their_call(error: Exception) -> None:
    assert not is_sticky(error)
    assert is_out_of_memory(error) == (error in PASSING[:4])
    check_device(torch.device("cpu"), error)


def test_a_device_that_answers_at_the_second_time_has_not_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA tells an error that nobody has asked for with the next call, once."""
    left = torch.AcceleratorError("CUDA error: invalid argument")
    answers: list[Exception | None] = [left, None]

    def ask(device: torch.device) -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    monkeypatch.setattr(device_errors, "_ask", ask)
    check_device(torch.device("cuda"), RuntimeError("a step's own"))
    assert not answers
    answers += [left, left]
    with pytest.raises(LiteCacheError, match="cuda has failed: CUDA error: invalid argument"):
        check_device(torch.device("cuda"), RuntimeError("a step's own"))
    answers.append(torch.AcceleratorError("CUDA error: out of memory"))
    check_device(torch.device("cuda"), RuntimeError("a step's own"))


def test_what_an_error_was_raised_from_counts_too() -> None:
    outer, inner = KeyError("while it was handled"), STICKY[0]
    outer.__context__ = inner
    assert is_sticky(outer)
    circle = RuntimeError("a")
    circle.__cause__ = other = RuntimeError("b")
    other.__cause__ = circle
    assert not is_sticky(circle)


@pytest.mark.parametrize("error", [STICKY[0], STICKY[11]], ids=lambda e: type(e).__name__)
def test_a_step_that_raises_a_sticky_error_ends_the_engine_and_no_request(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: queue.Queue[BaseException] = queue.Queue()
    made = Harness(family_source("llama"))
    made.engine._on_death = told.put

    def execute(plan: object) -> None:
        raise error

    monkeypatch.setattr(made.engine._runner, "execute", execute)
    made.engine.submit([Request("r", "c", (1, 2, 3), SamplingParams(4))])
    assert "cpu has failed: CUDA error: an illegal" in str(told.get(timeout=60))
    made.engine._thread.join(60)
    made.close()


def test_a_step_that_runs_out_of_memory_ends_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Harness(family_source("llama"))
    prompt = range(3, 203)
    (wanted,) = made.run([prompt], 4)
    made.engine.clear_pool()
    runner, errors = made.engine._runner, [PASSING[0], PASSING[1]]
    execute = runner.execute

    def fails_twice(plan: object) -> object:
        if errors:
            raise errors.pop()
        return execute(plan)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "execute", fails_twice)
    assert made.run([prompt], 4) == [wanted]
    assert made.reasons == [FinishReason.LENGTH]
    assert not errors
    made.close()
