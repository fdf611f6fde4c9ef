from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from litecache.adapter.pending import PendingRequest, remote_error
from litecache.adapter.streaming import TextDecoder, TokenStream, feed_streamer
from litecache.errors import CapacityError, ConfigError, GroupUnavailableError, RequestAborted
from litecache.types import FinishReason, Request, SamplingParams, TokenDelta


def pending(max_new_tokens: int = 8, eos: tuple[int, ...] = ()) -> PendingRequest:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, eos_token_ids=eos)
    return PendingRequest(Request("r", "c", (1, 2), sampling))


def ended(*tokens: int) -> PendingRequest:
    row = pending()
    row.feed(TokenDelta("r.0", tokens, FinishReason.LENGTH))
    return row


def utf8(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_of_text_add_up_and_no_character_is_cut() -> None:
    text = "naïve 日本語 text 🙂 " * 5
    decoder = TextDecoder(utf8)
    pieces = [decoder.add([byte]) for byte in text.encode()]
    pieces.append(decoder.add([], last=True))
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_an_incomplete_character_at_the_end_is_given_out() -> None:
    decoder = TextDecoder(utf8)
    assert decoder.add("é".encode()[:1]) == ""
    assert decoder.add([], last=True) == "�"


def test_tokens_arrive_while_the_request_goes_on() -> None:
    row = pending()
    stream = TokenStream(row, None, lambda _: None)
    found = {"ram": 2, "disk": 16}
    row.feed(TokenDelta("r.0", (4,), reused_tokens={"ram": 2}, ttft_s=0.5, found_tokens=found))
    assert next(stream) == 4
    assert (stream.reused_tokens, stream.ttft_s) == ({"ram": 2}, 0.5)
    assert stream.found_tokens == found
    threading.Timer(0.01, lambda: row.feed(TokenDelta("r.0", (5,), FinishReason.STOP))).start()
    assert list(stream) == [5]
    assert stream.token_ids == [4, 5]


def test_an_event_loop_reads_tokens_as_they_come_from_another_thread() -> None:
    rows = [pending() for _ in range(50)]

    def feed() -> None:
        for reason in (None, None, FinishReason.LENGTH):
            for row in rows:
                row.feed(TokenDelta("r.0", (4, 5), reason))

    async def read(row: PendingRequest) -> list[int]:
        return [token async for token in TokenStream(row, None, lambda _: None)]

    async def read_all() -> list[list[int]]:
        tasks = [asyncio.ensure_future(read(row)) for row in rows]
        await asyncio.sleep(0)  # all of them wait
        threading.Thread(target=feed).start()
        return await asyncio.wait_for(asyncio.gather(*tasks), 30)

    assert asyncio.run(read_all()) == [[4, 5] * 3] * 50


def test_an_event_loop_gets_whole_characters_then_the_error() -> None:
    row, pieces = pending(), []
    row.feed(TokenDelta("r.0", tuple("é".encode())[:1]))

    async def read() -> None:
        asyncio.get_running_loop().call_soon(
            row.feed,
            TokenDelta("r.0", tuple("é".encode())[1:], FinishReason.ERROR, "x", "CapacityError"),
        )
        async for piece in TokenStream(row, TextDecoder(utf8), lambda _: None):
            pieces.append(piece)

    with pytest.raises(CapacityError, match="x"):
        asyncio.run(read())
    assert pieces == ["é"]


def test_an_event_loop_goes_on_where_it_left_and_no_other_loop_reads_beside_it() -> None:
    text = "é日🙂"
    row = pending(max_new_tokens=64)
    row.feed(TokenDelta("r.0", tuple(text.encode()[:2])))
    stream = TokenStream(row, TextDecoder(utf8), lambda _: None)

    async def read() -> list[str]:
        pieces = []
        async for piece in stream:
            pieces.append(piece)
            break
        row.feed(TokenDelta("r.0", tuple(text.encode()[2:]), FinishReason.LENGTH))
        return pieces + [piece async for piece in stream]

    assert "".join(asyncio.run(read())) == text
    with pytest.raises(ConfigError, match="stream"):
        next(stream)
    other = TokenStream(ended(4, 5), None, lambda _: None)
    assert next(other) == 4
    with pytest.raises(ConfigError, match="stream"):
        aiter(other)


def test_tokens_may_come_when_the_event_loop_has_gone() -> None:
    row = pending()
    row.feed(TokenDelta("r.0", (4,)))

    async def first() -> int:
        async for token in TokenStream(row, None, lambda _: None):
            return int(token)
        raise AssertionError

    assert asyncio.run(first()) == 4
    row.feed(TokenDelta("r.0", (5,), FinishReason.LENGTH))
    assert row.wait() == [4, 5]


def test_a_stream_that_is_dropped_early_aborts_its_request() -> None:
    aborted: list[str] = []
    row = pending()
    row.feed(TokenDelta("r.0", (4,)))
    stream = TokenStream(row, None, aborted.append)
    next(stream)
    del stream
    assert aborted == ["r"]


def test_a_finished_stream_aborts_nothing() -> None:
    aborted: list[str] = []
    stream = TokenStream(ended(1, 2), None, aborted.append)
    assert list(stream) == [1, 2]
    stream.close()
    assert aborted == []


def test_an_aborted_request_raises_after_the_tokens_that_came_before() -> None:
    row = pending()
    row.feed(TokenDelta("r.0", (4,)))
    row.feed(TokenDelta("r.0", (), FinishReason.ABORT))
    stream = TokenStream(row, None, lambda _: None)
    assert next(stream) == 4
    with pytest.raises(RequestAborted, match="request r was aborted"):
        next(stream)


def test_an_engines_error_keeps_its_class() -> None:
    row = pending()
    row.feed(TokenDelta("r.0", (), FinishReason.ERROR, "no room", "CapacityError"))
    with pytest.raises(CapacityError, match="no room"):
        row.wait()
    assert type(remote_error("KeyError", "x")) is GroupUnavailableError
    assert type(remote_error("__name__", "x")) is GroupUnavailableError


def test_another_attempt_carries_the_tokens_so_far_under_another_name() -> None:
    row = pending()
    row.feed(TokenDelta("r.0", (4, 5)))
    assert row.next_attempt()
    request = row.wire_request()
    assert (request.request_id, request.prompt, request.num_resumed_tokens) == (
        "r.1",
        (1, 2, 4, 5),
        2,
    )


def test_the_time_of_a_request_goes_on_with_its_next_attempt() -> None:
    row = PendingRequest(Request("r", "c", (1, 2), SamplingParams(8), max_time_s=60.0))
    assert row.wire_request().max_time_s == 60
    row.submitted_at -= 45
    assert row.next_attempt()
    assert row.wire_request().max_time_s == pytest.approx(15, abs=5)
    row.submitted_at -= 45
    assert row.next_attempt()
    assert 0 < (row.wire_request().max_time_s or 0) < 1


@pytest.mark.parametrize(
    ("tokens", "reason"), [((4, 9), FinishReason.STOP), ((4, 5, 6), FinishReason.LENGTH)]
)
def test_a_request_whose_last_token_had_arrived_is_not_submitted_again(
    tokens: tuple[int, ...], reason: FinishReason
) -> None:
    row = pending(max_new_tokens=3, eos=(9,))
    row.feed(TokenDelta("r.0", tokens))
    assert not row.next_attempt()
    assert row.finish_reason is reason
    assert row.wait() == list(tokens)


class Recorder:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


def test_a_streamer_gets_the_prompt_then_one_row_of_tokens_a_step() -> None:
    recorder = Recorder()
    feed_streamer(recorder, torch.tensor([[1], [2]]), [ended(5, 6), ended(7)], 0)
    assert recorder.calls == [[[1], [2]], [5, 7], [6, 0], "end"]


def test_without_a_pad_token_a_streamer_gets_no_token_that_is_none() -> None:
    recorder = Recorder()
    feed_streamer(recorder, torch.tensor([[1], [2]]), [ended(5, 6), ended(7)], None)
    assert recorder.calls == [[[1], [2]], [5, 7], "end"]
