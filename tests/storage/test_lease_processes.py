"""Either side of a copy is stopped, killed or restarted in the middle of it; all are processes.

The shard is a process of its own (`shard_process.py`). The client is this process, which can stand
still in the middle of a copy, or a child that is stopped or killed there. Every case asks the same:
no wrong byte, no lease that a clock ended, no lease that outlives its client.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from shard_process import ShardProcess
from storage_help import KIB, bytes_of, key_of

from litecache.errors import StorageError
from litecache.storage import (
    ArenaView,
    Attachment,
    CommitItem,
    CommitStatus,
    SlotRef,
    SlotState,
    StageStatus,
)

NBYTES = 64 * KIB
HALF = NBYTES // 2
ROOT = bytes(16)

# A client that copies a slot out, half, waits for a line, and copies the other half.
READER = """
import os, sys
from litecache.storage import ArenaView, Attachment
print(os.getpid(), flush=True)
view = ArenaView(Attachment(*eval(sys.stdin.readline())))
slot, generation, nbytes = eval(sys.stdin.readline())
memory = view.buffer(slot, nbytes)
copy = bytearray(memory[: nbytes // 2])
print("half", flush=True)
sys.stdin.readline()
copy += memory[nbytes // 2 :]
print(view.holds(slot, generation), bytes(copy).hex(), flush=True)
"""


class Reader:
    """A child that stands in the middle of a copy out of a slot."""

    def __init__(self, shard: ShardProcess, number: int) -> None:
        self.shard = shard
        self.child = subprocess.Popen(
            [sys.executable, "-c", READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = int(self.child.stdout.readline())
        attachment = shard.call("attach", self.pid)
        self.client_id = attachment.client_id
        (staged,) = shard.call("stage", self.client_id, [key_of(number)])
        assert staged.status == StageStatus.READY
        self.ref = SlotRef(staged.slot, staged.generation)
        self.say(tuple(attachment))
        self.say((*self.ref, NBYTES))
        assert self.child.stdout.readline() == "half\n"

    def say(self, value: object) -> None:
        self.child.stdin.write(f"{value!r}\n")
        self.child.stdin.flush()

    def finish(self) -> tuple[bool, bytes]:
        """Copy the rest; (the generation was still right, what was copied)."""
        self.say(0)
        held, copied = self.child.stdout.readline().split()
        return held == "True", bytes.fromhex(copied)

    def end(self) -> None:
        self.child.kill()
        self.child.wait()
        for stream in (self.child.stdin, self.child.stdout):
            stream.close()


@pytest.fixture
def shards(tmp_path) -> Iterator[Callable[[], ShardProcess]]:
    started: list[ShardProcess] = []

    def start() -> ShardProcess:
        started.append(ShardProcess(str(tmp_path / "shard")))
        return started[-1]

    yield start
    for shard in started:
        if shard.child.poll() is None:
            shard.kill()


class Client:
    """This process as a client."""

    def __init__(self, shard: ShardProcess) -> None:
        self.shard = shard
        self.attachment: Attachment = shard.call("attach", os.getpid())
        self.id = self.attachment.client_id
        self.view = ArenaView(self.attachment)

    def reserve(self) -> SlotRef:
        (ref,) = self.shard.call("reserve", self.id, NBYTES, 1)
        return ref

    def copy_in(self, ref: SlotRef, number: int, first: int, last: int) -> None:
        self.view.buffer(ref.slot, NBYTES)[first:last] = bytes_of(key_of(number), NBYTES)[
            first:last
        ]

    def commit(self, ref: SlotRef, number: int) -> int:
        item = CommitItem(*ref, key_of(number), ROOT, "test")
        (status,) = self.shard.call("commit", self.id, [item])
        return status

    def put(self, number: int) -> None:
        ref = self.reserve()
        self.copy_in(ref, number, 0, NBYTES)
        assert self.commit(ref, number) == CommitStatus.STORED

    def stage(self, number: int) -> Any:
        (staged,) = self.shard.call("stage", self.id, [key_of(number)])
        return staged

    def get(self, number: int) -> bool:
        staged = self.stage(number)
        if staged.slot < 0:
            return False
        ref = SlotRef(staged.slot, staged.generation)
        self.shard.call("wait", [ref], 20.0)
        if not self.view.holds(*ref):
            return False
        right = bytes(self.view.buffer(ref.slot, NBYTES)) == bytes_of(key_of(number), NBYTES)
        assert right, "a wrong byte"
        self.shard.call("release", self.id, [ref])
        return True


def leases(shard: ShardProcess) -> int:
    return shard.call("stats")["leases"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_a_stopped_shard_delays_a_copy_in_and_spoils_nothing(shards):
    shard = shards()
    client = Client(shard)
    ref = client.reserve()
    client.copy_in(ref, 1, 0, HALF)
    shard.stop()
    client.copy_in(ref, 1, HALF, NBYTES)
    shard.send("commit", client.id, [CommitItem(*ref, key_of(1), ROOT, "test")])
    assert shard.silent(0.3)
    shard.go_on()
    assert shard.answer() == [CommitStatus.STORED]
    assert client.get(1)
    assert leases(shard) == 0


def test_a_stopped_shard_does_not_disturb_a_copy_out(shards):
    shard = shards()
    client = Client(shard)
    client.put(1)
    staged = client.stage(1)
    memory = client.view.buffer(staged.slot, NBYTES)
    copied = bytes(memory[:HALF])
    shard.stop()
    copied += bytes(memory[HALF:])
    assert client.view.holds(staged.slot, staged.generation)
    assert copied == bytes_of(key_of(1), NBYTES)
    shard.go_on()
    shard.call("release", client.id, [SlotRef(staged.slot, staged.generation)])
    assert leases(shard) == 0


def test_a_shard_killed_and_restarted_during_a_copy_in_never_knows_the_block(shards):
    shard = shards()
    client = Client(shard)
    client.put(7)
    assert shard.call("flush", 10.0).complete
    ref = client.reserve()
    client.copy_in(ref, 1, 0, HALF)
    shard.kill()
    client.copy_in(ref, 1, HALF, NBYTES)  # the mapping outlives the process that made it
    again = shards()
    with pytest.raises(StorageError, match="attach again"):
        again.call("commit", client.id, [CommitItem(*ref, key_of(1), ROOT, "test")])
    fresh = Client(again)
    assert fresh.attachment.epoch != client.attachment.epoch
    # the new life gives out the same slot; the old client's late bytes go to the old memory
    fresh.put(3)
    taken = fresh.reserve()
    assert taken.slot == ref.slot
    fresh.copy_in(taken, 2, 0, NBYTES)
    client.copy_in(ref, 1, 0, NBYTES)
    assert fresh.commit(taken, 2) == CommitStatus.STORED
    assert [fresh.get(number) for number in (1, 2, 7)] == [False, True, True]
    assert leases(again) == 0


def test_a_shard_killed_and_restarted_during_a_copy_out_leaves_right_bytes(shards):
    shard = shards()
    client = Client(shard)
    client.put(1)
    assert shard.call("flush", 10.0).complete
    staged = client.stage(1)
    memory = client.view.buffer(staged.slot, NBYTES)
    copied = bytes(memory[:HALF])
    shard.kill()
    again = shards()
    fresh = Client(again)
    for number in range(100, 110):
        fresh.put(number)
    copied += bytes(memory[HALF:])
    assert client.view.holds(staged.slot, staged.generation)
    assert copied == bytes_of(key_of(1), NBYTES)
    assert fresh.get(1), "a durable block is there again"
    with pytest.raises(StorageError, match="attach again"):
        again.call("release", client.id, [SlotRef(staged.slot, staged.generation)])
    assert leases(again) == 0


def test_a_read_that_dies_with_its_shard_never_looks_complete(shards):
    shard = shards()
    client = Client(shard)
    numbers = range(64)
    for number in numbers:
        wait_until(lambda number=number: try_put(client, number))
    assert shard.call("flush", 20.0).complete
    shard.call("clear", "ram")
    shard.send("stage", client.id, [key_of(number) for number in range(12)])
    staged = shard.answer()
    shard.kill()
    seen = [client.view.state(s.slot, s.generation) for s in staged]
    for number, state, s in zip(range(12), seen, staged, strict=True):
        # what the dead shard had not finished stays LOADING for ever: the client gives it up
        assert state in (SlotState.LOADING, SlotState.READY)
        assert client.view.holds(s.slot, s.generation) == (state is SlotState.READY)
        if state is SlotState.READY:
            found = bytes(client.view.buffer(s.slot, NBYTES))
            assert found == bytes_of(key_of(number), NBYTES)
    fresh = Client(shards())
    assert all(fresh.get(number) for number in range(12))


def try_put(client: Client, number: int) -> bool:
    refs = client.shard.call("reserve", client.id, NBYTES, 1)
    if not refs:
        return False
    client.copy_in(refs[0], number, 0, NBYTES)
    return client.commit(refs[0], number) == CommitStatus.STORED


def test_a_client_stopped_during_a_copy_out_keeps_its_slot_for_as_long_as_it_takes(shards):
    shard = shards()
    client = Client(shard)
    client.put(1)
    reader = Reader(shard, 1)
    try:
        os.kill(reader.pid, signal.SIGSTOP)
        for number in range(100, 160):  # every slot without a lease is recycled, some twice
            wait_until(lambda number=number: try_put(client, number))
        assert leases(shard) == 1
        os.kill(reader.pid, signal.SIGCONT)
        held, copied = reader.finish()
        assert held
        assert copied == bytes_of(key_of(1), NBYTES)
    finally:
        reader.end()
    wait_until(lambda: leases(shard) == 0)


def test_a_client_killed_during_a_copy_out_gives_its_slot_back_and_may_start_again(shards):
    shard = shards()
    client = Client(shard)
    client.put(1)
    assert shard.call("flush", 10.0).complete
    reader = Reader(shard, 1)
    assert leases(shard) == 1
    reader.end()
    wait_until(lambda: leases(shard) == 0)
    for number in range(100, 130):
        wait_until(lambda number=number: try_put(client, number))
    assert not client.view.holds(*reader.ref), "the slot was free to be given to others"
    with pytest.raises(StorageError, match="attach again"):
        shard.call("release", reader.client_id, [reader.ref])
    wait_until(lambda: client.get(1))  # back into RAM, once a slot is written out
    restarted = Reader(shard, 1)
    try:
        assert restarted.client_id != reader.client_id
        assert restarted.finish() == (True, bytes_of(key_of(1), NBYTES))
    finally:
        restarted.end()
    wait_until(lambda: leases(shard) == 0)
