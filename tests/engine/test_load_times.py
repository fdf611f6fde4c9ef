"""What hits cost, in virtual time: a hit is never slower than a miss, and as fast as its bytes and
the computing beside them allow. The formulas are those that docs/tiers.md promises."""

from __future__ import annotations

import numpy as np
import pytest
from virtual_machine import CHUNK, VirtualMachine

QUESTION = 64


def _hit(machine: VirtualMachine, length: int, tier: str) -> float:
    """First token of a prefix that lies in a tier, then in the pool."""
    prefix = machine.tokens(length)
    machine.store(prefix, tier)
    return machine.ask(np.concatenate([prefix, machine.tokens(QUESTION)]))


def _pool_hit(machine: VirtualMachine, length: int) -> float:
    prefix = machine.tokens(length)
    machine.ask(np.concatenate([prefix, machine.tokens(QUESTION)]))
    return machine.ask(np.concatenate([prefix, machine.tokens(QUESTION)]))


def _never_slower(cold_s: float) -> float:
    return cold_s + max(0.003, 0.05 * cold_s)


@pytest.mark.parametrize("length", [2048, 8192, 16384])
def test_hits_take_what_their_bytes_and_the_computing_beside_them_allow(length: int) -> None:
    machine = VirtualMachine()
    for tier in ("ram", "disk"):
        _hit(machine, 4096, tier)  # what the machine can do is measured
    cold_s = machine.ask(machine.tokens(length + QUESTION))
    hit_s = _pool_hit(machine, length)
    nbytes = length / 16 * machine.block_bytes
    for _ in range(2):
        ram_s, disk_s = _hit(machine, length, "ram"), _hit(machine, length, "disk")
    assert ram_s <= hit_s + 1.15 * nbytes / machine.copy + 0.003
    best_s = min(
        max(machine.cold_seconds(m) if m else 0.0, (length - m) / length * nbytes / machine.disk)
        for m in range(0, length + 1, 16)
    )
    if length > 2048:
        assert disk_s <= 1.10 * (best_s + hit_s) + 0.003
    assert disk_s <= _never_slower(cold_s)
    assert machine.costs.stats()["first_token_error"] < 0.15


@pytest.mark.parametrize("disk", [0.05e9, 0.2e9, 7e9])
@pytest.mark.parametrize("token_s", [2e-6, 23.2e-6])
def test_a_hit_is_never_slower_than_a_miss_however_slow_the_disk(
    disk: float, token_s: float
) -> None:
    machine = VirtualMachine(disk=disk, token_s=token_s, pair_s=token_s * 4e-5)
    for _ in range(4):
        machine.now += 1
        _hit(machine, 8192, "disk")
    for length in (1024, 2048, 8192):
        cold_s = machine.ask(machine.tokens(length + QUESTION))
        assert _hit(machine, length, "ram") <= _never_slower(cold_s)
        assert _hit(machine, length, "disk") <= _never_slower(cold_s)


def test_of_a_disk_no_more_is_read_than_may_be_loaded_before_all_is_computed() -> None:
    """A small model computes faster than its disk reads: what was found is computed by plan."""
    machine = VirtualMachine(token_s=1.5e-6, pair_s=4e-11)
    for _ in range(2):
        _hit(machine, 8192, "disk")
    for length, most in ((2048, 0), (8192, 0), (65_536, 1024)):
        machine.num_read = 0
        cold_s = machine.ask(machine.tokens(length + QUESTION))
        assert _hit(machine, length, "disk") <= _never_slower(cold_s)
        assert machine.num_read <= most
        assert machine.found == {"disk": length}
    # what lies in RAM is worth it
    machine.num_read = 0
    assert _hit(machine, 8192, "ram") < cold_s
    assert machine.found == {"ram": 8192}
    # in front of whom others compute, the disk has time
    machine.store(prefix := machine.tokens(8192), "disk")
    for _ in range(4):
        machine.submit(machine.tokens(16_384), 1)
    machine.ask(np.concatenate([prefix, machine.tokens(QUESTION)]))
    assert machine.num_read == 512


@pytest.mark.parametrize("stall_s", [0.004, 0.03, 0.06])
def test_a_disk_that_stalls_in_mid_load_costs_one_chunk_at_most(stall_s: float) -> None:
    machine = VirtualMachine()
    for _ in range(3):
        _hit(machine, 8192, "disk")
    cold_s = machine.ask(machine.tokens(8192 + QUESTION))
    machine.stall = (machine.now + 0.01 + stall_s, 5.0)
    assert _hit(machine, 8192, "disk") <= cold_s + machine.step_seconds(6144, 6144 + CHUNK)
    assert machine.stall is None
    assert _hit(machine, 8192, "disk") <= _never_slower(cold_s)  # it has not answered since
    machine.now += 6
    machine.scheduler.check_integrity()
