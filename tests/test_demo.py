"""The demo, as a user runs it: the same answers after everything was stopped and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What an empty cache answers is what stock does (test_smollm2.py); here it takes a minute more.
UNCACHED = ["--no-cache"] if os.environ.get("LITECACHE_TEST_PROFILE") == "long" else []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_reuses_the_document_from_disk_after_a_restart_with_the_same_answers(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    figures = tmp_path / "figures.json"
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env["LITECACHE_HOME"] = str(smollm2_dir.parents[1])
    command = [sys.executable, "examples/shared_prefix.py", "--json", str(figures), *UNCACHED]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    result = json.loads(figures.read_text())
    assert result["identical"] is True
    cold, restarted, *uncached = result["phases"]
    names = ["cold", "after_restart", *(["no_cache"] if UNCACHED else [])]
    assert [p["phase"] for p in result["phases"]] == names
    assert len(cold["questions"]) >= 5
    first, again = cold["questions"][0], restarted["questions"][0]
    assert sum(first["reused"].values()) < 48  # the template's head, shared with the warm-up
    assert again["found"]["disk"] >= 0.95 * first["prompt_tokens"]
    assert all(q["reused"]["gpu"] >= 1500 for q in cold["questions"][1:])
    assert all(sum(q["reused"].values()) == 0 for p in uncached for q in p["questions"])
