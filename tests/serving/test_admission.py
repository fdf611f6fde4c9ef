"""The queue in front of the engines: bounded, fair, and empty in the end whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from litecache.serving.admission import Admission
from litecache.serving.errors import ApiError


async def begun(*tasks: asyncio.Task[Any]) -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_places_are_given_up_to_the_bound_and_then_in_turn() -> None:
    async def scene() -> None:
        queue = Admission(max_running=2, max_waiting=8)
        leave = [await queue.enter("a", 1), await queue.enter("a", 1)]
        third = asyncio.create_task(queue.enter("a", 1))
        await begun(third)
        assert (queue.running, queue.waiting, third.done()) == (2, 1, False)
        leave[0]()
        leave[0]()  # once more does nothing
        await begun(third)
        assert (queue.running, queue.waiting, third.done()) == (2, 0, True)
        third.result()()
        leave[1]()
        assert queue.running == 0
        queue.check_integrity()

    asyncio.run(scene())


def test_the_key_with_the_least_that_runs_is_served_next() -> None:
    async def scene() -> list[str]:
        queue, order = Admission(max_running=1, max_waiting=100), list[str]()

        async def ask(tenant: str) -> None:
            leave = await queue.enter(tenant, 1)
            order.append(tenant)
            await asyncio.sleep(0)
            leave()

        tasks = [asyncio.create_task(ask("many")) for _ in range(20)]
        await begun()
        tasks += [asyncio.create_task(ask("few")) for _ in range(2)]
        await asyncio.gather(*tasks)
        queue.check_integrity()
        return order

    order = asyncio.run(scene())
    last = max(index for index, tenant in enumerate(order) if tenant == "few")
    assert last <= 10


def test_a_key_that_waits_longer_and_runs_more_is_served_later() -> None:
    async def scene() -> None:
        queue = Admission(max_running=4, max_waiting=8)
        many = [await queue.enter("many", 1) for _ in range(4)]
        first = asyncio.create_task(queue.enter("many", 1))
        await begun()
        later = asyncio.create_task(queue.enter("few", 1))
        await begun()
        many[0]()
        await begun()
        assert (first.done(), later.done()) == (False, True)
        first.cancel()

    asyncio.run(scene())


def test_a_full_queue_turns_the_newest_of_the_busiest_key_away() -> None:
    async def scene() -> None:
        queue = Admission(max_running=1, max_waiting=3)
        leave = await queue.enter("many", 1)
        many = [asyncio.create_task(queue.enter("many", 1)) for _ in range(3)]
        await begun()
        few = asyncio.create_task(queue.enter("few", 1))
        await begun()
        assert not few.done()
        with pytest.raises(ApiError) as told:
            await many[2]
        assert told.value.status == 429
        assert int(told.value.headers["retry-after"]) >= 1
        with pytest.raises(ApiError):
            await queue.enter("many", 1)
        assert (queue.waiting, queue.rejected) == (3, 2)
        leave()
        for task in asyncio.as_completed([few, *many[:2]]):
            (await task)()
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(scene())


@pytest.mark.parametrize("turn", ["before its turn", "as its turn comes"])
def test_who_goes_away_while_waiting_leaves_no_place_taken(turn: str) -> None:
    async def scene() -> None:
        queue = Admission(max_running=1, max_waiting=3)
        leave: Callable[[], None] = await queue.enter("a", 1)
        waiting = asyncio.create_task(queue.enter("b", 1))
        await begun()
        if turn == "as its turn comes":
            leave()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        leave()
        assert (queue.running, queue.waiting) == (0, 0)
        (await queue.enter("c", 1))()
        queue.check_integrity()

    asyncio.run(scene())


@pytest.mark.parametrize("then", ["a place gets free", "the queue is full"])
def test_one_that_has_just_been_cancelled_gets_no_turn_and_no_refusal(then: str) -> None:
    """Its future is cancelled at once, its task hears of it a turn of the loop later."""

    async def scene() -> None:
        queue = Admission(max_running=1, max_waiting=2)
        leave = await queue.enter("a", 1)
        first, gone = (asyncio.create_task(queue.enter("b", 1)) for _ in range(2))
        await begun()
        if then == "a place gets free":
            first, gone = gone, first
        first.add_done_callback(lambda task: task.result()())
        gone.cancel()
        if then == "a place gets free":
            leave()
        else:
            asyncio.get_running_loop().call_soon(leave)
            (await queue.enter("c", 1))()
        await first
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(scene())


def test_a_request_of_more_sequences_than_fit_runs_alone() -> None:
    async def scene() -> None:
        queue = Admission(max_running=4, max_waiting=3)
        leave = await queue.enter("a", 100)
        other = asyncio.create_task(queue.enter("b", 1))
        await begun()
        assert not other.done()
        leave()
        (await other)()
        assert queue.running == 0

    asyncio.run(scene())
