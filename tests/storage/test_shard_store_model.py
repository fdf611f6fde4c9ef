"""The shard store behaves like a dict that may forget, and planted bugs are caught."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from shard_machine import RamOnly, Roomy, ShardMachine, Tight

from litecache.storage import block_io, tiers

pytestmark = pytest.mark.no_cover

MACHINES = [Roomy, Tight, RamOnly]
EXAMPLES = 1000 if os.environ.get("LITECACHE_TEST_PROFILE") == "slow" else 50


def run(machine: type[ShardMachine], examples: int, *, shrink: bool = True) -> None:
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            database=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("machine", MACHINES)
def test_store_equals_a_dict_over_random_operations(machine: type[ShardMachine]) -> None:
    run(machine, EXAMPLES)


def test_the_model_catches_a_skipped_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_io, "fault", lambda memory, key, expected, error: None)
    with pytest.raises(AssertionError, match=r"wrong bytes|changed"):
        run(Roomy, 200, shrink=False)


def test_the_model_catches_eviction_of_leased_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers.Tiers, "_may_evict", lambda self, handle: True)
    with pytest.raises((AssertionError, KeyError)):
        run(RamOnly, 800, shrink=False)
