"""Chains that grow piece by piece in a full store: tails leave first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from storage_help import key_of, put

from litecache.storage import LocalShardClient, ShardStore

NBYTES, ROOT = 4096, bytes(16)
PIECE = 20


class Filled:
    """A store full of old chains of ten blocks."""

    def __init__(self, store: ShardStore) -> None:
        self.store, self.client = store, LocalShardClient(store)
        self._next = 0
        while not self._evicted():
            self.add_old_chain()

    def _evicted(self) -> bool:
        return self.store.metrics.by_label("litecache_evictions", "tier") != {}

    def add_old_chain(self) -> None:
        self._next += 10
        put(self.client, [key_of(self._next + i) for i in range(10)], NBYTES, ROOT)

    def grow(self, chain: list[bytes], by: int) -> None:
        new = [key_of(1 << 40 | len(chain) + i) for i in range(by)]
        put(self.client, new, NBYTES, chain[-1] if chain else ROOT)
        chain += new


@pytest.fixture(params=["RAM alone", "with a disk"])
def filled(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Filled]:
    folder = None if request.param == "RAM alone" else str(tmp_path / "s")
    with ShardStore(folder, storage_bytes=12 << 20, ram_bytes=8 << 20, io_threads=0) as store:
        made = Filled(store)
        yield made
        made.client.close()


def test_tails_leave_before_heads_however_the_chain_was_written(filled: Filled) -> None:
    chain: list[bytes] = []
    for _ in range(30):
        filled.grow(chain, PIECE)
    there = filled.client.query(chain)
    assert all(there)
    for _ in range(1000):
        filled.add_old_chain()
        there = filled.client.query(chain)
        count = sum(there)
        assert there == [True] * count + [False] * (len(chain) - count)
        if not count:
            break
    assert not any(there)


def test_a_chain_that_is_used_again_outlives_those_that_are_not(filled: Filled) -> None:
    used: list[bytes] = []
    filled.grow(used, 100)
    for _ in range(600):
        filled.add_old_chain()
        filled.client.touch(used[-1:])
    assert all(filled.client.query(used))
