"""The journal: what changed since the snapshot, as checksummed msgpack records.

File: a header of 32 bytes, then frames of `magic u32 | length u32 | xxh3_64 u64 | payload`. A
payload is `[seq, kind, body]`: puts carry `records.RECORD` bytes, dels carry (key, slot) pairs of
20 bytes, a name binds a namespace number, a sync says up to which sequence number the slab's bytes
were forced to the device. Sequence numbers only grow; replay skips what the
snapshot already holds. A damaged frame is skipped by searching for the next magic, so damage costs
what it touched.

Records enter an in-memory buffer under the store's lock, in the order in which the index changed;
`flush` carries the buffer to the file under a lock of its own, so no disk is waited for under the
store's lock, and the order in the file is the order of the changes.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Iterator
from typing import NamedTuple

import msgpack
import xxhash

from ...errors import StorageFormatError
from .files import NO_SPACE, Files

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<8sIIQQ")
_HEADER_MAGIC = b"LCJOURNL"
_FRAME = struct.Struct("<4sIQ")
_FRAME_MAGIC = b"\xf1LJ\x0a"
VERSION = 1
MAX_PAYLOAD_BYTES = 4 << 20
_MAX_SEQ = 1 << 62

PUT, DEL, NAME, SYNC = 1, 2, 3, 4


class Change(NamedTuple):
    """One record of the journal."""

    seq: int
    kind: int
    body: bytes


def header_bytes(base_seq: int) -> bytes:
    """The head of a journal that goes on from `base_seq`."""
    head = _HEADER.pack(_HEADER_MAGIC, VERSION, 0, base_seq, 0)[:-8]
    return head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head))


def frame(change: Change) -> bytes:
    """One record as it lies in the file."""
    payload: bytes = msgpack.packb(list(change))
    return _FRAME.pack(_FRAME_MAGIC, len(payload), xxhash.xxh3_64_intdigest(payload)) + payload


def parse(raw: bytes, path: str) -> tuple[list[Change], int]:
    """Sound records of a journal's bytes, and the offset after the last sound one.

    Raises:
        StorageFormatError: the header is sound and of another version.
    """
    if len(raw) >= _HEADER.size:
        magic, version, _, _, digest = _HEADER.unpack_from(raw)
        sound = digest == xxhash.xxh3_64_intdigest(raw[: _HEADER.size - 8])
        if sound and magic == _HEADER_MAGIC and version != VERSION:
            raise StorageFormatError(f"{path} has journal version {version}, this reads {VERSION}")
    # by number, not by place: a stale sector may repeat a later record in front of earlier ones
    changes: dict[int, Change] = {}
    end = min(len(raw), _HEADER.size)
    for change, after in _frames(raw):
        end = after
        changes.setdefault(change.seq, change)
    return [changes[seq] for seq in sorted(changes)], end


def _frames(raw: bytes) -> Iterator[tuple[Change, int]]:
    at = _HEADER.size
    while (at := raw.find(_FRAME_MAGIC, at)) >= 0:
        change, end = _frame_at(raw, at)
        if change is None:
            at += 1
            continue
        yield change, end
        at = end


def _frame_at(raw: bytes, at: int) -> tuple[Change | None, int]:
    if at + _FRAME.size > len(raw):
        return None, at
    _, length, digest = _FRAME.unpack_from(raw, at)
    start, end = at + _FRAME.size, at + _FRAME.size + length
    if length > MAX_PAYLOAD_BYTES or end > len(raw):
        return None, at
    payload = raw[start:end]
    if xxhash.xxh3_64_intdigest(payload) != digest:
        return None, at
    try:
        seq, kind, body = msgpack.unpackb(payload)
        typed = isinstance(seq, int) and isinstance(kind, int) and isinstance(body, bytes)
        if typed and 0 < seq <= _MAX_SEQ:
            return Change(seq, kind, body), end
    except (ValueError, TypeError, msgpack.exceptions.UnpackException):
        logger.warning("a journal record with a sound checksum cannot be read")
    return None, at


class Journal:
    """Appends changes to a file.

    Args:
        files: the file system.
        name: of the file, gone on with at `end`.
        seq: the last sequence number in use.
        end: offset to append at; whatever lies behind is cut off.
    """

    def __init__(self, files: Files, name: str, seq: int, end: int) -> None:
        self._files = files
        self._name = name
        self.seq = seq
        self.bytes = max(end, _HEADER.size)
        self.broken = False
        self._buffer: list[bytes] = []
        self._tail: list[bytes] | None = None
        self._lock = threading.Lock()
        self._buffer_lock = threading.Lock()
        self._fd = files.open(name, create=True)
        try:
            if end < _HEADER.size:
                files.truncate(self._fd, 0)
                try:
                    files.write(self._fd, [memoryview(header_bytes(seq))], 0)
                except OSError as error:
                    if error.errno not in NO_SPACE:
                        raise
                    # a full disk must not keep a store from opening: it may be read
                    self.broken = True
            elif files.size(self._fd) > end:
                files.truncate(self._fd, end)
        except BaseException:
            files.close(self._fd)
            raise

    def append(self, kind: int, body: bytes) -> int:
        """Buffer one change, under the store's lock; its sequence number."""
        raw = frame(Change(self.seq + 1, kind, body))
        with self._buffer_lock:
            self.seq += 1
            self._buffer.append(raw)
            if self._tail is not None:
                self._tail.append(raw)
        return self.seq

    def buffered_bytes(self) -> int:
        """Bytes in the file and on their way there."""
        with self._buffer_lock:
            return self.bytes + sum(map(len, self._buffer))

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
            raw = b"".join(batch)
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
            OSError: it failed; what was written since the last success may be lost, so the
                journal is `broken` until it is rewritten.
        """
        with self._lock:
            try:
                self._files.sync(self._fd)
            except OSError:
                self.broken = True
                raise

    def begin_rewrite(self) -> int:
        """Remember what is appended from here on; under the store's lock. The sequence now."""
        with self._buffer_lock:
            self._tail = []
            return self.seq

    def abandon_rewrite(self) -> None:
        """A snapshot failed: go on with the old file."""
        with self._buffer_lock:
            self._tail = None

    def finish_rewrite(self, base_seq: int) -> None:
        """Replace the file by one that holds only what came after `base_seq`, durably.

        Raises:
            OSError: it failed; the journal is `broken` unless the old file is untouched.
        """
        with self._lock:
            with self._buffer_lock:
                # what waits in the buffer is in the snapshot or in the tail
                tail, self._tail = self._tail or [], None
                waiting, self._buffer = self._buffer, []
            raw = header_bytes(base_seq) + b"".join(tail)
            try:
                fd = self._write_new(raw)
            except OSError:
                with self._buffer_lock:
                    self._buffer = waiting + self._buffer
                raise
            self._files.close(self._fd)
            self._fd, self.bytes, self.broken = fd, len(raw), True
            # until the folder is synced a power cut may bring the old file back
            self._files.sync_folder()
            self.broken = False

    def _write_new(self, raw: bytes) -> int:
        temporary = self._name + ".new"
        self._files.unlink(temporary)
        fd = self._files.open(temporary, create=True)
        try:
            self._files.write(fd, [memoryview(raw)], 0)
            self._files.sync(fd)
            self._files.rename(temporary, self._name)
        except OSError:
            self._files.close(fd)
            self._files.unlink(temporary)
            raise
        return fd

    def in_place(self) -> bool:
        """Whether the file still has its name."""
        with self._lock:
            return self._files.is_at(self._fd, self._name)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._files.close(self._fd)
