"""Turns through a shard's API, in batches of 64 blocks, as an engine would make them."""

from __future__ import annotations

import os
import time
from collections import deque
from typing import NamedTuple

import numpy as np

from litecache.storage import CommitItem, SlotRef, StageResult
from litecache.storage.client import PendingStage
from litecache.storage.disk.raw_disk import private
from storage_bench.backends import Backend, flushed

BATCH = 64
AHEAD = 3
ROOT = bytes(16)


class _Batch(NamedTuple):
    """A batch that was staged: the position of its first block and the answer to come."""

    first: int
    pending: PendingStage


class ShardTurns:
    """Writes and reads blocks of one size.

    Args:
        backend: the shard.
        block: bytes of a block.
        turn_bytes: bytes of a turn, rounded down to whole blocks.
    """

    def __init__(self, backend: Backend, block: int, turn_bytes: int) -> None:
        self.backend, self.client = backend, backend.client
        self.block = block
        self.turn_blocks = turn_bytes // block
        self.batch = min(BATCH, self.turn_blocks)
        self._source = private(self.turn_blocks * block)
        self._target = private(self.turn_blocks * block, fill=1)
        self.turns: list[list[bytes]] = []
        self._turn = 0

    @property
    def turn_bytes(self) -> int:
        """Bytes that a turn moves."""
        return self.turn_blocks * self.block

    def write(self) -> float:
        """GB/s from the first commit of filled slots until all of a turn's blocks are durable.

        The client's copy into the slots is not counted: on a GPU it is a DMA from the device.
        """
        keys = [os.urandom(16) for _ in range(self.turn_blocks)]
        items: list[CommitItem] = []
        while len(items) < len(keys):
            refs = self.client.reserve(self.block, min(self.batch, len(keys) - len(items)))
            if not refs:
                flushed(self.client)
            for ref in refs:
                done = len(items)
                np.copyto(self.client.arena.block(ref.slot, self.block), self._part(done))
                parent = keys[done - 1] if done else ROOT
                items.append(CommitItem(ref.slot, ref.generation, keys[done], parent, "bench"))
        begun = time.perf_counter()
        for start in range(0, len(items), self.batch):
            self.client.commit(items[start : start + self.batch])
        flushed(self.client)
        elapsed = time.perf_counter() - begun
        self.turns.append(keys)
        return self.turn_bytes / elapsed / 1e9

    def _part(self, i: int) -> np.ndarray:
        return self._source[i * self.block : (i + 1) * self.block]

    def read(self) -> float:
        """GB/s of staging one turn's blocks from disk, until they are ready in their slots."""
        self._turn = (self._turn + 1) % len(self.turns)
        self.backend.clear_ram()
        return self._stage(self.turns[self._turn], copy=False)

    def hit(self) -> float:
        """GB/s of staging one turn's blocks from RAM and copying them into an own buffer."""
        keys = self.turns[-1]
        self._stage(keys, copy=False)
        return self._stage(keys, copy=True)

    def _stage(self, keys: list[bytes], *, copy: bool) -> float:
        """Stage a turn, wait for it and, with `copy`, copy it block by block.

        While one batch is copied up to `AHEAD` others are under way. They are asked for in bursts
        and their answers taken in bursts, because after a copy of many MiB the first call finds
        none of its code and data in the caches; leases ride back with the next burst.
        """
        begun = time.perf_counter()
        firsts = deque(range(0, len(keys), self.batch))
        asked: list[_Batch] = []
        answered: deque[tuple[int, list[StageResult]]] = deque()
        done: list[SlotRef] = []
        hits = 0
        while firsts or asked or answered:
            if len(answered) <= 1 and not asked:
                for _ in range(min(AHEAD, len(firsts))):
                    first = firsts.popleft()
                    part = keys[first : first + self.batch]
                    asked.append(_Batch(first, self.client.stage_async(part, done)))
                    done = []
            if not answered:
                answered.extend((first, pending.result()) for first, pending in asked)
                asked.clear()
            hits += self._take(*answered.popleft(), done, copy=copy)
        elapsed = time.perf_counter() - begun
        self.client.release(done)
        if hits < 0.99 * len(keys):
            raise RuntimeError(f"only {hits} of {len(keys)} blocks hit")
        return hits * self.block / elapsed / 1e9

    def _take(
        self, first: int, results: list[StageResult], done: list[SlotRef], *, copy: bool
    ) -> int:
        """Wait for a batch and copy it; its leases are added to `done`."""
        refs = [SlotRef(slot, generation) for _, slot, generation in results if slot >= 0]
        ready = self.client.wait(refs)
        if copy:
            target, block, arena = self._target, self.block, self.client.arena
            at = first * block
            for ref in refs:
                np.copyto(target[at : at + block], arena.block(ref.slot, block))
                at += block
            # as an engine does before it uses what it copied: a changed slot is a miss
            ready = [arena.holds(slot, generation) for slot, generation in refs]
        done += refs
        return sum(ready)

    def memcpy(self) -> float:
        """GB/s of copying as many bytes, block by block, between private arrays."""
        begun = time.perf_counter()
        target, block = self._target, self.block
        for i in range(self.turn_blocks):
            np.copyto(target[i * block : (i + 1) * block], self._part(i))
        return self.turn_bytes / (time.perf_counter() - begun) / 1e9
