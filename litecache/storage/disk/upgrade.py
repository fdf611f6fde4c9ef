"""Stores of format 1 (up to LiteCache 0.1): their snapshot and journal, read as what a log says.

Slab and segments are as they were. Opening such a store writes its log first, then the superblock
of this format, and removes the old files last, so a kill at any instant leaves one that opens.
Format 1 kept a snapshot (header, names as msgpack, records of 80 bytes, oldest use first) and a
journal of what came since (frames of `magic | length | xxh3_64 | msgpack [seq, kind, body]`).
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator

import msgpack
import numpy as np
import xxhash

from ...errors import StorageFormatError, StorageFullError
from .files import NO_SPACE, Files
from .folder import Folder
from .log import write_new
from .records import (
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
    journal = files.read_all("journal", most)
    changes, whole = _journal(journal)
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
    magic, version, width, seq, count, names_bytes, names_sum, digest = _SNAPSHOT.unpack_from(raw)
    sound = xxhash.xxh3_64_intdigest(raw[: _SNAPSHOT.size - 8]) == digest
    if sound and (magic, version, width) != (b"LCSNAPSH", 1, _OLD_RECORD.itemsize):
        raise StorageFormatError(f"snapshot has version {version}, this version reads 1")
    if names_bytes > len(raw) - _SNAPSHOT.size:
        return empty, 0, 1
    seq = seq if sound else 0
    table = raw[_SNAPSHOT.size : _SNAPSHOT.size + names_bytes]
    names: list[str] = []
    if xxhash.xxh3_64_intdigest(table) == names_sum:
        match _unpack(table):
            case [*texts]:
                names = [str(text) for text in texts[:MAX_NAMES]]
    body = raw[_SNAPSHOT.size + names_bytes :]
    blocks = _puts(body, seq)
    named = [name_records(number, name) for number, name in enumerate(names)]
    for records in named:
        records["seq"] = seq
    present = len(body) // _OLD_RECORD.itemsize
    expected = max(count, present) if sound else present
    return np.concatenate([*named, blocks]), seq, expected - len(blocks)


def _puts(raw: bytes, seq: int) -> Records:
    old = np.frombuffer(raw[: len(raw) // _OLD_RECORD.itemsize * _OLD_RECORD.itemsize], _OLD_RECORD)
    old = old[mix(old) == old["mix"]]
    records = of_kind(PUT, len(old))
    for name in _COPIED:
        records[name] = old[name]
    records["seq"] = seq
    return records


def _journal(raw: bytes) -> tuple[dict[int, Records], bool]:
    """Changes by number, and whether the file was sound to its end."""
    if len(raw) >= _JOURNAL.size:
        magic, version, _, _, digest = _JOURNAL.unpack_from(raw)
        sound = digest == xxhash.xxh3_64_intdigest(raw[: _JOURNAL.size - 8])
        if sound and magic == b"LCJOURNL" and version != 1:
            raise StorageFormatError(f"journal has version {version}, this version reads 1")
    changes: dict[int, Records] = {}
    end = min(len(raw), _JOURNAL.size)
    for seq, kind, body, after in _frames(raw):
        end = after
        records = _change(kind, body, seq)
        if len(records):
            changes.setdefault(seq, records)
    return changes, end == len(raw)


def _change(kind: int, body: bytes, seq: int) -> Records:
    if kind == 1:
        return _puts(body, seq)
    records = np.zeros(0, RECORD)
    if kind == 2:
        dead = np.frombuffer(
            body[: len(body) // 20 * 20], np.dtype([("key", "<u8", (2,)), ("slot", "<u4")])
        )
        records = of_kind(DELETE, len(dead))
        records["key"], records["slot"] = dead["key"], dead["slot"]
    elif kind == 3:
        match _unpack(body):
            case [int(number), str(name)] if 0 <= number < MAX_NAMES:
                records = name_records(number, name)
    elif kind == 4 and len(body) == 8:
        records = of_kind(SYNC)
        records["checksum"] = int.from_bytes(body, "little")
    records["seq"] = seq
    return records


def _frames(raw: bytes) -> Iterator[tuple[int, int, bytes, int]]:
    at = _JOURNAL.size
    while 0 <= (at := raw.find(_FRAME_MAGIC, at)) <= len(raw) - _FRAME.size:
        _, length, digest = _FRAME.unpack_from(raw, at)
        end = at + _FRAME.size + length
        payload = raw[at + _FRAME.size : end]
        if length <= _MAX_PAYLOAD_BYTES and end <= len(raw):
            match _unpack(payload) if xxhash.xxh3_64_intdigest(payload) == digest else None:
                case [int(seq), int(kind), bytes(body)] if 0 < seq <= 1 << 62:
                    yield seq, kind, body, end
                    at = end
                    continue
        at += 1


def _unpack(raw: bytes) -> object:
    try:
        return msgpack.unpackb(raw)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException):
        return None
