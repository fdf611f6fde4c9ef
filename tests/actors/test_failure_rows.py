"""Every failure of one node of two, in the middle of a stream: the tokens of stock `generate`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from separate_nodes import available

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]
# What ends at once elsewhere, with room for a machine that does other things, too. Restarts, which
# nobody is to wait for, take longer on any.
SOON_S = 8.0
FAILURES = [
    "undisturbed",
    "replica killed",
    "device broken",
    "replica hung",
    "shard killed",
    "shard hung",
    "coordinator killed",
    "coordinator hung",
    "disk lies",
    "disk full",
    "driver dies",
    "link cut",
    "node dies",
]
ON_SEPARATE_NODES = ("disk full", "link cut")


def happened(kind: str) -> dict[str, Any]:
    """What failure_world.py tells."""
    script = Path(__file__).with_name("failure_world.py")
    folder = tempfile.mkdtemp(prefix="lc-fw-", dir="/tmp")
    try:
        done = subprocess.run(
            [sys.executable, str(script), kind, folder],
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, [*lines, done.stderr[-3000:]]
    return {"on": kind, **json.loads(lines[-1])}


@pytest.fixture(scope="module", params=["namespaces", "cluster"])
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "namespaces":
        if not available():
            pytest.skip("making network namespaces takes root")
    elif available() and os.environ.get("LITECACHE_TEST_PROFILE") != "long":
        pytest.skip("nodes that are less apart: for scripts/test.sh --long, or without root")
    return happened(request.param)


@pytest.mark.parametrize("failure", FAILURES)
def test_tokens_are_those_of_stock_generate_and_nobody_waits_for_what_is_gone(
    report: dict[str, Any], failure: str
) -> None:
    if report["on"] == "cluster" and failure in ON_SEPARATE_NODES:
        assert failure not in report
        return
    found = report[failure]
    assert found["same"]
    assert found["longest_gap_s"] < SOON_S
    for right, seconds in found["rows"]:
        assert right
        assert seconds < SOON_S


def test_a_restarted_shard_has_what_it_had(report: dict[str, Any]) -> None:
    assert report["shard killed"]["found again"]


def test_a_dead_drivers_requests_are_aborted_and_its_blocks_are_free(
    report: dict[str, Any],
) -> None:
    found = report["driver dies"]
    assert (found["ran"], found["aborted"], found["private"]) == (1, 1, 0)


def test_flush_says_that_a_dead_node_has_not_saved(report: dict[str, Any]) -> None:
    assert not report["node dies"]["complete"]
    assert report["node dies"]["flush_s"] < 2 * SOON_S


def test_a_replica_behind_a_cut_link_is_used_again_once_it_is_mended(
    report: dict[str, Any],
) -> None:
    if report["on"] == "cluster":
        pytest.skip("no link to cut")
    cut = report["link cut"]
    assert not cut["back"]
    assert cut["unavailable"] == 2
    assert cut["stats_s"] < SOON_S
    assert cut["again"]
