"""A short run of the fuzzer; scripts/fuzz_storage.py is the long one."""

from __future__ import annotations

import logging
import random

import pytest
from fuzz_world import FuzzStore, Outcome

pytestmark = pytest.mark.no_cover


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def fuzz(seeds: range) -> Outcome:
    store, total = FuzzStore(), Outcome()
    for seed in seeds:
        total += store.round(random.Random(seed))
    store.close()
    return total


def test_mutated_files_yield_no_wrong_block_and_spare_the_rest() -> None:
    total = fuzz(range(300))
    assert total.wrong == 0
    assert total.untouched > 1000
    assert total.hits == total.untouched
