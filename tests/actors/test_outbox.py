from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from litecache.actors import outbox as outbox_module
from litecache.actors.outbox import HEARTBEAT_TIMEOUT_S, Outbox
from litecache.types import FinishReason, TokenDelta, TokenLogprobs


class Hooks:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.aborted = asyncio.Event()

    def outbox(self, **options: Any) -> Outbox:
        return Outbox("life", self, **options)

    def pause(self, ids: Sequence[str]) -> None:
        self.calls.append(("pause", list(ids)))

    def resume(self, ids: Sequence[str]) -> None:
        self.calls.append(("resume", list(ids)))

    def abort_client(self, client_id: str) -> None:
        self.calls.append(("abort", client_id))
        self.aborted.set()


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 20))  # type: ignore[arg-type]


def delta(request_id: str, *tokens: int, finish: FinishReason | None = None) -> TokenDelta:
    return TokenDelta(request_id, tokens, finish)


def test_tokens_are_told_again_until_they_are_acknowledged() -> None:
    async def body() -> None:
        outbox = Hooks().outbox()
        epoch, new = outbox.register("c", ["r"])
        assert new == {"r"}
        outbox.push([("c", delta("r", 1)), ("c", delta("r", 2))])
        first = await outbox.poll("c", epoch, 0, 1)
        again = await outbox.poll("c", epoch, 0, 1)
        assert first == again
        assert [d.token_ids for d in first.deltas] == [(1, 2)]
        outbox.push([("c", delta("r", 3))])
        both = await outbox.poll("c", epoch, 0, 1)
        assert (both.first_seq, [d.token_ids for d in both.deltas]) == (1, [(1, 2), (3,)])
        outbox.push([("c", delta("r", 4))])
        rest = await outbox.poll("c", epoch, 2, 1)
        assert (rest.first_seq, [d.token_ids for d in rest.deltas]) == (3, [(4,)])

    run(body)


def test_a_waiting_poll_returns_as_soon_as_there_is_a_token() -> None:
    async def body() -> None:
        outbox = Hooks().outbox()
        epoch, _ = outbox.register("c", ["r"])
        waiting = asyncio.create_task(outbox.poll("c", epoch, 0, 15))
        await asyncio.sleep(0)
        start = time.perf_counter()
        outbox.push([("c", delta("r", 7))])
        reply = await waiting
        assert reply.deltas[0].token_ids == (7,)
        assert time.perf_counter() - start < 5

    run(body)


def test_an_empty_poll_returns_after_its_hold_time() -> None:
    async def body() -> None:
        outbox = Hooks().outbox()
        epoch, _ = outbox.register("c", ["r"])
        reply = await outbox.poll("c", epoch, 0, 0.01)
        assert reply.deltas == ()
        assert reply.epoch == epoch

    run(body)


def test_an_older_poll_that_still_waits_gives_way_to_the_newer_one() -> None:
    async def body() -> None:
        outbox = Hooks().outbox()
        epoch, _ = outbox.register("c", ["r"])
        old = asyncio.create_task(outbox.poll("c", epoch, 0, 15))
        await asyncio.sleep(0)
        new = asyncio.create_task(outbox.poll("c", epoch, 0, 15))
        assert (await old).deltas == ()
        outbox.push([("c", delta("r", 5))])
        assert (await new).deltas[0].token_ids == (5,)

    run(body)


def test_a_client_that_falls_silent_is_aborted_and_sees_a_new_epoch_when_it_returns() -> None:
    async def body() -> None:
        hooks = Hooks()
        outbox = hooks.outbox(heartbeat_timeout_s=0.05)
        epoch, _ = outbox.register("c", ["r"])
        await hooks.aborted.wait()
        assert hooks.calls == [("abort", "c")]
        outbox.push([("c", delta("r", 1))])
        reply = await outbox.poll("c", epoch, 0, 0.01)
        assert reply.epoch != epoch
        assert reply.deltas == ()

    run(body)


def test_polls_keep_a_client_alive() -> None:
    async def body() -> None:
        now = [0.0]
        hooks = Hooks()
        outbox = hooks.outbox(heartbeat_timeout_s=0.02, clock=lambda: now[0])
        epoch, _ = outbox.register("c", ["r"])
        for _ in range(5):
            await outbox.poll("c", epoch, 0, 0.02)
            now[0] += 0.015
        assert hooks.calls == []

    run(body)


def test_a_client_without_live_requests_is_forgotten_without_an_abort() -> None:
    async def body() -> None:
        hooks = Hooks()
        outbox = hooks.outbox(heartbeat_timeout_s=0.02)
        epoch, _ = outbox.register("c", ["r"])
        outbox.push([("c", delta("r", 1, finish=FinishReason.STOP))])
        reply = await outbox.poll("c", epoch, 0, 1)
        assert reply.deltas[0].finish_reason is FinishReason.STOP
        while outbox.stats()["clients"]:
            await asyncio.sleep(0.01)
        assert hooks.calls == []

    run(body)


def test_a_client_too_far_behind_pauses_and_resumes_when_it_caught_up() -> None:
    async def body() -> None:
        hooks = Hooks()
        outbox = hooks.outbox(max_unacknowledged_tokens=4)
        epoch, _ = outbox.register("c", ["a", "b"])
        for token in range(4):
            await outbox.poll("c", epoch, 0, 0.001)
            outbox.push([("c", delta("a", token))])
        assert hooks.calls == [("pause", ["a", "b"])]
        await outbox.poll("c", epoch, 1, 0.01)
        assert len(hooks.calls) == 1
        await outbox.poll("c", epoch, 2, 0.01)
        assert hooks.calls[1:] == [("resume", ["a", "b"])]
        assert outbox.stats()["unacknowledged_tokens"] == 2

    run(body)


def test_an_acknowledgement_of_another_epoch_drops_nothing() -> None:
    async def body() -> None:
        outbox = Hooks().outbox()
        epoch, _ = outbox.register("c", ["r"])
        outbox.push([("c", delta("r", 1))])
        reply = await outbox.poll("c", "an earlier life", 99, 1)
        assert reply.epoch == epoch
        assert reply.deltas[0].token_ids == (1,)

    run(body)


def test_a_request_submitted_twice_is_new_only_once() -> None:
    async def body() -> None:
        outbox = Hooks().outbox()
        epoch, _ = outbox.register("c", ["r"])
        assert outbox.register("c", ["r", "s"]) == (epoch, {"s"})

    run(body)


def test_tokens_within_the_gap_are_told_together() -> None:
    async def body() -> None:
        outbox = Hooks().outbox()
        epoch, _ = outbox.register("c", ["r"])
        outbox.push([("c", TokenDelta("r", (1,), ttft_s=0.1))])
        first = await outbox.poll("c", epoch, 0, 15, 0.1)
        assert [d.token_ids for d in first.deltas] == [(1,)]
        waiting = asyncio.create_task(outbox.poll("c", epoch, 1, 15, 0.1))
        await asyncio.sleep(0)
        for token in (2, 3):
            outbox.push([("c", delta("r", token))])
            await asyncio.sleep(0.01)
        assert not waiting.done()
        assert [d.token_ids for d in (await waiting).deltas] == [(2, 3)]

    run(body)


def test_one_delta_tells_how_a_request_began_and_ended() -> None:
    async def body() -> None:
        outbox = Hooks().outbox()
        epoch, _ = outbox.register("c", ["r", "s"])
        likely = [TokenLogprobs(-0.5, ((token, -0.5),)) for token in (1, 2)]
        begun = TokenDelta(
            *("r", (1,), None, None, None, {"gpu": 16}, 0.1, (likely[0],), {"gpu": 16, "disk": 32})
        )
        outbox.push([("c", begun), ("c", delta("s", 7))])
        outbox.push([("c", TokenDelta("r", (2,), logprobs=(likely[1],)))])
        outbox.push([("c", TokenDelta("r", (), FinishReason.ERROR, "full", "CapacityError"))])
        reply = await outbox.poll("c", epoch, 0, 1)
        assert list(reply.deltas) == [
            TokenDelta(
                *("r", (1, 2), FinishReason.ERROR, "full", "CapacityError", {"gpu": 16}, 0.1),
                tuple(likely),
                {"gpu": 16, "disk": 32},
            ),
            delta("s", 7),
        ]

    run(body)


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_told_once_and_in_order_whatever_replies_are_lost(seed: int) -> None:
    async def body() -> None:
        draw = random.Random(seed)
        outbox = Hooks().outbox()
        names = ["a", "b", "c"]
        epoch, _ = outbox.register("c", names)
        pushed: dict[str, list[int]] = {name: [] for name in names}
        told: dict[str, list[int]] = {name: [] for name in names}
        ack = 0
        for token in range(200):
            if draw.random() < 0.6:
                name = draw.choice(names)
                pushed[name].append(token)
                outbox.push([("c", delta(name, token))])
                continue
            reply = await outbox.poll("c", epoch, ack, 0.0)
            if draw.random() < 0.5 and token < 199:
                continue  # lost
            for new in reply.deltas[ack + 1 - reply.first_seq :]:
                told[new.request_id] += new.token_ids
            ack = reply.first_seq + len(reply.deltas) - 1
        reply = await outbox.poll("c", epoch, ack, 0.0)
        for new in reply.deltas[ack + 1 - reply.first_seq :]:
            told[new.request_id] += new.token_ids
        assert told == pushed
        assert sum(map(len, pushed.values())) > 50

    run(body)


@pytest.mark.parametrize("before_the_poll", [True, False])
@pytest.mark.parametrize(
    "news", [{"finish_reason": FinishReason.LENGTH}, {"awaits_guidance": True}]
)
def test_first_and_last_tokens_and_those_that_wait_for_the_driver_do_not_wait_for_the_gap(
    news: dict[str, Any], before_the_poll: bool
) -> None:
    async def body() -> None:
        outbox = Hooks().outbox()
        epoch, _ = outbox.register("c", ["r"])
        outbox.push([("c", TokenDelta("r", (1,), ttft_s=0.1))])
        await outbox.poll("c", epoch, 0, 15, 3600)
        last = ("c", TokenDelta("r", (2,), **news))
        if before_the_poll:
            outbox.push([last])
        waiting = asyncio.create_task(outbox.poll("c", epoch, 1, 3600, 3600))
        await asyncio.sleep(0)
        if not before_the_poll:
            outbox.push([last])
        reply = await asyncio.wait_for(waiting, 5)  # before the silence of the client ends it
        assert [d.token_ids for d in reply.deltas] == [(2,)]

    run(body)


@pytest.mark.parametrize("late", ["forgotten", "finished"])
def test_output_of_requests_that_are_over_is_void(late: str) -> None:
    async def body() -> None:
        outbox = Hooks().outbox()
        epoch, _ = outbox.register("c", ["r"])
        if late == "forgotten":
            outbox.forget("c", ["r"])
        else:
            outbox.push([("c", delta("r", finish=FinishReason.ABORT))])
            await outbox.poll("c", epoch, 0, 1)
        outbox.push([("c", delta("r", 1))])
        reply = await outbox.poll("c", epoch, 1, 0.01)
        assert reply.deltas == ()

    run(body)


def test_the_load_can_be_read_by_another_thread_while_clients_come_and_go() -> None:
    faults: list[BaseException] = []
    done = threading.Event()

    def read(outbox: Outbox) -> None:
        try:
            while not done.is_set():
                assert outbox.live_requests >= 0
        except BaseException as error:
            faults.append(error)

    async def body() -> None:
        outbox = Hooks().outbox(heartbeat_timeout_s=0.0)
        readers = [threading.Thread(target=read, args=(outbox,)) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            for number in range(4000):
                outbox.register(f"c{number}", ["r"])
                if number % 100 == 99:
                    outbox._expire()
                    await asyncio.sleep(0)
        finally:
            done.set()
            for reader in readers:
                reader.join(20)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        run(body)
    finally:
        sys.setswitchinterval(before)
    assert faults == []


def test_logits_of_many_requests_come_in_several_replies() -> None:
    async def body() -> None:
        outbox = Hooks().outbox()
        names = [f"r{number}" for number in range(5)]
        epoch, _ = outbox.register("c", names)
        part = bytes(outbox_module.MAX_REPLY_LOGITS_BYTES // 2)
        told = [TokenDelta(name, (), FinishReason.LENGTH, logits=part) for name in names]
        outbox.push([("c", each) for each in told])
        seen: list[str] = []
        while len(seen) < 5:
            reply = await outbox.poll("c", epoch, len(seen), 1)
            assert 1 <= len(reply.deltas) <= 2
            seen += [each.request_id for each in reply.deltas]
        assert seen == names

    run(body)


def test_all_waiting_polls_end_when_their_replica_is_about_to() -> None:
    async def body() -> None:
        outbox = Hooks().outbox()
        polls = []
        for client in ("a", "b"):
            epoch, _ = outbox.register(client, [f"r of {client}"])
            polls.append(asyncio.create_task(outbox.poll(client, epoch, 0, 600)))
        await asyncio.sleep(0)
        outbox.wake_all()
        # before the clients count as silent, which would end them, too
        replies = await asyncio.wait_for(asyncio.gather(*polls), HEARTBEAT_TIMEOUT_S / 2)
        assert [reply.deltas for reply in replies] == [(), ()]

    run(body)
