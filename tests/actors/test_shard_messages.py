"""Whatever a message to a shard holds, it is answered or refused by name; the next one works."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable

from litecache.actors.storage_shard import packed_methods
from litecache.errors import LiteCacheError
from litecache.storage import wire
from litecache.storage.protocol import CommitItem, ShardMethod, SlotRef
from litecache.storage.shard_store import ShardStore

COUNT = 2000
NUMBERS = [0, 1, -1, 7, 4096, 8192, 2**31, 2**62, -(2**63), 2**63 - 1]


def message(pick: random.Random, keys: list[bytes], client_id: int) -> tuple[ShardMethod, bytes]:
    some = pick.sample(keys, pick.randrange(len(keys)))
    client = pick.choice([client_id, client_id, client_id, pick.choice(NUMBERS)])
    pairs = [(pick.choice(NUMBERS), pick.choice(NUMBERS)) for _ in range(pick.randrange(4))]
    name = pick.choice(["model", "", "\0", "x" * 300])
    packed: dict[ShardMethod, Callable[[], bytes]] = {
        ShardMethod.STAGE: lambda: wire.pack_stage(client, some, [SlotRef(*p) for p in pairs]),
        ShardMethod.RELEASE: lambda: wire.pack_slots([SlotRef(*p) for p in pairs], client),
        ShardMethod.RESERVE: lambda: wire.pack_reserve(
            client, pick.choice(NUMBERS), pick.choice(NUMBERS)
        ),
        ShardMethod.COMMIT: lambda: wire.pack_commits(
            [CommitItem(*p, pick.choice(keys), pick.choice(keys), name) for p in pairs], client
        ),
    }
    method = pick.choice(list(ShardMethod))
    return method, packed.get(method, lambda: wire.pack_keys(some, client))()


def damaged(pick: random.Random, whole: bytes) -> bytes:
    broken = bytearray(whole)
    for _ in range(pick.randrange(1, 4)):
        broken[pick.randrange(len(broken))] = pick.randrange(256)
    return bytes(broken[: pick.choice([len(broken), pick.randrange(len(broken) + 1)])])


def test_any_message_is_answered_or_refused_by_name() -> None:
    pick = random.Random(7)
    keys = [pick.randbytes(16) for _ in range(6)]
    outcomes: Counter[str] = Counter()
    with ShardStore(None, ram_bytes=4 << 20) as store:
        methods = packed_methods(store, lambda: None)
        client_id = store.attach(os.getpid()).client_id
        for number in range(COUNT):
            method, whole = message(pick, keys, client_id)
            try:
                methods[method](damaged(pick, whole) if number % 3 == 0 else whole)
                outcomes["answered"] += 1
            except LiteCacheError:
                outcomes["refused"] += 1
            if number % 500 == 499:  # what was leased by chance goes back
                store.detach(client_id)
                client_id = store.attach(os.getpid()).client_id
                answer = methods[ShardMethod.RESERVE](wire.pack_reserve(client_id, 4096, 2))
                _, slots = wire.unpack_slots(answer or b"")
                assert len(slots) == 2
        store.check_integrity()
    assert outcomes["answered"] > COUNT * 0.4
    assert outcomes["refused"] > COUNT * 0.2
