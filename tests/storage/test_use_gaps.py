"""How long a block lay unused until a hit, as a shard counts it."""

from __future__ import annotations

import time

import pytest
from storage_help import fill, get

from litecache.metrics import GAP_BOUNDS_S
from litecache.storage import LocalShardClient, ShardStore

NBYTES = 4096


def test_hits_tell_how_long_their_blocks_lay_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    with ShardStore(None, ram_bytes=4 << 20) as store:
        old = fill(store, range(3), NBYTES)
        now[0] += 600
        young = fill(store, range(3, 5), NBYTES)
        now[0] += 30
        client = LocalShardClient(store)
        assert all(get(client, [*old, *young], NBYTES))
        now[0] += 10
        assert all(get(client, old, NBYTES))
        client.close()
        (_, _, told), *more = store.metrics.snapshot()["histograms"]
    assert not more
    assert isinstance(told, dict)
    counts = dict(zip([*GAP_BOUNDS_S, None], told["buckets"], strict=True))
    assert {bound: count for bound, count in counts.items() if count} == {15: 3, 60: 2, 900: 3}
    assert told["sum"] == 3 * 630 + 2 * 30 + 3 * 10
