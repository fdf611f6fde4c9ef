"""Slots as the copier gives them: what one copy touches was pinned in one piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import Harness, family_source
from plan_driver import random_prompt

from litecache.engine.transfer import block_copier
from litecache.engine.transfer.block_copier import ArenaSlots, BlockCopier, PinnedArenas
from litecache.storage.client import LocalShardClient
from litecache.storage.shard_store import ShardStore

KIB = 1 << 10


class Driver:
    """The driver's book of pinned memory: ranges are whole, and none is pinned twice."""

    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        end = address + nbytes
        assert all(end <= start or address >= start + n for start, n in self.ranges.items())
        self.ranges[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.ranges[address]
        return 0

    def holds(self, piece: torch.Tensor) -> bool:
        """Whether one pinned range holds all of it: CUDA copies nothing else asynchronously."""
        start = piece.data_ptr()
        end = start + len(piece)
        return any(first <= start and end <= first + n for first, n in self.ranges.items())


@pytest.mark.parametrize("block_bytes", [16 * KIB, 48 * KIB, 80 * KIB, 200 * KIB])
def test_no_copy_leaves_a_range_that_was_pinned_in_one_piece(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    monkeypatch.setattr(block_copier, "_cudart", lambda: driver)
    with ShardStore(None, ram_bytes=2 << 20) as store:
        client, pinned = LocalShardClient(store), PinnedArenas()
        copier = BlockCopier(torch.device("cpu"), lambda step: None, pinned)
        copier._cuda = True
        refs = client.reserve(block_bytes, (2 << 20) // block_bytes // 2)
        slots = copier.slots(client.arena, [ref.slot for ref in refs], block_bytes).pieces()
        for ref, slot in zip(refs, slots, strict=True):
            assert all(driver.holds(piece) for piece in slot)
            whole = torch.from_numpy(client.arena.block(ref.slot, block_bytes))
            whole.random_()
            assert torch.equal(torch.cat(tuple(slot)), whole)
        cut = [len(slot) > 1 for slot in slots]
        assert any(cut) == (block_bytes > 16 * KIB)
        pinned.close()
        assert not driver.ranges
        del slots, slot, whole
        client.close()


def test_blocks_that_lie_in_two_segments_come_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[int] = []
    slots = BlockCopier.slots

    def noted(*args: Any) -> ArenaSlots:
        made = slots(*args)
        pieces.extend(map(len, made.pieces()))
        return made

    monkeypatch.setattr(BlockCopier, "slots", noted)
    asked = [random_prompt(200, seed=seed) for seed in range(3)]
    # blocks of 48 KiB over segments of 64 KiB
    sizes = {"ram_bytes": 1 << 20, "block_size": 64, "num_blocks": 16}
    with Harness(family_source("llama"), folders=[tmp_path], **sizes) as harness:
        cold = harness.run(asked, 4)
        for emptied in (("gpu",), ("gpu", "ram")):
            harness.empty(*emptied)
            assert harness.run(asked, 4) == cold
            assert all(sum(counts.values()) for counts in harness.reused)
    assert max(pieces) > 1
