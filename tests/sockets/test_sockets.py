"""Sockets: calls by number from many threads, damage, ends on either side."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from litecache.errors import (
    ConfigError,
    GroupError,
    GroupUnavailableError,
    LiteCacheError,
    RequestTimeout,
    StorageError,
    StorageFullError,
)
from litecache.sockets import channel as channel_module
from litecache.sockets import frames, peers
from litecache.sockets import server as server_module
from litecache.sockets.channel import SocketChannel
from litecache.sockets.frames import pack_frame, take_frames
from litecache.sockets.server import AsyncSocketServer, SocketServer

REVERSE, SLOW, REFUSE, BREAK, NOTE, UNKNOWN, LONG = range(1, 8)


class Actor:
    """What the calls of these tests do."""

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

    def long(self, message: bytes) -> bytes:
        return bytes(frames.MAX_FRAME_BYTES + 1)


@pytest.fixture
def actor() -> Actor:
    return Actor()


@pytest.fixture
def server(actor: Actor) -> Iterator[SocketServer]:
    made = SocketServer(
        f"test-{os.getpid()}-{time.monotonic_ns()}",
        {
            REVERSE: actor.reverse,
            SLOW: actor.slow,
            REFUSE: actor.refuse,
            BREAK: actor.break_down,
            NOTE: actor.note,
            LONG: actor.long,
        },
    )
    yield made
    actor.may_go_on.set()
    made.close()


@pytest.fixture
def channel(server: SocketServer) -> Iterator[SocketChannel]:
    made = SocketChannel(server.address)
    yield made
    made.close()


def test_each_thread_gets_its_own_answer(channel: SocketChannel) -> None:
    def ask(i: int) -> bool:
        message = i.to_bytes(4, "little") * (1 + i % 50)
        return channel.answer(channel.call(REVERSE, message), 20) == message[::-1]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(2000)))


def test_answers_can_be_taken_in_any_order(channel: SocketChannel) -> None:
    numbers = [channel.call(REVERSE, bytes([i])) for i in range(20)]
    for i in reversed(range(20)):
        assert channel.answer(numbers[i], 20) == bytes([i])


def test_long_messages_go_both_ways_while_more_are_sent(channel: SocketChannel) -> None:
    # more than the socket's buffers hold, so that both sides have to send in pieces
    messages = [os.urandom(3 << 20) for _ in range(4)]
    numbers = [channel.call(REVERSE, message) for message in messages]
    for number, message in zip(numbers, messages, strict=True):
        assert channel.answer(number, 20) == message[::-1]


def test_a_message_without_an_answer_is_handled_in_order(
    channel: SocketChannel, actor: Actor
) -> None:
    for i in range(5):
        channel.tell(NOTE, bytes([i]))
    assert channel.answer(channel.call(REVERSE, b"ab"), 20) == b"ba"
    assert actor.released == [bytes([i]) for i in range(5)]
    assert not channel._answers


def test_errors_cost_one_call(channel: SocketChannel) -> None:
    with pytest.raises(ConfigError, match=r"^key=b'x' is invalid: 16 bytes") as refused:
        channel.answer(channel.call(REFUSE, b"x"), 20, "commit")
    assert (refused.value.field, refused.value.value) == ("key", "b'x'")
    assert refused.value.valid == "16 bytes"
    with pytest.raises(GroupError, match="commit failed: RuntimeError: a defect"):
        channel.answer(channel.call(BREAK, b"x"), 20, "commit")
    with pytest.raises(StorageError, match="there is no call 6"):
        channel.answer(channel.call(UNKNOWN, b"x"), 20)
    with pytest.raises(StorageError, match="is longer than"):
        channel.answer(channel.call(LONG, b"x"), 20)
    assert channel.answer(channel.call(REVERSE, b"ab"), 20) == b"ba"


def test_a_late_answer_can_be_waited_for_again(channel: SocketChannel, actor: Actor) -> None:
    number = channel.call(SLOW, b"later")
    with pytest.raises(RequestTimeout, match=r"stage took longer than 0\.05 s"):
        channel.answer(number, 0.05, "stage")
    actor.may_go_on.set()
    assert channel.answer(number, 20) == b"later"


def test_all_who_wait_learn_that_the_other_side_is_gone(
    channel: SocketChannel, server: SocketServer, actor: Actor
) -> None:
    numbers = [channel.call(SLOW, b"x") for _ in range(3)]

    def wait(number: int) -> str:
        with pytest.raises(GroupUnavailableError, match="has closed the socket"):
            channel.answer(number, 20)
        return "gone"

    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(wait, number) for number in numbers]
        assert not channel.hung_up
        server.close()
        actor.may_go_on.set()
        assert [each.result(20) for each in waiting] == ["gone"] * 3
    assert channel.hung_up
    with pytest.raises(GroupUnavailableError):
        channel.call(REVERSE, b"x")
    channel.tell(NOTE, b"x")


def test_closing_a_channel_ends_who_waits_on_it(server: SocketServer) -> None:
    channel = SocketChannel(server.address)
    number = channel.call(SLOW, b"x")
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
    assert channel.answer(channel.call(REVERSE, b"ab"), 20) == b"ba"


def test_another_user_is_not_let_in(server: SocketServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "same_user", lambda connection: False)
    channel = SocketChannel(server.address)
    with pytest.raises(GroupUnavailableError):
        channel.answer(channel.call(REVERSE, b"ab"), 20)
    channel.close()


def test_a_client_does_not_talk_to_another_users_process(
    server: SocketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "same_user", lambda connection: False)
    with pytest.raises(PermissionError):
        SocketChannel(server.address)


def test_other_users_cannot_reach_the_socket_and_need_not_be_asked(server: SocketServer) -> None:
    folder = Path(server.address).parent
    assert stat.S_IMODE(folder.lstat().st_mode) == 0o700
    assert stat.S_IMODE(Path(server.address).lstat().st_mode) == 0o600
    assert folder.lstat().st_uid == os.getuid()
    if os.getuid() == 0:
        code = f"import os, socket; os.setuid(65534); socket.socket(1).connect({server.address!r})"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "PermissionError" in ended.stderr


def test_a_folder_that_others_may_enter_or_own_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"litecache-{os.getuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    open_to_all = tmp_path / "run" / name
    open_to_all.mkdir(parents=True)
    open_to_all.chmod(0o755)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    long, good = tmp_path / ("x" * 100), tmp_path / "good"
    long.mkdir()
    good.mkdir()
    folders = iter([tmp_path / "other", long, good])
    bases = [Path(os.environ["XDG_RUNTIME_DIR"]), *folders]
    monkeypatch.setattr(peers, "_bases", lambda: iter(bases))
    server = SocketServer("private", {})
    assert server.address == str(good / name / "private.sock")
    server.close()
    monkeypatch.setattr(peers, "_bases", lambda: iter(bases[:1]))
    with pytest.raises(PermissionError, match="of this user alone"):
        SocketServer("private", {})


def test_what_a_killed_process_left_is_removed_and_what_lives_stays(server: SocketServer) -> None:
    folder = Path(server.address).parent
    code = (
        "import os, signal; from litecache.sockets.server import SocketServer;"
        f"print(SocketServer('left-{os.getpid()}', {{}}).address, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    stale = Path(left.stdout.strip())
    assert stale.parent == folder
    assert stale.exists()
    SocketServer(f"next-{time.monotonic_ns()}", {}).close()
    assert not stale.exists()
    assert Path(server.address).exists()
    server.close()
    assert not Path(server.address).exists()


def test_unfinished_frames_of_all_connections_have_one_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frames, "MAX_UNFINISHED_BYTES", 4 << 20)
    server = SocketServer(f"bound-{time.monotonic_ns()}", {REVERSE: lambda m: m[::-1]})
    half = struct.pack("<III", 60 << 20, 1, REVERSE) + bytes(1 << 20)
    clients = [socket.socket(socket.AF_UNIX) for _ in range(12)]
    ended = 0
    for client in clients:
        client.connect(server.address)
        client.settimeout(20)
        with contextlib.suppress(OSError):
            client.sendall(half)
    for client in clients[:-1]:
        client.setblocking(False)
    deadline = time.monotonic() + 60
    while ended < 9 and time.monotonic() < deadline:
        ended = sum(_has_ended(client) for client in clients)
        time.sleep(0.01)
    assert 9 <= ended < 12
    for client in clients:
        client.close()
    # what they held is free again
    channel = SocketChannel(server.address)
    message = os.urandom(3 << 20)
    assert channel.answer(channel.call(REVERSE, message), 20) == message[::-1]
    channel.close()
    server.close()


def _has_ended(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_frame_that_never_becomes_whole_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "FRAME_TIMEOUT_S", 0.3)
    server = SocketServer(f"slow-{time.monotonic_ns()}", {})
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(server.address)
        client.settimeout(20)
        for byte in struct.pack("<II", 9, 1):
            client.sendall(bytes([byte]))
        assert client.recv(1) == b""
    server.close()


def test_one_connection_too_many_is_closed_and_a_free_place_is_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frames, "MAX_CONNECTIONS", 2)
    server = SocketServer(f"few-{time.monotonic_ns()}", {REVERSE: lambda m: m[::-1]})
    first, second = SocketChannel(server.address), SocketChannel(server.address)
    assert first.answer(first.call(REVERSE, b"ab"), 20) == b"ba"
    assert second.answer(second.call(REVERSE, b"ab"), 20) == b"ba"
    third = SocketChannel(server.address)
    with pytest.raises(GroupUnavailableError):
        third.answer(third.call(REVERSE, b"ab"), 20)
    second.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        fourth = SocketChannel(server.address)
        with contextlib.suppress(GroupUnavailableError):
            assert fourth.answer(fourth.call(REVERSE, b"ab"), 20) == b"ba"
            break
        fourth.close()
    else:
        pytest.fail("the place of a connection that ended is not free again")
    for channel in (first, third, fourth):
        channel.close()
    server.close()


def test_a_server_takes_connections_again_after_there_was_no_room_for_a_thread(
    server: SocketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(server_module, "start_job", no_room)
        refused = SocketChannel(server.address)
        with pytest.raises(GroupUnavailableError):
            refused.answer(refused.call(REVERSE, b"ab"), 20)
        refused.close()
    channel = SocketChannel(server.address)
    assert channel.answer(channel.call(REVERSE, b"ab"), 20) == b"ba"
    channel.close()


def test_an_answer_that_nobody_wants_is_not_kept(channel: SocketChannel, actor: Actor) -> None:
    late = channel.call(SLOW, b"x")
    channel.forget(late)
    actor.may_go_on.set()
    there = channel.call(REVERSE, b"ab")
    assert channel.answer(channel.call(REVERSE, b"cd"), 20) == b"dc"
    channel.forget(there)
    assert not channel._answers
    assert not channel._unwanted


class TestOnALoop:
    """The same door on an asyncio loop: calls do not wait for each other."""

    @pytest.fixture
    def loop(self) -> Iterator[asyncio.AbstractEventLoop]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        yield loop
        # what the tests closed is noticed before the loop ends
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)

    def test_sending_does_not_wait_for_an_answer_that_another_thread_waits_for(
        self, loop: asyncio.AbstractEventLoop
    ) -> None:
        go_on = asyncio.Event()
        calls = []

        async def slow(message: bytes) -> bytes:
            await go_on.wait()
            return message

        async def reverse(message: bytes) -> bytes:
            calls.append(len(message))
            return message[::-1]

        name = f"test-{os.getpid()}-{time.monotonic_ns()}"
        door = AsyncSocketServer(name, {SLOW: slow, REVERSE: reverse})
        asyncio.run_coroutine_threadsafe(door.start(), loop).result(20)
        channel = SocketChannel(door.address)
        held = channel.call(SLOW, b"held")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(channel.answer, held, 60)
            deadline = time.monotonic() + 60
            while not channel._receiving and time.monotonic() < deadline:
                time.sleep(0.001)
            # more than the buffers of the socket, while the other thread waits in the kernel
            message = os.urandom(8 << 20)
            try:
                assert channel.answer(channel.call(REVERSE, message), 15) == message[::-1]
                channel.tell(REVERSE, message)
                assert channel.answer(channel.call(REVERSE, b"ab"), 15) == b"ba"
            finally:
                loop.call_soon_threadsafe(go_on.set)
            assert waiting.result(20) == b"held"
        assert calls == [len(message), len(message), 2]
        # with nobody waiting for an answer a message goes out whole, too
        channel.tell(REVERSE, message)
        deadline = time.monotonic() + 60
        while len(calls) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert calls[3:] == [len(message)]
        channel.close()
        loop.call_soon_threadsafe(door.close)

    def test_a_long_call_does_not_hold_up_the_others(self, loop: asyncio.AbstractEventLoop) -> None:
        go_on = asyncio.Event()

        async def slow(message: bytes) -> bytes:
            await go_on.wait()
            return message

        async def reverse(message: bytes) -> bytes:
            loop.call_soon(go_on.set)
            return message[::-1]

        async def broken(message: bytes) -> bytes:
            raise RuntimeError("a defect")

        async def long(message: bytes) -> bytes:
            return bytes(frames.MAX_FRAME_BYTES + 1)

        name = f"test-{os.getpid()}-{time.monotonic_ns()}"
        methods = {SLOW: slow, REVERSE: reverse, BREAK: broken, LONG: long}
        door = AsyncSocketServer(name, methods)
        asyncio.run_coroutine_threadsafe(door.start(), loop).result(20)
        channel = SocketChannel(door.address)
        held = channel.call(SLOW, b"held" * 100_000)
        with pytest.raises(GroupError, match="RuntimeError: a defect"):
            channel.answer(channel.call(BREAK, b""), 20)
        with pytest.raises(StorageError, match="there is no call 6"):
            channel.answer(channel.call(UNKNOWN, b""), 20)
        with pytest.raises(StorageError, match="is longer than"):
            channel.answer(channel.call(LONG, b""), 20)
        assert channel.answer(channel.call(REVERSE, b"ab"), 20) == b"ba"
        assert channel.answer(held, 20) == b"held" * 100_000
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bad:
            bad.settimeout(20)
            bad.connect(door.address)
            bad.sendall(b"\xff" * 64)
            assert bad.recv(100) == b""
        assert channel.answer(channel.call(REVERSE, b"cd"), 20) == b"dc"
        channel.close()
        loop.call_soon_threadsafe(door.close)


@pytest.mark.parametrize(
    "junk", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x94\xc0\xc0\xc0\xc0", b"\xff" * 9]
)
def test_an_error_that_cannot_be_read_is_an_error_all_the_same(junk: bytes) -> None:
    assert isinstance(frames.unpack_error(junk, "stage"), LiteCacheError)


def test_an_error_arrives_as_the_nearest_class_that_is_known() -> None:
    class OddError(StorageFullError):
        """Known here, and no longer once its name is changed."""

    error = OddError("room", [1] * 10_000, "less")
    again = frames.unpack_error(frames.pack_error(error), "stage")
    assert type(again) is OddError
    assert str(again) == str(error)
    assert len(str(again)) < 400
    OddError.__name__ = "Unknown"
    packed = frames.pack_error(error)
    OddError.__name__ = "OddError"
    assert type(frames.unpack_error(packed, "stage")) is StorageFullError


def test_an_address_is_had_once_and_free_again_after_close() -> None:
    name = f"test-{os.getpid()}-{time.monotonic_ns()}"
    server = SocketServer(name, {})
    with pytest.raises(OSError, match="exists"):
        SocketServer(name, {})
    server.close()
    with pytest.raises(OSError, match="No such file"):
        SocketChannel(server.address)
    for _ in range(200):  # without waiting for its thread, one close in fifty leaves it taken
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


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_cannot_call_on_its_parents_connection(server: SocketServer) -> None:
    channel = SocketChannel(server.address)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            told = str(channel.call(REVERSE, b"child"))
        except GroupUnavailableError:
            told = "refused"
        channel.close()
        os.write(writing, told.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"refused"
    os.waitpid(child, 0)
    assert channel.answer(channel.call(REVERSE, b"parent"), 10) == b"tnerap"
    channel.close()
