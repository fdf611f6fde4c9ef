"""Fuzzed messages to the engine and its actor; scripts/fuzz_engine.py sends many more."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from message_fuzz import MessageFuzz

from litecache.types import Request, SamplingParams

EXAMPLES = {"slow": 300, "long": 600}.get(os.environ.get("LITECACHE_TEST_PROFILE", ""), 150)


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


def test_calls_of_the_actor_reach_the_engine_in_their_order_whatever_their_size(
    fuzz: MessageFuzz, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("submit", "abort", "pause", "resume", "abort_client"):
        original = getattr(fuzz.engine, name)

        def call(argument: object, name: str = name, original: Any = original) -> None:
            original(argument)
            order.append(name)

        monkeypatch.setattr(fuzz.engine, name, call)
    fuzz.door._outbox = None  # made anew, over the calls that are watched
    large = [Request(f"big{n}", "c", (1,) * 200, SamplingParams(9)) for n in range(100)]
    names = [request.request_id for request in large]

    async def send() -> None:
        await asyncio.gather(fuzz.door.submit("c", large), fuzz.door.abort(names))
        outbox = fuzz.door._opened_outbox()
        for hook in (outbox._engine.pause, outbox._engine.resume):
            hook(names)
        outbox._engine.abort_client("c")

    fuzz.loop.run_until_complete(send())
    assert order == ["submit", "abort", "pause", "resume", "abort_client"]
    fuzz.door._outbox = None
