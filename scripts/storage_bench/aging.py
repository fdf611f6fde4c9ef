"""An aged store: a churn that leaves the slab as scattered as long use does."""

from __future__ import annotations

import os
import time

import numpy as np

from litecache.storage import CommitItem
from storage_bench.backends import flushed
from storage_bench.shard_turns import BATCH, ROOT, ShardTurns

CHURN = 4
"""Times the capacity that is written."""

_AT_ONCE = 16
_REFRESHED = 2


def age(turns: ShardTurns, disk_bytes: int) -> None:
    """Write chains of random length over and over, refreshing some at random.

    Afterwards `turns.turns` are what is left of them, whole chains in random order.
    """
    draw = np.random.default_rng(7)
    chains: list[list[bytes]] = []
    written = 0
    longest = max(2, min(turns.turn_blocks, BATCH * 2))
    while written < CHURN * disk_bytes:
        length = int(draw.integers(1, longest + 1))
        chains.append(_write_chain(turns, length))
        written += length * turns.block
        for i in draw.integers(max(0, len(chains) - 400), len(chains), _REFRESHED):
            turns.client.touch(chains[int(i)])
    flushed(turns.client)
    alive = [chain for chain in chains if all(turns.client.query(chain))]
    pool = [key for i in draw.permutation(len(alive)) for key in alive[int(i)]]
    size = turns.turn_blocks
    turns.turns = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]


def _write_chain(turns: ShardTurns, length: int) -> list[bytes]:
    keys: list[bytes] = []
    parent = ROOT
    while len(keys) < length:
        refs = turns.client.reserve(turns.block, min(_AT_ONCE, length - len(keys)))
        if not refs:
            time.sleep(0.002)
            continue
        items: list[CommitItem] = []
        for ref in refs:
            key = os.urandom(16)
            turns.client.arena.buffer(ref.slot, turns.block)[:64] = os.urandom(64)
            items.append(CommitItem(ref.slot, ref.generation, key, parent, "aged"))
            keys.append(key)
            parent = key
        turns.client.commit(items)
    return keys
