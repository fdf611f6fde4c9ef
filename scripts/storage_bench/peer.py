"""`light_mem` beside `PyLocalCacheService`: same tensor, same disk, same run."""

from __future__ import annotations

import time
from typing import Any

from bench_common import Report, Row, alternate, summarise

MIB = 1 << 20
ROUNDS = 4


class _Service:
    """One of the two, written and read a tensor at a time."""

    def __init__(self, kind: Any, kv: Any, file: str) -> None:
        self._service = kind(
            kvcache_tensor=kv, file=file, storage_size=4 << 30, num_shard=4, num_worker=16
        )
        self._kv = kv
        self._turns = {"w": 0, "r": 0}

    def turn(self, mode: str) -> float:
        """GB/s of one task over the whole tensor; reads follow the writes in order."""
        import torch

        pages = len(self._kv)
        first = self._turns[mode] * pages
        self._turns[mode] += 1
        begun = time.perf_counter()
        task = self._service.create(
            tokens=list(range(first, first + pages)),
            kv_page_indexer=torch.arange(pages, dtype=torch.int32),
            mode=mode,
        )
        while not task.ready():
            time.sleep(0.0005)
        return self._kv.numel() / (time.perf_counter() - begun) / 1e9


def bench_light_mem(report: Report, folder: str, quick: bool) -> None:
    """Both alternate; nothing but a note where `light_mem` is not importable."""
    try:
        import light_mem
        import torch
    except ImportError:
        report.console.print("light_mem is not importable: no comparison with it")
        return
    from litecache.storage import PyLocalCacheService

    pages = 64 if quick else 256
    kv = torch.randint(0, 256, (pages, MIB), dtype=torch.uint8)
    peer = _Service(light_mem.PyLocalCacheService, kv, f"{folder}/peer")
    ours = _Service(PyLocalCacheService, kv, f"{folder}/ours")
    for mode, label in (("w", "write until ready"), ("r", "read")):
        samples = alternate(
            ROUNDS,
            {"ours": lambda m=mode: ours.turn(m), "light_mem": lambda m=mode: peer.turn(m)},
        )
        mine, theirs = summarise(samples["ours"]), summarise(samples["light_mem"])
        report.add(
            Row("PyLocalCacheService", label, mine.median, "GB/s", theirs.median,
                mine.median / theirs.median, "light_mem", mine.spread, ROUNDS)
        )  # fmt: skip
