"""Shared by the storage tests: blocks whose bytes follow from their key, and short verbs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from litecache.storage import CommitItem, CommitStatus, LocalShardClient, ShardStore, SlotRef
from litecache.storage.disk.log import PUT, of_kind

ROOT = b"\0" * 16
KIB, MIB = 1 << 10, 1 << 20


def key_of(number: int) -> bytes:
    """A key for a small number."""
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def taken_bytes(folder: Path) -> int:
    """Bytes of the disk that a store's files take; a compaction may rename one meanwhile."""
    taken = 0
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            taken += file.stat().st_blocks * 512
    return taken


@functools.lru_cache(maxsize=256)
def bytes_of(key: bytes, nbytes: int) -> bytes:
    """The only right contents of a block."""
    seed = int.from_bytes(key[:8], "little")
    return np.random.default_rng(seed).bytes(nbytes)


def fast_folder() -> str:
    """A fresh folder where fsync costs nothing, for tests that open thousands of stores."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return tempfile.mkdtemp(prefix="litecache-test-", dir=base)


def put(
    client: LocalShardClient, keys: Sequence[bytes], nbytes: int, parent: bytes = ROOT
) -> list[CommitStatus]:
    """Store blocks as one chain; those that get no slot are left out."""
    refs = client.reserve(nbytes, len(keys))
    items = []
    for ref, key in zip(refs, keys, strict=False):
        client.arena.buffer(ref.slot, nbytes)[:] = bytes_of(key, nbytes)
        items.append(CommitItem(ref.slot, ref.generation, key, parent, "test"))
        parent = key
    return client.commit(items)


def get(client: LocalShardClient, keys: Sequence[bytes], nbytes: int) -> list[bool]:
    """Which keys hit; AssertionError on a wrong byte."""
    results = client.stage(keys)
    held = [SlotRef(r.slot, r.generation) for r in results if r.slot >= 0]
    client.wait(held)
    hits = []
    for key, result in zip(keys, results, strict=True):
        hit = result.slot >= 0 and client.arena.holds(result.slot, result.generation)
        if hit:
            found = bytes(client.arena.buffer(result.slot, nbytes))
            assert found == bytes_of(key, nbytes), f"wrong bytes for {key.hex()}"
        hits.append(hit)
    client.release(held)
    return hits


def fill(store: ShardStore, numbers: Iterable[int], nbytes: int, batch: int = 8) -> list[bytes]:
    """Store many blocks, waiting for room; their keys."""
    client = LocalShardClient(store)
    keys = [key_of(number) for number in numbers]
    parent = ROOT
    for start in range(0, len(keys), batch):
        rest = keys[start : start + batch]
        while rest:
            stored = len(put(client, rest, nbytes, parent))
            parent = rest[stored - 1] if stored else parent
            rest = rest[stored:]
            if rest:
                store.flush(10)
    client.close()
    return keys


def puts(numbers, slot=0, seq=0):
    """Records of blocks in neighbouring slots."""
    rows = of_kind(PUT, len(numbers))
    for i, n in enumerate(numbers):
        rows[i]["key"] = np.frombuffer(key_of(n), "<u8")
        rows[i]["slot"], rows[i]["pages"] = slot + i, 1
    rows["seq"] = seq
    return rows
