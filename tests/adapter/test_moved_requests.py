"""Where the requests of a replica that does not answer go on, and when nobody tries any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from litecache.actors.calls import ActorEndedError
from litecache.adapter import replica_poller as module
from litecache.adapter.pending import PendingRequest
from litecache.adapter.replica_poller import MOST_DEATHS
from litecache.adapter.replicas import ReplicaSet
from litecache.errors import GroupUnavailableError, RequestTimeout
from litecache.types import (
    FinishReason,
    Guidance,
    PollReply,
    Request,
    SamplingParams,
    TokenDelta,
)


class Replica:
    """A replica in a few states, spoken to as `ReplicaStub` is.

    Attributes:
        state: "serves" (answers, and computes nothing), "dead", "hangs", "loading", "left", or
            "deaf" (it tells news, and does not answer a submission).
        taken: ids of requests that were submitted to it.
        requests: themselves, by id.
        said: what it has told its clients.
        guided: messages about guided requests.
    """

    def __init__(self, handle: Any, name: str) -> None:
        self.state, self.name = handle.state, name
        self.taken: list[str] = []
        self.requests: dict[str, Request] = {}
        self.said: list[TokenDelta] = []
        self.guided: list[list[Guidance]] = []
        self.epoch, self.told = 1, 0
        self.news = threading.Condition()
        handle.stub = self

    def _answer(self, give: Callable[[], Any]) -> Any:
        return SimpleNamespace(get=lambda *_, **__: give())

    def _refuse(self) -> None:
        if self.state == "dead":
            raise GroupUnavailableError(f"{self.name}: the actor is gone")
        if self.state == "left":
            raise ActorEndedError(f"{self.name} has left its group")
        if self.state == "hangs":
            time.sleep(0.02)
            raise RequestTimeout(f"{self.name}: took longer than 2 s")

    def find_socket(self) -> None:
        pass

    def disconnect(self) -> None:
        pass

    def is_ready(self) -> bool:
        return self.state == "serves"

    def abort(self, wire_ids: Any) -> None:
        pass

    def submit(self, client_id: str, requests: Any) -> Any:
        def give() -> str:
            self._refuse()
            if self.state == "loading":
                raise GroupUnavailableError(f"{self.name} is loading its model")
            if self.state == "deaf":
                raise RequestTimeout(f"{self.name}: submit took longer than 2 s")
            self._take(requests)
            return f"e{self.epoch}"

        return self._answer(give)

    def _take(self, requests: Any) -> None:
        self.taken += [r.request_id for r in requests]
        self.requests |= {r.request_id: r for r in requests}

    def guide(self, guidance: list[Guidance]) -> Any:
        def give() -> None:
            self._refuse()
            if self.state == "deaf":
                raise RequestTimeout(f"{self.name}: guide took longer than 2 s")
            self.guided.append(guidance)

        return self._answer(give)

    def say(self, *deltas: TokenDelta) -> None:
        with self.news:
            self.said += deltas
            self.news.notify_all()

    def poll(self, client_id: str, epoch: str, ack: int, *_: Any, requests: Any = ()) -> Any:
        def give() -> PollReply:
            with self.news:
                self.news.wait_for(lambda: self.said[ack:], 0.02)
            self._refuse()
            if self.state == "loading":
                return PollReply(1)
            self._take(requests)
            known = ack if epoch == f"e{self.epoch}" else 0
            return PollReply(known + 1, tuple(self.said[known:]), f"e{self.epoch}")

        return self._answer(give)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ReplicaSet]]:
    monkeypatch.setattr(module, "ReplicaStub", Replica)
    monkeypatch.setattr(module, "_PROBE_S", 0.02)
    monkeypatch.setattr(module, "_RETRY_S", 0.01)
    sets: list[ReplicaSet] = []

    def make(*states: str) -> ReplicaSet:
        handles = [SimpleNamespace(state=state) for state in states]
        group: Any = SimpleNamespace(
            replicas_by_index=dict(enumerate(handles)),
            spec=SimpleNamespace(group="moving"),
            info=SimpleNamespace(block_size=16, max_requests=8),
        )
        sets.append(ReplicaSet(group, "c"))
        return sets[-1]

    yield make
    for each in sets:
        for poller in each.pollers:
            poller.close()


def begin(replicas: ReplicaSet, index: int) -> PendingRequest:
    pending = PendingRequest(Request("r", "c", range(1, 20), SamplingParams(max_new_tokens=9)))
    replicas.submit([pending], index)
    return pending


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def stubs(replicas: ReplicaSet) -> list[Any]:
    return [poller._replica for poller in replicas.pollers]


@pytest.mark.parametrize("state", ["dead", "hangs", "loading", "left"])
def test_a_request_goes_on_with_the_replica_that_answers(made: Any, state: str) -> None:
    replicas = made(state, "serves")
    row = begin(replicas, 0)
    until(lambda: stubs(replicas)[1].taken == [row.wire_id])
    assert not row.done


@pytest.mark.parametrize("state", ["dead", "hangs", "loading", "left"])
def test_it_goes_back_to_the_first_when_that_is_there_again_and_the_second_is_not(
    made: Any, state: str
) -> None:
    replicas = made("dead", "serves")
    first, second = stubs(replicas)
    row = begin(replicas, 0)
    until(lambda: second.taken)
    second.state = state
    until(lambda: replicas.pollers[1].silent_since is not None)
    assert not first.taken
    first.epoch, first.state = 2, "serves"
    until(lambda: first.taken)
    assert first.taken == [row.wire_id]
    assert not row.done


def test_what_one_of_several_submits_in_vain_goes_elsewhere_without_waiting_for_a_poll(
    made: Any,
) -> None:
    replicas = made("serves", "serves")
    first, second = stubs(replicas)
    begin(replicas, 0)
    until(lambda: first.taken)
    first.state = "deaf"
    later = PendingRequest(Request("later", "c", range(1, 9), SamplingParams(max_new_tokens=9)))
    replicas.pollers[0].submit([later])
    until(lambda: any(name.startswith("later") for name in second.taken))


def test_a_replica_may_answer_one_thread_while_another_waits_for_it_in_vain(made: Any) -> None:
    replicas = made("serves", "serves")
    poller, first = replicas.pollers[0], stubs(replicas)[0]
    begin(replicas, 0)
    until(lambda: first.taken)
    first.state = "deaf"
    # as the poll's thread does when a reply comes
    poller._move = lambda silent: setattr(silent, "silent_since", None)
    later = PendingRequest(Request("later", "c", range(1, 9), SamplingParams(max_new_tokens=9)))
    poller.submit([later])
    assert not later.done


def test_a_request_under_which_process_after_process_ends_is_given_up_and_says_why(
    made: Any,
) -> None:
    replicas = made("serves", "serves")
    row = begin(replicas, 0)
    for death in range(1, MOST_DEATHS + 1):
        until(lambda: any(poller.load for poller in replicas.pollers))
        (at,) = (i for i, poller in enumerate(replicas.pollers) if poller.load)
        here = stubs(replicas)[at]
        until(lambda: row.wire_id in here.taken)  # noqa: B023
        here.state = "dead"
        until(lambda: row.deaths == death)  # noqa: B023
        if death < MOST_DEATHS:
            until(lambda: not replicas.pollers[at].load)  # noqa: B023
            here.epoch, here.state = here.epoch + 1, "serves"
            until(lambda: replicas.pollers[at].silent_since is None)  # noqa: B023
    with pytest.raises(GroupUnavailableError, match=r"3 processes .* without a token .* is gone"):
        row.wait()


def test_a_token_in_between_clears_the_request(made: Any) -> None:
    row = PendingRequest(Request("r", "c", range(1, 9), SamplingParams(max_new_tokens=9)))
    row.deaths = MOST_DEATHS - 1
    row.feed(TokenDelta("r.0", (5,)))
    assert row.deaths == 0
    row.feed(TokenDelta("r.0", (6,), FinishReason.LENGTH))
    assert row.wait() == [5, 6]


class Counting:
    """A guide that appends twice what was drawn, and allows the tokens of the bits of the sum."""

    def __init__(self, most: int = 99) -> None:
        self.tokens: list[int] = [1]
        self._most = most

    @property
    def mask(self) -> bytes:
        return bytes([sum(self.tokens), 0, 0, 0]) if len(self.tokens) <= self._most else b""

    def take(self, tokens: Any) -> list[int]:
        forced = [2 * token for token in tokens]
        self.tokens += [*tokens, *forced]
        return forced


def begin_guided(replicas: ReplicaSet, name: str, most: int = 99) -> PendingRequest:
    guide = Counting(most)
    request = Request(name, "c", range(1, 20), SamplingParams(max_new_tokens=9), mask=guide.mask)
    replicas.submit([row := PendingRequest(request, guide=guide)], 0)
    return row


def asking(row: PendingRequest, token: int) -> TokenDelta:
    return TokenDelta(row.wire_id, (token,), awaits_guidance=True)


def test_all_rows_of_a_reply_are_guided_in_one_message(made: Any) -> None:
    replicas = made("serves")
    (here,) = stubs(replicas)
    rows = [begin_guided(replicas, name) for name in "abc"]
    until(lambda: len(here.taken) == 3)
    assert {request.mask for request in here.requests.values()} == {b"\1\0\0\0"}
    here.say(*(asking(row, i) for i, row in enumerate(rows, 3)))
    until(lambda: here.guided)
    (message,) = here.guided
    assert message == [
        Guidance(row.wire_id, 20, (2 * i,), bytes([1 + 3 * i, 0, 0, 0]))
        for i, row in enumerate(rows, 3)
    ]
    assert [row.tokens for row in rows] == [[3, 6], [4, 8], [5, 10]]


def test_a_row_that_is_whole_ends_here_and_then_there(made: Any) -> None:
    replicas = made("serves")
    (here,) = stubs(replicas)
    row = begin_guided(replicas, "whole", most=4)
    until(lambda: here.taken)
    here.say(asking(row, 3))
    until(lambda: len(here.guided) == 1)
    here.say(asking(row, 4))
    assert row.wait() == [3, 6, 4, 8]
    assert row.finish_reason is FinishReason.STOP
    until(lambda: len(here.guided) == 2)
    assert here.guided[1] == [Guidance(row.wire_id, 22, (8,), b"")]
    assert not replicas.pollers[0].load


def test_what_is_appended_counts_towards_the_length(made: Any) -> None:
    replicas = made("serves")
    (here,) = stubs(replicas)
    row = begin_guided(replicas, "long")
    until(lambda: here.taken)
    for number in range(5):
        until(lambda: len(here.guided) == number)  # noqa: B023
        here.say(asking(row, 1))
    assert row.wait() == [1, 2, 1, 2, 1, 2, 1, 2, 1]
    assert row.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("state", ["dead", "hangs", "left", "deaf"])
def test_a_guided_request_goes_on_elsewhere_with_what_was_appended_and_the_mask_behind(
    made: Any, state: str
) -> None:
    replicas = made("serves", "serves")
    first, second = stubs(replicas)
    row = begin_guided(replicas, "moved")
    until(lambda: first.taken)
    first.say(asking(row, 3))
    until(lambda: first.guided)
    first.state = state
    if state == "deaf":  # what it draws next is told, and the answer to that does not arrive
        first.say(asking(row, 5))
    until(lambda: second.taken)
    known = [3, 6, 5, 10] if state == "deaf" else [3, 6]
    (request,) = second.requests.values()
    assert list(request.prompt) == [*range(1, 20), *known]
    assert request.num_resumed_tokens == len(known)
    assert request.mask == bytes([1 + sum(known), 0, 0, 0])
    second.say(asking(row, 1))
    until(lambda: second.guided)
    assert second.guided == [
        [Guidance(row.wire_id, 20 + len(known), (2,), bytes([4 + sum(known), 0, 0, 0]))]
    ]
