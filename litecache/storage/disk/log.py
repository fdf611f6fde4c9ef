"""The log: one file of records, appended to and now and then written anew.

A record is 96 bytes, little-endian, with a check of its own, so that a damaged one costs one block.
The first of a file is a HEAD: magic, version, the file's epoch, the number up to which the slab was
synced when it was written. A PUT says where a block lies, a DELETE that it lies there no more, a
SYNC that the slab's bytes are on the device up to a number, a NAME binds a namespace's number to
its text, in as many pieces as that takes. Sequence numbers only grow.

Reading back, the highest number wins, for each key and for each slot; a put after the last sync is
doubtful (a power cut may have kept the record and lost the bytes); a record of another epoch is
left from an older file on the same sectors, and is ignored. Nothing is believed beyond its check,
and a block's bytes are verified when they are read, so a stale or forged record costs a miss and
never yields a wrong block.

Changes enter a buffer under the store's lock, in the order in which the index changed; `flush`
carries the buffer to the file under a lock of its own, so no disk is waited for under the store's
lock, and the order in the file is the order of the changes. Compaction writes the same kind of file
beside the old one, with the blocks in the order of their last use and what came meanwhile, syncs
it, and gives it the old one's name: at any instant there is one whole log. The file may take as
many records as changes fit beside a new file in the room that `META_SLOT_BYTES` reserve for each
slot.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import StorageFormatError
from ..protocol import PAGE_BYTES
from .files import NO_SPACE, Files

if TYPE_CHECKING:
    from ..block_index import BlockIndex, Entries

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
_SPARE_BYTES = 64 << 20
_BYTES_A_PAGE = 4 * RECORD_BYTES
"""A file that is larger than this for its slab was not written by a store."""

META_FIXED_BYTES = 128 << 10
META_SLOT_BYTES = 4 * RECORD_BYTES
META_NAME_COPIES = 3
_FREE_BYTES = 32 << 10


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


def recover(files: Files) -> Recovered:
    """Read a log, no further than what is possible beside such a slab.

    Raises:
        StorageFormatError: it is of another version or not a regular file.
        OSError: it cannot be read to its end: half a log must not pass for a whole one.
    """
    if not files.exists("log"):
        return replay(np.zeros(0, RECORD), synced=0)
    with files.opened("log") as fd:
        size = files.size(fd)
        count = min(size, most_bytes(files)) // RECORD_BYTES
        rows = np.empty(count, RECORD)
        kept = end = 0
        for start in range(0, count, CHUNK_RECORDS):
            # read behind what was kept, then moved together: no second copy of the file
            chunk = rows[start : start + CHUNK_RECORDS]
            raw = chunk.view(np.uint8).data
            if files.read(fd, [raw], start * RECORD_BYTES) != raw.nbytes:
                raise OSError(5, "the log cannot be read to its end")
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
            f"log has version {int(first['slot'][0])}, this version reads {VERSION}"
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
        return _SPARE_BYTES
    with files.opened("slab") as fd:
        return _SPARE_BYTES + _BYTES_A_PAGE * (files.size(fd) // PAGE_BYTES)


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


def write_new(
    files: Files, seq: int, names: Sequence[str], blocks: Iterable[Records], epoch: int
) -> tuple[int, int]:
    """Write and sync `log.new`; its descriptor and length. The caller renames it, or unlinks it.

    An OSError leaves nothing.

    Args:
        files: the file system.
        seq: the number that it stands for.
        names: of namespaces, by number.
        blocks: where they lie, oldest use first, in pieces.
        epoch: of the file.
    """
    named = [name_records(number, name) for number, name in enumerate(names)]
    first = np.concatenate([head(seq, seq), *named])
    files.unlink("log.new")
    fd = files.open("log.new", create=True)
    try:
        end = files.write(fd, [memoryview(seal(first, epoch))], 0)
        for records in blocks:
            records["seq"], records["kind"] = seq, PUT
            end += files.write(fd, [memoryview(seal(records, epoch))], end)
        files.sync(fd)
    except BaseException:
        files.close(fd)
        files.unlink("log.new")
        raise
    return fd, end


def _nbytes(pieces: Sequence[Records]) -> int:
    return sum(records.nbytes for records in pieces)


class Log:
    """The log of one folder; `flush`, `sync` and `compact` raise OSError when the disk refuses.

    Args:
        files: the file system.
        index: the shard's blocks.
        recovered: what was read back; its names are known from the start.
        on_name: called with number and text of each namespace.

    Attributes:
        names: namespaces by number; `name_bytes` what their records take in a file.
        seq: the last number in use; `synced_seq` the last that survives a power cut.
        bytes: length of the file.
        broken: a sync failed: what was written since may be lost, so nothing is appended any more
            and a new file must be written.
        compacting: one is being written.
    """

    def __init__(
        self,
        files: Files,
        index: BlockIndex,
        recovered: Recovered,
        on_name: Callable[[int, str], None],
    ) -> None:
        self._files = files
        self._index = index
        self._on_name = on_name
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self.name_bytes = 0
        for name in recovered.names:
            self._add_name(name)
        self.seq, self.synced_seq = recovered.seq, 0
        self.bytes = recovered.end
        self.broken = self.compacting = False
        self._epoch = recovered.epoch or secrets.randbits(63)
        self._removed: list[tuple[bytes, int]] = []
        self._buffer: list[Records] = []
        self._tail: list[Records] = []
        self._lock = threading.Lock()
        self._buffer_lock = threading.Lock()
        self._fd = files.open("log", create=True)
        try:
            if files.size(self._fd) > self.bytes:
                files.truncate(self._fd, self.bytes)
            if not self.bytes:
                self._write_head()
        except BaseException:
            files.close(self._fd)
            raise

    def _write_head(self) -> None:
        raw = seal(head(self.seq, 0), self._epoch)
        try:
            self.bytes = self._files.write(self._fd, [memoryview(raw)], 0)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            # a full disk must not keep a store from opening: it may be read
            self.broken = True

    def _add_name(self, name: str) -> int:
        number = len(self.names)
        self.names.append(name)
        self._numbers.setdefault(name, number)
        self.name_bytes += name_records(number, name).nbytes
        self._on_name(number, name)
        return number

    def name_number(self, name: str, most_bytes: int) -> int:
        """Number of a namespace; a new one goes to the log; 0 when the table is full."""
        number = self._numbers.get(name)
        if number is None:
            records = name_records(len(self.names), name)
            taken = META_NAME_COPIES * (self.name_bytes + records.nbytes)
            if len(self.names) >= MAX_NAMES or taken > most_bytes:
                return 0
            number = self._add_name(name)
            self._append(records)
        return number

    def _append(self, records: Records) -> int:
        """Buffer changes, under the store's lock; the number of the last."""
        with self._buffer_lock:
            records["seq"] = np.arange(self.seq + 1, self.seq + 1 + len(records))
            self.seq += len(records)
            self._buffer.append(records)
            if self.compacting:
                self._tail.append(records)
        return self.seq

    def put(self, entries: Entries) -> int:
        """Blocks are where the index says; the number of the last record."""
        self._append_removed()
        records = self._index.records(entries)
        records["kind"] = PUT
        return self._append(records)

    def removed(self, entry: int, slot: int) -> None:
        """A block's slot was given up; written before the next record or sync."""
        self._removed.append((self._index.key_at(entry), slot))

    def _append_removed(self) -> None:
        if self._removed:
            keys, slots = zip(*self._removed, strict=True)
            records = of_kind(DELETE, len(keys))
            records["key"] = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
            records["slot"] = slots
            self._removed.clear()
            self._append(records)

    def keep_doubts(self) -> None:
        """Write down which blocks are doubtful, before a mark of a later sync covers them."""
        flags = self._index.column("flags").astype(np.uint8)
        doubtful = np.flatnonzero(flags & FLAG_DOUBTFUL)
        for start in range(0, len(doubtful), CHUNK_RECORDS):
            self.put(doubtful[start : start + CHUNK_RECORDS])

    def wants_compaction(self, slots: int) -> bool:
        """Whether the file holds as many changes as blocks, with so many slots."""
        if self.compacting:
            return False
        most = _FREE_BYTES + self.name_bytes + 2 * RECORD_BYTES * slots
        return self.broken or self.bytes + _nbytes(self._buffer) > most

    def full(self, slots: int) -> bool:
        """Whether one more batch might take the room of a new file (compaction keeps failing)."""
        room = META_FIXED_BYTES - _FREE_BYTES + META_SLOT_BYTES * slots
        new = self.name_bytes + RECORD_BYTES * slots + _nbytes(self._tail)
        return self.bytes + _nbytes(self._buffer) + new > room + META_NAME_COPIES * self.name_bytes

    def flush(self) -> None:
        """Carry the buffer to the file; after an OSError it waits for the next attempt."""
        with self._lock:
            with self._buffer_lock:
                batch = list(self._buffer)
            raw = b""
            if batch and not self.broken:
                raw = seal(batch[0] if len(batch) == 1 else np.concatenate(batch), self._epoch)
                # what comes of one that fails lies behind the end: the next attempt overwrites it
                self._files.write(self._fd, [memoryview(raw)], self.bytes)
            with self._buffer_lock:
                del self._buffer[: len(batch)]
            self.bytes += len(raw)

    def sync(self) -> None:
        """Force the file to the device; after an OSError the log is `broken`."""
        with self._lock:
            try:
                self._files.sync(self._fd)
            except OSError:
                self.broken = True
                raise

    def begin_sync(self) -> int:
        """The number that a sync from now on covers."""
        self._append_removed()
        return self.seq

    def mark_synced(self, seq: int) -> int:
        """The slab is synced up to `seq`; the number of the mark if nothing came in between, else
        `seq`.
        """
        record = of_kind(SYNC)
        record["checksum"] = seq
        mark = self._append(record)
        return mark if mark == seq + 1 else seq

    def begin_compaction(self) -> int:
        """From now on, under the store's lock, changes are kept for the new file too.

        Returns:
            The number that `compact` begins with. The blocks that it is given may be told as they
            were at any instant since: what has changed meanwhile has a higher number.
        """
        self._append_removed()
        with self._buffer_lock:
            self.compacting = True
            return self.seq

    def compact(self, seq: int, blocks: Iterable[Records], sync_slab: Callable[[], None]) -> None:
        """Write the new file and let it take the old one's place.

        After an OSError the old file stays in force, or the log is `broken`.

        Args:
            seq: as `begin_compaction` gave it.
            blocks: all with a disk copy, oldest use first, in pieces.
            sync_slab: called before the new file counts, since a power cut must not take the bytes
                of a block that it names.
        """
        fd, epoch = -1, secrets.randbits(63)
        try:
            fd, end = write_new(self._files, seq, list(self.names), blocks, epoch)
            sync_slab()
            with self._lock:
                self._succeed(fd, end, seq, epoch)
        except BaseException:
            if fd not in (-1, self._fd):
                self._files.close(fd)
                self._files.unlink("log.new")
            raise
        finally:
            with self._buffer_lock:
                self.compacting, self._tail = False, []

    def _succeed(self, fd: int, end: int, seq: int, epoch: int) -> None:
        with self._buffer_lock:
            # what waits in the buffer is in the new file already, or in the tail
            tail, waiting = list(self._tail), len(self._buffer)
        mark = of_kind(SYNC)
        mark["checksum"] = mark["seq"] = seq
        raw = seal(np.concatenate([mark, *tail]), epoch)
        self._files.write(fd, [memoryview(raw)], end)
        self._files.sync(fd)
        self._files.rename("log.new", "log")
        with self._buffer_lock:
            del self._buffer[:waiting]
        self._files.close(self._fd)
        self._fd, self.bytes, self._epoch = fd, end + len(raw), epoch
        # until the folder is synced a power cut may bring the old file back
        self.broken = True
        self._files.sync_folder()
        self.broken = False

    def in_place(self) -> bool:
        """Whether the file still has its name."""
        with self._lock:
            return self._files.is_at(self._fd, "log")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            fd, self._fd = self._fd, -1  # the number will soon be another file's
            self._files.close(fd)
