"""A process that stores blocks until it is killed; says on stdout what became durable."""

from __future__ import annotations

import os
import sys

from storage_help import MIB, bytes_of, key_of

from litecache.storage import CommitItem, LocalShardClient, ShardStore


def main(folder: str, first: int, fsync: str, nbytes: int) -> None:
    store = ShardStore(
        folder,
        storage_bytes=48 * MIB,
        ram_bytes=8 * MIB,
        fsync=fsync,
        fsync_interval_s=0.02,
    )
    client = LocalShardClient(store)
    os.write(1, b"open\n")
    number, waiting = first, []
    while True:
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
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
