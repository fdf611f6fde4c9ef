"""The benchmarks of the tiers: they run, and what they compare with is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from bench_tiers import ColdCurve, never_slower
from tier_world import SlowFiles

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def _quick(script: str, folder: Path, *args: str) -> dict[str, object]:
    file = folder / "out.json"
    command = [sys.executable, str(SCRIPTS / script), "--quick", "--json", str(file), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    document: dict[str, object] = json.loads(file.read_text())
    return document


@pytest.mark.slow
def test_bench_tiers_tells_first_tokens_by_source_beside_their_limits(tmp_path: Path) -> None:
    document = _quick("bench_tiers.py", tmp_path, "--only", "first", "idle", "throttled")
    rows = {(row["case"], row["metric"]): row for row in document["rows"]}  # type: ignore[attr-defined]
    for metric in ("pool hit", "RAM hit", "disk hit", "disk hit, never slower"):
        row = rows["tiny idle 1024", metric]
        assert row["limit"] > 0
        assert row["ratio"] == pytest.approx(row["value"] / row["limit"])
        assert row["peer"].endswith("NOT held") == (row["ratio"] > 1)
    assert rows["tiny idle 1024", "RAM hit loaded"]["limit"] == pytest.approx(1024 * 1024 / 1e9)
    assert ("tiny disk 0.2 GB/s 1024", "disk hit, never slower") in rows
    assert rows["tiny", "D, O_DIRECT reads"]["value"] > 0


def test_the_cold_curve_goes_through_what_was_measured() -> None:
    curve = ColdCurve()
    for length in (500, 1000, 4000, 16_000, 64_000):
        for noise in (0.98, 1.0, 1.5):  # the median counts
            curve.add(length, (5 + 0.02 * length + 1e-6 * length**2) * noise)
    at = np.array([0, 2000, 30_000, 60_000])
    assert curve(at) == pytest.approx(5 + 0.02 * at + 1e-6 * at**2, rel=0.02)


def test_a_hit_may_be_slower_by_five_percent_or_three_milliseconds() -> None:
    assert never_slower(20.0) == 23.0
    assert never_slower(200.0) == pytest.approx(210.0)


def test_slow_files_read_at_their_rate_and_stall_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 4096)
    (tmp_path / "file").chmod(0o600)
    files = SlowFiles(bytes_per_s=20e6)
    files.folder = os.open(tmp_path, os.O_RDONLY)
    fd = files.open("file")
    buffer = bytearray(1 << 20)
    started = time.monotonic()
    assert files.read(fd, [memoryview(buffer)], 0) == 1 << 20
    assert time.monotonic() - started >= 0.052
    assert bytes(buffer[:256]) == bytes(range(256))
    files.bytes_per_s, files.stall_after, files.stall_s = 0, 1 << 20, 0.2
    started = time.monotonic()
    files.read(fd, [memoryview(buffer)[: 1 << 19]], 0)
    files.read(fd, [memoryview(buffer)[: 1 << 19]], 0)
    assert time.monotonic() - started >= 0.2
    assert files.stall_after is None
    files.close(fd)
    os.close(files.folder)
