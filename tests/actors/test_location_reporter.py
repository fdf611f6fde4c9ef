from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from litecache.actors.locations import LocationMap, LocationReport, LocationReporter
from litecache.errors import GroupUnavailableError
from litecache.storage.client import LocalShardClient
from litecache.storage.protocol import CommitItem
from litecache.storage.shard_store import ShardStore

BLOCK = 4096


class FlakyMap:
    """A `LocationMap` that can be out of reach, or lose its memory."""

    def __init__(self) -> None:
        self.located = LocationMap()
        self.out_of_reach = False
        self.resyncs = 0
        self.changed = threading.Condition()

    def restart(self) -> None:
        self.located = LocationMap()

    def report(self, report: LocationReport) -> bool:
        self._reach()
        self.resyncs += report.part == 0
        taken = self.located.report(LocationReport.unpacked(*report.packed()))
        self._tell()
        return taken

    def wait_for(self, keys: set[bytes]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.located.keys_of("s") == keys, 20)

    def _reach(self) -> None:
        if self.out_of_reach:
            raise GroupUnavailableError("out of reach")

    def _tell(self) -> None:
        with self.changed:
            self.changed.notify_all()


@pytest.fixture
def store() -> Iterator[ShardStore]:
    with ShardStore(None, ram_bytes=1 << 20) as opened:
        yield opened


def put(store: ShardStore, *numbers: int) -> set[bytes]:
    client = LocalShardClient(store)
    keys = [bytes([n]) * 16 for n in numbers]
    slots = client.reserve(BLOCK, len(keys))
    client.commit(
        [CommitItem(*slot, key, bytes(16)) for slot, key in zip(slots, keys, strict=True)]
    )
    client.close()
    return set(keys)


def test_the_map_follows_a_shard(store: ShardStore) -> None:
    sink = FlakyMap()
    keys = put(store, 1, 2)
    reporter = LocationReporter(store, sink.report, "s", "n", interval_s=60)
    try:
        sink.wait_for(keys)
        keys |= put(store, 3)
        reporter.notify()
        sink.wait_for(keys)
        store.delete([bytes([1]) * 16])
        reporter.notify()
        sink.wait_for(keys - {bytes([1]) * 16})
    finally:
        reporter.close()
    assert len(sink.located.shards()) == 1


def test_a_restarted_coordinator_is_filled_again(store: ShardStore) -> None:
    sink = FlakyMap()
    keys = put(store, 1, 2)
    reporter = LocationReporter(store, sink.report, "s", "n", interval_s=0.02)
    try:
        sink.wait_for(keys)
        sink.restart()
        sink.wait_for(keys)
    finally:
        reporter.close()


def test_changes_while_the_coordinator_is_out_of_reach_are_not_lost(store: ShardStore) -> None:
    sink = FlakyMap()
    keys = put(store, 1)
    reporter = LocationReporter(store, sink.report, "s", "n", interval_s=0.02)
    try:
        sink.wait_for(keys)
        sink.out_of_reach = True
        keys |= put(store, 2)
        with pytest.raises(GroupUnavailableError):
            reporter.report()  # this message is lost
        sink.out_of_reach = False
        sink.wait_for(keys)
        assert sink.resyncs == 1  # the one at the start
    finally:
        reporter.close()
