"""A lease ends by a call or by proof that the client is gone, never by a clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from storage_help import KIB, MIB, bytes_of, fill, get, key_of, put

from litecache.errors import StorageError
from litecache.storage import ArenaView, Attachment, LocalShardClient, ShardStore, SlotRef

HERE = os.path.dirname(__file__)
NBYTES = 64 * KIB

CHILD = """
import sys, time
from litecache.storage import ArenaView, Attachment
from storage_help import bytes_of, key_of
print("ready", flush=True)
attachment = Attachment(*eval(sys.stdin.readline()))
view = ArenaView(attachment)
slot, number, nbytes = eval(sys.stdin.readline())
data = bytes_of(key_of(number), nbytes)
while True:
    for start in range(0, nbytes, 4096):
        view.buffer(slot, nbytes)[start : start + 4096] = data[start : start + 4096]
    print("copied", flush=True)
"""


class Copier:
    """A client process that copies into a slot for ever."""

    def __init__(self, store: ShardStore, number: int) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE,
        )
        self.expect("ready")
        attachment = store.attach(self.child.pid)
        self.client_id = attachment.client_id
        (self.ref,) = store.reserve(self.client_id, NBYTES, 1)
        self.say(tuple(attachment))
        self.say((self.ref.slot, number, NBYTES))
        self.expect("copied")

    def say(self, value: object) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(f"{value!r}\n")
        self.child.stdin.flush()

    def expect(self, line: str) -> None:
        assert self.child.stdout is not None
        assert self.child.stdout.readline().strip() == line

    def end(self) -> None:
        self.child.kill()
        self.child.wait()
        for stream in (self.child.stdin, self.child.stdout):
            stream.close()


@pytest.fixture
def store():
    with ShardStore(None, ram_bytes=1 * MIB) as made:
        yield made
        made.check_integrity()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def test_a_stopped_client_keeps_its_lease_and_a_killed_one_loses_it(store):
    copier = Copier(store, 1)
    try:
        os.kill(copier.child.pid, signal.SIGSTOP)
        fill(store, range(100, 140), NBYTES)  # more than fits: every other slot is recycled
        time.sleep(0.3)  # no clock may end the lease
        assert store.stats()["leases"] == 1
        assert store._tiers.by_slot[copier.ref.slot].generation == copier.ref.generation
        os.kill(copier.child.pid, signal.SIGCONT)
        copier.expect("copied")
        assert store.stats()["leases"] == 1
    finally:
        copier.end()
    wait_until(lambda: store.stats()["leases"] == 0)
    assert copier.ref.slot not in store._tiers.by_slot or (
        store._tiers.by_slot[copier.ref.slot].generation != copier.ref.generation
    )


def test_a_client_that_dies_between_reserve_and_commit_loses_the_slot_not_the_bytes_of_others(
    store,
):
    client = LocalShardClient(store)
    put(client, [key_of(5)], NBYTES)
    copier = Copier(store, 2)
    copier.end()
    wait_until(lambda: store.stats()["leases"] == 0)
    assert store.query([key_of(2)]) == [False]
    assert get(client, [key_of(5)], NBYTES) == [True]
    with pytest.raises(StorageError, match="attach again"):
        store.reserve(copier.client_id, NBYTES, 1)


def test_an_in_flight_copy_into_a_slot_of_a_dead_shard_harms_nobody():
    first = ShardStore(None, ram_bytes=1 * MIB)
    copier = Copier(first, 3)
    try:
        first.close()
        with ShardStore(None, ram_bytes=1 * MIB) as second:
            keys = fill(second, range(10), NBYTES)
            copier.expect("copied")  # it still writes to the old memory
            client = LocalShardClient(second)
            assert all(get(client, keys, NBYTES))
            assert second.epoch != first.epoch
            with pytest.raises(StorageError):
                second.stage(copier.client_id, keys)
            client.close()
    finally:
        copier.end()


def test_detach_ends_all_leases(store):
    client = LocalShardClient(store)
    put(client, [key_of(0)], NBYTES)
    client.stage([key_of(0), key_of(0)])
    client.reserve(NBYTES, 3)
    assert store.stats()["leases"] == 5
    client.close()
    assert store.stats()["leases"] == 0


def test_leases_of_two_clients_on_one_slot_are_counted(store):
    one, two = LocalShardClient(store), LocalShardClient(store)
    put(one, [key_of(0)], NBYTES)
    (a,), (b,) = one.stage([key_of(0)]), two.stage([key_of(0)])
    assert (a.slot, a.generation) == (b.slot, b.generation)
    one.release([SlotRef(a.slot, a.generation), SlotRef(a.slot, a.generation)])
    fill(store, range(1, 40), NBYTES)
    assert bytes(two.arena.buffer(b.slot, NBYTES)) == bytes_of(key_of(0), NBYTES)
    assert two.arena.holds(b.slot, b.generation)


def test_a_dead_process_cannot_attach(store):
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(StorageError, match="client_pid"):
        store.attach(child.pid)


def test_another_protocol_version_is_refused(store):
    attachment = store.attach(os.getpid())
    with pytest.raises(StorageError, match="protocol"):
        ArenaView(attachment._replace(version=99))
    gone = Attachment(*attachment)._replace(arena_pid=2**22 - 1)
    with pytest.raises(StorageError, match="cannot be opened"):
        ArenaView(gone)
