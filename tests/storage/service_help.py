"""Shared by the tests of LocalCacheService and PyLocalCacheService."""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Sequence

import pytest
import torch

from litecache.storage import PyLocalCacheService, PyState, PyTask
from litecache.storage.service.pages import BlockLayout

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


class Gate:
    """Holds copies between the tensor and the store, so that a test can act in the middle of one.

    Attributes:
        copies: how many have begun.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, copy: str) -> None:
        real = getattr(BlockLayout, copy)
        self.entered, self.open = threading.Event(), threading.Event()
        self.copies = 0

        def held(layout, pages, memory) -> None:
            self.copies += 1
            self.entered.set()
            assert self.open.wait(30), "nobody opened the gate"
            real(layout, pages, memory)

        monkeypatch.setattr(BlockLayout, copy, held)

    def abort_inside(self, cache: PyLocalCacheService, task: PyTask) -> None:
        """Abort while the first copy is under way; the copy ends, then `abort` returns."""
        assert self.entered.wait(30)
        aborting = threading.Thread(target=cache.abort, args=(task,))
        aborting.start()
        aborting.join(0.2)
        assert aborting.is_alive(), "abort did not wait for the copy"
        self.open.set()
        aborting.join(30)
        assert not aborting.is_alive()
