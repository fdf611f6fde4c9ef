"""Groups on a cluster of two nodes: what one node has, the other finds; a node is drained."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest


def report_of(program: str, folder: Path, timeout_s: float) -> dict[str, Any]:
    """What a program of this folder says of a Ray of its own."""
    script = Path(__file__).with_name(program)
    with tempfile.TemporaryDirectory(prefix="lc-two-", dir="/tmp") as ray_folder:
        done = subprocess.run(
            [sys.executable, str(script), str(folder), ray_folder],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


@pytest.mark.slow
def test_a_prefix_computed_on_one_node_is_served_to_the_other(tmp_path: Path) -> None:
    report = report_of("two_nodes.py", tmp_path, timeout_s=150)
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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_is_drained_with_the_same_tokens_and_what_it_saved_is_found_again(
    tmp_path: Path,
) -> None:
    report = report_of("drained_node.py", tmp_path, timeout_s=280)
    assert report["nodes"] == 2, "all: one on each node"
    assert report["folders"] == ["shard-0", "shard-0"]
    assert report["moved"]
    assert report["replicas"] == 1
    assert report["complete"] == [True, True]
    assert "draining: 1 open request(s)" in report["told"]
    assert report["left"] == []
    assert "all replicas of group 'wide' are on node" in report["refused"]
    assert report["after"]
    assert "CPU 2 asked for, 0 of 1 free" in report["no_room"]
    assert report["grown"] == [2, ["litecache:wide:gpu:" + report["grown"][1][0][-1]]]
    assert report["new_shards"] == 1
    assert report["again"]
    assert report["ray_drained"]
    assert report["reused"].get("disk", 0) + report["reused"].get("ram", 0) >= 96
