"""The records of the log: what the disk tier writes down about itself, and how it is read back.

96 bytes each, little-endian, with a check of their own, so that one damaged record costs one block.
The first of a file is a HEAD: magic, version, the file's epoch, the number up to which the slab was
synced when it was written. A PUT says where a block lies, a DELETE that it lies there no more, a
SYNC that the slab's bytes are on the device up to a number, a NAME binds a namespace's number to
its text, in as many pieces as that takes. Sequence numbers only grow.

Reading back, the highest number wins, for each key and for each slot; a put after the last sync is
doubtful (a power cut may have kept the record and lost the bytes); a record of another epoch is
left from an older file on the same sectors, and is ignored. Nothing is believed beyond its check,
and a block's bytes are verified when they are read, so a stale or forged record costs a miss and
never yields a wrong block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import StorageFormatError
from ..protocol import PAGE_BYTES
from .files import Files

RECORD = np.dtype(
    [
        ("key", "<u8", (2,)),
        ("parent", "<u8", (2,)),
        ("checksum", "<u8"),
        ("created_s", "<u4"),
        ("expires_s", "<u4"),
        ("used_s", "<u4"),
        ("hits", "<u4"),
        ("slot", "<u4"),
        ("pages", "<u4"),
        ("namespace", "<u4"),
        ("kind", "u1"),
        ("flags", "u1"),
        ("retention", "u1"),
        ("codec", "u1"),
        ("epoch", "<u8"),
        ("seq", "<u8"),
        ("mix", "<u8"),
    ]
)
RECORD_BYTES = RECORD.itemsize
PUT, DELETE, NAME, SYNC, HEAD = 1, 2, 3, 4, 5
FLAG_PINNED = 1
FLAG_DOUBTFUL = 2
VERSION = 2
MAX_NAMES = 65_535

CHUNK_RECORDS = 1 << 16
"""So many are read or written at a time: few enough to stay in a processor's cache."""

Records = npt.NDArray[np.void]

_MAGIC = b"LiteCache log\r\n\0"
_PRIMES = np.array([0x9FB21C651E98DF25, 0xD6E8FEB86659FD93], np.uint64)
_SEED = np.uint64(0x6C69746563616368)
_MAX_SEQ = 1 << 62
_TEXT_BYTES = 56
"""Of a name, in the fields before `slot`."""
_FREE_BYTES = 64 << 20
_BYTES_A_PAGE = 4 * RECORD_BYTES
"""A file that is larger than this for its slab was not written by a store."""


class Recovered(NamedTuple):
    """What a folder's metadata says.

    Attributes:
        records: one per key, and one per slot, oldest use first.
        names: namespaces by number.
        seq: last sequence number in use.
        end: where the log goes on.
        epoch: of the log.
        changes: puts and removals that came after the file was begun.
        damaged: records that were not sound.
    """

    records: Records
    names: list[str]
    seq: int
    end: int
    epoch: int
    changes: int
    damaged: int


def mix(records: Records) -> npt.NDArray[np.uint64]:
    """The check of each record: a multiply-xorshift mix over all words but the last."""
    words = records.view("<u8").reshape(len(records), records.itemsize // 8)
    mixed = np.full(len(records), _SEED)
    for column in range(words.shape[1] - 1):
        mixed ^= words[:, column]
        mixed *= _PRIMES[column % 2]
        mixed ^= mixed >> np.uint64(32)
    return mixed


def seal(records: Records, epoch: int) -> bytes:
    """Set each record's epoch and check; the bytes to write."""
    records["epoch"] = epoch
    records["mix"] = mix(records)
    return records.tobytes()


def is_sound(records: Records) -> npt.NDArray[np.bool_]:
    """Which records are as they were sealed."""
    sound: npt.NDArray[np.bool_] = mix(records) == records["mix"]
    return sound


def of_kind(kind: int, count: int = 1) -> Records:
    """Empty records."""
    records = np.zeros(count, RECORD)
    records["kind"] = kind
    return records


def head(seq: int, synced: int) -> Records:
    """The first record of a file that goes on from `seq`."""
    record = of_kind(HEAD)
    record["key"] = np.frombuffer(_MAGIC, "<u8")
    record["slot"], record["seq"], record["checksum"] = VERSION, seq, synced
    return record


def name_records(number: int, name: str) -> Records:
    """The pieces of a name, at least one."""
    text = name.encode(errors="surrogatepass")
    records = of_kind(NAME, max(1, -(-len(text) // _TEXT_BYTES)))
    whole = records.view(np.uint8).reshape(len(records), RECORD_BYTES)
    padded = text.ljust(len(records) * _TEXT_BYTES, b"\0")
    whole[:, :_TEXT_BYTES] = np.frombuffer(padded, np.uint8).reshape(-1, _TEXT_BYTES)
    records["namespace"], records["pages"] = number, len(text)
    records["slot"] = np.arange(len(records))
    return records


def recover(files: Files, name: str = "log") -> Recovered:
    """Read a log, no further than what is possible beside such a slab.

    Raises:
        StorageFormatError: it is of another version or not a regular file.
        OSError: it cannot be read to its end: half a log must not pass for a whole one.
    """
    if not files.exists(name):
        return replay(np.zeros(0, RECORD), synced=0)
    with files.opened(name) as fd:
        size = files.size(fd)
        count = min(size, most_bytes(files)) // RECORD_BYTES
        rows = np.empty(count, RECORD)
        kept = end = 0
        for start in range(0, count, CHUNK_RECORDS):
            # read behind what was kept, then moved together: no second copy of the file
            chunk = rows[start : start + CHUNK_RECORDS]
            raw = chunk.view(np.uint8).data
            if files.read(fd, [raw], start * RECORD_BYTES) != raw.nbytes:
                raise OSError(5, f"{name} cannot be read to its end")
            good = np.flatnonzero(is_sound(chunk))
            if kept < start or len(good) < len(chunk):
                rows[kept : kept + len(good)] = chunk[good]
            kept += len(good)
            end = start + int(good[-1]) + 1 if len(good) else end
    damaged = count - kept + (size % RECORD_BYTES != 0)
    rows = rows[:kept]
    first = rows[:1]
    headed = bool(kept) and int(first["kind"][0]) == HEAD and first["key"].tobytes() == _MAGIC
    if headed and int(first["slot"][0]) != VERSION:
        raise StorageFormatError(
            f"{name} has version {int(first['slot'][0])}, this version reads {VERSION}"
        )
    synced, base = (int(first["checksum"][0]), int(first["seq"][0])) if headed else (0, 0)
    epoch = 0
    if kept:
        epochs, counts = np.unique(first["epoch"] if headed else rows["epoch"], return_counts=True)
        epoch = int(epochs[np.argmax(counts)])
        rows = _only(rows, rows["epoch"] == epoch)
    found = replay(rows, synced, base)
    return found._replace(end=end * RECORD_BYTES, epoch=epoch, damaged=damaged)


def most_bytes(files: Files) -> int:
    """What the metadata of a folder can take at most, with its slab."""
    if not files.exists("slab"):
        return _FREE_BYTES
    with files.opened("slab") as fd:
        return _FREE_BYTES + _BYTES_A_PAGE * (files.size(fd) // PAGE_BYTES)


def replay(rows: Records, synced: int, base: int = 0) -> Recovered:
    """Sound records of one epoch, in the order of their file, as what they leave.

    Args:
        rows: of any kind.
        synced: the slab's bytes are on the device up to this number.
        base: changes after this number are counted.
    """
    rows = rows[rows["seq"] <= _MAX_SEQ] if len(rows) and rows["seq"].max() > _MAX_SEQ else rows
    seqs = rows["seq"]
    if np.any(seqs[1:] < seqs[:-1]):
        # by number, not by place: a stale sector may repeat a later record before earlier ones
        rows = rows[np.argsort(seqs, kind="stable")]
    kinds = np.ascontiguousarray(rows["kind"])
    marks = rows[kinds == SYNC]
    # a mark vouches for nothing that came after it
    synced = max(synced, int(np.minimum(marks["checksum"], marks["seq"]).max(initial=0)))
    seq = int(rows["seq"].max(initial=0))
    names = _names(rows[kinds == NAME])
    rows = _only(rows, (kinds == PUT) | (kinds == DELETE))
    count = int(np.count_nonzero(rows["seq"] > base))
    last = rows["kind"] == PUT
    for words in (rows["key"], rows["slot"].reshape(-1, 1)):
        last[_overwritten(words)] = False
    records = _only(rows, last)
    records["flags"] |= np.where(records["seq"] > synced, FLAG_DOUBTFUL, 0).astype(np.uint8)
    return Recovered(records, names, seq, 0, 0, count, 0)


def _only(rows: Records, wanted: npt.NDArray[np.bool_]) -> Records:
    """Some of the rows, moved together where they lie: there may be no memory for another copy."""
    kept = int(np.argmin(wanted)) if len(wanted) and not wanted.all() else len(rows)
    for start in range(kept, len(rows), CHUNK_RECORDS):
        chunk = rows[start : start + CHUNK_RECORDS][wanted[start : start + CHUNK_RECORDS]]
        rows[kept : kept + len(chunk)] = chunk
        kept += len(chunk)
    return rows[:kept]


def _overwritten(words: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Positions of rows `[n, words]` that a later row of the same words replaces."""
    # few rows share a value: sort them all for the values alone, then those few for their order
    values = np.sort(words[:, 0])
    twice = np.unique(values[1:][values[1:] == values[:-1]])
    if not len(twice):
        return np.zeros(0, np.int64)
    at = np.searchsorted(twice, words[:, 0]).clip(max=len(twice) - 1)
    some = np.flatnonzero(twice[at] == words[:, 0])
    order = some[np.lexsort(words[some].T)]
    return order[:-1][np.all(words[order[1:]] == words[order[:-1]], axis=1)]


def _names(rows: Records) -> list[str]:
    pieces: dict[int, dict[int, bytes]] = {}
    lengths: dict[int, int] = {}
    for row in rows:
        number = int(row["namespace"])
        if number < MAX_NAMES:
            pieces.setdefault(number, {})[int(row["slot"])] = row.tobytes()[:_TEXT_BYTES]
            lengths[number] = int(row["pages"])
    names = [f"unknown-{number}" for number in range(max(pieces, default=0) + 1)]
    names[0] = ""
    for number, parts in pieces.items():
        wanted = range(max(1, -(-lengths[number] // _TEXT_BYTES)))
        if len(wanted) <= len(parts) and all(piece in parts for piece in wanted):
            text = b"".join(parts[piece] for piece in wanted)[: lengths[number]]
            names[number] = text.decode(errors="replace")
    return names
