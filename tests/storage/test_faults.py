"""A short run of the fault injection; scripts/fault_storage.py is the long one."""

from __future__ import annotations

import logging

import pytest
from fault_world import BUGS, first_violation, run_world

pytestmark = pytest.mark.no_cover


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_no_fault_of_the_disk_breaks_a_promise() -> None:
    tallies = [run_world(seed) for seed in range(20)]
    assert sum(sum(tally.faults.values()) for tally in tallies) > 200
    assert sum(tally.hits for tally in tallies) == sum(tally.untouched for tally in tallies) > 500


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str) -> None:
    assert first_violation(bug, range(60)) is not None
