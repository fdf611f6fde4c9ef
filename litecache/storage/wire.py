"""The slot protocol as bytes: one packed message for a whole batch.

Pickling 64 keys and 64 small tuples costs more than the copy of a small block; here they are one
`bytes` object each way. A message is a header (protocol version, kind, count) and fixed-width
little-endian fields. What does not parse, or was written by another version, is a StorageError
and changes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from itertools import chain

import msgpack
import numpy as np

from ..errors import ConfigError, StorageError
from ..hashing import KEY_BYTES, BlockKey
from .protocol import (
    PROTOCOL_VERSION,
    CommitItem,
    CommitStatus,
    SlotRef,
    StageResult,
    StageStatus,
)

_HEADER = struct.Struct("<HHI")
_ITEM = struct.Struct(f"<qq{KEY_BYTES}s{KEY_BYTES}sI")
_STATUSES = {status.value: status for status in StageStatus}
_SLOT_BYTES = 16
_STAGED_BYTES = 24


class Kind(IntEnum):
    """What a message holds."""

    KEYS = 1
    SLOTS = 2
    STAGED = 3
    COMMITS = 4
    STATUSES = 5
    FLAGS = 6


def _pack(kind: Kind, count: int, body: bytes) -> bytes:
    return _HEADER.pack(PROTOCOL_VERSION, kind, count) + body


def _unpack(message: bytes, kind: Kind, item_bytes: int, *, tail: bool = False) -> memoryview:
    """The body of a message that holds `count` items of `item_bytes` each, checked.

    Args:
        message: as it came.
        kind: what it must be.
        item_bytes: width of an item.
        tail: more may follow the items.
    """
    if not isinstance(message, bytes) or len(message) < _HEADER.size:
        raise StorageError(f"a {type(message).__name__} is no packed message of the slot protocol")
    version, found, count = _HEADER.unpack_from(message)
    if version != PROTOCOL_VERSION:
        raise StorageError(
            f"a message of slot protocol {version} cannot be read: this side speaks "
            f"{PROTOCOL_VERSION}"
        )
    body = memoryview(message)[_HEADER.size :]
    whole = len(body) >= count * item_bytes if tail else len(body) == count * item_bytes
    if found != kind or not whole:
        raise StorageError(
            f"a message of kind {found} with {count} items in {len(body)} bytes is no "
            f"{kind.name} message"
        )
    return body


def pack_keys(keys: Sequence[BlockKey]) -> bytes:
    """Keys, in order.

    Raises:
        ConfigError: a key is not 16 bytes.
    """
    if keys and set(map(len, keys)) != {KEY_BYTES}:
        bad = next(key for key in keys if len(key) != KEY_BYTES)
        raise ConfigError("key", bad, f"{KEY_BYTES} bytes")
    return _pack(Kind.KEYS, len(keys), b"".join(keys))


def unpack_keys(message: bytes) -> list[BlockKey]:
    """Inverse of `pack_keys`."""
    body = bytes(_unpack(message, Kind.KEYS, KEY_BYTES))
    return [body[at : at + KEY_BYTES] for at in range(0, len(body), KEY_BYTES)]


def pack_slots(slots: Sequence[SlotRef]) -> bytes:
    """Slots with their generations."""
    body = struct.pack(f"<{2 * len(slots)}q", *chain.from_iterable(slots))
    return _pack(Kind.SLOTS, len(slots), body)


def unpack_slots(message: bytes) -> list[SlotRef]:
    """Inverse of `pack_slots`."""
    pairs = np.frombuffer(_unpack(message, Kind.SLOTS, _SLOT_BYTES), "<i8").reshape(-1, 2)
    return list(map(SlotRef, pairs[:, 0].tolist(), pairs[:, 1].tolist()))


def pack_staged(results: Sequence[StageResult]) -> bytes:
    """Answers of `stage`: statuses, slots, generations, int64 `[3, n]`."""
    columns = np.array(results, "<i8").reshape(-1, 3).T
    return _pack(Kind.STAGED, len(results), columns.tobytes())


def unpack_staged(message: bytes) -> list[StageResult]:
    """Inverse of `pack_staged`."""
    body = _unpack(message, Kind.STAGED, _STAGED_BYTES)
    statuses, slots, generations = np.frombuffer(body, "<i8").reshape(3, -1).tolist()
    unknown = set(statuses).difference(_STATUSES)
    if unknown:
        raise StorageError(f"a STAGED message holds the unknown statuses {sorted(unknown)}")
    return list(map(StageResult, map(_STATUSES.__getitem__, statuses), slots, generations))


def pack_commits(items: Sequence[CommitItem]) -> bytes:
    """Items of `commit`; namespaces follow the items, each once.

    Raises:
        ConfigError: a key or a parent is not 16 bytes.
    """
    names = {item[4]: 0 for item in items}
    for number, name in enumerate(names):
        names[name] = number
    parts: list[bytes] = []
    for slot, generation, key, parent, namespace in items:
        if len(key) != KEY_BYTES or len(parent) != KEY_BYTES:
            raise ConfigError("key", (key, parent), "16 bytes each for key and parent")
        parts.append(_ITEM.pack(slot, generation, key, parent, names[namespace]))
    parts.append(msgpack.packb(list(names)))
    return _pack(Kind.COMMITS, len(items), b"".join(parts))


def unpack_commits(message: bytes) -> list[CommitItem]:
    """Inverse of `pack_commits`."""
    body = _unpack(message, Kind.COMMITS, _ITEM.size, tail=True)
    count: int = _HEADER.unpack_from(message)[2]
    end = count * _ITEM.size
    try:
        names = msgpack.unpackb(body[end:])
        items = [
            CommitItem(slot, generation, key, parent, names[number])
            for slot, generation, key, parent, number in _ITEM.iter_unpack(body[:end])
        ]
        well_formed = all(isinstance(name, str) for name in names)
    except (ValueError, TypeError, IndexError, KeyError, msgpack.UnpackException) as error:
        raise StorageError(f"the names of a COMMITS message are damaged: {error}") from error
    if not well_formed:
        raise StorageError("the names of a COMMITS message are no strings")
    return items


def pack_statuses(statuses: Sequence[CommitStatus]) -> bytes:
    """Answers of `commit`."""
    return _pack(Kind.STATUSES, len(statuses), bytes(statuses))


def unpack_statuses(message: bytes) -> list[CommitStatus]:
    """Inverse of `pack_statuses`."""
    try:
        return list(map(CommitStatus, _unpack(message, Kind.STATUSES, 1)))
    except ValueError as error:
        raise StorageError(f"a STATUSES message holds an unknown status: {error}") from error


def pack_flags(flags: Sequence[bool]) -> bytes:
    """Answers of `query`, `durable` and `cancel`."""
    return _pack(Kind.FLAGS, len(flags), bytes(flags))


def unpack_flags(message: bytes) -> list[bool]:
    """Inverse of `pack_flags`."""
    return list(map(bool, _unpack(message, Kind.FLAGS, 1)))
