"""The slot protocol as bytes: one packed message for a whole batch, in msgpack.

A message is a tuple: protocol version, kind, the client's id (0 where nobody needs it), and
columns. A column is a byte string: keys joined, numbers as little-endian int64, which take less
time than lists of them and are of one type.
Requests carry the client's id, because each further argument of an actor call costs as much as the
whole message. What does not parse, or was written by another version, is a StorageError and changes
nothing; what cannot be carried is a ConfigError before it leaves.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from functools import partial
from itertools import chain
from typing import Any

import msgpack

from ..errors import ConfigError, StorageError
from ..hashing import KEY_BYTES, BlockKey
from .key_dict import join_keys, split_keys
from .protocol import (
    ALL_KEYS,
    PROTOCOL_VERSION,
    CommitItem,
    CommitStatus,
    Retention,
    SlotRef,
    StageResult,
    StageStatus,
)

_MOST_ITEMS = 1 << 22
_STATUSES = {status.value: status for status in StageStatus}
_RETENTIONS = {retention.value: retention for retention in Retention}
_COMMIT_STATUSES = {status.value: status for status in CommitStatus}
# a NamedTuple's own constructor takes three times as long
_staged = partial(tuple.__new__, StageResult)
_slot_ref = partial(tuple.__new__, SlotRef)
_commit_item = partial(tuple.__new__, CommitItem)


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


def _pack(kind: Kind, client_id: int, *columns: Any) -> bytes:
    try:
        packed: bytes = msgpack.packb((PROTOCOL_VERSION, int(kind), client_id, *columns))
        return packed
    except (TypeError, ValueError, OverflowError) as error:
        valid = "integers of 64 bits and whole Unicode text, Python's own"
        raise ConfigError(kind.name.lower(), type(error).__name__, valid) from error


def _unpack(message: bytes, kind: Kind, *types: type) -> tuple[int, list[Any]]:
    """The client's id and the columns of a message, which must be of these types."""
    try:
        version, found, client_id, *columns = msgpack.unpackb(
            message, use_list=False, max_array_len=_MOST_ITEMS, max_map_len=0, max_ext_len=0
        )
    except Exception as error:  # msgpack's errors have no common root
        what = type(message).__name__
        raise StorageError(f"a {what} is no packed message of the slot protocol") from error
    if version != PROTOCOL_VERSION:
        raise StorageError(
            f"a message of slot protocol {version} cannot be read: this side speaks "
            f"{PROTOCOL_VERSION}"
        )
    if found != kind or type(client_id) is not int or tuple(map(type, columns)) != types:
        raise StorageError(f"a message of kind {found} is no {kind.name} message")
    return client_id, columns


def _check(kind: Kind, whole: bool) -> None:
    if not whole:
        raise StorageError(f"the columns of what should be a message of {kind.name} are damaged")


def _split(kind: Kind, joined: bytes) -> list[BlockKey]:
    _check(kind, len(joined) % KEY_BYTES == 0)
    return split_keys(joined)


def _int64s(numbers: Sequence[int]) -> bytes:
    try:
        return struct.pack(f"<{len(numbers)}q", *numbers)
    except struct.error as error:
        raise ConfigError("slots", type(numbers).__name__, "integers of 64 bits") from error


def _numbers(kind: Kind, column: bytes, columns: int = 1) -> tuple[int, ...]:
    _check(kind, len(column) % (8 * columns) == 0)
    return struct.unpack(f"<{len(column) // 8}q", column)


def _pack_slots(slots: Sequence[SlotRef]) -> bytes:
    return _int64s(tuple(chain.from_iterable(slots)))


def _slots(kind: Kind, column: bytes) -> list[SlotRef]:
    fields = iter(_numbers(kind, column, 2))
    return list(map(_slot_ref, zip(fields, fields, strict=True)))


def pack_keys(keys: Sequence[BlockKey], client_id: int = 0) -> bytes:
    """Keys, in order.

    Raises:
        ConfigError: a key is not 16 bytes.
    """
    return _pack(Kind.KEYS, client_id, join_keys(keys))


def unpack_keys(message: bytes) -> tuple[int, list[BlockKey]]:
    """Inverse of `pack_keys`: `(client_id, keys)`."""
    client_id, (joined,) = _unpack(message, Kind.KEYS, bytes)
    return client_id, _split(Kind.KEYS, joined)


def pack_slots(slots: Sequence[SlotRef], client_id: int = 0) -> bytes:
    """Slots with their generations."""
    return _pack(Kind.SLOTS, client_id, _pack_slots(slots))


def unpack_slots(message: bytes) -> tuple[int, list[SlotRef]]:
    """Inverse of `pack_slots`: `(client_id, slots)`."""
    client_id, (column,) = _unpack(message, Kind.SLOTS, bytes)
    return client_id, _slots(Kind.SLOTS, column)


def pack_reserve(client_id: int, block_bytes: int, n: int) -> bytes:
    """A request for slots."""
    return _pack(Kind.RESERVE, client_id, block_bytes, n)


def unpack_reserve(message: bytes) -> tuple[int, int, int]:
    """Inverse of `pack_reserve`: `(client_id, block_bytes, n)`."""
    client_id, (block_bytes, n) = _unpack(message, Kind.RESERVE, int, int)
    return client_id, block_bytes, n


def pack_stage(
    client_id: int, keys: Sequence[BlockKey], released: Sequence[SlotRef], reads: int = ALL_KEYS
) -> bytes:
    """A request to stage keys, of which the first `reads` may be read, and leases that end with it.

    Raises:
        ConfigError: a key is not 16 bytes.
    """
    return _pack(Kind.STAGE, client_id, join_keys(keys), _pack_slots(released), reads)


def unpack_stage(message: bytes) -> tuple[int, list[BlockKey], list[SlotRef], int]:
    """Inverse of `pack_stage`: `(client_id, keys, released, reads)`."""
    client_id, (joined, slots, reads) = _unpack(message, Kind.STAGE, bytes, bytes, int)
    return client_id, _split(Kind.STAGE, joined), _slots(Kind.STAGE, slots), reads


def pack_staged(results: Sequence[StageResult]) -> bytes:
    """Answers of `stage`: statuses, slots, generations, int64 `[3, n]`."""
    columns = tuple(chain.from_iterable(zip(*results, strict=True)))
    return _pack(Kind.STAGED, 0, _int64s(columns))


def unpack_staged(message: bytes) -> list[StageResult]:
    """Inverse of `pack_staged`."""
    _, (column,) = _unpack(message, Kind.STAGED, bytes)
    fields = _numbers(Kind.STAGED, column, 3)
    count = len(fields) // 3
    unknown = set(fields[:count]).difference(_STATUSES)
    if unknown:
        raise StorageError(f"a STAGED message holds the unknown statuses {sorted(unknown)}")
    statuses = map(_STATUSES.__getitem__, fields[:count])
    rest = fields[count : 2 * count], fields[2 * count :]
    return list(map(_staged, zip(statuses, *rest, strict=True)))


def pack_commits(items: Sequence[CommitItem], client_id: int = 0) -> bytes:
    """Items of `commit`; each namespace stands once, and per item its number.

    Raises:
        ConfigError: a key or a parent is not 16 bytes.
    """
    columns = zip(*items, strict=True) if items else [()] * len(CommitItem._fields)
    slots, generations, keys, parents, namespaces, expires, retentions = columns
    numbers = {name: number for number, name in enumerate(dict.fromkeys(namespaces))}
    per_item = map(numbers.__getitem__, namespaces)
    column = _int64s((*slots, *generations, *per_item, *expires, *retentions))
    return _pack(
        Kind.COMMITS, client_id, column, join_keys(keys), join_keys(parents), list(numbers)
    )


def unpack_commits(message: bytes) -> tuple[int, list[CommitItem]]:
    """Inverse of `pack_commits`: `(client_id, items)`."""
    client_id, columns = _unpack(message, Kind.COMMITS, bytes, bytes, bytes, tuple)
    fields, keys, parents, names = columns
    numbers, count = _numbers(Kind.COMMITS, fields, 5), len(fields) // 40
    _check(Kind.COMMITS, len(keys) == len(parents) == KEY_BYTES * count)
    cut = [numbers[at * count : (at + 1) * count] for at in range(5)]
    slots, generations, of_items, expires, retentions = cut
    _check(Kind.COMMITS, set(map(type, names)) <= {str} and set(of_items) <= {*range(len(names))})
    _check(Kind.COMMITS, set(retentions) <= _RETENTIONS.keys())
    found = split_keys(keys), split_keys(parents), map(names.__getitem__, of_items)
    rest = expires, map(_RETENTIONS.__getitem__, retentions)
    items = zip(slots, generations, *found, *rest, strict=True)
    return client_id, list(map(_commit_item, items))


def pack_statuses(statuses: Sequence[CommitStatus]) -> bytes:
    """Answers of `commit`."""
    return _pack(Kind.STATUSES, 0, bytes(statuses))


def unpack_statuses(message: bytes) -> list[CommitStatus]:
    """Inverse of `pack_statuses`."""
    _, (statuses,) = _unpack(message, Kind.STATUSES, bytes)
    _check(Kind.STATUSES, _COMMIT_STATUSES.keys() >= set(statuses))
    return list(map(_COMMIT_STATUSES.__getitem__, statuses))


def pack_flags(flags: Sequence[bool]) -> bytes:
    """Answers of `query`, `durable` and `cancel`."""
    return _pack(Kind.FLAGS, 0, bytes(flags))


def unpack_flags(message: bytes) -> list[bool]:
    """Inverse of `pack_flags`."""
    _, (flags,) = _unpack(message, Kind.FLAGS, bytes)
    return list(map(bool, flags))
