"""What an error of a step says about the device: gone for this process, or only this step.

CUDA keeps most errors of kernels and of the hardware: after one, everything that the process asks
of the device fails, and only another process can use it again ("sticky" in CUDA's own manuals).
Errors of an argument, and of memory that is short, end with the call. `is_sticky` tells by the
text, which every library passes on; `check_device` asks the device itself where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from litecache.errors import LiteCacheError, first_line

# As the CUDA runtime and the driver word those errors after which a process has to end.
_STICKY = (
    "illegal memory access",
    "an illegal instruction",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
    "hardware stack error",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "tensor memory not completely freed",
    "contained error",
    "context is destroyed",
    "external device",
    "unknown error",
    "busy or unavailable",
    "driver shutting down",
    "gpu has fallen off the bus",
    "mps client failed",
    "mps server is not ready",
    # of libraries whose kernels failed on the device
    "cublas_status_execution_failed",
    "cudnn_status_execution_failed",
)
# Whose words the above are: a text of a model's own code may have some of them, too.
_SPEAKERS = ("cuda", "cublas", "cudnn", "cusolver", "cusparse", "triton error", "hip error")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, in the words of torch, CUDA, cuBLAS or Triton."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = first_line(error).lower()
    return isinstance(error, RuntimeError) and (
        ("out of memory" in text and any(who in text for who in _SPEAKERS))
        or "cublas_status_alloc_failed" in text
    )


def is_sticky(error: BaseException) -> bool:
    """Whether an error, or what it was raised from, ends the device's use in this process.

    Running out of memory never does, whoever words it.
    """
    return any(_says_so(each) for each in _chain(error))


def _says_so(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    # only the first line: torch's advice behind it speaks of assertions, whatever has happened
    text = first_line(error).lower()
    return any(who in text for who in _SPEAKERS) and any(what in text for what in _STICKY)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def check_device(device: torch.device, error: BaseException) -> None:
    """After a step's error: whether any later step of this process could succeed.

    Raises:
        LiteCacheError: none could, since the device does nothing any more here.
    """
    if is_sticky(error):
        raise LiteCacheError(f"{device} has failed: {first_line(error)}") from error
    if device.type != "cuda":
        return
    broken: RuntimeError | None = None
    for _ in range(2):  # the first time may tell once more what an earlier call has left behind
        try:
            return _ask(device)
        except RuntimeError as refused:
            if is_out_of_memory(refused):
                return
            broken = refused
    assert broken is not None
    raise LiteCacheError(f"{device} has failed: {first_line(broken)}") from error


def _ask(device: torch.device) -> None:
    torch.cuda.synchronize(device)
    torch.ones(1, device=device).item()
