from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_prefix_computed_on_one_node_is_served_to_the_other(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_nodes.py")
    with tempfile.TemporaryDirectory(prefix="lc-two-", dir="/tmp") as ray_folder:
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path), ray_folder],
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["nodes"] == 2
    assert report["cold"] == {}
    assert report["warm"] == {"remote": 96}
    assert report["remote_blocks"] == 6
    assert report["moved"] == {"remote": 96}, "what only the other one's pool held"
    assert report["same_moved"]
    assert report["same"]
    assert sum(report["routed_reuse"].values()) >= 96
    assert min(report["held_bytes"]) >= 16 * 3
    assert min(report["stored"]) >= 3
