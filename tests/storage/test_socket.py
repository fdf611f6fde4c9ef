"""A shard's socket: calls by number from many threads, damage, ends on either side."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from litecache.errors import ConfigError, GroupUnavailableError, RequestTimeout, StorageError
from litecache.storage import socket_server
from litecache.storage.frames import Method, pack_frame, take_frames
from litecache.storage.socket_channel import SocketChannel
from litecache.storage.socket_server import SocketServer


class Shard:
    """Answers queries with their message turned around; stages wait until they may go on."""

    def __init__(self) -> None:
        self.released: list[bytes] = []
        self.may_go_on = threading.Event()

    def reverse(self, message: bytes) -> bytes:
        return message[::-1]

    def slow(self, message: bytes) -> bytes:
        self.may_go_on.wait(20)
        return message

    def refuse(self, message: bytes) -> bytes:
        raise ConfigError("key", message, "16 bytes")

    def break_down(self, message: bytes) -> bytes:
        raise RuntimeError("a defect")

    def note(self, message: bytes) -> None:
        self.released.append(message)


@pytest.fixture
def shard() -> Shard:
    return Shard()


@pytest.fixture
def server(shard: Shard) -> Iterator[SocketServer]:
    made = SocketServer(
        f"test-{os.getpid()}-{time.monotonic_ns()}",
        {
            Method.QUERY: shard.reverse,
            Method.STAGE: shard.slow,
            Method.COMMIT: shard.refuse,
            Method.DURABLE: shard.break_down,
            Method.RELEASE: shard.note,
        },
    )
    yield made
    shard.may_go_on.set()
    made.close()


@pytest.fixture
def channel(server: SocketServer) -> Iterator[SocketChannel]:
    made = SocketChannel(server.address)
    yield made
    made.close()


def test_each_thread_gets_its_own_answer(channel: SocketChannel) -> None:
    def ask(i: int) -> bool:
        message = i.to_bytes(4, "little") * (1 + i % 50)
        return channel.answer(channel.call(Method.QUERY, message), 20) == message[::-1]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(2000)))


def test_answers_can_be_taken_in_any_order(channel: SocketChannel) -> None:
    numbers = [channel.call(Method.QUERY, bytes([i])) for i in range(20)]
    for i in reversed(range(20)):
        assert channel.answer(numbers[i], 20) == bytes([i])


def test_long_messages_go_both_ways_while_more_are_sent(channel: SocketChannel) -> None:
    # more than the socket's buffers hold, so that both sides have to send in pieces
    messages = [os.urandom(3 << 20) for _ in range(4)]
    numbers = [channel.call(Method.QUERY, message) for message in messages]
    for number, message in zip(numbers, messages, strict=True):
        assert channel.answer(number, 20) == message[::-1]


def test_a_message_without_an_answer_is_handled_in_order(
    channel: SocketChannel, shard: Shard
) -> None:
    for i in range(5):
        channel.tell(Method.RELEASE, bytes([i]))
    assert channel.answer(channel.call(Method.QUERY, b"ab"), 20) == b"ba"
    assert shard.released == [bytes([i]) for i in range(5)]


def test_errors_cost_one_call(channel: SocketChannel) -> None:
    with pytest.raises(StorageError, match=r"commit failed: key=.* is invalid: 16 bytes"):
        channel.answer(channel.call(Method.COMMIT, b"x"), 20, "commit")
    with pytest.raises(StorageError, match="RuntimeError: a defect"):
        channel.answer(channel.call(Method.DURABLE, b"x"), 20)
    with pytest.raises(StorageError, match="knows no call 7"):
        channel.answer(channel.call(Method.TOUCH, b"x"), 20)
    assert channel.answer(channel.call(Method.QUERY, b"ab"), 20) == b"ba"


def test_a_late_answer_can_be_waited_for_again(channel: SocketChannel, shard: Shard) -> None:
    number = channel.call(Method.STAGE, b"later")
    with pytest.raises(RequestTimeout, match=r"stage took longer than 0\.05 s"):
        channel.answer(number, 0.05, "stage")
    shard.may_go_on.set()
    assert channel.answer(number, 20) == b"later"


def test_all_who_wait_learn_that_the_shard_is_gone(
    channel: SocketChannel, server: SocketServer, shard: Shard
) -> None:
    numbers = [channel.call(Method.STAGE, b"x") for _ in range(3)]

    def wait(number: int) -> str:
        with pytest.raises(GroupUnavailableError, match="has closed its socket"):
            channel.answer(number, 20)
        return "gone"

    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(wait, number) for number in numbers]
        assert not channel.hung_up
        server.close()
        shard.may_go_on.set()
        assert [each.result(20) for each in waiting] == ["gone"] * 3
    assert channel.hung_up
    with pytest.raises(GroupUnavailableError):
        channel.call(Method.QUERY, b"x")
    channel.tell(Method.RELEASE, b"x")


def test_closing_a_channel_ends_who_waits_on_it(server: SocketServer) -> None:
    channel = SocketChannel(server.address)
    number = channel.call(Method.STAGE, b"x")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(channel.answer, number, None)
        time.sleep(0.05)
        channel.close()
        with pytest.raises(GroupUnavailableError):
            waiting.result(20)


def test_a_hostile_connection_is_closed_and_harms_nobody(
    channel: SocketChannel, server: SocketServer
) -> None:
    for junk in (b"\xff" * 64, struct.pack("<III", 0xFFFF_FFFF, 1, 1), pack_frame(1, 99, b"")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bad:
            bad.settimeout(20)
            bad.connect(server.address)
            bad.sendall(junk)
            answer = bad.recv(1 << 16)
            # a call that is not known is answered, what is no frame ends the connection
            assert (answer == b"") == (junk[:4] == b"\xff" * 4)
    assert channel.answer(channel.call(Method.QUERY, b"ab"), 20) == b"ba"


def test_another_user_is_not_let_in(server: SocketServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_server, "_same_user", lambda connection: False)
    channel = SocketChannel(server.address)
    with pytest.raises(GroupUnavailableError):
        channel.answer(channel.call(Method.QUERY, b"ab"), 20)
    channel.close()


def test_an_address_is_had_once_and_free_again_after_close() -> None:
    name = f"test-{os.getpid()}-{time.monotonic_ns()}"
    server = SocketServer(name, {})
    with pytest.raises(OSError, match="in use"):
        SocketServer(name, {})
    server.close()
    with pytest.raises(OSError, match="refused"):
        SocketChannel(server.address)
    SocketServer(name, {}).close()


def test_frames_come_out_whole_however_they_arrive() -> None:
    sent = [(i, i % 3, bytes([i]) * (7 * i)) for i in range(30)]
    stream = b"".join(pack_frame(*frame) for frame in sent)
    for step in (1, 5, 13, len(stream)):
        buffer, got = bytearray(), []
        for start in range(0, len(stream), step):
            buffer += stream[start : start + step]
            got += list(take_frames(buffer))
        assert got == sent
        assert not buffer
    with pytest.raises(StorageError, match="is longer than"):
        pack_frame(1, 1, bytes((64 << 20) + 1))
