"""`litecache inspect` and `litecache verify` as functions: what a storage folder holds, and whether
every block of it is sound.

`inspect_store` only reads metadata and works beside a live store. `verify_store` reads every block,
so it takes the lock and is refused while a store is live. Neither changes a file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np

from ...errors import ConfigError, StorageError, StorageFormatError
from ..protocol import PAGE_BYTES
from .files import ReadOnlyFiles
from .folder import disk_used_bytes, held_folder, open_folder, read_superblock
from .log import FLAG_PINNED, Records, Recovered
from .slab import Slab, read_records
from .upgrade import recover_any

_AGE_BOUNDS_S = (60, 3600, 86_400, 7 * 86_400, 30 * 86_400)
_AGE_NAMES = ("1 minute", "1 hour", "1 day", "7 days", "30 days", "older")


@dataclass(frozen=True)
class NamespaceReport:
    """Blocks of one namespace.

    Attributes:
        hits: times its blocks were staged, as of the last snapshot.
        age_s: seconds since the oldest block was written; `idle_s` since the newest use.
    """

    name: str
    blocks: int
    bytes: int
    hits: int
    pinned: int
    age_s: int
    idle_s: int


@dataclass(frozen=True)
class ShardReport:
    """One shard's folder.

    Attributes:
        bytes: of blocks; `disk_bytes` is what the files take.
        ages: number of blocks by the time since they were written.
        damaged_records: metadata records that were not sound.
    """

    path: str
    segment_bytes: int
    blocks: int
    bytes: int
    disk_bytes: int
    hits: int
    pinned: int
    block_sizes: dict[int, int]
    ages: dict[str, int]
    journal_changes: int
    damaged_records: int
    namespaces: list[NamespaceReport]

    def to_dict(self) -> dict[str, object]:
        """JSON-able."""
        return asdict(self)


@dataclass
class VerifyReport:
    """The outcome of reading every block of a shard.

    Attributes:
        checked, bytes: what was read.
        bad: key (hex) and reason of each block that is not sound.
    """

    path: str
    checked: int = 0
    bytes: int = 0
    damaged_records: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Every block and every record is sound."""
        return not self.bad and not self.damaged_records

    def to_dict(self) -> dict[str, object]:
        """JSON-able."""
        return {**asdict(self), "ok": self.ok}


def shard_folders(directory: str) -> list[str]:
    """Folders of shards at or directly below `directory`.

    Raises:
        ConfigError: there is none.
    """
    directory = os.path.abspath(directory)
    with _readable(directory):
        below = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    for folders in ([directory], [os.path.join(directory, name) for name in below]):
        if found := [f for f in folders if os.path.lexists(os.path.join(f, "superblock"))]:
            return found
    raise ConfigError("dir", directory, "a storage folder (with shard-*/superblock in it)")


def inspect_store(
    directory: str, progress: Callable[[int, int], None] | None = None
) -> list[ShardReport]:
    """What the shards of a storage folder hold.

    Args:
        directory: a storage folder.
        progress: called with (shards done, shards in all).

    Raises:
        ConfigError: there is no store.
        StorageFormatError: a file is of another format.
        StorageError: a file cannot be read.
    """
    folders = shard_folders(directory)
    reports = []
    for folder in folders:
        reports.append(_inspect(folder))
        if progress is not None:
            progress(len(reports), len(folders))
    return reports


@contextmanager
def _readable(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{folder} cannot be read: {error}") from error


def _look(folder: str) -> tuple[int, Recovered]:
    """Segment size and metadata, beside a live store; root reads everybody's."""
    files = ReadOnlyFiles()
    with _readable(folder):
        files.folder, _ = open_folder(folder, any_owner=not os.geteuid())
        try:
            version, segment_bytes = read_superblock(files, folder)
            return segment_bytes, recover_any(files, version)
        finally:
            os.close(files.folder)


def _inspect(folder: str) -> ShardReport:
    segment_bytes, recovered = _look(folder)
    records, now = recovered.records, int(time.time())
    sizes, counts = np.unique(records["pages"].astype(np.int64), return_counts=True)
    ages = np.searchsorted(_AGE_BOUNDS_S, now - records["created_s"].astype(np.int64))
    by_age = np.bincount(ages, minlength=len(_AGE_NAMES)).tolist()
    spaces = [
        _namespace(recovered, number, now) for number in np.unique(records["namespace"]).tolist()
    ]
    return ShardReport(
        path=folder,
        segment_bytes=segment_bytes,
        **_sums(records),
        disk_bytes=disk_used_bytes(folder),
        block_sizes=dict(zip((sizes * PAGE_BYTES).tolist(), counts.tolist(), strict=True)),
        ages=dict(zip(_AGE_NAMES, by_age, strict=True)),
        journal_changes=recovered.changes,
        damaged_records=recovered.damaged,
        namespaces=sorted(spaces, key=lambda report: -report.bytes),
    )


def _sums(records: Records) -> dict[str, int]:
    return {
        "blocks": len(records),
        "bytes": _bytes(records),
        "hits": int(records["hits"].sum(dtype=np.int64)),
        "pinned": int(np.count_nonzero(records["flags"] & FLAG_PINNED)),
    }


def _bytes(records: Records) -> int:
    return int(records["pages"].sum(dtype=np.int64)) * PAGE_BYTES


def _namespace(recovered: Recovered, number: int, now: int) -> NamespaceReport:
    mine = recovered.records[recovered.records["namespace"] == number]
    known = number < len(recovered.names)
    return NamespaceReport(
        name=recovered.names[number] if known else f"unknown-{number}",
        **_sums(mine),
        age_s=now - int(mine["created_s"].min()),
        idle_s=now - int(mine["used_s"].max()),
    )


def verify_store(
    directory: str, progress: Callable[[int, int], None] | None = None
) -> list[VerifyReport]:
    """Read and check every block of every shard.

    Args:
        directory: a storage folder.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        ConfigError: there is no store.
        StorageLockedError: a live store holds a shard.
        StorageFormatError: a file is of another format.
        StorageError: a file other than the slab cannot be read.
    """
    reports = [VerifyReport(folder) for folder in shard_folders(directory)]
    total = sum(_bytes(_look(report.path)[1].records) for report in reports)
    done = 0
    for report in reports:
        with _readable(report.path):
            for nbytes in _verify(report):
                done += nbytes
                if progress is not None:
                    progress(done, total)
    return reports


def _verify(report: VerifyReport) -> Iterator[int]:
    files = ReadOnlyFiles()
    with held_folder(files, report.path):
        recovered = recover_any(files, read_superblock(files, report.path)[0])
        report.damaged_records = recovered.damaged
        if not files.exists("slab"):
            raise StorageFormatError(f"{report.path} has no slab")
        with closing(Slab(files)) as slab:
            records = np.sort(recovered.records, order="slot")
            for batch, blocks in read_records(slab, records):
                report.checked += len(batch)
                report.bytes += sum(len(data) for data, _ in blocks)
                report.bad += [
                    (key.tobytes().hex(), reason)
                    for key, (_, reason) in zip(batch["key"], blocks, strict=True)
                    if reason is not None
                ]
                yield _bytes(batch)
