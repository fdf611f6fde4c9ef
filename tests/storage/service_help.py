"""Shared by the tests of LocalCacheService and PyLocalCacheService."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import torch

from litecache.storage import PyLocalCacheService, PyState, PyTask

FINISHED, ABORTED = PyState.Finished, PyState.Aborted


def tensor(pages: int, page_bytes: int = 4096, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (pages, page_bytes), dtype=torch.uint8, generator=generator)


def service(
    kv: torch.Tensor, folder: pathlib.Path, storage_mb: int = 128, shards: int = 2, workers: int = 4
) -> PyLocalCacheService:
    return PyLocalCacheService(
        kvcache_tensor=kv,
        file=str(folder / "cache"),
        storage_size=storage_mb << 20,
        num_shard=shards,
        num_worker=workers,
    )


def run(
    cache: PyLocalCacheService, tokens: Sequence[int], pages: Sequence[int], mode: str, **more: int
) -> PyTask:
    indexer = torch.tensor(list(pages), dtype=torch.int32)
    task = cache.create(tokens=list(tokens), kv_page_indexer=indexer, mode=mode, **more)
    assert task.wait(60), "the task did not end"
    return task


def round_trip(cache: PyLocalCacheService, kv: torch.Tensor, pages: Sequence[int]) -> None:
    tokens = [1000 + i for i in range(len(pages))]
    before = kv.clone()
    assert set(run(cache, tokens, pages, "w").state()) == {FINISHED}
    kv.zero_()
    assert set(run(cache, tokens, pages, "r").state()) == {FINISHED}
    used = sorted(set(pages))
    assert torch.equal(kv[used], before[used])
