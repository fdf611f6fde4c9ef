"""A hypothesis state machine: a `ShardStore` against a plain dict.

`Roomy` never has to evict from disk, so the store's keys must equal the model's. `Tight` is smaller
than what is put into it, so misses are allowed, wrong bytes never.
"""

from __future__ import annotations

import os
import shutil
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from storage_help import KIB, MIB, ROOT, bytes_of, fast_folder, key_of

from litecache.storage import (
    CommitItem,
    CommitStatus,
    LocalShardClient,
    ShardStore,
    SlotRef,
    StageStatus,
)

NUMBERS = st.integers(0, 39)
SIZES = (64 * KIB, 40 * KIB, 4 * KIB)


def size_of(number: int) -> int:
    return SIZES[number % len(SIZES)]


class ShardMachine(RuleBasedStateMachine):
    storage_bytes = 8 * MIB
    strict = True
    has_disk = True
    quotas: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.folder = fast_folder()
        self.model: dict[bytes, int] = {}
        self.durable: set[bytes] = set()
        self.damaged: set[bytes] = set()
        self.volatile: set[bytes] = set()

    @initialize(
        eviction=st.sampled_from(["lru", "lfu", "s3fifo"]),
        admission=st.sampled_from(["all", "frequent", "reused"]),
    )
    def start(self, eviction: str, admission: str) -> None:
        self.options = {"eviction": eviction, "admission": admission}
        self.open()

    def open(self) -> None:
        self.store = ShardStore(
            self.folder if self.has_disk else None,
            storage_bytes=self.storage_bytes,
            ram_bytes=1 * MIB,
            io_threads=0,
            quotas=self.quotas,
            ram_quotas=self.quotas,
            **self.options,
        )
        self.client = LocalShardClient(self.store)
        self.held: list[tuple[SlotRef, bytes, int]] = []
        self.reserved: list[tuple[SlotRef, int]] = []

    def teardown(self) -> None:
        try:
            if hasattr(self, "store"):
                self.client.close()
                self.store.close()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    @invariant()
    def integrity(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check_integrity()
        keys = set(self.store.keys())
        assert keys <= set(self.model), "the store holds what was never put, or was deleted"
        if self.strict and self.options["admission"] == "all":
            lossy = self.damaged | self.volatile
            assert keys >= set(self.model) - lossy, "the store lost a block"
        for ref, key, nbytes in self.held:
            if self.client.arena.holds(*ref):
                found = bytes(self.client.arena.buffer(ref.slot, nbytes))
                assert found == bytes_of(key, nbytes), "a leased slot changed"

    @rule(first=NUMBERS, count=st.integers(1, 6))
    def put(self, first: int, count: int) -> None:
        self.put_numbers(first, count)

    def put_numbers(self, first: int, count: int) -> None:
        parent = ROOT
        for number in range(first, min(first + count, 40)):
            key, nbytes = key_of(number), size_of(number)
            for ref in self.client.reserve(nbytes, 1):
                self.client.arena.buffer(ref.slot, nbytes)[:] = bytes_of(key, nbytes)
                item = CommitItem(ref.slot, ref.generation, key, parent, f"ns{number % 3}")
                (status,) = self.client.commit([item])
                present = key in self.model
                assert status is CommitStatus.STORED or present, "a new key was refused"
                assert self.client.commit([item]) == [CommitStatus.STALE]
                self.model[key] = nbytes
                if status is CommitStatus.STORED:
                    self.damaged.discard(key)
                    self.volatile.discard(key)
            parent = key

    @rule(number=NUMBERS)
    def reserve_and_keep(self, number: int) -> None:
        if len(self.reserved) < 4:
            nbytes = size_of(number)
            self.reserved += [(ref, nbytes) for ref in self.client.reserve(nbytes, 2)]

    @rule()
    def give_reserved_back(self) -> None:
        self.client.release([ref for ref, _ in self.reserved])
        self.reserved.clear()

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=8), keep=st.booleans())
    def stage(self, numbers: list[int], keep: bool) -> None:
        self.stage_numbers(numbers, keep)

    def stage_numbers(self, numbers: list[int], keep: bool) -> None:
        keys = [key_of(number) for number in numbers]
        leased = []
        for number, key, result in zip(numbers, keys, self.client.stage(keys), strict=True):
            if result.status is StageStatus.MISS:
                lossy = not self.strict or self.options["admission"] != "all"
                excused = key not in self.model or key in self.damaged | self.volatile
                assert lossy or excused, "lost a block"
            if result.slot < 0:
                continue
            ref = SlotRef(result.slot, result.generation)
            leased.append((ref, key, size_of(number)))
            if self.client.arena.holds(*ref):
                found = bytes(self.client.arena.buffer(ref.slot, size_of(number)))
                assert found == bytes_of(key, size_of(number)), "wrong bytes"
                assert self.client.arena.entry(ref.slot)[2] == key
            else:
                assert key in self.damaged, "a sound block failed to load"
        if keep and len(self.held) < 16:
            self.held += leased
        else:
            self.client.release([ref for ref, _, _ in leased])

    @rule(keep=st.booleans())
    def stage_everything(self, keep: bool) -> None:
        self.stage_numbers(list(range(40)), keep)

    @rule(first=NUMBERS)
    def put_many(self, first: int) -> None:
        self.put_numbers(first, 16)

    @rule()
    def release_all(self) -> None:
        self.client.release([ref for ref, _, _ in self.held])
        self.held.clear()

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=4))
    def delete(self, numbers: list[int]) -> None:
        keys = [key_of(number) for number in numbers]
        self.store.delete(keys)
        for key in keys:
            self.model.pop(key, None)
        assert not any(self.store.query(keys))

    @rule(numbers=st.lists(NUMBERS, max_size=6))
    def query_and_touch(self, numbers: list[int]) -> None:
        keys = [key_of(number) for number in numbers]
        found = self.store.query(keys, touch=True)
        assert all(key in self.model for key, hit in zip(keys, found, strict=True) if hit)

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=4))
    def fetch(self, numbers: list[int]) -> None:
        for number, (key, data) in zip(
            numbers, self.store.fetch([key_of(n) for n in numbers]), strict=True
        ):
            assert data is None or data == bytes_of(key, size_of(number))

    @rule()
    def flush(self) -> None:
        report = self.store.flush(5)
        assert report.pending == 0

    @rule(tier=st.sampled_from(["ram", "disk"]))
    def clear(self, tier: str) -> None:
        self.store.clear(tier)
        if tier == "disk":
            # what lay on disk alone is gone by request
            self.model = {key: self.model[key] for key in set(self.store.keys())}
            self.volatile = set(self.model)

    @rule(numbers=st.lists(NUMBERS, max_size=3), pin=st.booleans())
    def pin(self, numbers: list[int], pin: bool) -> None:
        keys = [key_of(number) for number in numbers]
        (self.store.pin if pin else self.store.unpin)(keys)

    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        if not self.has_disk:
            return
        keys = list(self.model)
        durable = {k for k, d in zip(keys, self.store.durable(keys), strict=True) if d}
        if clean and not self.strict and any(self.store.awaits_disk(keys)):
            durable = set()  # what is written at the end may take another's room, or its quota
        self.client.close()
        if clean:
            self.store.close()
        else:
            self.store.abandon()
        self.open()
        found = set(self.store.keys())
        assert durable <= found, "a durable block was lost"
        self.model = {key: self.model[key] for key in found}

    @rule(choice=NUMBERS, offset=st.integers(0, 4095), cold=st.booleans(), read=st.booleans())
    def flip_a_byte_on_disk(self, choice: int, offset: int, cold: bool, read: bool) -> None:
        index = self.store._tiers.index
        entries = [(number, index.find(key_of(number))) for number in range(40)]
        on_disk = [(number, entry) for number, entry in entries if entry >= 0 and index.disk[entry]]
        if not on_disk:
            return
        number, entry = on_disk[choice % len(on_disk)]
        at = (index.disk[entry] - 1) * 4096 + offset
        with open(os.path.join(self.folder, "slab"), "r+b") as slab:
            slab.seek(at)
            byte = slab.read(1)[0]
            slab.seek(at)
            slab.write(bytes([byte ^ 0x40]))
        self.damaged.add(key_of(number))
        if cold:
            self.store.clear("ram")
        if read:
            self.stage_numbers([number], keep=False)


class Roomy(ShardMachine):
    pass


class Tight(ShardMachine):
    storage_bytes = 1 * MIB + 128 * KIB
    strict = False
    quotas: ClassVar[dict[str, int]] = {"ns1": 100 * KIB}


class RamOnly(ShardMachine):
    strict = False
    has_disk = False
    quotas: ClassVar[dict[str, int]] = {"ns1": 100 * KIB}
