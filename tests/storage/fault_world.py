"""One life of a store on a faulty disk, judged by an oracle with its own sha256 of every block.

`run_world(seed)` opens a store over `FaultFiles`, does random things, cuts the power, opens it
again and checks, three times over. A violation raises `BrokenPromiseError`.
"""

from __future__ import annotations

import collections
import hashlib
import random
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

from fault_files import FaultFiles
from storage_help import KIB, MIB, ROOT, bytes_of, fast_folder, key_of

from litecache.errors import StorageError
from litecache.storage import CommitItem, LocalShardClient, ShardStore, SlotRef, block_io
from litecache.storage.disk import tier as disk_tier

SIZES = (4 * KIB, 8 * KIB, 20 * KIB)
STORAGE_BYTES = 1 * MIB + 256 * KIB
KINDS = ("flip", "short", "enospc", "eio", "sync_eio")


class BrokenPromiseError(AssertionError):
    """The store broke a promise."""


@dataclass
class Tally:
    """What a world saw."""

    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    cuts: int = 0
    durable: int = 0
    hits: int = 0
    untouched: int = 0


class World:
    """A store, its faulty disk and the oracle."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        rates = {kind: self.draw.choice([0, 0, 0.01, 0.05, 0.15]) for kind in KINDS}
        self.files = FaultFiles(self.draw, rates)
        self.folder = fast_folder()
        self.sha: dict[bytes, bytes] = {}
        self.size: dict[bytes, int] = {}
        self.flipped: set[bytes] = set()
        self.number = 0
        self.tally = Tally(self.files.faults)
        self.options = {
            "fsync": self.draw.choice(["always", "interval"]),
            "eviction": self.draw.choice(["lru", "lfu", "s3fifo"]),
        }

    def open(self) -> None:
        # a fault while opening must be an error of our own, and must not spoil the next attempt
        for attempt in range(2):
            self.files.enabled = attempt == 0
            try:
                self.store = ShardStore(
                    self.folder,
                    storage_bytes=STORAGE_BYTES,
                    ram_bytes=1 * MIB,
                    io_threads=0,
                    files=self.files,
                    **self.options,
                )
                break
            except StorageError as error:
                if attempt:
                    raise BrokenPromiseError(
                        f"the store does not open any more: {error}"
                    ) from error
        self.files.enabled = True
        self.client = LocalShardClient(self.store)

    def close_files(self) -> None:
        self.files.enabled = False
        self.client.close()
        self.store.abandon()

    def step(self) -> None:
        action = self.draw.choice(
            [self.put, self.put, self.put, self.read, self.read, self.other, self.other]
        )
        action()
        self.note_flips()
        self.store.check_integrity()

    def put(self) -> None:
        nbytes = self.draw.choice(SIZES)
        count = self.draw.randrange(1, 9)
        refs = self.client.reserve(nbytes, count)
        items, parent = [], ROOT
        for ref in refs:
            self.number += 1
            fresh = self.draw.random() < 0.8
            number = self.number if fresh else self.draw.randrange(self.number)
            key = key_of(number)
            if self.size.setdefault(key, nbytes) != nbytes or key in self.flipped:
                self.client.release([ref])
                continue
            data = bytes_of(key, nbytes)
            self.sha[key] = hashlib.sha256(data).digest()
            self.client.arena.buffer(ref.slot, nbytes)[:] = data
            items.append(CommitItem(ref.slot, ref.generation, key, parent, "world"))
            parent = key
        self.client.commit(items)

    def read(self) -> None:
        known = list(self.sha)
        if known:
            self.verify(self.draw.sample(known, min(len(known), 12)))

    def verify(self, keys: list[bytes]) -> int:
        results = self.client.stage(keys)
        hits = 0
        for key, result in zip(keys, results, strict=True):
            if result.slot < 0:
                continue
            if self.client.arena.holds(result.slot, result.generation):
                data = bytes(self.client.arena.buffer(result.slot, self.size[key]))
                self.compare(key, data)
                hits += 1
            self.client.release([SlotRef(result.slot, result.generation)])
        if keys and self.draw.random() < 0.3:
            ((key, found),) = self.store.fetch([self.draw.choice(keys)])
            if found is not None:
                self.compare(key, found)
        return hits

    def compare(self, key: bytes, data: bytes) -> None:
        if hashlib.sha256(data).digest() != self.sha[key]:
            raise BrokenPromiseError(f"wrong bytes for {key.hex()}")

    def other(self) -> None:
        action = self.draw.randrange(5)
        if action == 0:
            self.store.flush(5)
        elif action == 1:
            self.store.clear("ram")
        elif action == 2:
            self.store._durability.compact()
        elif action == 3 and self.sha:
            self.store.delete(self.draw.sample(list(self.sha), 1))
        else:
            self.store.touch(self.draw.sample(list(self.sha), min(4, len(self.sha))))

    def note_flips(self) -> None:
        if not self.files.flipped:
            return
        index = self.store._tiers.index
        for entry in index.entries().tolist():
            start = (index.disk[entry] - 1) * 4096
            end = start + index.pages[entry] * 4096
            if index.disk[entry] and any(start <= at < end for _, at in self.files.flipped):
                self.flipped.add(index.key_at(entry))
        self.files.flipped.clear()

    def cut(self) -> None:
        self.note_flips()
        keys = list(self.sha)
        promised = {k for k, d in zip(keys, self.store.durable(keys), strict=True) if d}
        self.close_files()
        self.files.power_cut()
        self.tally.cuts += 1
        self.open()
        self.files.enabled = False
        self.store.check_integrity()
        untouched = promised - self.flipped
        self.tally.durable += len(promised)
        self.tally.untouched += len(untouched)
        missing = [k for k, hit in zip(keys, self.store.query(keys), strict=True) if not hit]
        lost = untouched & set(missing)
        if lost:
            raise BrokenPromiseError(f"{len(lost)} durable blocks are gone after a power cut")
        wanted = sorted(untouched)
        for start in range(0, len(wanted), 16):
            part = wanted[start : start + 16]
            hits = self.verify(part)
            self.tally.hits += hits
            if hits != len(part):
                raise BrokenPromiseError(f"{len(part) - hits} durable blocks cannot be read")
        self.verify([key for key in keys if key not in untouched][:64])
        if self.store.stats()["leases"]:
            raise BrokenPromiseError("a lease leaked")
        # a damaged block is gone or right from here on
        self.flipped &= set(self.store.keys())
        self.files.enabled = True

    def run(self) -> Tally:
        try:
            self.open()
            for _ in range(3):
                for _ in range(self.draw.randrange(4, 30)):
                    self.step()
                self.cut()
            self.close_files()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        return self.tally


def run_world(seed: int) -> Tally:
    """One world; raises `BrokenPromiseError`."""
    return World(seed).run()


@contextmanager
def planted(bug: str):
    """The store with a bug planted: `checksum skipped`, `rename before fsync`, `early publish`."""
    with ExitStack() as stack:
        if bug == "checksum skipped":
            skip = lambda memory, key, expected, error: "io_error" if error else None  # noqa: E731
            stack.enter_context(mock.patch.object(block_io, "fault", skip))
            stack.enter_context(mock.patch("litecache.storage.disk.slab.fault", skip))
        elif bug == "rename before fsync":
            real = FaultFiles.sync

            def lazy(self: FaultFiles, fd: int) -> None:
                inode = self._open[fd]
                lazy_names = ("log.new",)
                if any(n in lazy_names and node is inode for n, node in self.names.items()):
                    return
                real(self, fd)

            stack.enter_context(mock.patch.object(FaultFiles, "sync", lazy))
        elif bug == "early publish":
            early = lambda self, entry: bool(self._index.disk[entry])  # noqa: E731
            stack.enter_context(mock.patch.object(disk_tier.DiskTier, "is_durable", early))
        else:
            raise ValueError(bug)
        yield


BUGS = ("checksum skipped", "rename before fsync", "early publish")


def first_violation(bug: str, seeds: range) -> str | None:
    """What catches a planted bug, or None when nothing does."""
    with planted(bug):
        for seed in seeds:
            try:
                run_world(seed)
            except (BrokenPromiseError, AssertionError) as found:
                return f"seed {seed}: {found}"
    return None
