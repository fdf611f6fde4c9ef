"""A node with settings of its own is drained, taken away, and another one takes its place."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_node_is_drained_with_the_same_tokens_and_what_it_saved_is_found_again(
    tmp_path: Path,
) -> None:
    script = Path(__file__).with_name("drained_node.py")
    with tempfile.TemporaryDirectory(prefix="lc-drn-", dir="/tmp") as ray_folder:
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path), ray_folder],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.strip().splitlines()[-1])
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
