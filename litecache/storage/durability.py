"""Durability: carries the log to its file, syncs, compacts, and says what is durable.

One thread sleeps until something was written and its interval is over, or the log has outgrown
its share. Nothing here holds the store's lock while a disk works.
"""

from __future__ import annotations

import errno
import logging
import threading
import time

from ..metrics import Metrics
from ..threads import start_service
from .retry import Backoff, LogByRate
from .tiers import Tiers

logger = logging.getLogger(__name__)


class Durability:
    """Keeps the disk tier's metadata on disk.

    Args:
        tiers: the state, guarded by `lock`.
        lock: the store's lock.
        changed: notified when more has become durable.
        threaded: False does all work when it is asked for.
        fsync: `always`, `interval` or `never`.
        interval_s: how long a write may stay unsynced under `interval`.
        metrics: where drops are counted.
    """

    def __init__(
        self,
        tiers: Tiers,
        lock: threading.Lock,
        changed: threading.Condition,
        *,
        threaded: bool,
        fsync: str,
        interval_s: float,
        metrics: Metrics,
    ) -> None:
        self._tiers = tiers
        self._lock = lock
        self._changed = changed
        self._wake = threading.Condition(lock)
        self._fsync = fsync
        self._interval_s = interval_s
        self._metrics = metrics
        self._closing = False
        self._unsynced = False
        self._compaction = Backoff()
        self._say = LogByRate(logger, logging.ERROR)
        self._sync_lock = threading.Lock()
        self.lost_writes = 0
        self.last_error: OSError | None = None
        self._thread: threading.Thread | None = None
        if tiers.disk is not None and threaded:
            self._thread = start_service(self._run, "durability")

    def note_change(self) -> None:
        """Metadata changed without a write; the lock is held."""
        self._unsynced = True
        self._wake.notify()

    def after_write(self) -> None:
        """Carry the log to its file, and sync or compact if it is due."""
        disk = self._tiers.disk
        assert disk is not None
        self.flush_log()
        if self._fsync == "always":
            self.sync()
        if self._thread is not None:
            with self._lock:
                self._wake.notify()

    def flush_log(self) -> bool:
        """Carry what changed to the log's file, so that it survives kill -9.

        Returns:
            Whether the file holds everything.
        """
        disk = self._tiers.disk
        if disk is None:
            return True
        with self._lock:
            seq = disk.log.begin_sync()
        try:
            disk.log.flush()
        except OSError as error:
            self._say("the log cannot be written: %s", error)
            self.last_error = error
            return False
        if self._fsync == "never" and not disk.log.broken:
            with self._lock:
                disk.log.synced_seq = max(disk.log.synced_seq, seq)
        return not disk.log.broken

    def sync(self, *, force: bool = False) -> bool:
        """Make everything written so far durable; False when the disk refused.

        Args:
            force: rewrite a broken log now, although that has just failed.
        """
        disk = self._tiers.disk
        if disk is None:
            return True
        with self._sync_lock:
            if not self._in_place():
                return False
            with self._lock:
                seq = disk.log.begin_sync()
                before = disk.log.synced_seq
                self._unsynced = False
                if seq == before and not disk.log.broken:
                    return True
            if not self._sync_slab(before):
                return False
            with self._lock:
                seq = disk.log.mark_synced(seq)
            whole = False
            try:
                disk.log.flush()
                if not disk.log.broken:
                    disk.log.sync()
                    whole = True
            except OSError as error:
                self._say("the log cannot be synced: %s", error)
            # one whose sync failed once may have lost pages: only a new one can be trusted
            due = force or self._compaction.due()
            if not whole and not (due and self._compact_locked()):
                return False
            with self._lock:
                disk.log.synced_seq = max(disk.log.synced_seq, seq)
                self._changed.notify_all()
            return True

    def _in_place(self) -> bool:
        """Whether the store's files still are where the next start will look for them."""
        disk = self._tiers.disk
        assert disk is not None
        if disk.lost is None and (trouble := disk.trouble()) is not None:
            logger.error(
                "the disk tier in %s is out until the next start: %s", disk.folder.path, trouble
            )
            with self._lock:
                self._tiers.lose_disk(trouble)
                self._changed.notify_all()
        return disk.lost is None

    def _sync_slab(self, synced_seq: int) -> bool:
        disk = self._tiers.disk
        assert disk is not None
        try:
            disk.slab.sync()
        except OSError as error:
            self._say("the slab cannot be synced: %s", error)
            # a second sync may succeed without the writes that the first one lost
            self._distrust(synced_seq)
            return False
        return True

    def _distrust(self, synced_seq: int) -> None:
        """The device may have lost what was written since the last sync: drop it."""
        tiers, disk = self._tiers, self._tiers.disk
        assert disk is not None
        with self._lock:
            doubtful = [
                entry
                for entry in disk.on_disk().tolist()
                if tiers.index.put_seq[entry] > synced_seq
            ]
            for entry in doubtful:
                self.lost_writes += 1
                self._metrics.inc("litecache_drops", reason="sync_error")
                tiers.drop(entry)
            # their records must be gone for good before a later mark could vouch for them
            disk.log.broken = True
            self._changed.notify_all()

    def compact(self, *, if_due: bool = False) -> bool:
        """Write a new log; False when the disk refused.

        Args:
            if_due: not again at once after a failure.
        """
        with self._sync_lock:
            due = self._compaction.due() or not if_due
            return due and self._in_place() and self._compact_locked()

    def _compact_locked(self) -> bool:
        disk = self._tiers.disk
        assert disk is not None
        synced_seq = disk.log.synced_seq

        def sync_slab() -> None:
            if not self._sync_slab(synced_seq):
                raise OSError(errno.EIO, "the slab cannot be synced")

        try:
            seq = disk.compact(self._lock, sync_slab)
        except OSError as error:
            self._say("compaction failed: %s", error)
            self.last_error = error
            return self._compaction.note(False)
        self._compaction.note(True)
        with self._lock:
            disk.log.synced_seq = max(disk.log.synced_seq, seq)
            self._changed.notify_all()
        return True

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._closing and not self._due():
                    self._wake.wait()
                if self._closing:
                    return
                if self._unsynced and self._fsync == "interval":
                    deadline = time.monotonic() + self._interval_s
                    while not self._closing and (left := deadline - time.monotonic()) > 0:
                        self._wake.wait(left)
                if self._closing:
                    return
            self._maintain(force_sync=self._fsync == "interval")

    def _due(self) -> bool:
        disk = self._tiers.disk
        assert disk is not None
        if disk.wants_compaction() and self._compaction.due():
            return True
        return self._unsynced and self._fsync == "interval"

    def _maintain(self, *, force_sync: bool) -> None:
        disk = self._tiers.disk
        assert disk is not None
        synced = self.sync() if force_sync or self._fsync == "always" else True
        with self._lock:
            # what changed during the sync waits for the next one, and so does a sync that failed
            self._unsynced |= not synced and not disk.lost
            wanted = disk.wants_compaction()
        if wanted:
            self.compact(if_due=True)

    def catch_up(self) -> None:
        """Without a thread: do what it would have done by now, but for the interval's sync."""
        disk = self._tiers.disk
        if (
            self._thread is None
            and disk is not None
            and (self._unsynced or disk.wants_compaction())
        ):
            self._maintain(force_sync=False)

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._closing = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
