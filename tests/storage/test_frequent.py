"""`admission="frequent"`: what is used twice is written, what never comes back is not."""

from __future__ import annotations

import collections
import random

import numpy as np
import pytest
from storage_help import KIB, MIB, get, key_of, put

from litecache.storage import CommitItem, LocalShardClient, ShardStore, SlotRef
from litecache.storage.admission import FrequencySketch

NBYTES = 4 * KIB


def make(folder, **options) -> ShardStore:
    options = {"storage_bytes": 4 * MIB, "ram_bytes": MIB, "io_threads": 0, **options}
    return ShardStore(str(folder), **{"admission": "frequent", **options})


def test_the_sketch_never_counts_too_low_and_forgets_by_halves():
    sketch, uses = FrequencySketch(1 << 12), collections.Counter()
    draw = random.Random(1)
    for _ in range((1 << 11) - 1):
        key = key_of(min(int(draw.paretovariate(0.4)), 1000))
        uses[key] += 1
        assert sketch.add(key) >= min(15, uses[key])
    assert max(uses.values()) > 15
    sketch.add(key_of(0))
    often = max(uses, key=uses.__getitem__)
    assert sketch.add(often) == 8
    for _ in range(20):
        assert 9 <= sketch.add(often) <= 15


def test_few_keys_of_a_scan_pass_for_known():
    sketch = FrequencySketch(1 << 17)
    keys = np.random.default_rng(0).bytes(16 * 60_000)
    known = sum(sketch.add(keys[at : at + 16]) > 1 for at in range(0, len(keys), 16))
    assert known < 0.01 * 60_000


def test_a_scan_writes_next_to_nothing_and_a_second_use_writes(tmp_path):
    with make(tmp_path) as store:
        client = LocalShardClient(store)
        for start in range(0, 2000, 8):
            put(client, [key_of(start + i) for i in range(8)], NBYTES)
        assert store.stats()["disk_blocks"] <= 10
        found = [key_of(1990 + i) for i in range(4)]
        assert all(get(client, found, NBYTES))
        assert store.flush().complete
        assert all(store.durable(found))
        # computed again after RAM had lost it
        assert not store.query([key_of(3)])[0]
        put(client, [key_of(3)], NBYTES)
        assert store.flush().complete
        assert store.durable([key_of(3)]) == [True]
        assert store.stats()["disk_blocks"] <= 15
        store.check_integrity()
        client.close()


def test_a_hit_elsewhere_counts_for_the_chain_whose_last_key_is_told(tmp_path):
    with make(tmp_path) as store:
        client = LocalShardClient(store)
        chain, other = [key_of(i) for i in range(8)], [key_of(100 + i) for i in range(8)]
        put(client, chain, NBYTES)
        put(client, other, NBYTES)
        put(client, [key_of(300)], NBYTES, key_of(300))  # follows itself
        store.touch([chain[5], key_of(300)])
        assert store.flush().complete
        assert store.durable(chain) == [True] * 6 + [False] * 2
        assert not any(store.durable(other))
        assert store.durable([key_of(300)]) == [True]
        store.check_integrity()
        client.close()


@pytest.mark.slow
def test_hits_are_as_many_as_with_all_for_a_part_of_the_writes(tmp_path):
    """Prompts of four blocks, half of them of a Zipf distribution, half never seen again."""

    def run(admission: str) -> tuple[float, float]:
        draw = np.random.default_rng(7)
        with make(tmp_path / admission, admission=admission) as store:
            client, hits = LocalShardClient(store), 0
            for ask in range(2400):
                prompt = 10_000 + ask if ask % 2 else int(draw.zipf(1.1)) % 1000
                keys = [key_of(4 * prompt + i) for i in range(4)]
                staged = client.stage(keys)
                client.release([SlotRef(*r[1:]) for r in staged if r.slot >= 0])
                hits += sum(r.slot >= 0 for r in staged)
                if staged[3].slot < 0:
                    refs = client.reserve(NBYTES, 4)
                    chain = zip(refs, keys, [bytes(16), *keys], strict=False)
                    client.commit([CommitItem(*ref, key, parent) for ref, key, parent in chain])
            store.check_integrity()
            client.close()
            written = store.metrics.value("litecache_storage_bytes", direction="write", tier="disk")
            return hits / (4 * 1200), written

    (hits, written), (hits_all, written_all) = run("frequent"), run("all")
    print(f"hits {hits:.3f} against {hits_all:.3f}, bytes {written:.0f} against {written_all:.0f}")
    assert hits >= hits_all > 0.3
    assert written <= 0.4 * written_all
