"""A sound store whose files are mutated, one round after the other.

Which blocks a mutation touches is known from the bytes that it changed: slab extents and, in the
log, the records around them. Blocks outside must still hit.
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
from litecache.storage.disk.log import DELETE, PUT, RECORD, RECORD_BYTES, of_kind, seal

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
        self.keys = fill(store, range(24), NBYTES)
        store.flush()
        store._durability.compact()
        self.keys += fill(store, range(24, 40), NBYTES, batch=4)
        store.flush()
        disk, index = store._tiers.disk, store._tiers.index
        assert disk is not None
        self.extent = {key: (index.disk[index.find(key)] - 1) * 4096 for key in self.keys}
        self.sound = {name: bytes(files.names[name].seen) for name in ("superblock", "slab", "log")}
        store.abandon()

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def round(self, draw: random.Random) -> Outcome:
        """One mutation; AssertionError for a crash of any other kind than a LiteCacheError."""
        name = draw.choice(["slab", "log", "log"])
        before = self.sound[name]
        if name == "log" and not draw.randrange(8):
            after, touched = self.forge(draw)
        else:
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
        starts = {at // RECORD_BYTES * RECORD_BYTES for at in changed}
        pieces = [before[start : start + RECORD_BYTES] for start in starts]
        return {key for key in self.keys for piece in pieces if key in piece}

    def forge(self, draw: random.Random) -> tuple[bytes, set[bytes]]:
        """A log with a sound record that no store wrote, and the blocks that it names."""
        log = self.sound["log"]
        record = of_kind(draw.randrange(1, 7))
        key = draw.choice([draw.choice(self.keys), draw.randbytes(16)])
        record["key"] = np.frombuffer(key, "<u8")
        record["slot"], record["pages"] = draw.randrange(48), 1
        record["seq"] = draw.choice([draw.randrange(1 << 62), draw.randrange(1 << 62, 1 << 64)])
        for field in ("checksum", "namespace", "created_s", "flags"):
            width = RECORD[field].itemsize
            record[field] = int.from_bytes(draw.randbytes(width), "little")
        ours = int(np.frombuffer(log[:RECORD_BYTES], RECORD)["epoch"][0])
        raw = seal(record, draw.choice([ours, draw.getrandbits(63)]))
        touched = set()
        if int(record["kind"][0]) in (PUT, DELETE):
            start = int(record["slot"][0]) * 4096
            touched = {k for k in self.keys if k == key or self.extent[k] == start}
        return log + raw, touched


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
    kind = draw.randrange(8)
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
    else:
        # a piece of the file over another: stale sectors
        length = draw.choice([96, 512, 4096])
        other = draw.randrange(len(data))
        piece = data[other : other + length]
        data[at : at + len(piece)] = piece
        del data[max(len(raw), at) :]
    return bytes(data)


def keys_of(numbers: range) -> list[bytes]:
    return [key_of(number) for number in numbers]
