"""The shard store behaves like a dict that may forget, and planted bugs are caught."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from shard_machine import RamOnly, Roomy, ShardMachine, Tight

from litecache.storage import block_io, tiers

pytestmark = pytest.mark.no_cover

MACHINES = [Roomy, Tight, RamOnly]
EXAMPLES = {"slow": 300, "long": 1000}.get(os.environ.get("LITECACHE_TEST_PROFILE", ""), 50)


def run(machine: type[ShardMachine], examples: int, **others: Any) -> None:
    quiet = settings(max_examples=examples, suppress_health_check=list(HealthCheck), **others)
    run_state_machine_as_test(machine, settings=quiet)


def catch(machine: type[ShardMachine], examples: int) -> None:
    """Run where a bug is planted: what fails is neither kept nor reduced."""
    run(machine, examples, database=None, phases=(Phase.generate,))


@pytest.mark.hypothesis  # as those that hypothesis finds by itself: with more examples in CI
@pytest.mark.timeout(900)
@pytest.mark.parametrize("machine", MACHINES)
def test_store_equals_a_dict_over_random_operations(machine: type[ShardMachine]) -> None:
    run(machine, EXAMPLES)


def test_the_model_catches_a_skipped_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_io, "fault", lambda memory, key, expected, error: None)
    with pytest.raises(AssertionError, match=r"wrong bytes|changed"):
        catch(Roomy, 200)


def test_the_model_catches_eviction_of_leased_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers.Tiers, "_may_evict", lambda self, handle: True)
    with pytest.raises((AssertionError, KeyError)):
        catch(RamOnly, 800)
