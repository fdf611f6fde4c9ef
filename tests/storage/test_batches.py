"""What `stage` does for a whole batch at once is what it would do block by block."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from storage_help import KIB, fill, get, key_of

from litecache.storage import LocalShardClient, ShardStore, SlotRef, SlotState
from litecache.storage.arena.arena import Arena
from litecache.storage.arena.view import ArenaView
from litecache.storage.block_index import BlockIndex

NBYTES = 64 * KIB


def test_hits_of_a_key_that_is_given_twice_count_twice_and_never_wrap() -> None:
    index = BlockIndex()
    first, second = index.insert(key_of(1)), index.insert(key_of(2))
    index.hits[second] = 0xFFFF_FFFF
    for _ in range(2):
        index.note_hits(index.get_many([key_of(1), key_of(2), key_of(1)]), 77)
    assert index.hits[first] == 4
    assert index.hits[second] == 0xFFFF_FFFF
    assert index.used_s[first] == index.used_s[second] == 77


def test_leases_given_as_released_end_before_the_stage(tmp_path: Path) -> None:
    options = {"storage_bytes": 64 << 20, "ram_bytes": 1 << 20}
    with ShardStore(str(tmp_path / "s"), **options) as store:
        keys = fill(store, range(48), NBYTES)
        assert store.flush(30).complete  # what is not on disk yet keeps its slot
        client = LocalShardClient(store)
        held: list[SlotRef] = []
        # as many as RAM holds, again and again: each batch finds room only where the last one left
        for start in range(0, 48, 16):
            part = keys[start : start + 16]
            results = client.stage_async(part, held).result()
            held = [SlotRef(r.slot, r.generation) for r in results if r.slot >= 0]
            assert len(held) == 16
            assert all(client.wait(held))
            assert store.stats()["leases"] == 16
        client.stage_async(keys[:2], held).abandon()
        assert store.stats()["leases"] == 0
        assert all(get(client, keys, NBYTES)[:1])
        store.check_integrity()
        client.close()


def test_waiting_sees_the_slot_table_change_and_gives_up_when_the_shard_is_lost() -> None:
    arena = Arena(1 << 20, 64 << 10, 1)
    arena.grow(range(1))
    view = ArenaView(arena.attachment(1))
    for slot, state in ((0, SlotState.READY), (1, SlotState.LOADING), (2, SlotState.LOADING)):
        arena.set_entry(slot, 5, state, key_of(slot), 4096)
    refs = [SlotRef(0, 5), SlotRef(1, 5), SlotRef(2, 5), SlotRef(0, 4)]
    assert view.wait(refs, 0.01) == [True, False, False, False]
    assert view.wait(refs, 30, is_lost=lambda: True) == [True, False, False, False]
    started = threading.Event()

    def finish() -> None:
        started.wait()
        arena.set_state(1, 5, SlotState.FAILED)
        arena.set_state(2, 5, SlotState.READY)

    def looked() -> bool:
        started.set()
        return False

    thread = threading.Thread(target=finish)
    thread.start()
    assert view.wait(refs, 30, looked) == [True, False, True, False]
    thread.join()
    view.close()
    arena.close()


def test_the_slot_table_of_a_segment_exists_with_it() -> None:
    arena = Arena(64 << 20, 4 << 20, 1)
    arena.grow(range(3, 4))
    start, length = arena.arena_bytes + 3 * 32 * KIB, 32 * KIB
    holes = os.lseek(arena._fd, start, os.SEEK_HOLE)
    assert holes >= start + length
    assert os.lseek(arena._fd, arena.arena_bytes, os.SEEK_DATA) == start
    arena.close()
