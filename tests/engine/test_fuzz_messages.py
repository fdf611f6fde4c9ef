"""Fuzzed messages to the engine and its actor; scripts/fuzz_engine.py sends many more."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from message_fuzz import MessageFuzz

EXAMPLES = 600 if os.environ.get("LITECACHE_TEST_PROFILE") == "slow" else 150


@pytest.fixture(scope="module")
def fuzz() -> Iterator[MessageFuzz]:
    torch.set_num_threads(1)
    made = MessageFuzz()
    try:
        yield made
        made.check()
    finally:
        made.close()


@settings(max_examples=EXAMPLES, database=None)
@given(st.integers(0, 2**63))
def test_no_message_harms_anything_but_its_own_request(fuzz: MessageFuzz, seed: int) -> None:
    fuzz.round(random.Random(seed))
    assert fuzz.tally.raw == []
    assert fuzz.tally.unanswered == []
