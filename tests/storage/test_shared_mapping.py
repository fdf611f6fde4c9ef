"""The arena's memory: huge pages where there are some, and the same behaviour without."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from storage_help import ROOT, key_of

from litecache.errors import StorageError
from litecache.storage import CommitItem, LocalShardClient, ShardStore
from litecache.storage.arena import mapping as shared_mapping
from litecache.storage.arena.arena import Arena
from litecache.storage.arena.mapping import HUGE_PAGE_BYTES, SharedMapping
from litecache.storage.arena.view import ArenaView, mapping_bytes

MIB = 1 << 20


def mapped_huge_bytes(address: int) -> int:
    """`ShmemPmdMapped` of the mapping that starts at an address."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:x}-"):
            break
    return next(int(at.split()[1]) * 1024 for at in lines if at.startswith("ShmemPmdMapped"))


def is_mapped(address: int) -> bool:
    return any(
        int(low, 16) <= address < int(high, 16)
        for low, high in (
            line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()
        )
    )


def huge_pages_can_be_made() -> bool:
    fd = os.memfd_create("probe")
    try:
        os.ftruncate(fd, HUGE_PAGE_BYTES)
        mapping = SharedMapping(fd, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
        mapping.make(fd, 0, HUGE_PAGE_BYTES)
        return mapped_huge_bytes(mapping.array.ctypes.data) > 0
    finally:
        os.close(fd)


def test_shard_and_client_map_the_arena_by_huge_pages() -> None:
    if not huge_pages_can_be_made():
        pytest.skip("this kernel makes no huge pages of shared memory")
    arena = Arena(64 * MIB, 4 * MIB, 1)
    arena.grow(range(2, 4))
    assert arena.resident_bytes() == 8 * MIB + 8 * MIB // 128  # and its part of the slot table
    view = ArenaView(arena.attachment(1))
    view.block(2 * 1024, 4096)[:] = 7
    for array in (np.frombuffer(arena.array, np.uint8), view.array):
        assert array.ctypes.data % HUGE_PAGE_BYTES == 0
    assert mapped_huge_bytes(np.frombuffer(arena.array, np.uint8).ctypes.data) == 8 * MIB
    assert mapped_huge_bytes(view.array.ctypes.data) == 4 * MIB
    assert bytes(arena.buffer(2 * 1024, 3)) == b"\7\7\7"
    view.close()
    arena.close()


def test_the_arena_starts_at_a_huge_page_for_whoever_maps_it() -> None:
    arena = Arena(8 * MIB, 512 << 10, 1)
    views = [ArenaView(arena.attachment(i)) for i in range(3)]
    starts = [view.array.ctypes.data for view in views]
    starts.append(np.frombuffer(arena.array, np.uint8).ctypes.data)
    assert len(set(starts)) == 4
    assert [start % HUGE_PAGE_BYTES for start in starts] == [0] * 4
    for view in views:
        view.close()
    arena.close()


def test_memory_exists_even_where_the_kernel_takes_no_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SharedMapping, "_advise", lambda self, start, nbytes, advice: False)
    arena = Arena(64 * MIB, 4 * MIB, 1)
    arena.grow(range(1, 3))
    assert arena.resident_bytes() == 8 * MIB + 8 * MIB // 128
    arena.close()


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.ENOMEM, errno.EAGAIN])
def test_without_huge_pages_the_memory_is_there_all_the_same(
    refusal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[int] = []
    real = SharedMapping._advise

    def refuse(self: SharedMapping, start: int, nbytes: int, advice: int) -> bool:
        advised.append(advice)
        if advice in (shared_mapping._MADV_COLLAPSE, shared_mapping._MADV_HUGEPAGE):
            shared_mapping.ctypes.set_errno(refusal)
            return False
        return real(self, start, nbytes, advice)

    monkeypatch.setattr(SharedMapping, "_advise", refuse)
    with ShardStore(None, ram_bytes=64 * MIB) as store:
        client = LocalShardClient(store)
        refs = client.reserve(MIB, 60)
        assert len(refs) == 60
        for i, ref in enumerate(refs):
            client.arena.block(ref.slot, MIB)[:] = i
        assert [client.arena.block(ref.slot, MIB)[-1] for ref in refs] == list(range(60))
        assert store._arena.resident_bytes() <= 64 * MIB + 4 * MIB
        store.check_integrity()
        client.close()
    assert shared_mapping._MADV_COLLAPSE in advised


def test_too_little_memory_is_an_error_that_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arena = Arena(64 * MIB, 4 * MIB, 1)
    real = os.posix_fallocate

    def small(fd: int, start: int, nbytes: int) -> None:
        if 6 * MIB < start + nbytes < 64 * MIB:
            raise OSError(errno.ENOSPC, "no memory")
        real(fd, start, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", small)
    with pytest.raises(OSError, match="no memory"):
        arena.grow(range(2))
    assert arena.resident_bytes() <= 8 * MIB // 128
    arena.grow(range(1))
    assert arena.resident_bytes() <= 4 * MIB + 8 * MIB // 128
    arena.close()


def test_memory_stays_mapped_as_long_as_a_view_of_it_lives() -> None:
    fd = os.memfd_create("views")
    os.ftruncate(fd, 3 * 4096)
    mapping = SharedMapping(fd, 3 * 4096)
    os.close(fd)
    address = mapping.array.ctypes.data
    kept = memoryview(mapping.array)[4096:5000]
    mapping.close()
    gc.collect()
    kept[:] = b"x" * 904
    assert is_mapped(address)
    del kept
    gc.collect()
    assert not is_mapped(address)


def test_what_cannot_be_mapped_is_an_error() -> None:
    fd = os.open(os.devnull, os.O_RDONLY)
    with pytest.raises(OSError, match="cannot map"):
        SharedMapping(fd, 4096)
    os.close(fd)


@pytest.mark.parametrize("foreign", ["another epoch", "a file", "the same name"])
def test_another_file_behind_the_arena_s_descriptor_is_refused(
    foreign: str, tmp_path: Path
) -> None:
    """In another PID namespace process and descriptor number may be anybody's."""
    arena = Arena(MIB, 64 << 10, 7)
    attachment = arena.attachment(1)
    ArenaView(attachment).close()
    if foreign == "a file":
        fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    else:
        fd = os.memfd_create("litecache-7" if foreign == "the same name" else "litecache-8")
    os.truncate(fd, mapping_bytes(attachment.arena_bytes))
    with pytest.raises(StorageError, match=f"/fd/{fd} is .*(and not|another file)"):
        ArenaView(attachment._replace(arena_fd=fd))
    os.close(fd)
    arena.close()


def test_a_symlink_or_another_file_at_the_arena_s_path_is_refused(tmp_path: Path) -> None:
    arena = Arena(MIB, 64 << 10, 7, use_memfd=False)
    attachment = arena.attachment(1)
    ArenaView(attachment).close()
    (tmp_path / "link").symlink_to(arena.path or "")
    (tmp_path / "other").write_bytes(bytes(mapping_bytes(attachment.arena_bytes)))
    for name in ("link", "other"):
        with pytest.raises(StorageError, match=name):
            ArenaView(attachment._replace(arena_path=str(tmp_path / name)))
    arena.close()


def test_ram_grows_again_after_memory_was_short_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short, real = [False], os.posix_fallocate

    def fallocate(fd: int, start: int, nbytes: int) -> None:
        if short[0]:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        real(fd, start, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    nbytes = 64 << 10
    with ShardStore(None, ram_bytes=4 * MIB, io_threads=0) as store:
        client = LocalShardClient(store)

        def used_after(number: int) -> int:
            for ref in client.reserve(nbytes, 1):
                client.commit([CommitItem(*ref, key_of(number), ROOT)])
            used = store.stats()["ram_bytes_used"]
            assert isinstance(used, int)
            return used

        assert used_after(0) == nbytes
        short[0] = True
        held = max(used_after(number) for number in range(1, 40))
        assert held < 4 * MIB // 2
        assert store.query([key_of(39)]) == [True], "what RAM there is goes on"
        short[0] = False
        deadline = time.monotonic() + 60
        for number in itertools.count(100):
            if used_after(number) == 4 * MIB:
                break
            assert time.monotonic() < deadline
            time.sleep(0.005)
        store.check_integrity()
        client.close()


@pytest.mark.parametrize("use_memfd", [True, False])
def test_other_users_cannot_open_the_arena_whatever_the_umask_is(use_memfd):
    before = os.umask(0)
    try:
        with ShardStore(None, ram_bytes=1 * MIB, use_memfd=use_memfd) as store:
            arena = store._arena
            for file in (arena._fd, *([] if use_memfd else [arena.path])):
                assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    finally:
        os.umask(before)
