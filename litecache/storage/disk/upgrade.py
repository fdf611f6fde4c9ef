"""Stores of format 1 (up to LiteCache 0.1): their snapshot and journal, read as what a log says.

Slab and segments are as they were. Opening such a store writes its log first, then the superblock
of this format, and removes the old files last, so a kill at any instant leaves one that opens.
Format 1 kept a snapshot (header, names as msgpack, records of 80 bytes, oldest use first) and a
journal of what came since (frames of `magic | length | xxh3_64 | msgpack [seq, kind, body]`).
"""

from __future__ import annotations

import secrets
import struct

import msgpack
import numpy as np
import xxhash

from ...errors import StorageFormatError, StorageFullError
from .files import NO_SPACE, Files
from .folder import Folder
from .log import (
    DELETE,
    MAX_NAMES,
    PUT,
    RECORD,
    SYNC,
    Records,
    Recovered,
    mix,
    most_bytes,
    name_records,
    of_kind,
    recover,
    replay,
    write_new,
)

_OLD_RECORD = np.dtype(
    [
        ("key", "<u8", (2,)),
        ("parent", "<u8", (2,)),
        *((name, "<u8" if name in ("checksum", "mix") else "<u4")
          for name in ("checksum", "slot", "pages", "namespace", "created_s", "expires_s", "hits",
                       "used_s", "flags", "mix")),
    ]
)  # fmt: skip
_OLD_DELETE = np.dtype([("key", "<u8", (2,)), ("slot", "<u4")])
_COPIED = [name for name in _OLD_RECORD.names or () if name != "mix"]
_SNAPSHOT = struct.Struct("<8sIIQQQQQ")
_JOURNAL = struct.Struct("<8sIIQQ")
_FRAME = struct.Struct("<4sIQ")
_FRAME_MAGIC = b"\xf1LJ\x0a"
_MAX_PAYLOAD_BYTES = 4 << 20


def recover_any(files: Files, version: int) -> Recovered:
    """What the metadata of a folder of format `version` says; nothing is written.

    Raises:
        StorageFormatError: a file is of another version or not a regular file.
        OSError: a file cannot be read to its end.
    """
    return recover(files) if version > 1 else _recover_old(files)


def upgrade(files: Files, folder: Folder) -> None:
    """Turn a folder of format 1 into one of the present format; one of the present is left alone.

    Raises:
        StorageFullError: there is no room for the log.
    """
    if folder.version == 1:
        found = _recover_old(files)
        try:
            fd, _ = write_new(files, found.seq, found.names, [found.records], secrets.randbits(63))
            files.close(fd)
            files.rename("log.new", "log")
            files.sync_folder()
            folder.write_superblock(folder.segment_bytes)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise StorageFullError(
                f"{folder.path} is of format 1, and its disk has no room for "
                f"{len(found.records) * RECORD.itemsize:,} bytes more to upgrade it"
            ) from error
    for name in ("snapshot", "journal"):
        files.unlink(name)


def _recover_old(files: Files) -> Recovered:
    most = most_bytes(files)
    base, seq, damaged = _snapshot(files.read_all("snapshot", most))
    changes, whole = _journal(files.read_all("journal", most))
    rows = [base, *(rows for number, rows in sorted(changes.items()) if number > seq)]
    synced = max([seq, *(int(r["checksum"][0]) for r in changes.values() if r["kind"][0] == SYNC)])
    found = replay(np.concatenate(rows), synced, seq)
    last = max([found.seq, *changes])
    return found._replace(seq=last, damaged=damaged + (not whole))


def _snapshot(raw: bytes) -> tuple[Records, int, int]:
    """Names and blocks, the number they stand for, and how many records were damaged."""
    empty = np.zeros(0, RECORD)
    if len(raw) < _SNAPSHOT.size:
        return empty, 0, 0
    magic, version, width, seq, count, names_bytes, names_sum, _ = _SNAPSHOT.unpack_from(raw)
    sound = _is_sound(raw, _SNAPSHOT.size)
    if sound and (magic, version, width) != (b"LCSNAPSH", 1, _OLD_RECORD.itemsize):
        raise StorageFormatError(f"snapshot has version {version}, this version reads 1")
    table = raw[_SNAPSHOT.size : _SNAPSHOT.size + names_bytes]
    if names_bytes > len(raw) - _SNAPSHOT.size:
        return empty, 0, 1
    names = _unpack(table) if xxhash.xxh3_64_intdigest(table) == names_sum else None
    texts = map(str, names[:MAX_NAMES] if isinstance(names, list) else [])
    body = raw[_SNAPSHOT.size + names_bytes :]
    blocks = _puts(body)
    rows = np.concatenate([*(name_records(*each) for each in enumerate(texts)), blocks])
    rows["seq"] = seq if sound else 0
    present = len(body) // _OLD_RECORD.itemsize
    expected = max(count, present) if sound else present
    return rows, seq if sound else 0, expected - len(blocks)


def _journal(raw: bytes) -> tuple[dict[int, Records], bool]:
    """Changes by number, and whether the file was sound to its end."""
    if len(raw) >= _JOURNAL.size:
        magic, version, *_ = _JOURNAL.unpack_from(raw)
        if _is_sound(raw, _JOURNAL.size) and magic == b"LCJOURNL" and version != 1:
            raise StorageFormatError(f"journal has version {version}, this version reads 1")
    changes: dict[int, Records] = {}
    at, end = _JOURNAL.size, min(len(raw), _JOURNAL.size)
    while 0 <= (at := raw.find(_FRAME_MAGIC, at)) <= len(raw) - _FRAME.size:
        _, length, digest = _FRAME.unpack_from(raw, at)
        start = at + _FRAME.size
        payload = raw[start : start + min(length, _MAX_PAYLOAD_BYTES)]
        sound = len(payload) == length and xxhash.xxh3_64_intdigest(payload) == digest
        match _unpack(payload) if sound else None:
            case [int(seq), int(kind), bytes(body)] if 0 < seq <= 1 << 62:
                at = end = start + length
                if len(records := _change(kind, body)):
                    records["seq"] = seq
                    changes.setdefault(seq, records)
            case _:
                at += 1
    return changes, end == len(raw)


def _change(kind: int, body: bytes) -> Records:
    if kind == 1:
        return _puts(body)
    if kind == 2:
        dead = _rows(body, _OLD_DELETE)
        records = of_kind(DELETE, len(dead))
        records["key"], records["slot"] = dead["key"], dead["slot"]
        return records
    if kind == 4 and len(body) == 8:
        records = of_kind(SYNC)
        records["checksum"] = int.from_bytes(body, "little")
        return records
    match _unpack(body) if kind == 3 else None:
        case [int(number), str(name)] if 0 <= number < MAX_NAMES:
            return name_records(number, name)
    return np.zeros(0, RECORD)


def _puts(raw: bytes) -> Records:
    old = _rows(raw, _OLD_RECORD)
    old = old[mix(old) == old["mix"]]
    records = of_kind(PUT, len(old))
    for name in _COPIED:
        records[name] = old[name]
    return records


def _rows(raw: bytes, width: np.dtype[np.void]) -> Records:
    return np.frombuffer(raw[: len(raw) // width.itemsize * width.itemsize], width)


def _is_sound(raw: bytes, size: int) -> bool:
    """Whether a header of so many bytes ends with its checksum."""
    digest = int.from_bytes(raw[size - 8 : size], "little")
    return bool(xxhash.xxh3_64_intdigest(raw[: size - 8]) == digest)


def _unpack(raw: bytes) -> object:
    try:
        return msgpack.unpackb(raw)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException):
        return None
