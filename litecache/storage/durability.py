"""Durability: carries the log to its file, syncs, compacts, and says what is durable.

One thread sleeps until something was written and its interval is over, or the log has outgrown
its share. Nothing here holds the store's lock while a disk works.
"""

from __future__ import annotations

import errno
import logging
import threading

from ..threads import start_service
from .disk.tier import DiskTier
from .retry import Backoff, LogByRate
from .tiers import Tiers

logger = logging.getLogger(__name__)


class _SlabError(OSError):
    """The slab's sync failed: what was written since the last one has been dropped."""


class Durability:
    """Keeps the disk tier's metadata on disk.

    Args:
        tiers: of the store.
        disk: its disk tier.
        threaded: False does all work when it is asked for.
        fsync: `always`, `interval` or `never`.
        interval_s: how long a write may stay unsynced under `interval`.

    Attributes:
        last_error: why the log could not be written.
    """

    def __init__(
        self, tiers: Tiers, disk: DiskTier, *, threaded: bool, fsync: str, interval_s: float
    ) -> None:
        self._tiers = tiers
        self._disk = disk
        self._lock = tiers.lock
        self._wake = threading.Condition(tiers.lock)
        self._fsync = fsync
        self._interval_s = interval_s
        self._closing = False
        self._unsynced = False
        self._compaction = Backoff()
        self._say = LogByRate(logger, logging.ERROR)
        self._sync_lock = threading.Lock()
        self.last_error: OSError | None = None
        self._thread = start_service(self._run, "durability") if threaded else None

    def note_change(self) -> None:
        """Metadata changed; the lock is held. The thread is woken where that is news to it."""
        news, self._unsynced = not self._unsynced, True
        if news or self._disk.wants_compaction():
            self._wake.notify()

    def after_write(self) -> None:
        """Carry the log to its file, and sync or compact if it is due."""
        self.flush_log()
        if self._fsync == "always":
            self.sync()
        with self._lock:
            if self._disk.wants_compaction():
                self._wake.notify()

    def flush_log(self) -> bool:
        """Carry what changed to the log's file, so that it survives kill -9.

        Returns:
            Whether the file holds everything.
        """
        log = self._disk.log
        with self._lock:
            seq = log.begin_sync()
        try:
            log.flush()
        except OSError as error:
            self._say("the log cannot be written: %s", error)
            self.last_error = error
            return False
        if self._fsync == "never" and not log.broken:
            self._note_synced(seq)
        return not log.broken

    def _note_synced(self, seq: int) -> None:
        with self._lock:
            self._disk.log.synced_seq = max(self._disk.log.synced_seq, seq)
            self._tiers.changed.notify_all()

    def sync(self, *, force: bool = False) -> bool:
        """Make everything written so far durable; False when the disk refused.

        Args:
            force: rewrite a broken log now, although that has just failed.
        """
        log = self._disk.log
        with self._sync_lock:
            if not self._in_place():
                return False
            with self._lock:
                seq, before = log.begin_sync(), log.synced_seq
                self._unsynced = False
                if seq == before and not log.broken:
                    return True
            try:
                self._sync_slab(before)
                with self._lock:
                    seq = log.mark_synced(seq)
                log.flush()
                if not log.broken:
                    log.sync()
            except _SlabError:
                return False
            except OSError as error:
                self._say("the log cannot be synced: %s", error)
            else:
                if not log.broken:
                    self._note_synced(seq)
                    return True
            # one whose sync failed once may have lost pages: only a new one can be trusted
            if not (force or self._compaction.due()) or not self._compact_locked():
                return False
            self._note_synced(seq)
            return True

    def _in_place(self) -> bool:
        """Whether the store's files still are where the next start will look for them."""
        disk = self._disk
        if disk.lost is None and (trouble := disk.trouble()) is not None:
            logger.error(
                "the disk tier in %s is out until the next start: %s", disk.folder.path, trouble
            )
            with self._lock:
                self._tiers.lose_disk(trouble)
                self._tiers.changed.notify_all()
        return disk.lost is None

    def _sync_slab(self, synced_seq: int) -> None:
        try:
            self._disk.slab.sync()
        except OSError as error:
            self._say("the slab cannot be synced: %s", error)
            self._distrust(synced_seq)
            raise _SlabError(errno.EIO, "the slab cannot be synced") from error

    def _distrust(self, synced_seq: int) -> None:
        """The device may have lost what was written since the last sync: drop it.

        A second sync may succeed without the writes that the first one lost.
        """
        tiers, put_seq = self._tiers, self._tiers.index.put_seq
        with self._lock:
            doubtful = [e for e in self._disk.on_disk().tolist() if put_seq[e] > synced_seq]
            tiers.failed_writes += len(doubtful)
            for entry in doubtful:
                tiers.metrics.inc("litecache_drops", reason="sync_error")
                tiers.drop(entry)
            # their records must be gone for good before a later mark could vouch for them
            self._disk.log.broken = True
            tiers.changed.notify_all()

    def compact(self, *, if_due: bool = False) -> bool:
        """Write a new log; False when the disk refused.

        Args:
            if_due: not again at once after a failure.
        """
        with self._sync_lock:
            due = self._compaction.due() or not if_due
            return due and self._in_place() and self._compact_locked()

    def _compact_locked(self) -> bool:
        synced_seq = self._disk.log.synced_seq
        try:
            seq = self._disk.compact(self._lock, lambda: self._sync_slab(synced_seq))
        except OSError as error:
            self._say("compaction failed: %s", error)
            self.last_error = error
            return self._compaction.note(False)
        self._note_synced(seq)
        return self._compaction.note(True)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._closing or self._due()):
                    # one that failed is tried again, whether anything else happens or not
                    held = self._disk.wants_compaction()
                    self._wake.wait(self._compaction.left_s() if held else None)
                if self._unsynced and self._fsync == "interval":
                    self._wake.wait_for(
                        lambda: self._closing or self._compacts_now(), self._interval_s
                    )
                if self._closing:
                    return
            self._maintain(sync=self._fsync != "never")

    def _due(self) -> bool:
        unsynced = self._unsynced and self._fsync == "interval"
        return unsynced or self._compacts_now()

    def _compacts_now(self) -> bool:
        return self._disk.wants_compaction() and self._compaction.due()

    def makes_room(self) -> bool:
        """Whether a log that is full is about to be written anew; the lock is held."""
        self._wake.notify()
        compacts = self._disk.log.compacting or self._compacts_now()
        return self._thread is not None and not self._closing and compacts

    def _maintain(self, *, sync: bool) -> None:
        synced = self.sync() if sync else True
        with self._lock:
            # what changed during the sync waits for the next one, and so does a sync that failed
            self._unsynced |= not synced and not self._disk.lost
            wanted = self._disk.wants_compaction()
        if wanted:
            self.compact(if_due=True)

    def catch_up(self) -> None:
        """Without a thread: do what it would have done by now, but for the interval's sync."""
        if self._thread is None and (self._unsynced or self._disk.wants_compaction()):
            self._maintain(sync=self._fsync == "always")

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._closing = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
