"""The 42 behaviours that a drop-in replacement of LightMem must show, one numbered test each."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import xxhash
from service_help import ABORTED, FINISHED, Gate, round_trip, run, service, tensor

from litecache.storage import LocalShardClient, PyLocalCacheService, PyState, PyTask
from litecache.storage.disk.files import Files
from litecache.storage.service import tasks


@pytest.fixture
def kv() -> torch.Tensor:
    return tensor(512)


@pytest.fixture
def cache(kv: torch.Tensor, tmp_path) -> Iterator[PyLocalCacheService]:
    made = service(kv, tmp_path)
    yield made
    made.close()


def in_threads(count: int, body: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            body(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures


def test_01_constructed_by_keyword_it_works_at_once(kv, tmp_path):
    cache = PyLocalCacheService(
        kvcache_tensor=kv,
        file=str(tmp_path / "c"),
        storage_size=64 << 20,
        num_shard=2,
        num_worker=2,
    )
    assert isinstance(run(cache, [1, 2], [0, 1], "w"), PyTask)
    assert PyState.Finished in run(cache, [1, 2], [0, 1], "r").state()
    cache.close()


def test_02_three_dimensions_are_refused(tmp_path):
    with pytest.raises((ValueError, RuntimeError), match="2-D"):
        service(torch.zeros(4, 4, 4, dtype=torch.uint8), tmp_path)


def test_03_a_non_contiguous_tensor_is_refused(kv, tmp_path):
    with pytest.raises((ValueError, RuntimeError), match="contiguous"):
        service(kv[::2], tmp_path)


def test_04_an_invalid_mode_is_refused(cache):
    with pytest.raises((ValueError, RuntimeError), match="mode"):
        cache.create(tokens=[1], kv_page_indexer=torch.tensor([0]), mode="invalid")


def test_05_wrong_length_and_page_out_of_range_are_refused(tmp_path):
    cache = service(tensor(10), tmp_path)
    with pytest.raises((ValueError, RuntimeError)):
        cache.create(tokens=list(range(100)), kv_page_indexer=torch.tensor([0, 1, 15]), mode="w")
    with pytest.raises((ValueError, RuntimeError), match="15"):
        cache.create(tokens=[1, 2, 3], kv_page_indexer=torch.tensor([0, 1, 15]), mode="w")
    cache.close()


def test_06_an_empty_task_is_ready(cache):
    empty = torch.tensor([], dtype=torch.int32)
    assert cache.create(tokens=[], kv_page_indexer=empty, mode="w").ready()


def test_07_too_few_pages_do_not_hang(cache):
    with pytest.raises((ValueError, RuntimeError), match="kv_page_indexer"):
        cache.create(tokens=list(range(100)), kv_page_indexer=torch.arange(5), mode="w")


def test_08_too_little_disk_is_a_runtime_error(kv, tmp_path):
    with pytest.raises(RuntimeError, match="storage_bytes"):
        service(kv, tmp_path, storage_mb=8 << 20, shards=1)
    assert not list(tmp_path.glob("cache_*"))


def test_09_a_path_with_a_directory_can_be_used_again(kv, tmp_path):
    for _ in range(3):
        cache = service(kv, tmp_path / "sub")
        run(cache, [1], [0], "w")
        assert (tmp_path / "sub" / "cache_0").exists()
        del cache  # collected, not closed


def test_10_pages_per_block_follow_the_variable(kv, tmp_path, monkeypatch):
    cache = service(kv, tmp_path / "a")
    assert (cache._n, cache._page_size, cache._block_size) == (64, 4096, 64 * 4096)
    cache.close()
    monkeypatch.setenv("LIGHTMEM_MAX_BLOCK_SIZE_MB", "1")
    wide = service(tensor(16, 300_000), tmp_path / "b")
    assert wide._n == (1 << 20) // 300_000 == 3
    wide.close()


def test_11_hash_is_xxh3_128_of_each_blocks_tokens(cache):
    n = cache._n
    for length in (3, n, n + 1, 3 * n, 3 * n - 1):
        tokens = list(range(7, 7 + length))
        words = np.array(tokens, dtype=np.uint64)
        wanted = [
            xxhash.xxh3_128(words[i : i + n].tobytes()).hexdigest() for i in range(0, length, n)
        ]
        assert cache.hash(tokens) == wanted


def test_12_hash_is_deterministic_and_tells_apart(cache):
    assert cache.hash(range(100)) == cache.hash(range(100))
    assert cache.hash(range(100)) != cache.hash(range(1, 101))


def test_13_written_tokens_are_found(cache):
    tokens = list(range(150))
    run(cache, tokens, range(150), "w")
    found = cache.query(tokens)
    assert found == [True] * len(cache.hash(tokens))


def test_14_unwritten_tokens_are_not_found(cache):
    assert cache.query(list(range(1_000_000, 1_000_200))) == [False] * 4


def test_15_an_empty_query_is_empty(cache):
    assert cache.query([]) == []


def test_16_a_longer_query_of_a_partial_block_misses(cache):
    run(cache, range(30), range(30), "w")
    assert cache.query(list(range(60))) == [False]


def test_17_long_queries_are_stable(cache):
    answers = [cache.query(list(range(10_000))) for _ in range(3)]
    assert answers[0]
    assert answers[0] == answers[1] == answers[2]


def test_18_queries_from_ten_threads(cache):
    def ask(i: int) -> None:
        draw = random.Random(i)
        for _ in range(20):
            tokens = [draw.randrange(10**6) for _ in range(draw.randrange(10, 100))]
            assert isinstance(cache.query(tokens), list)

    in_threads(10, ask)


def test_19_a_single_page_returns(cache, kv):
    round_trip(cache, kv, [0])


@pytest.mark.parametrize("count", [20, 50, 256, 512])
def test_20_sequential_pages_return(cache, kv, count):
    round_trip(cache, kv, range(count))
    cache.close()


def test_20_random_distinct_pages_return(cache, kv):
    round_trip(cache, kv, random.Random(3).sample(range(512), 30))


def test_21_first_and_last_page_return(cache, kv):
    round_trip(cache, kv, [0, 511])


def test_22_ten_tokens_on_one_page(cache, kv):
    round_trip(cache, kv, [5] * 10)


def test_23_the_second_content_of_a_page_belongs_to_the_second_token(cache, kv):
    run(cache, [1], [0], "w")
    kv[0] = 77
    run(cache, [2], [0], "w")
    kv.zero_()
    run(cache, [2], [0], "r")
    assert bool((kv[0] == 77).all())


def test_24_start_pos_skips_blocks(cache, kv):
    n, before = cache._n, kv.clone()
    tokens, pages = list(range(5 * n)), list(range(5 * n))
    assert run(cache, tokens, pages, "w", start_pos=0).state() == [FINISHED] * 5
    later = [t + 10_000 for t in tokens]
    assert run(cache, later, pages, "w", start_pos=2 * n).state() == [FINISHED] * 3
    kv.zero_()
    assert run(cache, later, pages, "r", start_pos=2 * n).state() == [FINISHED] * 3
    assert torch.equal(kv[2 * n : 5 * n], before[2 * n : 5 * n])
    assert not kv[: 2 * n].any()


def test_25_pages_repeat_and_are_read_to_other_pages(cache, kv):
    before = kv.clone()
    tokens = list(range(100))
    run(cache, tokens, [i % 50 for i in range(100)], "w")
    kv.zero_()
    run(cache, tokens, [200 + i for i in range(100)], "r")
    assert torch.equal(kv[200:300], before[:50].repeat(2, 1))


@pytest.mark.parametrize("count", [1, 1000, 65_536])
def test_26_up_to_65536_pages_in_a_task(tmp_path, count):
    kv = tensor(256, 512)
    cache = service(kv, tmp_path)
    round_trip(cache, kv, np.random.default_rng(1).integers(0, 256, count).tolist())
    cache.close()


def test_27_a_ready_task_is_finished_or_aborted(cache):
    task = run(cache, range(200), range(200), "w")
    assert task.ready()
    assert set(task.state()) <= {FINISHED, ABORTED}


def test_28_states_are_numbered_as_documented(cache):
    assert [int(state) for state in PyState] == [0, 1, 2, 3]
    assert [state.name for state in PyState] == ["Initial", "Working", "Finished", "Aborted"]
    indexer = torch.arange(500)
    task = cache.create(tokens=list(range(500)), kv_page_indexer=indexer, mode="w")
    assert set(task.state()) <= set(PyState)
    task.wait(60)


def test_29_data_is_safe_before_the_disk(tmp_path, monkeypatch):
    kv = tensor(50, 1 << 20)
    cache = service(kv, tmp_path, storage_mb=512, shards=1)
    before = kv.clone()
    disk = threading.Event()
    real = Files.write
    monkeypatch.setattr(Files, "write", lambda *args: disk.wait(60) and real(*args))
    task = cache.create(tokens=list(range(50)), kv_page_indexer=torch.arange(50), mode="w")
    deadline = time.monotonic() + 60
    while not task.data_safe() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert task.data_safe()
    assert not task.ready(), "the disk has not taken anything yet"
    kv.zero_()
    disk.set()
    assert task.wait(60)
    run(cache, range(50), range(50), "r")
    assert torch.equal(kv, before)
    cache.close()


def test_30_a_read_is_safe_exactly_when_it_is_ready(cache):
    run(cache, range(300), range(300), "w")
    task = cache.create(tokens=list(range(300)), kv_page_indexer=torch.arange(300), mode="r")
    while not task.ready():
        assert task.data_safe() in (False, task.ready())
    assert task.data_safe()


def test_31_pages_already_stored_are_listed(cache):
    first = run(cache, range(20), range(20), "w")
    second = run(cache, range(20), range(20), "w")
    assert first.page_already_list == []
    assert second.page_already_list == list(range(20))
    assert all(type(page) is int for page in second.page_already_list)


def test_32_ten_tasks_at_once(cache):
    tasks = [
        cache.create(
            tokens=list(range(i * 100, i * 100 + 50)), kv_page_indexer=torch.arange(50), mode="w"
        )
        for i in range(10)
    ]
    assert all(task.wait(60) for task in tasks)


def test_33_abort_makes_a_task_ready_immediately(tmp_path):
    cache = service(tensor(12_800, 3840), tmp_path, storage_mb=256, workers=32)
    task = cache.create(tokens=list(range(12_800)), kv_page_indexer=torch.arange(12_800), mode="w")
    cache.abort(task)
    assert task.ready()
    assert set(task.state()) <= {FINISHED, ABORTED}
    cache.close()


def test_34_abort_in_the_middle_stays_and_touches_nothing_more(tmp_path, monkeypatch):
    kv = tensor(640)
    cache = service(kv, tmp_path, shards=1, workers=1)
    tokens = list(range(640))
    run(cache, tokens, range(640), "w")
    kv.zero_()
    gate = Gate(monkeypatch, "scatter")
    task = cache.create(tokens=tokens, kv_page_indexer=torch.arange(640), mode="r")
    gate.abort_inside(cache, task)
    states = task.state()
    assert task.ready()
    assert ABORTED in states
    assert set(states) <= {FINISHED, ABORTED}
    run(cache, [9], [0], "w")  # the one worker has done with the task
    assert task.ready()
    assert task.state() == states
    assert gate.copies == 1
    assert not kv[64:].any(), "a page was touched after abort"
    del task
    cache.close()


def writes_and_reads(cache: PyLocalCacheService, kv: torch.Tensor) -> None:
    before = kv.clone()

    def write(i: int) -> None:
        pages = range(i * 25, i * 25 + 25)
        assert set(run(cache, [10_000 * i + p for p in pages], pages, "w").state()) == {FINISHED}

    def read(i: int) -> None:
        pages = range(i * 25, i * 25 + 25)
        assert set(run(cache, [10_000 * i + p for p in pages], pages, "r").state()) == {FINISHED}

    in_threads(10, write)
    kv.zero_()
    in_threads(10, read)
    assert torch.equal(kv[:250], before[:250])


def test_35_ten_threads_write_disjoint_pages(cache, kv):
    writes_and_reads(cache, kv)


def test_36_ten_threads_read_all_of_it(cache, kv):
    before = kv.clone()
    run(cache, range(400), range(400), "w")
    kv.zero_()
    in_threads(10, lambda i: run(cache, range(400), range(400), "r"))
    assert torch.equal(kv[:400], before[:400])


def test_37_mixed_threads(cache):
    done = []

    def body(i: int) -> None:
        for j in range(2):
            tokens = range(1000 * (2 * i + j), 1000 * (2 * i + j) + 20)
            done.append(set(run(cache, tokens, range(20), "w").state()) == {FINISHED})
        tokens = range(1000 * 2 * i, 1000 * 2 * i + 20)
        done.append(set(run(cache, tokens, range(100, 120), "r").state()) == {FINISHED})

    in_threads(10, body)
    assert sum(done) == len(done) == 30


def test_38_a_read_during_a_write_is_right_or_a_miss(tmp_path):
    kv = tensor(80)
    cache = service(kv, tmp_path)
    for page in range(40):
        kv[page] = page + 1

    def body(i: int) -> None:
        draw = random.Random(i)
        for _ in range(50 if i < 2 else 100):
            page = draw.randrange(40)
            if i < 2:
                run(cache, [page], [page], "w")
            else:
                target = 40 + 10 * (i - 2) + draw.randrange(10)
                if run(cache, [page], [target], "r").state() == [FINISHED]:
                    assert bool((kv[target] == page + 1).all())

    in_threads(6, body)
    cache.close()


def test_39_a_miss_is_aborted_without_an_exception(cache):
    task = run(cache, [424242], [0], "r")
    assert task.ready()
    assert task.state() == [ABORTED]
    assert task.results() == ["miss"]


def churn(tmp_path, seconds: float) -> tuple[int, int]:
    """Four writers and four readers over a store a fifth of the working set."""
    kv = tensor(16, 512 << 10)
    cache = service(kv, tmp_path, storage_mb=64, shards=1, workers=8)
    stop = time.monotonic() + seconds
    hits, misses = [], []

    def fill(page: int, token: int) -> None:
        kv[page] = torch.full((512 << 10,), token % 251, dtype=torch.uint8)

    def body(i: int) -> None:
        draw = random.Random(i)
        while time.monotonic() < stop:
            token = draw.randrange(600)
            if i < 4:
                fill(i, token)
                run(cache, [token], [i], "w")
            else:
                task = run(cache, [token], [i], "r")
                (misses if task.state() == [ABORTED] else hits).append(token)
                if task.state() == [FINISHED]:
                    assert bool((kv[i] == token % 251).all()), "wrong bytes"

    in_threads(8, body)
    cache.close()
    return len(hits), len(misses)


def test_40_a_store_smaller_than_the_working_set_evicts_and_never_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTMEM_MAX_BLOCK_SIZE_MB", "1")
    hits, misses = churn(tmp_path, 3)
    assert hits >= 1
    assert misses >= 1


def test_41_a_key_that_is_queried_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTMEM_MAX_BLOCK_SIZE_MB", "1")
    kv = tensor(8, 512 << 10)
    cache = service(kv, tmp_path, storage_mb=32, shards=1)
    run(cache, [7], [0], "w")
    present = []
    for token in range(100, 300):
        run(cache, [token], [1], "w")
        present.append(cache.query([7])[0])
    gone = [not cache.query([token])[0] for token in range(100, 300)]
    assert any(gone), "nothing was evicted"
    assert sum(present) > 0.8 * len(present)
    cache.close()


def test_42_a_write_of_what_exists_is_finished_and_says_so(cache):
    run(cache, [1, 2, 3], [0, 1, 2], "w")
    again = run(cache, [1, 2, 3], [0, 1, 2], "w")
    assert again.state() == [FINISHED]
    assert again.results() == ["exists"]


def test_42_a_write_that_gets_no_slot_is_finished_and_says_dropped(cache, monkeypatch):
    monkeypatch.setattr(tasks, "_WAIT_FOR_ROOM_S", 0.05)
    clients = []
    for store in cache._core.engine.stores:
        clients.append(LocalShardClient(store))
        while clients[-1].reserve(cache._block_size, 8):
            pass
    task = run(cache, [1, 2, 3], [0, 1, 2], "w")
    assert task.state() == [FINISHED]
    assert task.results() == ["dropped"]
    assert cache.query([1, 2, 3]) == [False]
    for client in clients:
        client.close()
    assert run(cache, [1, 2, 3], [0, 1, 2], "w").results() == ["stored"]


def test_a_service_with_fewer_shards_takes_in_those_of_before(tmp_path):
    kv = tensor(64)
    with service(kv, tmp_path, shards=2) as cache:
        round_trip(cache, kv, range(64))
        assert cache.flush()
    foreign = tmp_path / "cache_5"
    foreign.mkdir()
    (foreign / "notes").write_text("somebody's")
    with service(kv, tmp_path, shards=1) as cache:
        deadline = time.monotonic() + 60
        while (tmp_path / "cache_1").exists():
            assert time.monotonic() < deadline, "the old shard is still there"
            time.sleep(0.05)
        kept = kv.clone()
        kv.zero_()
        assert set(run(cache, [1000 + i for i in range(64)], range(64), "r").state()) == {FINISHED}
        assert torch.equal(kv, kept)
    assert [file.name for file in foreign.iterdir()] == ["notes"]
