"""A sound store whose files are mutated, one round after the other.

Which blocks a mutation touches is known from the bytes that it changed: slab extents and, in
snapshot and journal, the records (or the frame) around them. Blocks outside must still hit.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import astuple, dataclass

import numpy as np
from fault_files import FaultFiles, Inode
from storage_help import KIB, MIB, bytes_of, fast_folder, fill, key_of

from litecache.errors import LiteCacheError
from litecache.storage import ShardStore
from litecache.storage.disk import journal
from litecache.storage.disk.records import RECORD_BYTES

NBYTES = 4 * KIB
OPTIONS = {"storage_bytes": 1 * MIB, "ram_bytes": 1 * MIB, "io_threads": 0}


@dataclass
class Outcome:
    """What rounds saw."""

    refused: int = 0
    untouched: int = 0
    hits: int = 0
    touched_hits: int = 0
    wrong: int = 0

    def __iadd__(self, other: Outcome) -> Outcome:
        mine = [a + b for a, b in zip(astuple(self), astuple(other), strict=True)]
        self.refused, self.untouched, self.hits, self.touched_hits, self.wrong = mine
        return self


class FuzzStore:
    """Makes the sound store and runs rounds on copies of it, in memory."""

    def __init__(self) -> None:
        self.folder = fast_folder()
        files = FaultFiles(random.Random(0))
        store = ShardStore(self.folder, files=files, **OPTIONS)
        in_snapshot = fill(store, range(24), NBYTES)
        store.flush()
        store._parts.keeper.compact()
        in_journal = fill(store, range(24, 40), NBYTES, batch=4)
        store.flush()
        self.keys = in_snapshot + in_journal
        disk, index = store._tiers.disk, store._tiers.index
        assert disk is not None
        self.extent = {key: (index.disk[index.find(key)] - 1) * 4096 for key in self.keys}
        self.sound = {
            name: bytes(files.names[name].seen)
            for name in ("superblock", "slab", "snapshot", "journal")
        }
        store.abandon()
        self.in_snapshot, self.in_journal = in_snapshot, in_journal

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def round(self, draw: random.Random) -> Outcome:
        """One mutation; AssertionError for a crash of any other kind than a LiteCacheError."""
        name = draw.choice(["slab", "slab", "snapshot", "snapshot", "journal", "journal"])
        before = self.sound[name]
        after = mutate(before, draw)
        touched = self.touched(name, before, after)
        files = FaultFiles(draw)
        for file, raw in {**self.sound, name: after}.items():
            inode = Inode()
            inode.stable, inode.seen = bytearray(raw), bytearray(raw)
            files.names[file] = inode
        outcome = Outcome()
        try:
            store = ShardStore(self.folder, files=files, **OPTIONS)
        except LiteCacheError:
            # a forged version with a right checksum is another format; damage is not
            outcome.refused = 1
            return outcome
        try:
            store.check_integrity()
            for key, data in store.fetch(self.keys):
                right = data == bytes_of(key, NBYTES)
                outcome.wrong += data is not None and not right
                outcome.touched_hits += right and key in touched
                if key not in touched:
                    outcome.untouched += 1
                    outcome.hits += right
            strangers = set(store.keys()) - set(self.keys)
            outcome.wrong += sum(data is not None for _, data in store.fetch(list(strangers)))
        finally:
            store.abandon()
        return outcome

    def touched(self, name: str, before: bytes, after: bytes) -> set[bytes]:
        """Keys whose data or metadata a mutation reached."""
        changed = changed_range(before, after)
        if name == "slab":
            pages = set((np.array(changed, np.int64) // NBYTES).tolist())
            return {key for key, start in self.extent.items() if start // NBYTES in pages}
        if name == "snapshot":
            first = len(before) - len(self.in_snapshot) * RECORD_BYTES
            if any(at < first for at in changed):
                return set(self.keys)
            return self.owners(before, [(at - first) // RECORD_BYTES * RECORD_BYTES + first
                                        for at in changed], RECORD_BYTES)  # fmt: skip
        return self.journal_owners(before, set(changed))

    def owners(self, raw: bytes, starts: list[int], length: int) -> set[bytes]:
        pieces = [raw[start : start + length] for start in set(starts)]
        return {key for key in self.keys for piece in pieces if key in piece}

    def journal_owners(self, raw: bytes, changed: set[int]) -> set[bytes]:
        if changed and min(changed) < 32:
            return set(self.in_journal)
        starts, at = [], 32
        while at < len(raw):
            size = int.from_bytes(raw[at + 4 : at + 8], "little") + 16
            if any(at <= c < at + size for c in changed):
                starts.append(raw[at : at + size])
            at += size
        return {key for key in self.keys for piece in starts if key in piece}


def changed_range(before: bytes, after: bytes) -> list[int]:
    """Positions of `before` that differ, everything behind a change of length included."""
    shorter = min(len(before), len(after))
    a = np.frombuffer(before[:shorter], np.uint8)
    b = np.frombuffer(after[:shorter], np.uint8)
    changed: list[int] = np.flatnonzero(a != b).tolist()
    return (
        changed
        + list(range(shorter, len(before), 64))
        + ([len(before) - 1] if len(after) < len(before) else [])
    )


def mutate(raw: bytes, draw: random.Random) -> bytes:
    """One of a dozen ways to spoil a file."""
    data = bytearray(raw)
    at = draw.randrange(len(data))
    kind = draw.randrange(9)
    if kind == 0:
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        for _ in range(draw.randrange(1, 20)):
            data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data[at : at + 200] = bytes(len(data[at : at + 200]))
    elif kind == 4:
        # lengths and counts are 4 or 8 bytes: make one gigantic
        width = draw.choice([4, 8])
        end = min(len(data), at + width)
        data[at:end] = b"\xff" * (end - at)
    elif kind == 5:
        data[at : at + 64] = draw.randbytes(len(data[at : at + 64]))
    elif kind == 6:
        data += draw.randbytes(draw.randrange(1, 5000))
    elif kind == 7:
        # a piece of the file over another: stale sectors
        length = draw.choice([80, 512, 4096])
        other = draw.randrange(len(data))
        piece = data[other : other + length]
        data[at : at + len(piece)] = piece
        del data[max(len(raw), at) :]
    else:
        future = journal.frame(journal.Change(2**62, draw.randrange(1, 6), draw.randbytes(90)))
        data += future
    return bytes(data)


def keys_of(numbers: range) -> list[bytes]:
    return [key_of(number) for number in numbers]
