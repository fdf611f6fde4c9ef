"""Fifteen defects found in a peer, each shown to be absent here."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from service_help import ABORTED, FINISHED, Gate, run, service, tensor
from storage_help import MIB

from litecache.errors import ConfigError, StorageError, StorageLockedError
from litecache.storage import LocalCacheService
from litecache.storage.disk import files as files_module


def slab_of(cache) -> str:
    (store,) = cache._core.engine.stores
    return f"{store.directory}/slab"


def store_of(cache):
    return cache._core.engine.stores[0]


@pytest.mark.parametrize(("mode", "copy"), [("w", "gather"), ("r", "scatter")])
def test_01_abort_is_final(tmp_path, monkeypatch, mode, copy):
    kv = tensor(640)
    cache = service(kv, tmp_path, workers=1)
    if mode == "r":
        run(cache, range(640), range(640), "w")
    gate = Gate(monkeypatch, copy)
    task = cache.create(tokens=list(range(640)), kv_page_indexer=torch.arange(640), mode=mode)
    gate.abort_inside(cache, task)
    assert task.ready()
    assert task.state() == [ABORTED] * 10
    run(cache, [9999], [0], "w")  # the one worker has done with the task
    assert gate.copies == 1 + (mode == "w"), "a block was copied after abort"
    assert task.ready()
    assert task.state() == [ABORTED] * 10
    cache.close()


def test_02_an_aborted_task_may_be_dropped(tmp_path):
    cache = service(tensor(200, 64 << 10), tmp_path, storage_mb=256)
    for i in range(5):
        tokens = list(range(1000 * i, 1000 * i + 200))
        task = cache.create(tokens=tokens, kv_page_indexer=torch.arange(200), mode="w")
        cache.abort(task)
        del task
        gc.collect()
    assert run(cache, [1], [0], "w").state() == [FINISHED]
    cache.close()


@pytest.mark.parametrize("page", [-1, 10, 2**31 - 1])
def test_03_an_out_of_range_page_is_an_exception(tmp_path, page):
    cache = service(tensor(10), tmp_path)
    for mode in "wr":
        with pytest.raises(ConfigError, match="0 to 9"):
            cache.create(tokens=[1], kv_page_indexer=torch.tensor([page]), mode=mode)
    assert run(cache, [1], [9], "w").state() == [FINISHED]
    cache.close()


@pytest.mark.parametrize(
    ("call", "smallest"), [("allocate", 0), ("write", 0), ("write", 256 << 10)]
)
def test_04_a_full_disk_is_an_error_and_a_miss(tmp_path, monkeypatch, call, smallest):
    """Growing the slab, any write, or (the last case) writes of block data alone fail."""
    kv = tensor(64)
    cache = service(kv, tmp_path, shards=1)
    real = getattr(files_module.Files, call)

    def full(self, fd, *args):
        if smallest and sum(map(len, args[0])) < smallest:
            return real(self, fd, *args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_module.Files, call, full)
    task = run(cache, range(64), range(64), "w")
    assert task.state() == [ABORTED]
    assert task.results() == ["disk_full"]
    kv.zero_()
    assert run(cache, range(64), range(64), "r").state() == [ABORTED]
    assert not kv.any()
    monkeypatch.undo()
    assert run(cache, range(64), range(64), "w").state() == [FINISHED]
    cache.close()


def test_05_a_restart_keeps_everything(tmp_path):
    kv = tensor(200)
    before = kv.clone()
    first = service(kv, tmp_path)
    run(first, range(200), range(200), "w")
    first.close()
    kv.zero_()
    second = service(kv, tmp_path)
    assert set(run(second, range(200), range(200), "r").state()) == {FINISHED}
    assert torch.equal(kv[:200], before)
    second.close()


def test_06_a_second_service_on_the_same_path_is_refused(tmp_path):
    kv = tensor(64)
    first = service(kv, tmp_path)
    with pytest.raises(StorageLockedError, match="in use"):
        service(kv, tmp_path)
    with pytest.raises(StorageLockedError):
        service(tensor(64, 8192), tmp_path)
    assert run(first, range(64), range(64), "w").state() == [FINISHED]
    first.close()
    service(kv, tmp_path).close()


def test_06_a_second_process_on_the_same_path_is_refused(tmp_path):
    first = service(tensor(64), tmp_path)
    code = (
        "import sys, numpy; from litecache.storage import LocalCacheService\n"
        "from litecache.errors import StorageLockedError\n"
        "kv = numpy.zeros((64, 4096), numpy.uint8)\n"
        "try: LocalCacheService(sys.argv[1], 128 << 20, 2, kv, 2)\n"
        "except StorageLockedError: sys.exit(7)"
    )
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path / "cache")])
    assert child.returncode == 7
    first.close()


def test_07_the_same_tokens_after_another_prefix_have_another_key(tmp_path):
    kv = tensor(256)
    cache = service(kv, tmp_path)
    n = cache._n
    same = list(range(5000, 5000 + n))
    run(cache, [*range(n), *same], range(2 * n), "w")
    other = [*range(n, 2 * n), *same]
    assert cache.hash(other)[1] == cache.hash([*range(n), *same])[1]
    assert cache.query(other) == [False, False]
    assert run(cache, other, range(2 * n), "r").state() == [ABORTED, ABORTED]
    cache.close()


def test_08_a_flipped_byte_on_disk_is_a_miss_with_a_counter(tmp_path):
    kv = tensor(64)
    cache = service(kv, tmp_path, shards=1)
    run(cache, range(64), range(64), "w")
    store = store_of(cache)
    store.clear("ram")
    with open(slab_of(cache), "r+b") as slab:
        slab.seek(12_345)
        byte = slab.read(1)[0]
        slab.seek(12_345)
        slab.write(bytes([byte ^ 1]))
    kv.zero_()
    assert run(cache, range(64), range(64), "r").state() == [ABORTED]
    assert not kv.any()
    assert store.metrics.value("litecache_misses", tier="disk", reason="corrupt") == 1
    cache.close()


def test_09_a_partial_block_stores_nobody_elses_bytes(tmp_path):
    kv = tensor(64)
    cache = LocalCacheService(str(tmp_path / "c"), 64 * MIB, 1, kv, 2)
    with cache:
        assert cache.create("write", [9], list(range(64))).wait(30)
        cache._core.engine.stores[0].clear()  # the next block comes where this one's bytes lie
        task = cache.create("write", [1], list(range(10)))
        assert task.wait(30)
        (_, data), *_ = cache._core.engine.stores[0].fetch([(1).to_bytes(16, "big")])
        assert data[: 10 * 4096] == kv[:10].numpy().tobytes()
        assert not any(data[10 * 4096 : -16])
        wider = cache.create("read", [1], list(range(20)))
        assert wider.wait(30)
        assert wider.state() == [ABORTED]


def test_10_too_many_shards_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="num_of_shard"):
        service(tensor(64, 1 << 20), tmp_path, storage_mb=256, shards=64)
    assert os.listdir(tmp_path) == []


def test_11_a_read_refreshes_recency(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTMEM_MAX_BLOCK_SIZE_MB", "1")
    cache = service(tensor(8, 512 << 10), tmp_path, storage_mb=16, shards=1)
    run(cache, [7], [0], "w")
    for token in range(100, 200):
        run(cache, [token], [1], "w")
        assert run(cache, [7], [2], "r").state() == [FINISHED]
    assert not cache.query([100])[0]
    written = store_of(cache).metrics.value(
        "litecache_storage_bytes", direction="write", tier="disk"
    )
    assert written == 101 * MIB, "it stayed; it was not evicted and written again"
    cache.close()


def test_12_an_empty_task_leaves_no_active_thread(tmp_path):
    cache = service(tensor(64), tmp_path)
    for mode in "wr":
        assert cache.create(tokens=[], kv_page_indexer=[], mode=mode).ready()
        assert cache.active_threads(mode) == 0
    run(cache, [1], [1], "w")
    assert cache.active_threads("w") == 0
    cache.close()


def test_13_strided_and_wrongly_typed_index_tensors(tmp_path):
    kv = tensor(64)
    cache = service(kv, tmp_path)
    strided = torch.arange(64, dtype=torch.int32)[::2]
    before = kv.clone()
    tokens = list(range(32))
    task = cache.create(tokens=tokens, kv_page_indexer=strided, mode="w")
    assert task.wait(30)
    kv.zero_()
    run(cache, tokens, range(0, 64, 2), "r")
    assert torch.equal(kv[::2], before[::2])
    assert not kv[1::2].any()
    for wrong in (torch.arange(32.0), torch.ones(32, dtype=torch.bool), torch.zeros(32, 1).long()):
        with pytest.raises(ConfigError, match="integers"):
            cache.create(tokens=tokens, kv_page_indexer=wrong, mode="w")
    cache.close()


def test_14_the_service_keeps_the_tensor_alive(tmp_path):
    kv = tensor(64)
    held = weakref.ref(kv)
    cache = service(kv, tmp_path)
    del kv
    gc.collect()
    assert held() is not None
    assert run(cache, range(64), range(64), "w").state() == [FINISHED]
    cache.close()
    del cache
    gc.collect()
    assert held() is None


def test_15_an_idle_service_sleeps(tmp_path):
    cache = service(tensor(64), tmp_path, workers=16)
    run(cache, range(64), range(64), "w")
    cache.flush()
    time.sleep(1.2)  # the interval sync after the write
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.02
    cache.close()


def test_a_read_holds_its_slot_until_it_is_copied(tmp_path, monkeypatch):
    cache = service(tensor(64), tmp_path, shards=1, workers=1)
    run(cache, range(64), range(64), "w")
    gate = Gate(monkeypatch, "scatter")
    task = cache.create(tokens=list(range(64)), kv_page_indexer=torch.arange(64), mode="r")
    assert gate.entered.wait(30)
    assert store_of(cache).stats()["leases"] == 1
    gate.open.set()
    assert task.wait(30)
    assert task.state() == [FINISHED]
    cache.close()


def test_a_closed_service_refuses_and_leaves_no_thread(tmp_path):
    before = set(threading.enumerate())
    cache = service(tensor(64), tmp_path)
    cache.close()
    cache.close()
    with pytest.raises(StorageError, match="closed"):
        cache.query([1])
    never_ran = LocalCacheService(str(tmp_path / "c"), 64 * MIB, 1, tensor(64), 2)
    never_ran.close()
    with pytest.raises(StorageError, match="closed"):
        never_ran.run()
    assert set(threading.enumerate()) <= before


def test_another_page_size_makes_a_fresh_store_and_keeps_the_old_one_aside(tmp_path):
    first = service(tensor(64, 4096), tmp_path)
    run(first, [1], [0], "w")
    first.close()
    second = service(tensor(64, 8192), tmp_path)
    assert second.query([1]) == [False]
    assert run(second, [1], [0], "w").state() == [FINISHED]
    second.close()
    assert (tmp_path / "cache_0.pages-4096" / "slab").exists()


def test_explicit_hash_values_are_the_keys_as_given(tmp_path):
    kv = tensor(130)
    with LocalCacheService(str(tmp_path / "c"), 64 * MIB, 2, kv, 2) as cache:
        values = [5, f"{6:032x}", (7).to_bytes(16, "big")]
        assert cache.create("write", values, list(range(130))).wait(30)
        assert [cache.query(value) for value in (5, 6, 7, 8)] == [True, True, True, False]
        assert cache.page_size() == 4096
        assert cache.block_size() == 64 * 4096
    again = service(kv, tmp_path / "other")
    task = again.create(hash_128s=[1 << 100], kv_page_indexer=[3], mode="w")
    assert task.wait(30)
    assert again.query(hash_128s=[1 << 100, 2]) == [True, False]
    again.close()


def test_the_memory_engine_and_registered_engines(tmp_path, monkeypatch):
    kv = tensor(64)
    before = kv.clone()
    with LocalCacheService(str(tmp_path / "c"), 64 * MIB, 1, kv, 2, engine="memory") as cache:
        assert cache.create("write", [1], list(range(64))).wait(30)
        kv.zero_()
        task = cache.create("read", [1], list(range(64)))
        assert task.wait(30)
        assert torch.equal(kv, before)
    with pytest.raises(ConfigError, match="local, memory"):
        LocalCacheService(str(tmp_path / "c"), 64 * MIB, 1, kv, 2, engine="none")
    from litecache.storage.service import MemoryEngine, engine

    class Point:
        name = "mine"

        def load(self) -> type:
            return MemoryEngine

    monkeypatch.setattr(engine, "entry_points", lambda group: [Point()])
    assert engine.get_engine("mine") is MemoryEngine


def test_a_live_store_of_another_page_size_is_not_set_aside_even_without_its_lock_file(tmp_path):
    with service(tensor(64), tmp_path) as cache:
        run(cache, [1], [0], "w")
        (tmp_path / "cache_0" / "lock").unlink()
        with pytest.raises(StorageLockedError, match="cache_0"):
            service(tensor(64, 8192), tmp_path, shards=1)
        assert (tmp_path / "cache_0" / "slab").exists()
