"""`LocalCacheService` on shard actors: the promises it keeps in-process, and a shard's death."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from litecache.actors import storage_shard
from litecache.actors.calls import result
from litecache.actors.ray_engine import STORED, Outcomes, RayEngine
from litecache.errors import ConfigError, StorageError, StorageLockedError
from litecache.storage import LocalCacheService, Task, TaskState
from litecache.storage.service import engine

MIB = 1 << 20
PAGE = 4096
PER_BLOCK = 64
BLOCKS = 12


def tensor(pages: int = BLOCKS * PER_BLOCK, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (pages, PAGE), dtype=np.uint8)


def service(kv: np.ndarray, folder: Path, shards: int = 1) -> LocalCacheService:
    made = LocalCacheService(str(folder / "c"), 64 * MIB, shards, kv, 4, engine=RayEngine)
    made.run()
    return made


def done(task: Task) -> Task:
    assert task.wait(60), f"the task did not end: {task.results()}"
    return task


def shard_pids(cache: LocalCacheService) -> list[int]:
    made = cache._core.engine
    assert isinstance(made, RayEngine)
    return [result(handle.info.remote())["pid"] for handle in made._handles.values()]


KEYS = list(range(1, BLOCKS + 1))
PAGES = np.arange(BLOCKS * PER_BLOCK)


@pytest.fixture
def kv() -> np.ndarray:
    return tensor()


@pytest.fixture
def cache(ray_local: None, kv: np.ndarray, tmp_path: Path) -> Iterator[LocalCacheService]:
    made = service(kv, tmp_path)
    yield made
    made.close()


def test_blocks_go_through_the_actors_and_are_there_again_after_close(
    ray_local: None, kv: np.ndarray, tmp_path: Path
) -> None:
    cache = service(kv, tmp_path, shards=2)
    before = kv.copy()
    written = done(cache.create("write", KEYS, PAGES))
    assert written.results() == ["stored"] * BLOCKS
    again = done(cache.create("write", KEYS, PAGES))
    assert again.results() == ["exists"] * BLOCKS
    assert again.get_page_already_list() == PAGES.tolist()
    assert cache.query_many([*KEYS, 99]) == [True] * BLOCKS + [False]
    pids = shard_pids(cache)
    assert len({*pids, os.getpid()}) == 3, "the stores live in processes of their own"

    kv[:] = 0
    read = done(cache.create("read", [*KEYS[6:], 99], np.r_[PAGES[6 * PER_BLOCK :], 0]))
    assert read.results() == ["hit"] * 6 + ["miss"]
    assert read.state()[-1] is TaskState.Aborted
    assert (kv[6 * PER_BLOCK :] == before[6 * PER_BLOCK :]).all()
    assert not kv[: 6 * PER_BLOCK].any()
    assert cache.flush()
    cache.close()
    for pid in pids:
        wait_until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
    with service(kv, tmp_path, shards=2) as reopened:
        assert done(reopened.create("read", KEYS, PAGES)).results() == ["hit"] * BLOCKS
    assert (kv == before).all()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_live_prefix_is_refused_in_either_form(
    cache: LocalCacheService, kv: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_shard, "LOCK_PATIENCE_S", 0.3)
    with pytest.raises(StorageLockedError):
        service(kv, tmp_path)
    with pytest.raises(StorageLockedError):
        LocalCacheService(str(tmp_path / "c"), 64 * MIB, 1, kv, 1)
    assert done(cache.create("write", KEYS, PAGES)).results() == ["stored"] * BLOCKS
    cache.close()
    with pytest.raises(StorageError, match="closed"):
        cache.query(1)
    with LocalCacheService(str(tmp_path / "c"), 64 * MIB, 1, kv, 1) as local:
        assert local.query_many(KEYS) == [True] * BLOCKS


def test_a_killed_shard_costs_misses_and_comes_back_with_what_was_written(
    cache: LocalCacheService, kv: np.ndarray
) -> None:
    before = kv.copy()
    done(cache.create("write", KEYS, PAGES))
    pids = shard_pids(cache)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    during = done(cache.create("write", [100], PAGES[:PER_BLOCK]))
    assert during.results()[0] in ("stored", "shard_lost")
    kv[:] = 0
    wait_until(lambda: all(cache.query_many(KEYS)))
    assert done(cache.create("read", KEYS, PAGES)).results() == ["hit"] * BLOCKS
    assert (kv == before).all()
    assert not set(pids) & set(shard_pids(cache))
    assert done(cache.create("write", [101], PAGES[:PER_BLOCK])).results() == ["stored"]


def test_a_full_disk_aborts_with_the_reason_and_the_block_is_a_miss(
    cache: LocalCacheService,
) -> None:
    # The limit holds for the arena's memory, too: let it grow first.
    others = [key + 1000 for key in KEYS]
    assert done(cache.create("write", others, PAGES)).results() == ["stored"] * BLOCKS
    for pid in shard_pids(cache):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))
    task = done(cache.create("write", KEYS, PAGES))
    assert task.results() == ["disk_full"] * BLOCKS
    assert set(task.state()) == {TaskState.Aborted}
    assert not any(cache.query_many(KEYS))


def test_abort_is_final_and_touches_nothing_more(cache: LocalCacheService, kv: np.ndarray) -> None:
    done(cache.create("write", KEYS, PAGES))
    kv[:] = 7
    task = cache.create("read", KEYS, PAGES)
    cache.abort(task)
    assert task.ready()
    seen, states = kv.copy(), task.state()
    assert set(states) <= {TaskState.Finished, TaskState.Aborted}
    time.sleep(0.2)
    assert (kv == seen).all()
    assert task.state() == states


def test_a_store_smaller_than_what_is_written_evicts_and_never_lies(
    ray_local: None, tmp_path: Path
) -> None:
    kv = tensor(PER_BLOCK * 8)
    cache = LocalCacheService(
        str(tmp_path / "c"), 12 * MIB, 1, kv, 2, ram_bytes=4 * MIB, engine=RayEngine
    )
    with cache:
        contents = {}
        for number in range(100, 180, 8):
            kv[:] = np.random.default_rng(number).integers(0, 256, kv.shape, dtype=np.uint8)
            keys = list(range(number, number + 8))
            results = done(cache.create("write", keys, np.arange(len(kv)))).results()
            assert set(results) <= {"stored", "dropped"}
            contents.update({key: kv[i * 64 : i * 64 + 64].copy() for i, key in enumerate(keys)})
        there = cache.query_many(list(contents))
        assert 8 <= sum(there) < len(contents)
        for key in [key for key, held in zip(contents, there, strict=True) if held]:
            assert done(cache.create("read", [key], np.arange(64))).results() == ["hit"]
            assert (kv[:64] == contents[key]).all()


def test_the_engine_is_found_by_the_entry_point_of_the_project(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tomllib

    with open(Path(__file__).parents[2] / "pyproject.toml", "rb") as file:
        declared = tomllib.load(file)["project"]["entry-points"][engine.ENTRY_POINT_GROUP]
    points = [EntryPoint(name, value, engine.ENTRY_POINT_GROUP) for name, value in declared.items()]
    monkeypatch.setattr(engine, "entry_points", lambda group: points)
    assert engine.get_engine("ray") is RayEngine
    with pytest.raises(ConfigError, match="local, memory, ray"):
        engine.get_engine("rays")


def test_an_outcome_is_told_once_and_the_last_one_counts() -> None:
    outcomes = Outcomes()
    outcomes.note([(b"a" * 16, "no_room"), (b"b" * 16, None)])
    outcomes.note([(b"a" * 16, None)])
    assert outcomes.take(b"a" * 16) == STORED
    assert outcomes.take(b"a" * 16) is None
    assert outcomes.take(b"b" * 16) == STORED
