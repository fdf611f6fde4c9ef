"""A short run of the chaos in mid-load; scripts/chaos_loads.py is the long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "chaos_loads.py"


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_shards_killed_and_stopped_in_mid_load_cost_no_token_and_leave_nothing(
    tmp_path: Path,
) -> None:
    file = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(file)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {
        (row["case"], row["metric"]): row["value"] for row in json.loads(file.read_text())["rows"]
    }
    assert rows["prompts", "partly loaded, partly computed"] >= 20
    assert rows["shards", "of these while blocks were loading"] > 0
    assert rows["all", "problems"] == 0
