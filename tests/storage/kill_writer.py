"""A process that stores blocks until it is killed; says on stdout what became durable.

It is killed from outside, or kills itself just before the Nth file operation of a kind, which may
come while it still opens (and replays) what the killed one before it left.
"""

from __future__ import annotations

import os
import signal
import sys

from storage_help import MIB, bytes_of, key_of

from litecache.storage import CommitItem, LocalShardClient, ShardStore
from litecache.storage.disk.files import Files

# how many of each there are in the first tenths of a second: opening takes the first few
OPERATIONS = {
    "open": 7, "read": 4, "allocate": 8, "write": 100, "sync": 30, "rename": 6, "sync_folder": 8,
}  # fmt: skip
COMPACT_EVERY = 16


class DeadlyFiles(Files):
    """The real file system until the Nth operation of a kind.

    Args:
        operation: one of `OPERATIONS`; empty for none.
        count: N, from 1.
    """

    def __init__(self, operation: str, count: int) -> None:
        self.left = count
        if operation:
            real = getattr(self, operation)

            def deadly(*args, **more):
                self.left -= 1
                if not self.left:
                    os.write(1, f"killed {operation}\n".encode())
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **more)

            setattr(self, operation, deadly)


def main(folder: str, first: int, fsync: str, nbytes: int, operation: str, count: int) -> None:
    store = ShardStore(
        folder,
        storage_bytes=48 * MIB,
        ram_bytes=8 * MIB,
        fsync=fsync,
        fsync_interval_s=0.02,
        files=DeadlyFiles(operation, count),
    )
    client = LocalShardClient(store)
    os.write(1, b"open\n")
    number, waiting, batches = first, [], 0
    while True:
        batches += 1
        if not batches % COMPACT_EVERY:
            store._durability.compact()
        refs = client.reserve(nbytes, 8)
        if not refs:
            store.flush(10)
        items, parent = [], bytes(16)
        for ref in refs:
            key = key_of(number)
            client.arena.buffer(ref.slot, nbytes)[:] = bytes_of(key, nbytes)
            items.append(CommitItem(*ref, key, parent, "kill"))
            parent, number = key, number + 1
        client.commit(items)
        waiting += range(number - len(items), number)
        done = store.durable([key_of(n) for n in waiting])
        said = [n for n, durable in zip(waiting, done, strict=True) if durable]
        if said:
            os.write(1, b"".join(b"durable %d\n" % n for n in said))
        waiting = [n for n, durable in zip(waiting, done, strict=True) if not durable][-64:]
        os.write(1, b"committed %d\n" % number)


if __name__ == "__main__":
    _, path, at, policy, size, kind, nth = sys.argv
    main(path, int(at), policy, int(size), kind, int(nth))
