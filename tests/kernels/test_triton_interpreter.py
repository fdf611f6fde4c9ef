"""The Triton kernels on the CPU, in Triton's interpreter.

Triton decides when a kernel is defined whether it is interpreted, so this needs a process of its
own; the rest of the suite keeps its environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_kernels_are_right_in_the_interpreter(which: str) -> None:
    environment = dict(os.environ, TRITON_INTERPRET="1", LITECACHE_KERNELS="triton")
    environment.pop("COVERAGE_PROCESS_CONFIG", None)  # it would trace the interpreter
    script = Path(__file__).with_name("triton_in_interpreter.py")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-m",
            which,
            str(script),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
