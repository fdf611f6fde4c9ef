"""The slot protocol as bytes: one packed message for a whole batch.

Pickling 64 keys and 64 small tuples costs more than the copy of a small block; here they are one
`bytes` object each way. A message is a header (protocol version, kind, count, client id) and
fixed-width little-endian fields. Requests carry the client's id, because each further argument of
an actor call costs as much as the whole message. What does not parse, or was written by another
version, is a StorageError and changes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from functools import partial
from itertools import chain

import msgpack

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

_HEADER = struct.Struct("<HHIq")
_ITEM = struct.Struct(f"<qq{KEY_BYTES}s{KEY_BYTES}sI")
_RESERVE = struct.Struct("<qq")
_STATUSES = {status.value: status for status in StageStatus}
# a NamedTuple's own constructor takes three times as long
_staged = partial(tuple.__new__, StageResult)
_slot_ref = partial(tuple.__new__, SlotRef)
_SLOT_BYTES = 16
_STAGED_BYTES = 24


class Kind(IntEnum):
    """What a message holds."""

    KEYS = 1
    SLOTS = 2
    STAGE = 3
    STAGED = 4
    COMMITS = 5
    STATUSES = 6
    FLAGS = 7
    RESERVE = 8


def _pack(kind: Kind, count: int, body: bytes, client_id: int = 0) -> bytes:
    return _HEADER.pack(PROTOCOL_VERSION, kind, count, client_id) + body


def client_of(message: bytes) -> int:
    """The client that sent a request; call it after unpacking, which checks the message."""
    client_id: int = _HEADER.unpack_from(message)[3]
    return client_id


def _unpack(message: bytes, kind: Kind, item_bytes: int, *, tail: int = 0) -> memoryview:
    """The body of a message that holds `count` items of `item_bytes` each, checked.

    Args:
        message: as it came.
        kind: what it must be.
        item_bytes: width of an item.
        tail: items of so many bytes may follow them.
    """
    if not isinstance(message, bytes) or len(message) < _HEADER.size:
        raise StorageError(f"a {type(message).__name__} is no packed message of the slot protocol")
    version, found, count, _ = _HEADER.unpack_from(message)
    if version != PROTOCOL_VERSION:
        raise StorageError(
            f"a message of slot protocol {version} cannot be read: this side speaks "
            f"{PROTOCOL_VERSION}"
        )
    body = memoryview(message)[_HEADER.size :]
    rest = len(body) - count * item_bytes
    whole = rest >= 0 and rest % tail == 0 if tail else rest == 0
    if found != kind or not whole:
        raise StorageError(
            f"a message of kind {found} with {count} items in {len(body)} bytes is no "
            f"{kind.name} message"
        )
    return body


def _join(keys: Sequence[BlockKey]) -> bytes:
    if keys and set(map(len, keys)) != {KEY_BYTES}:
        bad = next(key for key in keys if len(key) != KEY_BYTES)
        raise ConfigError("key", bad, f"{KEY_BYTES} bytes")
    return b"".join(keys)


def _split(joined: bytes) -> list[BlockKey]:
    return [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]


def _slot_bytes(slots: Sequence[SlotRef]) -> bytes:
    return struct.pack(f"<{2 * len(slots)}q", *chain.from_iterable(slots))


def _slots(body: memoryview) -> list[SlotRef]:
    fields = iter(struct.unpack(f"<{len(body) // 8}q", body))
    return list(map(_slot_ref, zip(fields, fields, strict=True)))


def pack_keys(keys: Sequence[BlockKey], client_id: int = 0) -> bytes:
    """Keys, in order.

    Raises:
        ConfigError: a key is not 16 bytes.
    """
    return _pack(Kind.KEYS, len(keys), _join(keys), client_id)


def unpack_keys(message: bytes) -> list[BlockKey]:
    """Inverse of `pack_keys`."""
    return _split(bytes(_unpack(message, Kind.KEYS, KEY_BYTES)))


def pack_slots(slots: Sequence[SlotRef], client_id: int = 0) -> bytes:
    """Slots with their generations."""
    return _pack(Kind.SLOTS, len(slots), _slot_bytes(slots), client_id)


def unpack_slots(message: bytes) -> list[SlotRef]:
    """Inverse of `pack_slots`."""
    return _slots(_unpack(message, Kind.SLOTS, _SLOT_BYTES))


def pack_reserve(client_id: int, block_bytes: int, n: int) -> bytes:
    """A request for slots."""
    return _pack(Kind.RESERVE, 1, _RESERVE.pack(block_bytes, n), client_id)


def unpack_reserve(message: bytes) -> tuple[int, int]:
    """Inverse of `pack_reserve`: `(block_bytes, n)`."""
    block_bytes, n = _RESERVE.unpack(_unpack(message, Kind.RESERVE, _RESERVE.size))
    return block_bytes, n


def pack_stage(client_id: int, keys: Sequence[BlockKey], released: Sequence[SlotRef]) -> bytes:
    """A request to stage keys, and leases that end with it.

    Raises:
        ConfigError: a key is not 16 bytes.
    """
    return _pack(Kind.STAGE, len(keys), _join(keys) + _slot_bytes(released), client_id)


def unpack_stage(message: bytes) -> tuple[list[BlockKey], list[SlotRef]]:
    """Inverse of `pack_stage`: `(keys, released)`."""
    body = _unpack(message, Kind.STAGE, KEY_BYTES, tail=_SLOT_BYTES)
    end = _HEADER.unpack_from(message)[2] * KEY_BYTES
    return _split(bytes(body[:end])), _slots(body[end:])


def pack_staged(results: Sequence[StageResult]) -> bytes:
    """Answers of `stage`: statuses, slots, generations, int64 `[3, n]`."""
    columns = chain.from_iterable(zip(*results, strict=True))
    return _pack(Kind.STAGED, len(results), struct.pack(f"<{3 * len(results)}q", *columns))


def unpack_staged(message: bytes) -> list[StageResult]:
    """Inverse of `pack_staged`."""
    body = _unpack(message, Kind.STAGED, _STAGED_BYTES)
    count = len(body) // _STAGED_BYTES
    fields = struct.unpack(f"<{3 * count}q", body)
    unknown = set(fields[:count]).difference(_STATUSES)
    if unknown:
        raise StorageError(f"a STAGED message holds the unknown statuses {sorted(unknown)}")
    statuses = map(_STATUSES.__getitem__, fields[:count])
    rest = fields[count : 2 * count], fields[2 * count :]
    return list(map(_staged, zip(statuses, *rest, strict=True)))


def pack_commits(items: Sequence[CommitItem], client_id: int = 0) -> bytes:
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
    return _pack(Kind.COMMITS, len(items), b"".join(parts), client_id)


def unpack_commits(message: bytes) -> list[CommitItem]:
    """Inverse of `pack_commits`."""
    body = _unpack(message, Kind.COMMITS, _ITEM.size, tail=1)
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
