"""The key index alone: query time of 1,000 keys in one call, and memory of ten million entries."""

from __future__ import annotations

import mmap
import time

import numpy as np
from bench_common import Report, Row, summarise

from litecache.storage.block_index import BlockIndex
from litecache.storage.eviction.queues import Queues


def bench_index(report: Report, quick: bool) -> None:
    """Add the rows; `quick` takes a tenth of the entries."""
    count = 1_000_000 if quick else 10_000_000
    before = _rss_bytes()
    index, queues = BlockIndex(), Queues("lru")
    draw = np.random.default_rng(0)
    words = draw.integers(0, 2**64, (count, 2), np.uint64)
    entries = index.insert_words(words)
    zeros = np.zeros(count, np.int64)
    queues.extend(entries, zeros + 90, zeros, words[:, 0])
    sample = words[draw.integers(0, count, 200_000)].tobytes()
    del words, zeros, entries
    used = _rss_bytes() - before
    report.add(Row("index", f"RSS of {count:,} entries", used / 1e9, "GB", 1.5, None, "bound"))
    report.add(Row("index", "bytes an entry", used / count, "B", 150, None, "bound"))
    keys = [sample[i : i + 16] for i in range(0, len(sample), 16)]
    times = []
    for start in range(0, len(keys), 1000):
        begun = time.perf_counter()
        found = index.find_many(keys[start : start + 1000])
        times.append((time.perf_counter() - begun) * 1e3)
        assert (found >= 0).all()
    result = summarise(times)
    report.add(
        Row("index", "query of 1,000 keys", result.median, "ms", 1.0, None, "bound", result.spread,
            result.samples)
    )  # fmt: skip


def _rss_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE
