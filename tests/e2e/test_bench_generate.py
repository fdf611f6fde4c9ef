"""The benchmark of transformers' loops runs, and compares outputs before it compares times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_generate.py"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_bench_generate_compares_both_sides_of_every_case(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--threads", "1", "--json", str(file)]
    environment = {**os.environ, "LITECACHE_HOME": str(smollm2_dir.parents[1])}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=290, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 6  # prompt lookup meets three others
    assert {row["case"].split(",")[0] for row in rows} == {
        "4 beams", "editing", "8 samples", "scores",
    }  # fmt: skip
    for row in rows:
        assert row["ratio"] == pytest.approx(row["limit"] / row["value"])
