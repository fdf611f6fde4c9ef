"""Shards of an earlier, larger `storage_shards`: counted in the bound, read, shrunk, emptied.

A present shard takes the retired ones beside it whose number leaves its own as the remainder. While
they exist their bytes are taken off its bound. Their blocks enter it as any others do, from the end
of their slab to its start, and the slab shrinks behind them; at last the folder goes. A process
that dies meanwhile leaves a shorter slab, and the next start goes on.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import numpy as np

from ...errors import LiteCacheError, StorageLockedError
from ...threads import start_job
from ..protocol import PAGE_BYTES, CommitItem, Retention, SlotRef
from .files import Files
from .folder import FILE_NAMES, Folder, disk_used_bytes
from .log import FLAG_PINNED
from .slab import Slab, read_records
from .upgrade import recover_any

if TYPE_CHECKING:
    from ..shard_store import ShardStore
    from ..tiers import Tiers

logger = logging.getLogger(__name__)

_PAUSE_S = 0.5


def retired_folders(directory: str, shards: int) -> list[str]:
    """Folders beside a shard's that it is to take in.

    Args:
        directory: of the shard, named `shard-<i>`, or `<prefix>_<i>` by a cache service.
        shards: how many share the parent folder now; higher numbers are retired.
    """
    parent, name = os.path.split(directory)
    own = re.fullmatch(r"(shard-|.*_)(\d+)", name)
    if own is None or not os.path.isdir(parent):
        return []
    others = (re.fullmatch(re.escape(own[1]) + r"(\d+)", other) for other in os.listdir(parent))
    found = sorted(int(other[1]) for other in others if other is not None)
    paths = [f"{parent}/{own[1]}{i}" for i in found if i >= shards and i % shards == int(own[2])]
    if own[1] == "shard-":
        return paths
    # beside the prefix of a service there may be anybody's folders
    return [path for path in paths if os.path.isfile(f"{path}/superblock")]


class Retired:
    """The retired shards that one shard takes in; opened, and cut to size at once.

    Args:
        folders: of the shards; one that a live store holds is left out.
        most_bytes: what they may take together.
    """

    def __init__(self, folders: list[str], most_bytes: int) -> None:
        self._open: list[tuple[Folder, Files]] = []
        self._unreadable: list[str] = []
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        for path in folders:
            files = Files()
            try:
                self._open.append((Folder(files, path, 0, 4096), files))
            except StorageLockedError:
                logger.warning("%s is in use: not taken in", path)
            except (LiteCacheError, OSError) as error:
                logger.warning(
                    "%s cannot be taken in, its bytes count all the same: %s", path, error
                )
                self._unreadable.append(path)
        for _, files in self._open:
            over = self.nbytes() - most_bytes
            if over > 0:
                with closing(Slab(files)) as slab:
                    slab.truncate(max(0, slab.size() - over))

    def nbytes(self) -> int:
        """Bytes that they take now."""
        return sum(map(disk_used_bytes, [*(f.path for f, _ in self._open), *self._unreadable]))

    def begin(self, store: ShardStore, tiers: Tiers, lock: threading.Lock) -> None:
        """Start to move the blocks into an open store, whose state and lock are given."""
        self._store, self._tiers, self._lock = store, tiers, lock
        if self._open:
            self._thread = start_job(self._run, "retired")

    def wait(self, timeout_s: float) -> bool:
        """Wait until all blocks have moved; whether they have."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self._open

    def let_go(self) -> None:
        """In a forked child: the folders are the parent's."""
        for folder, _ in self._open:
            folder.close()

    def close(self) -> None:
        """Stop; what has not moved stays for the next start."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self.let_go()
        self._open.clear()

    def _run(self) -> None:
        while self._open and not self._stopped.is_set():
            folder, files = self._open[0]
            try:
                if not self._empty(files, folder.version):
                    return
                for name in (*FILE_NAMES, "lock"):
                    files.unlink(name)
                os.rmdir(folder.path)
                logger.info("%s was of an earlier storage_shards: taken in, removed", folder.path)
            except Exception as error:  # a sick old shard must not cost the present one its thread
                logger.warning("%s cannot be taken in to its end: %s", folder.path, error)
                self._unreadable.append(folder.path)
            self._open.pop(0)
            folder.close()
            self._give_room()

    def _give_room(self) -> None:
        with self._lock:
            assert self._tiers.disk is not None
            self._tiers.disk.retired_bytes = self.nbytes()

    def _empty(self, files: Files, version: int) -> bool:
        """Move all blocks; False when that has to wait for the next start."""
        found = recover_any(files, version)
        from_the_end = np.sort(found.records, order="slot")[::-1]
        client_id = self._store.attach(os.getpid()).client_id
        with ExitStack() as undo:
            undo.callback(self._store.detach, client_id)
            slab = undo.enter_context(closing(Slab(files)))
            for records, blocks in read_records(slab, from_the_end):
                sound = [i for i, (_, reason) in enumerate(blocks) if reason is None]
                moved = False
                while not moved:
                    faults = self._faults()
                    for i in sound:
                        self._store_one(client_id, records[i], blocks[i][0], found.names)
                    while (report := self._store.flush(1)).pending and not self._stopped.is_set():
                        pass
                    # for what found no room there is none; what a disk refused lies here still
                    moved = report.complete or (report.failed > 0 and faults == self._faults())
                    if self._stopped.wait(0 if moved else _PAUSE_S):
                        return False
                if sound:
                    slab.truncate(min(slab.size(), int(records["slot"][sound[-1]]) * PAGE_BYTES))
                    self._give_room()
        return True

    def _faults(self) -> int:
        drops = self._store.metrics.by_label("litecache_drops", "reason")
        return sum(int(drops.get(reason, 0)) for reason in ("io_error", "sync_error"))

    def _store_one(
        self, client_id: int, record: np.void, data: memoryview, names: list[str]
    ) -> None:
        store, number = self._store, int(record["namespace"])
        name = names[number] if number < len(names) else ""
        key, parent = record["key"].tobytes(), record["parent"].tobytes()
        refs: list[SlotRef] = []
        while not refs and not self._stopped.is_set():
            refs = store.reserve(client_id, len(data), 1)
            if not refs and store.flush(1).failed:
                return
        for ref in refs:
            self._tiers.arena.buffer(ref.slot, len(data))[:] = data
            kept = [each for each in Retention if each == int(record["retention"])]
            # its own time goes with it: the block may be on disk before it is set below
            expires_s = int(record["expires_s"])
            store.commit(client_id, [CommitItem(*ref, key, parent, name, expires_s, *kept)])
        with self._lock:
            index = self._tiers.index
            if (entry := index.find(key)) >= 0:
                index.created_s[entry] = int(record["created_s"])
                index.expire(entry, int(record["expires_s"]))
        if int(record["flags"]) & FLAG_PINNED:
            store.pin([key])
