"""From the files of a folder to the set of blocks that it holds.

Snapshot first, then the journal's changes after it. Of several records for one key the last counts,
a removal kills the record of the same key and slot before it. Nothing is believed beyond its
checksum, and a block's bytes are verified when they are read, so a stale or forged record costs a
miss and never yields a wrong block. The store, `verify` and `inspect` share this.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import msgpack
import numpy as np

from ..protocol import PAGE_BYTES
from . import journal, snapshot
from .files import Files
from .records import FLAG_DOUBTFUL, RECORD_BYTES, Records, unseal

logger = logging.getLogger(__name__)

DEL_BYTES = 20
MAX_NAMES = 65_535
_FREE_BYTES = 64 << 20
_BYTES_A_PAGE = 4 * RECORD_BYTES
"""A file that is larger than this for its slab was not written by a store."""


class Recovered(NamedTuple):
    """What a folder's metadata says.

    Attributes:
        records: one per key, oldest use first.
        names: namespaces by number.
        seq: last sequence number in use.
        journal_end: where the journal goes on.
        journal_changes: changes replayed from it.
        damaged: records that were not sound.
    """

    records: Records
    names: list[str]
    seq: int
    journal_end: int
    journal_changes: int
    damaged: int


def recover(files: Files) -> Recovered:
    """Read snapshot and journal, no further than what is possible beside such a slab.

    Raises:
        StorageFormatError: a file is of another version or not a regular file.
    """
    most_bytes = _FREE_BYTES + _BYTES_A_PAGE * _slab_pages(files)
    base = snapshot.read(files, "snapshot", most_bytes)
    raw = files.read_all("journal", most_bytes)
    changes, end = journal.parse(raw, "journal")
    names = list(base.names[:MAX_NAMES]) or [""]
    parts = [base.records]
    dels: list[tuple[int, bytes]] = []
    rows = len(base.records)
    seq, damaged = base.seq, base.damaged + (end < len(raw))
    synced = max([base.seq, *(_synced_seq(c) for c in changes if c.kind == journal.SYNC)])
    for change in changes:
        seq = max(seq, change.seq)
        if change.seq <= base.seq:
            continue
        if change.kind == journal.PUT:
            parts.append(_puts(change, synced))
            rows += len(parts[-1])
        elif change.kind == journal.DEL:
            dels += [
                (rows, change.body[i : i + DEL_BYTES])
                for i in range(0, len(change.body) - DEL_BYTES + 1, DEL_BYTES)
            ]
        elif change.kind == journal.NAME:
            _bind_name(names, change.body)
    records = _last_of_each_key(np.concatenate(parts) if rows else base.records)
    return Recovered(_without(records, dels), names, seq, end, len(changes), damaged)


def _slab_pages(files: Files) -> int:
    if not files.exists("slab"):
        return 0
    fd = files.open("slab")
    try:
        return files.size(fd) // PAGE_BYTES
    finally:
        files.close(fd)


def _synced_seq(change: journal.Change) -> int:
    return int.from_bytes(change.body[:8], "little") if len(change.body) == 8 else 0


def _puts(change: journal.Change, synced: int) -> Records:
    records = unseal(change.body)
    if change.seq > synced:
        # a power cut may have kept the record and lost the bytes: not durable until read once
        records = records.copy()
        records["flags"] |= FLAG_DOUBTFUL
    return records


def _bind_name(names: list[str], body: bytes) -> None:
    try:
        number, name = msgpack.unpackb(body)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException):
        return
    if not isinstance(number, int) or not isinstance(name, str) or not 0 <= number < MAX_NAMES:
        return
    while len(names) <= number:
        names.append(f"unknown-{len(names)}")
    names[number] = name


class _Rows(NamedTuple):
    records: Records
    order: np.ndarray[tuple[int], np.dtype[np.int64]]


def _last_of_each_key(records: Records) -> _Rows:
    if not len(records):
        return _Rows(records, np.zeros(0, np.int64))
    if len(np.unique(records["key"][:, 0])) == len(records):
        return _Rows(records, np.arange(len(records), dtype=np.int64))
    keys = np.ascontiguousarray(records["key"]).view("V16").ravel()
    _, last = np.unique(keys[::-1], return_index=True)
    order = np.sort(len(records) - 1 - last).astype(np.int64)
    return _Rows(records[order], order)


def _without(rows: _Rows, dels: list[tuple[int, bytes]]) -> Records:
    if not dels or not len(rows.records):
        return rows.records
    wanted = {body: order for order, body in dels}
    keys = np.ascontiguousarray(rows.records["key"]).view("V16").ravel()
    by_key = np.argsort(keys, kind="stable")
    names = np.array([np.void(body[:16]) for body in wanted], dtype="V16")
    at = np.searchsorted(keys[by_key], names) if len(keys) else np.zeros(len(names), np.int64)
    keep = np.ones(len(keys), bool)
    for place, (body, order) in zip(at.tolist(), wanted.items(), strict=True):
        if place >= len(by_key):
            continue
        row = by_key[place]
        same = keys[row].tobytes() == body[:16]
        slot = int.from_bytes(body[16:], "little")
        if same and int(rows.records["slot"][row]) == slot and rows.order[row] < order:
            keep[row] = False
    kept: Records = rows.records[keep]
    return kept
