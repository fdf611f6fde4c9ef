from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_after_ray_shutdown_every_call_ends_with_an_error_and_no_ray_is_started() -> None:
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(prefix="lc-", dir="/tmp") as folder:
        ended = subprocess.run(
            [sys.executable, str(here / "lost_ray.py"), folder],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}"},
        )
    assert ended.returncode == 0, ended.stderr[-3000:]
    report = json.loads(ended.stdout.splitlines()[-1])
    assert report.pop("a hidden Ray") is False
    assert report.pop("a new adapter") == "3"
    assert {report.pop("close"), report.pop("close under another Ray")} == {"None"}
    assert len(report) == 15
    for name, said in report.items():
        assert said.startswith("LiteCacheError"), (name, said)
