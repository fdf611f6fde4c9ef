"""The question that a driver asks the coordinator: bounded messages, and others in between."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from litecache.actors import coordinator as coordinator_module
from litecache.actors.coordinator import Coordinator, CoordinatorClient
from litecache.actors.messages import pack_load, pack_routing, unpack_value
from litecache.actors.router import ReplicaLoad, RoutedPrompt
from litecache.storage.key_dict import BATCH_KEYS


def prompts(count: int, num_keys: int) -> list[RoutedPrompt]:
    keys = [[bytes([i]) + n.to_bytes(15, "big") for n in range(num_keys)] for i in range(count)]
    return [RoutedPrompt(each, 16 * num_keys) for each in keys]


async def started() -> Coordinator:
    made = Coordinator("group", {})
    for index in range(2):
        await made.report_replica(pack_load(index, f"n{index}", ReplicaLoad()))
    return made


def test_others_are_answered_while_a_long_question_is() -> None:
    order: list[str] = []

    async def both() -> None:
        coordinator = await started()
        message = pack_routing(prompts(3, BATCH_KEYS), {})

        async def ask() -> None:
            assert unpack_value(await coordinator.route(message)) == tuple(
                (i, None, 0, False) for i in (0, 1, 0)
            )
            order.append("the long one")

        async def other() -> None:
            await coordinator.describe()
            order.append("the other")

        await asyncio.gather(ask(), other())

    asyncio.run(both())
    assert order == ["the other", "the long one"]


def test_rows_are_asked_for_in_messages_of_a_bounded_size_and_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordinator_module, "_MAX_ROUTED_KEYS", 10)
    coordinator = asyncio.run(started())
    sizes: list[int] = []

    class Direct(CoordinatorClient):
        def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
            sizes.append(len(args[0]))
            return asyncio.run(getattr(coordinator, method)(*args))

    asked = [*prompts(5, 4), *prompts(1, 12), *prompts(1, 0)]
    chosen = Direct("group").route(asked)
    assert len(chosen) == 7
    assert chosen[5] == chosen[0], "its first keys went there"
    assert len(sizes) == 5  # 4 + 4, 4 + 4, 4, and the long one alone
    assert max(sizes) < 16 * 12 + 64
    assert Direct("group").route([]) == []
