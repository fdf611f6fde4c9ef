"""Any value at the doors of `LocalCacheService`: a result or an error, and nothing left behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from any_values import ANYTHING, EVERY, good_or_refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from litecache.errors import ConfigError, LiteCacheError, StorageError
from litecache.storage import LocalCacheService, PyLocalCacheService, PyTask, TaskState
from litecache.storage.service import LocalEngine, MemoryEngine
from litecache.storage.service.pages import tensor_rows
from litecache.storage.service.tasks import Task

MIB = 1 << 20
PAGE = 4096
PAGES = list(range(100))


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "file": str(folder / "new" / "c"),
        "storage_size": 8 * MIB,
        "num_of_shard": 1,
        "kvcache": np.zeros((128, PAGE), np.uint8),
        "num_workers": 1,
        "ram_bytes": 4 * MIB,
        "engine": "local",
    }


def left_in(folder: Path) -> tuple[list[str], int, int]:
    gc.collect()
    files = sorted(str(path) for path in folder.rglob("*"))
    return files, len(os.listdir("/proc/self/fd")), threading.active_count()


def construct(values: dict[str, Any]) -> Any:
    cache = LocalCacheService(**values)
    cache.close()
    return cache


@pytest.mark.parametrize(
    "name",
    [
        *("storage_size", "num_of_shard", "kvcache", "num_workers", "ram_bytes", "engine"),
        pytest.param("file", marks=pytest.mark.slow),
    ],
)
def test_every_hard_value_of_an_argument_is_taken_or_refused_without_a_trace(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / "a" / "b" / "c"  # a value is ../..
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    before = left_in(tmp_path)
    for value in EVERY:
        outcome = good_or_refused(
            lambda value=value: construct(arguments(tmp_path) | {name: value}), within_s=5
        )
        if isinstance(outcome, LiteCacheError):
            continue
        for path in sorted(tmp_path.rglob("*"), reverse=True):
            if path not in (deep, *deep.parents):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    assert left_in(tmp_path) == before


@pytest.mark.parametrize("path", ["link/c", "file/c", "loop/c"])
@pytest.mark.parametrize("engine", ["local", "memory"])
def test_a_prefix_behind_something_that_is_no_folder_is_refused(
    path: str, engine: str, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    before = left_in(tmp_path)
    values = arguments(tmp_path) | {"file": str(tmp_path / path), "engine": engine}
    assert isinstance(good_or_refused(lambda: construct(values)), StorageError)
    assert left_in(tmp_path) == before


def test_a_prefix_that_makes_too_long_names_is_refused_before_a_file_is_there(
    tmp_path: Path,
) -> None:
    for length in (224, 255):
        values = arguments(tmp_path) | {"file": str(tmp_path / ("p" * length))}
        assert isinstance(good_or_refused(lambda values=values: construct(values)), ConfigError)
    assert list(tmp_path.iterdir()) == []
    construct(arguments(tmp_path) | {"file": str(tmp_path / ("p" * 223))})


@pytest.mark.parametrize("note", ["[" * 100_000, '{"page_bytes": "x/../../y"}', None])
def test_a_note_that_no_service_wrote_neither_stops_nor_leads_astray(
    note: str | None, tmp_path: Path
) -> None:
    construct(arguments(tmp_path))
    path = tmp_path / "new" / "c.geometry.json"
    path.unlink()
    if note is None:
        os.mkfifo(path)
    else:
        path.write_text(note)
    assert not isinstance(good_or_refused(lambda: construct(arguments(tmp_path))), LiteCacheError)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, "c_0", "c_0.pages-0"]


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_a_quantized_tensor_is_refused() -> None:
    quantized = torch.quantize_per_tensor(torch.zeros(4, 16), 0.1, 0, torch.quint8)
    with pytest.raises(ConfigError, match="kvcache"):
        tensor_rows(quantized)  # torch itself would end the process


class Failing(MemoryEngine):
    keeps_folders = True

    def __init__(self, options: Any) -> None:
        raise StorageError("not today")


def test_an_engine_that_does_not_open_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not today"):
        construct(arguments(tmp_path) | {"engine": Failing})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"), [("ram_bytes", 2 * MIB), ("storage_size", 8 * MIB), ("storage_size", MIB)]
)
def test_a_bound_that_holds_no_block_is_refused_with_the_numbers(
    field: str, value: int, tmp_path: Path
) -> None:
    big = np.zeros((4, 9 * MIB), np.uint8)
    values = arguments(tmp_path) | {"storage_size": 512 * MIB, "ram_bytes": 256 * MIB}
    with pytest.raises(ConfigError, match=r"\d{3}"):
        construct(values | {"kvcache": big, field: value})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PyLocalCacheService]:
    kv = torch.arange(128 * PAGE, dtype=torch.int32).view(torch.uint8)[: 128 * PAGE]
    made = PyLocalCacheService(
        kvcache_tensor=kv.view(128, PAGE).clone(),
        file=str(tmp_path_factory.mktemp("service") / "c"),
        storage_size=16 * MIB,
        num_shard=1,
        num_worker=2,
    )
    yield made
    made.close()


def answers(cache: PyLocalCacheService) -> None:
    tokens = list(range(70))
    task = cache.create(tokens, tokens, "w")
    assert task.wait(30)
    assert set(task.state()) == {TaskState.Finished}
    assert cache.query(tokens) == [True, True]


CALLS = {
    "hash": 1, "query": 1, "create": 4, "abort": 1, "active_threads": 1, "flush": 1,
}  # fmt: skip
CORE_CALLS = {"query": 1, "query_many": 1, "create": 3, "abort": 1, "active_threads": 1, "flush": 1}
PLAUSIBLE = st.sampled_from([
    "r", "w", "read", "write", [1, 2], [0.5], [-1], [1, None], list(range(70)), [2**64], [2**70],
    np.arange(70), np.arange(140)[::2], torch.arange(70), torch.arange(70, dtype=torch.int32),
    [1] * 70, [127] * 70, [128], bytes(16), "0" * 32, "g" * 32, [bytes(16)] * 2, [True], [[1]],
])  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_any_arguments_of_the_methods_give_a_result_or_an_error_and_the_service_goes_on(
    cache: PyLocalCacheService, data: st.DataObject
) -> None:
    core = data.draw(st.booleans())
    calls = CORE_CALLS if core else CALLS
    method = data.draw(st.sampled_from(sorted(calls)))
    values = [data.draw(PLAUSIBLE | ANYTHING) for _ in range(calls[method])]
    target: Any = super(PyLocalCacheService, cache) if core else cache
    outcome = good_or_refused(lambda: getattr(target, method)(*values))
    if isinstance(outcome, PyTask | Task):
        good_or_refused(lambda: outcome.wait(data.draw(st.just(30.0) | ANYTHING)))
        assert outcome.wait(30)
    answers(cache)


def test_tokens_that_are_no_whole_numbers_have_no_keys(cache: PyLocalCacheService) -> None:
    for tokens in ([1.5], [-1], np.array([0.5]), ["1"], [True, False], None):
        with pytest.raises(ConfigError, match="tokens"):
            cache.hash(tokens)  # type: ignore[arg-type]


def test_a_closed_service_refuses_by_name(tmp_path: Path) -> None:
    made = LocalCacheService(**(arguments(tmp_path) | {"engine": LocalEngine}))
    made.close()
    for call in (lambda: made.query(1), lambda: made.create("read", [1], [0]), made.flush):
        with pytest.raises(StorageError, match="closed"):
            call()  # type: ignore[no-untyped-call]


def test_blocks_whose_write_fails_are_aborted_and_forgotten(tmp_path: Path) -> None:
    class Refusing(MemoryEngine):
        def put(self, *arguments: Any) -> list[str]:
            raise OSError("no\nway")

    with LocalCacheService(**(arguments(tmp_path) | {"engine": Refusing})) as made:
        task = made.create("write", [1], [0])
        assert task.wait(30)
        assert task.results() == ["error: OSError: no"]
        assert made._core.waiting == {}
