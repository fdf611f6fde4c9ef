"""A store that cannot open, that is closed, or that a fork has copied: nothing stays, nobody lies.

What is started half is taken back; a closed store touches no file and no memory; a forked child has
no part in its parent's store.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from any_values import EVERY, good_or_refused
from storage_help import MIB, ROOT, bytes_of, fill, key_of

from litecache.errors import LiteCacheError, StorageError
from litecache.storage import CommitItem, LocalCacheService, LocalShardClient, ShardStore
from litecache.storage.disk.files import Files
from litecache.storage.tiers import Tiers

NBYTES = 4096


def make(folder: Path | None, **options: Any) -> ShardStore:
    options = {"storage_bytes": 16 * MIB, "ram_bytes": 2 * MIB, **options}
    return ShardStore(None if folder is None else str(folder), **options)


def left_in(folder: Path) -> tuple[list[str], int, int]:
    gc.collect()
    files = sorted(str(path) for path in folder.rglob("*"))
    return files, len(os.listdir("/proc/self/fd")), threading.active_count()


class _NoThread(threading.Thread):
    """The system has room for `room` more."""

    room = 0

    def start(self) -> None:
        if not _NoThread.room:
            raise RuntimeError("can't start new thread")
        _NoThread.room -= 1
        super().start()


def test_a_store_that_cannot_open_leaves_nothing_wherever_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = left_in(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(threading, "Thread", _NoThread)
        for _NoThread.room in range(4):  # of one for the log and four for I/O
            with pytest.raises(LiteCacheError, match="no room for the thread"):
                make(tmp_path / "shard-0")
            assert left_in(tmp_path) == before

    def no_descriptor() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(select, "epoll", no_descriptor)
    with pytest.raises(StorageError, match="Too many open files"):
        make(tmp_path / "shard-0")
    assert left_in(tmp_path) == before


@pytest.mark.parametrize(
    "option",
    ["storage_bytes", "ram_bytes", "fsync", "ttl_s", "write_bytes_per_s", "eviction", "admission"],
)
def test_every_hard_value_of_an_option_is_taken_or_refused_without_a_trace(
    option: str, tmp_path: Path
) -> None:
    before = left_in(tmp_path)
    for value in EVERY:

        def try_it(value: object = value) -> None:
            with make(None, **{option: value}) as store:
                fill(store, range(2), NBYTES)

        good_or_refused(try_it, within_s=5)
    assert left_in(tmp_path) == before


def test_a_block_may_live_for_as_long_as_the_settings_allow(tmp_path: Path) -> None:
    with make(tmp_path, ttl_s=1e10) as store:
        keys = fill(store, range(3), NBYTES)
        assert all(store.query(keys))
        assert store.flush().complete
    with make(tmp_path) as store:
        assert all(store.query(keys))


def test_a_closed_store_refuses_and_writes_to_no_file_that_has_its_descriptors(
    tmp_path: Path,
) -> None:
    store = make(tmp_path / "shard-0")
    keys = fill(store, range(4), NBYTES)
    store.clear("ram")
    store.close()
    others = [open(tmp_path / str(i), "wb+") for i in range(20)]  # noqa: SIM115
    calls: list[Callable[[], object]] = [
        lambda: store.fetch(keys),
        lambda: store.delete(keys[:1]),
        lambda: store.pin(keys),
        lambda: store.clear(),
        lambda: store.delete_salt("0" * 16),
        lambda: store.query(keys),
        lambda: store.durable(keys),
        store.flush,
    ]
    for call in calls:
        with pytest.raises(StorageError, match="the shard store is closed"):
            call()
    store._durability.flush_log()  # a thread that was on its way when the store was closed
    for other in others:
        other.close()
    assert {(tmp_path / str(i)).stat().st_size for i in range(20)} == {0}


def test_bytes_of_a_closed_arena_are_none_of_a_block() -> None:
    store = make(None)
    keys = fill(store, range(1), NBYTES)
    assert store.fetch(keys) == [(keys[0], bytes_of(keys[0], NBYTES))]
    store._arena.close()  # while a fetch is under way
    with pytest.raises(StorageError, match="closed"):
        store.fetch(keys)


def test_who_closes_second_finds_the_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(tmp_path)
    began, go_on = threading.Event(), threading.Event()
    close = store._leases.close

    def slowly() -> None:
        began.set()
        assert go_on.wait(30)
        close()

    monkeypatch.setattr(store._leases, "close", slowly)
    first = threading.Thread(target=store.close)
    first.start()
    assert began.wait(30)
    second = threading.Thread(target=store.close)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go_on.set()
    second.join(30)
    make(tmp_path).close()
    first.join(30)


@pytest.mark.parametrize("call", ["fdatasync", "stat"])
def test_a_folder_that_cannot_be_reached_does_not_keep_a_store_from_closing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = left_in(tmp_path)[1:]
    store = make(tmp_path / "shard-0")
    fill(store, range(4), NBYTES)
    real = getattr(os, call)

    def failing(path: Any, *rest: Any, **more: Any) -> Any:
        if call == "fdatasync" or path == str(tmp_path / "shard-0"):
            raise OSError(errno.EIO if call == "fdatasync" else errno.EACCES, "not now")
        return real(path, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        assert store.flush().complete == (call == "fdatasync")
        store.close()
    assert left_in(tmp_path)[1:] == before
    with make(tmp_path / "shard-0") as store:
        store.check_integrity()


class _Torn(Files):
    """Writes of blocks fail for a while."""

    failing = 0

    def write(self, fd: int, buffers: Any, offset: int) -> int:
        if len(buffers[0]) == 4 * NBYTES and self.failing:
            self.failing -= 1
            raise OSError(errno.EIO, "not now")
        return super().write(fd, buffers, offset)


def test_a_block_of_a_retired_shard_goes_from_there_only_once_it_is_written_here(
    tmp_path: Path,
) -> None:
    with make(tmp_path / "shard-1") as store:
        keys = fill(store, range(8), 4 * NBYTES)
    files = _Torn()
    files.failing = 20
    with make(tmp_path / "shard-0", shards=1, files=files) as store:
        assert store._retired.wait(30)
        assert store.fetch(keys) == [(key, bytes_of(key, 4 * NBYTES)) for key in keys]


def test_a_block_keeps_its_time_when_its_shard_is_taken_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make(tmp_path / "shard-1") as store:
        client = LocalShardClient(store)
        (ref,) = client.reserve(NBYTES, 1)
        client.arena.buffer(ref.slot, NBYTES)[:] = bytes_of(key_of(1), NBYTES)
        client.commit([CommitItem(*ref, key_of(1), ROOT, "", 2**31)])
    commit = ShardStore.commit

    def at_once(store: ShardStore, *args: Any) -> Any:
        found = commit(store, *args)
        store.flush()  # it is on disk before anything else is said of it
        return found

    monkeypatch.setattr(ShardStore, "commit", at_once)
    store = make(tmp_path / "shard-0", shards=1)
    assert store._retired.wait(30)
    store.abandon()
    with make(tmp_path / "shard-0") as store:
        assert store._tiers.index.expires_s[store._tiers.index.find(key_of(1))] == 2**31


def test_a_service_that_its_own_thread_collects_is_closed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = np.zeros((64, NBYTES), np.uint8)
    gone, go_on = threading.Event(), threading.Event()
    finish = Tiers.finish_writes

    def collecting(*arguments: Any) -> None:  # under the store's lock
        finish(*arguments)
        assert go_on.wait(30)
        gc.collect()
        gone.set()

    monkeypatch.setattr(Tiers, "finish_writes", collecting)
    gc.disable()
    try:
        cache: Any = LocalCacheService(str(tmp_path / "c"), 32 * MIB, 1, kv, 2)
        cache.run()
        task = cache.create("write", [1], range(64))
        cache.itself = cache
        del cache
        go_on.set()
        assert gone.wait(30)
    finally:
        gc.enable()
    assert task.wait(30)
    while any(thread.name == "litecache-finalizer" for thread in threading.enumerate()):
        time.sleep(0.01)
    with LocalCacheService(str(tmp_path / "c"), 32 * MIB, 1, kv, 2) as again:
        assert again.query(1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_leaves_the_store_to_its_parent(tmp_path: Path) -> None:
    kv = np.random.default_rng(0).integers(0, 256, (64, NBYTES), dtype=np.uint8)

    def make_service() -> LocalCacheService:
        return LocalCacheService(str(tmp_path / "c"), 32 * MIB, 1, kv, 2)

    cache, waits = make_service(), make_service  # not run: its task stays open
    task = cache.create("read", [1], range(64))
    store = cache._core.engine.stores[0]
    (told, tell), (stay, go) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        answers = []
        for call in (lambda: store.query([key_of(1)]), lambda: cache.query(1), cache.run):
            try:
                call()
            except StorageError:
                answers.append("refused")
        cache.close()  # as at the end of a process
        store.close()
        answers.append(str(task.ready()))
        os.write(tell, ",".join(answers).encode())
        os.close(tell)
        os.close(go)
        os.read(stay, 1)
        os._exit(0)
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        assert pipe.read(1000) == b"refused,refused,refused,True"
    cache.run()
    assert task.wait(30)
    assert cache.create("write", [1], range(64)).wait(30)
    assert cache.flush()
    assert store.stats()["disk_lost"] == ""
    cache.close()
    with waits() as again:  # while the child is there
        assert again.query(1)
    os.close(go)
    os.waitpid(child, 0)
    os.close(stay)
