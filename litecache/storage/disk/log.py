"""The log: one file of records (`records.py`), appended to and now and then written anew.

Changes enter a buffer under the store's lock, in the order in which the index changed; `flush`
carries the buffer to the file under a lock of its own, so no disk is waited for under the store's
lock, and the order in the file is the order of the changes. Compaction writes the same kind of file
beside the old one, with the blocks in the order of their last use and what came meanwhile, syncs
it, and gives it the old one's name: at any instant there is one whole log.

The file may take as many records as changes fit beside a new file in the room that
`META_SLOT_BYTES` reserve for each slot.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .files import NO_SPACE, Files
from .records import (
    CHUNK_RECORDS,
    DELETE,
    FLAG_DOUBTFUL,
    MAX_NAMES,
    PUT,
    RECORD_BYTES,
    SYNC,
    Records,
    Recovered,
    head,
    name_records,
    of_kind,
    seal,
)

if TYPE_CHECKING:
    from ..block_index import BlockIndex, Entries

META_FIXED_BYTES = 128 << 10
META_SLOT_BYTES = 4 * RECORD_BYTES
META_NAME_COPIES = 3
_FREE_BYTES = 32 << 10


def write_new(
    files: Files, seq: int, names: Sequence[str], blocks: Iterable[Records], epoch: int
) -> tuple[int, int]:
    """Write and sync `log.new`; its descriptor and length. The caller renames it, or unlinks it.

    Args:
        files: the file system.
        seq: the number that it stands for.
        names: of namespaces, by number.
        blocks: where they lie, oldest use first, in pieces.
        epoch: of the file.

    Raises:
        OSError: the disk refused; nothing is left.
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
    """The log of one folder.

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
        """Carry the buffer to the file.

        Raises:
            OSError: the disk refused; the buffer waits for the next attempt.
        """
        with self._lock:
            with self._buffer_lock:
                batch, self._buffer = self._buffer, []
            if self.broken or not batch:
                return
            raw = seal(batch[0] if len(batch) == 1 else np.concatenate(batch), self._epoch)
            try:
                self._files.write(self._fd, [memoryview(raw)], self.bytes)
            except OSError:
                # what came of it lies behind the end and is overwritten by the next attempt
                with self._buffer_lock:
                    self._buffer = batch + self._buffer
                raise
            self.bytes += len(raw)

    def sync(self) -> None:
        """Force the file to the device.

        Raises:
            OSError: it failed, and the log is `broken`.
        """
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

        Args:
            seq: as `begin_compaction` gave it.
            blocks: all with a disk copy, oldest use first, in pieces.
            sync_slab: called before the new file counts, since a power cut must not take the bytes
                of a block that it names.

        Raises:
            OSError: the disk refused; the old file stays in force, or the log is `broken`.
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
            tail, waiting = self._tail, self._buffer
            self._buffer, self.compacting = [], False
        try:
            mark = of_kind(SYNC)
            mark["checksum"] = mark["seq"] = seq
            raw = seal(np.concatenate([mark, *tail]), epoch)
            self._files.write(fd, [memoryview(raw)], end)
            self._files.sync(fd)
            self._files.rename("log.new", "log")
        except OSError:
            with self._buffer_lock:
                self._buffer = waiting + self._buffer
            raise
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
            self._files.close(self._fd)
