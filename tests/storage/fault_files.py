"""A file system that loses power: `Files` over memory, with every kind of fault a disk can have.

As in SQLite's test VFS, a write that was not synced is only a promise. `power_cut()` decides for
each one anew: kept, dropped, or torn at a 512-byte sector, in any order; renames and new names that
were not followed by a folder sync may be undone. While running it may flip a stored bit, shorten a
read, or answer ENOSPC or EIO. Every fault is counted in `faults`.
"""

from __future__ import annotations

import collections
import errno
import random
from collections.abc import Sequence

from litecache.storage.disk.files import Files

SECTOR = 512


class Inode:
    """One file: what is on the platter, what programs see, and the writes in between."""

    def __init__(self) -> None:
        self.stable = bytearray()
        self.seen = bytearray()
        self.pending: list[tuple[int, bytes] | int] = []


class FaultFiles(Files):
    """The store's file system in memory.

    Args:
        draw: source of all decisions.
        rates: probability per call of `flip`, `short`, `enospc`, `eio`, `sync_eio`.
    """

    def __init__(self, draw: random.Random, rates: dict[str, float] | None = None) -> None:
        self.draw = draw
        self.rates = rates or {}
        self.faults: collections.Counter[str] = collections.Counter()
        self.names: dict[str, Inode] = {}
        self.stable_names: dict[str, Inode] = {}
        self.unsynced_names: list[tuple[str, Inode | None]] = []
        self._open: dict[int, Inode] = {}
        self._next = 1000
        self.flipped: list[tuple[str, int]] = []
        self.enabled = True
        self.direct = True
        self.boots = 0

    def _hit(self, kind: str) -> bool:
        if self.enabled and self.draw.random() < self.rates.get(kind, 0):
            self.faults[kind] += 1
            return True
        return False

    def open(self, name: str, *, create: bool = False, direct: bool = False) -> int:
        if name not in self.names:
            if not create:
                raise FileNotFoundError(name)
            self.names[name] = Inode()
            self.unsynced_names.append((name, self.names[name]))
        self._next += 1
        self._open[self._next] = self.names[name]
        return self._next

    def is_direct(self, fd: int) -> bool:
        return self.direct

    def close(self, fd: int) -> None:
        del self._open[fd]

    def size(self, fd: int) -> int:
        return len(self._open[fd].seen)

    def exists(self, name: str) -> bool:
        return name in self.names

    def is_at(self, fd: int, name: str) -> bool:
        return self.names.get(name) is self._open[fd]

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self._hit("eio"):
            raise OSError(errno.EIO, "injected")
        data = self._open[fd].seen
        wanted = sum(map(len, buffers))
        if wanted and self._hit("short"):
            wanted = self.draw.randrange(wanted)
        done = 0
        for buffer in buffers:
            piece = data[offset + done : offset + min(done + len(buffer), wanted)]
            buffer[: len(piece)] = piece
            done += len(piece)
            if len(piece) < len(buffer):
                break
        return done

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self._hit("enospc"):
            raise OSError(errno.ENOSPC, "injected")
        raw = b"".join(bytes(buffer) for buffer in buffers)
        inode = self._open[fd]
        if self._hit("eio"):
            # part of it may have reached the disk all the same
            raw = raw[: self.draw.randrange(len(raw) + 1)]
            self._apply(inode.seen, offset, raw)
            inode.pending.append((offset, raw))
            raise OSError(errno.EIO, "injected")
        self._apply(inode.seen, offset, raw)
        inode.pending.append((offset, raw))
        if self._hit("flip") and inode.seen:
            self._flip(inode)
        return len(raw)

    def _flip(self, inode: Inode) -> None:
        name = next((name for name, node in self.names.items() if node is inode), "")
        if name != "slab":
            return
        at = self.draw.randrange(len(inode.seen))
        bit = 1 << self.draw.randrange(8)
        inode.seen[at] ^= bit
        inode.pending.append((at, bytes([inode.seen[at]])))
        self.flipped.append((name, at))

    @staticmethod
    def _apply(data: bytearray, offset: int, raw: bytes) -> None:
        if len(data) < offset:
            data.extend(bytes(offset - len(data)))
        data[offset : offset + len(raw)] = raw

    def drop_cache(self, fd: int, offset: int, length: int) -> None:
        return

    def allocate(self, fd: int, offset: int, length: int) -> None:
        if self._hit("enospc"):
            raise OSError(errno.ENOSPC, "injected")
        inode = self._open[fd]
        if len(inode.seen) < offset + length:
            self.truncate(fd, offset + length)

    def punch(self, fd: int, offset: int, length: int) -> None:
        if self._hit("eio"):
            raise OSError(errno.EIO, "injected")
        inode = self._open[fd]
        self._apply(inode.seen, offset, bytes(length))
        inode.pending.append((offset, bytes(length)))

    def truncate(self, fd: int, length: int) -> None:
        inode = self._open[fd]
        self._resize(inode.seen, length)
        inode.pending.append(length)

    @staticmethod
    def _resize(data: bytearray, length: int) -> None:
        del data[length:]
        data.extend(bytes(length - len(data)))

    def sync(self, fd: int) -> None:
        inode = self._open[fd]
        if self._hit("sync_eio"):
            # what was promised may or may not be there, and is not promised any more
            self._settle(inode, self.draw.random() < 0.5)
            raise OSError(errno.EIO, "injected")
        self._settle(inode, True)

    def _settle(self, inode: Inode, keep: bool) -> None:
        for item in inode.pending:
            if isinstance(item, int):
                self._resize(inode.stable, item)
            elif keep or self.draw.random() < 0.5:
                self._apply(inode.stable, *item)
        inode.pending.clear()

    def rename(self, source: str, target: str) -> None:
        self.names[target] = self.names.pop(source)
        self.unsynced_names += [(source, None), (target, self.names[target])]

    def unlink(self, name: str) -> None:
        if self.names.pop(name, None) is not None:
            self.unsynced_names.append((name, None))

    def sync_folder(self) -> None:
        self.stable_names = dict(self.names)
        self.unsynced_names.clear()

    def boot_id(self) -> str:
        return f"boot-{self.boots}"

    def power_cut(self) -> None:
        """Everything that was not synced is decided now; open files are gone."""
        self.boots += 1
        names = dict(self.stable_names)
        # a journalling file system keeps a prefix of the name changes
        kept = self.draw.randrange(len(self.unsynced_names) + 1)
        self.faults["names_lost"] += len(self.unsynced_names) - kept
        for path, inode in self.unsynced_names[:kept]:
            if inode is None:
                names.pop(path, None)
            else:
                names[path] = inode
        for inode in set(names.values()):
            self._lose(inode)
        self.names, self.stable_names = names, dict(names)
        self.unsynced_names.clear()
        self._open.clear()

    def _lose(self, inode: Inode) -> None:
        writes = [item for item in inode.pending if not isinstance(item, int)]
        for item in inode.pending:
            # lengths follow metadata: a write that is kept makes the file long enough itself
            if isinstance(item, int) and self.draw.random() < 0.7:
                self._resize(inode.stable, item)
        self.draw.shuffle(writes)
        for offset, raw in writes:
            fate = self.draw.random()
            if fate < 0.4:
                self._apply(inode.stable, offset, raw)
            elif fate < 0.7:
                self.faults["dropped"] += 1
            else:
                self.faults["torn"] += 1
                for at in range(0, len(raw), SECTOR):
                    if self.draw.random() < 0.5:
                        self._apply(inode.stable, offset + at, raw[at : at + SECTOR])
        inode.pending.clear()
        inode.seen = bytearray(inode.stable)
