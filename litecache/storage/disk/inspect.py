"""`litecache inspect` and `litecache verify` as functions: what a storage folder holds, and whether
every block of it is sound.

`inspect_store` only reads metadata and works beside a live store. `verify_store` reads every block,
so it takes the lock and is refused while a store is live. Neither changes a file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np

from ...errors import ConfigError, StorageError, StorageFormatError
from ..protocol import PAGE_BYTES
from .files import Files
from .folder import Folder, disk_used_bytes, open_folder, read_superblock
from .records import FLAG_PINNED, Records, Recovered
from .slab import Slab, read_blocks, requests, stored
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
    if os.path.lexists(os.path.join(directory, "superblock")):
        return [directory]
    below = sorted(os.scandir(directory), key=lambda e: e.name) if os.path.isdir(directory) else []
    found = [e.path for e in below if os.path.lexists(os.path.join(e.path, "superblock"))]
    if not found:
        raise ConfigError("dir", directory, "a storage folder (with shard-*/superblock in it)")
    return found


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
        with _readable(folder):
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


@contextmanager
def _metadata(folder: str) -> Iterator[Files]:
    """A folder's files for reading beside a live store; root reads everybody's."""
    files = Files()
    files.folder, _ = open_folder(folder, any_owner=not os.geteuid())
    try:
        yield files
    finally:
        os.close(files.folder)


def _inspect(folder: str) -> ShardReport:
    with _metadata(folder) as files:
        version, segment_bytes = read_superblock(files, folder)
        recovered = recover_any(files, version)
    records = recovered.records
    now = int(time.time())
    sizes, counts = np.unique(records["pages"], return_counts=True)
    return ShardReport(
        path=folder,
        segment_bytes=segment_bytes,
        blocks=len(records),
        bytes=_bytes(records),
        disk_bytes=disk_used_bytes(folder),
        hits=int(records["hits"].sum(dtype=np.int64)),
        pinned=int(np.count_nonzero(records["flags"] & FLAG_PINNED)),
        block_sizes={
            int(pages) * PAGE_BYTES: int(count) for pages, count in zip(sizes, counts, strict=True)
        },
        ages=_ages(records, now),
        journal_changes=recovered.changes,
        damaged_records=recovered.damaged,
        namespaces=_namespaces(recovered, now),
    )


def _bytes(records: Records) -> int:
    return int(records["pages"].sum(dtype=np.int64)) * PAGE_BYTES


def _ages(records: Records, now: int) -> dict[str, int]:
    ages = now - records["created_s"].astype(np.int64)
    counts = np.bincount(np.searchsorted(_AGE_BOUNDS_S, ages), minlength=len(_AGE_NAMES))
    return dict(zip(_AGE_NAMES, counts.tolist(), strict=True))


def _namespaces(recovered: Recovered, now: int) -> list[NamespaceReport]:
    reports = []
    records = recovered.records
    for number in np.unique(records["namespace"]).tolist():
        mine = records[records["namespace"] == number]
        known = number < len(recovered.names)
        reports.append(
            NamespaceReport(
                name=recovered.names[number] if known else f"unknown-{number}",
                blocks=len(mine),
                bytes=_bytes(mine),
                hits=int(mine["hits"].sum(dtype=np.int64)),
                pinned=int(np.count_nonzero(mine["flags"] & FLAG_PINNED)),
                age_s=now - int(mine["created_s"].min()),
                idle_s=now - int(mine["used_s"].max()),
            )
        )
    return sorted(reports, key=lambda report: -report.bytes)


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
    folders = shard_folders(directory)
    total = 0
    for folder in folders:
        with _readable(folder), _metadata(folder) as files:
            version, _ = read_superblock(files, folder)
            total += _bytes(recover_any(files, version).records)
    done = 0
    reports = []
    for folder in folders:
        report = VerifyReport(folder)
        reports.append(report)
        with _readable(folder):
            for nbytes in _verify(folder, report):
                done += nbytes
                if progress is not None:
                    progress(done, total)
    return reports


def _verify(path: str, report: VerifyReport) -> Iterator[int]:
    files = Files()
    folder = Folder(files, path, 0, 4096)
    try:
        recovered = recover_any(files, folder.version)
        report.damaged_records = recovered.damaged
        records = np.sort(recovered.records, order="slot")
        if not files.exists("slab"):
            raise StorageFormatError(f"{path} has no slab")
        slab = Slab(files)
        try:
            # a forged record may claim any size: believe at most what the slab has
            outside = records["pages"].astype(np.int64) * PAGE_BYTES > slab.size()
            for block in stored(records[outside]):
                report.bad.append((block.key.hex(), "outside the slab"))
                report.checked += 1
                yield block.nbytes
            for batch in requests(stored(records[~outside])):
                with read_blocks(slab, batch) as found:
                    for block, (_, reason) in zip(batch, found, strict=True):
                        if reason is not None:
                            report.bad.append((block.key.hex(), reason))
                nbytes = sum(block.nbytes for block in batch)
                report.checked += len(batch)
                report.bytes += nbytes
                yield nbytes
        finally:
            slab.close()
    finally:
        if folder.clean:
            folder.note_clean()  # nothing was written meanwhile
        folder.close()
