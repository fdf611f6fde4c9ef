"""The disk tier: slab, space and log of one folder.

It places blocks and makes room by eviction. Its `Log` keeps the metadata on disk in step, its
`Quotas` hold namespaces to their share, its space keeps slots in place while they are read.
What changes its state runs under the store's lock and touches no file; what touches files
(`write`, `read`, `grow`, `shrink`) runs outside it.

Bounded bytes: every segment of the slab that exists counts in full, every slot in use counts
`META_SLOT_BYTES` for the log and a new one beside it, and `META_FIXED_BYTES` for the rest.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from ..block_index import BlockIndex, Entries
from ..eviction.queues import Queues, allocate
from ..key_dict import BATCH_KEYS
from ..namespaces import Quotas
from ..protocol import PAGE_BYTES
from ..retry import Backoff, LogByRate
from ..segments import SegmentSpace, pick_segment_bytes, region_size
from .files import NO_SPACE, Files
from .folder import Folder
from .log import (
    FLAG_DOUBTFUL,
    FLAG_PINNED,
    META_FIXED_BYTES,
    META_NAME_COPIES,
    META_SLOT_BYTES,
    Log,
    Records,
    recover,
)
from .slab import Slab
from .upgrade import upgrade

logger = logging.getLogger(__name__)


class DiskTier:
    """One folder.

    Args:
        files: the file system.
        path: the folder, absolute.
        storage_bytes: bound on everything in it.
        index: the shard's blocks; filled from the folder.
        policy: name of the eviction policy.
        on_evict: called with the entry whose disk copy was given up, under the store's lock.
        quotas: namespace, or digest of a salt (`namespaces.py`), to the disk bytes it may take.
        direct: try O_DIRECT.
        retired_bytes: what retired shards (`retired.py`) take of the bound; may be set later.

    Attributes:
        growth: when the slab may grow again after the disk had no room.
        lost: why the tier was taken out while the store was live; nothing is written any more.

    Raises:
        ConfigError, StorageFullError, StorageLockedError, StorageFormatError: see `Folder`.
    """

    def __init__(
        self,
        files: Files,
        path: str,
        *,
        storage_bytes: int,
        index: BlockIndex,
        policy: str,
        on_evict: Callable[[int], None],
        quotas: dict[str, int],
        direct: bool = True,
        retired_bytes: int = 0,
    ) -> None:
        self._files = files
        self._say = LogByRate(logger, logging.WARNING)
        self._index = index
        self._on_evict = on_evict
        self.limit = storage_bytes
        self.retired_bytes = retired_bytes
        self.queues = Queues(policy, index)
        self.quotas = Quotas(quotas, self.queues)
        self.growth = Backoff()
        self.lost: str | None = None
        self.folder = Folder(files, path, storage_bytes, pick_segment_bytes(storage_bytes))
        with ExitStack() as opened:
            opened.callback(self.folder.discard)
            upgrade(files, self.folder)
            self.space = SegmentSpace(self.folder.segment_bytes, self._may_grow)
            self.space.may_shrink = True
            self.slab = Slab(files, direct=direct)
            opened.callback(self.slab.close)
            recovered = recover(files)
            self.log = Log(files, index, recovered, self.quotas.note_name)
            opened.callback(self.log.close)
            self.damaged_records = recovered.damaged
            self._fit_slab()
            self._restore(recovered.records)
            self.log.keep_doubts()
            self._make_durable()
            opened.pop_all()

    def _may_grow(self, new_segments: int, new_slots: int) -> bool:
        if new_segments > 0 and not self.growth.due():
            return False
        slab = (self.space.present + new_segments) * self.space.segment_bytes
        meta = self._meta_bytes(self.space.slots_assigned + new_slots)
        return slab + meta <= self.limit - self.retired_bytes

    def _meta_bytes(self, slots: int) -> int:
        names = META_NAME_COPIES * self.log.name_bytes
        return META_FIXED_BYTES + META_SLOT_BYTES * slots + names

    def _make_durable(self) -> None:
        # what was read back counts as durable from here on: make that true
        try:
            self.log.flush()
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            # the next sync writes it, or fails
            logger.warning("%s opens on a full disk: %s", self.folder.path, error)
        self.slab.sync()
        self.log.sync()
        self._files.sync_folder()

    def trouble(self) -> str | None:
        """What has become of the files under the live store; None: all are in their place."""
        trouble = self.folder.trouble()
        if trouble is None and not (
            self._files.is_at(self.slab.fd, "slab") and self.log.in_place()
        ):
            trouble = "its slab or its log was removed"
        return trouble

    def _fit_slab(self) -> None:
        """Make slab and space agree on whole segments, as many as the bound allows."""
        slab, segment = self.slab, self.space.segment_bytes
        size, room = slab.size(), max(0, self.limit - self.retired_bytes - META_FIXED_BYTES)
        segments = min(-(-size // segment), room // segment)
        if size > segments * segment:
            slab.truncate(segments * segment)
        elif size % segment:
            try:
                self._files.allocate(slab.fd, size, segments * segment - size)
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                # what lies in the part that is there is read all the same
                logger.warning("the slab's last segment cannot be made whole: %s", error)
        self.space.grow(range(segments))

    def _restore(self, records: Records) -> None:
        """Blocks of a store that was opened again enter space, index and queues, if they fit."""
        fits = self.space.occupy(
            records["slot"].astype(np.int64), records["pages"].astype(np.int64)
        )
        kept = records
        if not fits.all():
            logger.info("%d blocks do not fit the store any more", len(fits) - fits.sum())
            kept = records[fits]
        if not self.folder.intact:
            # any slot may have been given to another block whose record is lost
            kept["flags"] |= FLAG_DOUBTFUL
        entries = self._index.load(kept)
        self.queues.extend(
            entries, *(kept[name].astype(np.int64) for name in ("pages", "namespace", "retention"))
        )
        for entry in np.flatnonzero(kept["flags"] & FLAG_PINNED).tolist():
            self.queues.remove(entry)
            self._count_pinned(entry, 1)

    def name_number(self, name: str) -> int:
        """Number of a namespace."""
        return self.log.name_number(name, self.limit // 64)

    def allocate(self, pages: int, n: int, namespace: int) -> list[int]:
        """Up to `n` slots, evicting what is oldest; fewer when the rest is busy or may grow."""
        n = self.quotas.room_for(namespace, pages, n, lambda: self._evict_one(namespace, pages))
        slots = allocate(
            self.queues,
            self.space,
            pages,
            n,
            slot_of=lambda entry: self._index.disk[entry] - 1,
            allowed=self._may_evict,
            give_up=self._give_up,
        )
        self.quotas.begin_writes(namespace, pages * len(slots))
        return slots

    def _evict_one(self, namespace: int, pages: int) -> bool:
        victim = self.queues.evict(pages, self._may_evict, namespace)
        if victim is None:
            return False
        self._give_up(victim)
        return True

    def _may_evict(self, entry: int) -> bool:
        return self._index.disk[entry] - 1 not in self.space.readers

    def _give_up(self, entry: int) -> None:
        self._release_slot(entry)
        self._on_evict(entry)

    def _count_pinned(self, entry: int, sign: int) -> None:
        pages = self._index.pages[entry]
        self.quotas.pinned[self._index.namespace[entry]] += sign * pages

    def _release_slot(self, entry: int) -> None:
        slot = self._index.disk[entry] - 1
        if self._index.pinned(entry):
            self._count_pinned(entry, -1)
        self.log.removed(entry, slot)
        self._index.disk[entry] = 0
        self._index.put_seq[entry] = 0
        self.space.free(slot)

    def remove(self, entry: int) -> None:
        """Give up an entry's disk copy."""
        if entry in self.queues:
            self.queues.remove(entry)
        self._release_slot(entry)

    def place(self, entries: Sequence[int], slots: Sequence[int], checksums: Sequence[int]) -> None:
        """Blocks of a chain, head first, now lie in their slots: index, queue and log."""
        index = self._index
        for entry, slot, checksum in zip(entries, slots, checksums, strict=True):
            index.disk[entry] = slot + 1
            index.checksum[entry] = checksum
            index.flags[entry] &= ~FLAG_DOUBTFUL
            self.space.bind(slot, entry)
        for entry in entries:
            if index.pinned(entry):
                self._count_pinned(entry, 1)
            else:
                self._enqueue(entry)
        seq = self.log.put(np.array(entries, np.int64))
        for entry in entries:
            index.put_seq[entry] = seq

    def _enqueue(self, entry: int) -> None:
        index = self._index
        retention = index.retention[entry]
        self.queues.insert(entry, index.pages[entry], index.namespace[entry], retention)

    def set_pinned(self, entry: int, pinned: bool) -> None:
        """Take an entry out of eviction, or put it back, and remember that on disk."""
        index = self._index
        index.flags[entry] = index.flags[entry] & ~FLAG_PINNED | (FLAG_PINNED if pinned else 0)
        if not index.disk[entry]:
            return
        if index.pinned(entry) and entry in self.queues:
            self.queues.remove(entry)
            self._count_pinned(entry, 1)
        elif not index.pinned(entry) and entry not in self.queues:
            self._count_pinned(entry, -1)
            self._enqueue(entry)
        self._rewrite(entry)

    def _rewrite(self, entry: int) -> None:
        self._index.put_seq[entry] = self.log.put(np.array([entry], np.int64))

    def trust(self, entries: Sequence[int]) -> bool:
        """Blocks were read and are sound; whether that was news of any."""
        flags = self._index.flags
        doubtful = [entry for entry in entries if flags[entry] & FLAG_DOUBTFUL]
        for entry in doubtful:
            flags[entry] &= ~FLAG_DOUBTFUL
            self._rewrite(entry)
        return bool(doubtful)

    def is_durable(self, entry: int) -> bool:
        """Whether the disk copy survives what the fsync policy promises."""
        index = self._index
        sound = index.disk[entry] and not index.flags[entry] & FLAG_DOUBTFUL
        return bool(sound) and index.put_seq[entry] <= self.log.synced_seq

    def on_disk(self) -> Entries:
        """Entries with a disk copy, oldest use first."""
        entries = np.flatnonzero(self._index.column("disk"))
        return entries[np.argsort(self.queues.ticks(entries), kind="stable")]

    def wants_compaction(self) -> bool:
        """Whether the log should be written anew."""
        return not self.lost and self.log.wants_compaction(self.space.slots_assigned)

    def log_full(self) -> bool:
        """Whether the log may not grow at all any more (compaction keeps failing)."""
        return self.log.full(self.space.slots_assigned)

    def compact(self, lock: threading.Lock, sync_slab: Callable[[], None]) -> int:
        """Write the log anew, never holding the store's `lock` for long; the number it covers."""
        with lock:
            seq = self.log.begin_compaction()
            entries = np.flatnonzero(self._index.column("disk"))
            ticks = self.queues.ticks(entries)
        order = entries[np.argsort(ticks, kind="stable")]

        def blocks() -> Iterator[Records]:
            for start in range(0, len(order), BATCH_KEYS):
                with lock:
                    batch = order[start : start + BATCH_KEYS]
                    records = self._index.records(batch[self._index.column("disk")[batch] != 0])
                yield records

        self.log.compact(seq, blocks(), sync_slab)
        return seq

    def grow(self, segments: range, pages: int) -> bool:
        """Reserve disk space for segments with blocks of a size; False when the disk has none.

        What their metadata will take is left free, or the log could not tell of a single block.
        """
        size = self.space.segment_bytes
        slots = self.space.slots_assigned + region_size(size // PAGE_BYTES, pages).slots
        meta = self._meta_bytes(slots) - self.log.bytes
        try:
            if self.folder.room_bytes() < len(segments) * size + meta:
                raise OSError(errno.ENOSPC, "too little room beside it for its log")
            self._files.allocate(self.slab.fd, segments.start * size, len(segments) * size)
        except OSError as error:
            self._say("the slab of %s cannot grow: %s", self.folder.path, error)
            return self.growth.note(False)
        return self.growth.note(True)

    def shrink(self, segments: Sequence[int]) -> bool:
        """Give the disk space of empty segments back; False when the file system cannot."""
        size = self.space.segment_bytes
        try:
            for segment in segments:
                self._files.punch(self.slab.fd, segment * size, size)
        except OSError as error:
            logger.info("the slab of %s cannot shrink: %s", self.folder.path, error)
            return False
        return True

    def close(self, *, clean: bool) -> None:
        """Close all files and give the lock up; `clean`: a compaction has just succeeded."""
        try:
            if clean:
                self.folder.note("clean")
        except OSError as error:
            logger.warning("%s cannot be marked as closed cleanly: %s", self.folder.path, error)
        self.lost = self.lost or "it is closed"  # to threads that were about to look
        self.log.close()
        self.slab.close()
        self.folder.close()

    def discard(self) -> None:
        """Undo the opening: a folder that was made for it goes, too."""
        self.log.close()
        self.slab.close()
        self.folder.discard()

    def check_integrity(self, in_flight: set[int]) -> None:
        """AssertionError unless index, space and queues agree, but for the slots of writes."""
        index = self._index
        entries = np.flatnonzero(index.column("disk")).tolist()
        used = {index.disk[entry] - 1: index.pages[entry] for entry in entries}
        assert len(used) == len(entries), "two blocks share a disk slot"
        for slot in (*self.space.given_up, *in_flight):
            assert slot not in used, "a slot in flight belongs to a block"
        self.space.check_integrity(used, in_flight)
        for slot, pages in used.items():
            assert self.space.owner(slot) >= 0, f"slot {slot} of {pages} pages has no owner"
        queued = set(self.queues)
        for entry in entries:
            slot = index.disk[entry] - 1
            assert self.space.owner(slot) == entry, "a slot's owner is off"
            assert (entry in queued) != index.pinned(entry), "queue and pin disagree"
        self.queues.check_integrity()
        assert all(index.disk[entry] for entry in queued), "a queued block is not on disk"
        pinned = sum(index.pages[entry] for entry in entries if index.pinned(entry))
        assert pinned == self.quotas.pinned.total(), "pinned pages are off"
