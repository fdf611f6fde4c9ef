"""The streamed products in Triton's interpreter; on a GPU `test_runner_gpu.py` compares them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_streamed_products_are_right_in_the_interpreter() -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header",
         str(here / "linear_in_interpreter.py")],
        env=dict(os.environ, TRITON_INTERPRET="1"), cwd=here.parents[1],
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
