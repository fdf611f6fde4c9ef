"""The snapshot: all blocks of a slab as fixed-width checksummed records.

File: header (magic, version, sequence, number of records, bytes of the namespace table, digest),
the namespace table (msgpack list of names, with its digest), then `records.RECORD`s in order of
recency, oldest first. Written to a temporary file, synced, renamed, and the folder synced, so at
any instant there is one whole snapshot. 500,000 records are read in a fraction of a second.
"""

from __future__ import annotations

import logging
import struct
from typing import NamedTuple

import msgpack
import numpy as np
import xxhash

from ...errors import StorageFormatError
from .files import Files
from .records import RECORD, RECORD_BYTES, Records, seal, unseal

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<8sIIQQQQ")
_MAGIC = b"LCSNAPSH"
VERSION = 1
_CHUNK_RECORDS = 100_000
_MAX_NAMES_BYTES = 16 << 20


class Snapshot(NamedTuple):
    """What a snapshot file holds.

    Attributes:
        seq: the last journal sequence number that it includes.
        names: namespaces by number.
        records: sound records, oldest use first.
        damaged: records that were not sound.
    """

    seq: int
    names: list[str]
    records: Records
    damaged: int


EMPTY = Snapshot(0, [], np.zeros(0, RECORD), 0)


def write(files: Files, name: str, snapshot: Snapshot) -> int:
    """Replace the snapshot atomically and durably; bytes written.

    Raises:
        OSError: the old snapshot stays.
    """
    temporary = name + ".new"
    names: bytes = msgpack.packb(snapshot.names)
    head = _HEADER.pack(
        _MAGIC,
        VERSION,
        RECORD_BYTES,
        snapshot.seq,
        len(snapshot.records),
        len(names),
        xxhash.xxh3_64_intdigest(names),
    )
    head += struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
    files.unlink(temporary)
    fd = files.open(temporary, create=True)
    try:
        offset = files.write(fd, [memoryview(head), memoryview(names)], 0)
        for start in range(0, len(snapshot.records), _CHUNK_RECORDS):
            raw = seal(snapshot.records[start : start + _CHUNK_RECORDS])
            offset += files.write(fd, [memoryview(raw)], offset)
        files.sync(fd)
        files.rename(temporary, name)
        files.sync_folder()
    except OSError:
        files.unlink(temporary)
        raise
    finally:
        files.close(fd)
    return offset


def read(files: Files, name: str, most_bytes: int) -> Snapshot:
    """Read what is sound of a snapshot.

    A damaged header still yields its sound records when its length fields are plausible.

    Raises:
        StorageFormatError: the header is sound and of another version, or not a regular file.
        OSError: the file cannot be read.
    """
    raw = files.read_all(name, most_bytes)
    return _parse(raw, name) if raw else EMPTY


def _parse(raw: bytes, path: str) -> Snapshot:
    body = _HEADER.size + 8
    if len(raw) < body:
        logger.warning("%s is too short for a snapshot: taken as empty", path)
        return EMPTY
    magic, version, width, seq, count, names_bytes, names_digest = _HEADER.unpack_from(raw)
    sound = xxhash.xxh3_64_intdigest(raw[: _HEADER.size]) == int.from_bytes(
        raw[_HEADER.size : body], "little"
    )
    if sound and (magic != _MAGIC or version != VERSION or width != RECORD_BYTES):
        raise StorageFormatError(f"{path} has snapshot version {version}, this reads {VERSION}")
    if not sound:
        logger.warning("%s has a damaged header: its records are taken one by one", path)
        seq = 0
    if names_bytes > min(_MAX_NAMES_BYTES, len(raw) - body):
        return EMPTY
    table = raw[body : body + names_bytes]
    names: list[str] = []
    if xxhash.xxh3_64_intdigest(table) == names_digest:
        try:
            names = [str(name) for name in msgpack.unpackb(table)]
        except (ValueError, TypeError, msgpack.exceptions.UnpackException):
            logger.warning("%s has an unreadable namespace table", path)
    records = unseal(memoryview(raw)[body + names_bytes :])
    present = (len(raw) - body - names_bytes) // RECORD_BYTES
    expected = max(count, present) if sound else present
    return Snapshot(seq, names, records, expected - len(records))
