"""Promises about a store's folder: who may reach it, what removes it, what a full disk does."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from storage_help import KIB, MIB, bytes_of, fill, get, key_of, put, taken_bytes

from litecache.errors import ConfigError, LiteCacheError, StorageError, StorageLockedError
from litecache.storage import LocalShardClient, ShardStore, block_io, durability
from litecache.storage.disk import folder
from litecache.storage.disk.files import Files
from litecache.storage.disk.inspect import inspect_store, verify_store

NBYTES = 64 * KIB
STRANGER = 54_321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def make(path: Path | str, **options: object) -> ShardStore:
    return ShardStore(str(path), **{"storage_bytes": 16 * MIB, "ram_bytes": 4 * MIB, **options})


def wait_until(true, store: ShardStore, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        store.wait_for_change(0.05)
    assert true()


# --- who may reach it


@as_root
@pytest.mark.parametrize("which", ["above", "given", "shard"])
def test_a_folder_of_another_user_is_refused_wherever_it_stands(tmp_path, which):
    shard = tmp_path / "above" / "given" / "shard"
    make(shard).close()
    victim = next(p for p in (shard, *shard.parents) if p.name == which)
    os.chown(victim, STRANGER, STRANGER)
    with pytest.raises(ConfigError, match=str(STRANGER)):
        make(shard)
    os.chown(victim, 0, 0)
    make(shard).close()


@pytest.mark.parametrize(
    ("which", "mode", "good"),
    [
        ("above", 0o777, False),
        ("above", 0o1777, True),
        ("above", 0o755, True),
        ("given", 0o777, False),
        ("given", 0o1777, True),
        ("given", 0o755, True),
        ("shard", 0o777, False),
        ("shard", 0o1777, False),
        ("shard", 0o720, False),
        ("shard", 0o755, True),
    ],
)
def test_a_folder_that_others_may_write_is_refused(tmp_path, which, mode, good):
    shard = tmp_path / "above" / "given" / "shard"
    shard.mkdir(parents=True)
    next(p for p in (shard, *shard.parents) if p.name == which).chmod(mode)
    if good:
        make(shard).close()
        assert shard.stat().st_mode & 0o777 == 0o700
    else:
        with pytest.raises(ConfigError, match=r"storage_dir.*(others may write|no other user)"):
            make(shard)
        assert os.listdir(shard) == []


@as_root
def test_a_group_may_write_on_the_way_only_if_nobody_else_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "given").mkdir()
    os.chown(tmp_path / "given", 0, STRANGER)
    (tmp_path / "given").chmod(0o775)
    with pytest.raises(ConfigError, match="no other user"):
        make(tmp_path / "given" / "shard")
    # as in a container that was started with this group
    monkeypatch.setattr(os, "getgroups", lambda: [STRANGER])
    make(tmp_path / "given" / "shard").close()


NAMES = ["superblock", "slab", "log", "lock"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_others_may_have_written_is_refused(tmp_path, name):
    with make(tmp_path / "s") as store:
        fill(store, range(3), NBYTES)
    file = tmp_path / "s" / name
    for mode in (0o606, 0o660, 0o640):
        file.chmod(mode)
        with pytest.raises(StorageError, match=f"{name}.*private.*{mode:04o}"):
            make(tmp_path / "s")
    file.chmod(0o600)
    os.link(file, tmp_path / "second-name")
    with pytest.raises(StorageError, match=f"{name}.*2 names"):
        make(tmp_path / "s")
    os.unlink(tmp_path / "second-name")
    if os.geteuid() == 0:
        os.chown(file, STRANGER, STRANGER)
        with pytest.raises(StorageError, match=f"{name}.*{STRANGER}"):
            make(tmp_path / "s")
        os.chown(file, 0, 0)
    with make(tmp_path / "s") as store:
        assert len(store) == 3


def test_no_symlink_at_the_end_of_the_way_is_followed_and_one_before_it_is(tmp_path):
    with make(tmp_path / "real" / "shard") as store:
        keys = fill(store, range(3), NBYTES)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "alias").symlink_to("shard")
    with make(tmp_path / "link" / "shard") as store:
        assert all(store.query(keys))
    with pytest.raises(ConfigError, match="symlink"):
        make(tmp_path / "real" / "alias")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for bad in ("dangling", "loop", "loop/shard"):
        with pytest.raises(ConfigError, match="symlink"):
            make(tmp_path / bad)
    if os.geteuid() == 0:
        os.lchown(tmp_path / "link", STRANGER, STRANGER)
        with pytest.raises(ConfigError, match=str(STRANGER)):
            make(tmp_path / "link" / "shard")


def test_paths_that_are_none_are_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in ("x/y", "", str(tmp_path / "file" / "shard"), f"{tmp_path}/a\0b", "/proc/self/mem"):
        with pytest.raises(LiteCacheError, match="storage_dir"):
            make(path)


@as_root
def test_root_inspects_the_store_of_another_user(tmp_path):
    with make(tmp_path / "shard-0") as store:
        fill(store, range(3), NBYTES)
    for path in (tmp_path / "shard-0", *(tmp_path / "shard-0").iterdir()):
        os.chown(path, STRANGER, STRANGER)
    (report,) = inspect_store(str(tmp_path))
    assert report.blocks == 3


# --- what a full or failing disk does


class FullFiles(Files):
    """A disk that is full, or fails, while it is told so."""

    error = 0
    tried = 0

    def _check(self) -> None:
        self.tried += 1
        if self.error:
            raise OSError(self.error, os.strerror(self.error))

    def allocate(self, fd, offset, length):
        self._check()
        super().allocate(fd, offset, length)

    def write(self, fd, buffers, offset):
        self._check()
        return super().write(fd, buffers, offset)


def test_an_existing_store_opens_and_serves_on_a_full_disk(tmp_path, monkeypatch):
    with make(tmp_path) as store:
        keys = fill(store, range(20), NBYTES)
    store = make(tmp_path)
    store.abandon()  # not closed cleanly: opening would like to write
    (tmp_path / "lock").write_bytes(b"1 another-boot".ljust(128))
    os.truncate(tmp_path / "slab", (tmp_path / "slab").stat().st_size - 4096)
    monkeypatch.setattr(folder, "disk_room_bytes", lambda path: 0)
    files = FullFiles()
    files.error = errno.ENOSPC
    with make(tmp_path, files=files, io_threads=0) as store:
        client = LocalShardClient(store)
        assert sum(get(client, keys, NBYTES)) >= 19
        store.check_integrity()
        files.error = 0
        assert store.flush().complete
        client.close()
    with make(tmp_path) as store:
        assert sum(store.query(keys)) >= 19


def test_a_slab_grows_again_once_the_disk_has_room(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("litecache.storage.retry.time.monotonic", lambda: now[0])
    files = FullFiles()
    with make(tmp_path, files=files, io_threads=0, storage_bytes=32 * MIB) as store:
        fill(store, range(20), NBYTES)
        before = store.stats()["slab_bytes"]
        files.error = errno.ENOSPC
        client = LocalShardClient(store)
        put(client, [key_of(n) for n in range(100, 130)], NBYTES)
        tried = files.tried
        put(client, [key_of(n) for n in range(130, 160)], NBYTES)
        assert files.tried - tried < 20, "a full disk is asked again and again"
        assert store.stats()["slab_bytes"] == before
        assert store.stats()["drops"]["disk_full_growth"] >= 1
        files.error = 0
        now[0] += 60
        for first in range(200, 400, 20):
            put(client, [key_of(n) for n in range(first, first + 20)], NBYTES)
            store.flush()
        assert store.stats()["slab_bytes"] >= 3 * before
        store.check_integrity()
        client.close()


class SmallDisk(Files):
    """A disk that has `room` bytes left."""

    room = 64 * MIB

    def _take(self, fd, end) -> None:
        more = max(0, end - self.size(fd))
        if more > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= more

    def allocate(self, fd, offset, length):
        self._take(fd, offset + length)
        super().allocate(fd, offset, length)

    def write(self, fd, buffers, offset):
        self._take(fd, offset + sum(map(len, buffers)))
        return super().write(fd, buffers, offset)


def test_a_slab_leaves_its_log_the_last_room_of_a_disk(tmp_path, monkeypatch):
    files = SmallDisk()
    monkeypatch.setattr(folder, "disk_room_bytes", lambda path: files.room)
    with make(tmp_path, files=files, io_threads=0, storage_bytes=8 * MIB) as store:
        fill(store, range(20), NBYTES)
        files.room = store._tiers.disk.space.segment_bytes
        last = fill(store, range(100, 400), NBYTES)[-8:]
        assert store.flush().complete
        assert all(store.durable(last))
        assert "disk_full" not in store.stats()["drops"]
        store.check_integrity()


def test_a_failing_disk_logs_little_and_does_not_compact_for_every_batch(
    tmp_path, monkeypatch, caplog
):
    now = [1000.0]
    monkeypatch.setattr("litecache.storage.retry.time.monotonic", lambda: now[0])
    files = FullFiles()
    with make(tmp_path, files=files, io_threads=0) as store:
        fill(store, range(4), NBYTES)
        compactions = 0
        real = durability.Durability._compact_locked

        def counted(self):
            nonlocal compactions
            compactions += 1
            return real(self)

        monkeypatch.setattr(durability.Durability, "_compact_locked", counted)
        now[0] += 100  # whatever earlier tests have logged
        files.error = errno.EIO
        client = LocalShardClient(store)
        with caplog.at_level(logging.WARNING):
            for first in range(100, 300, 4):
                put(client, [key_of(n) for n in range(first, first + 4)], NBYTES)
        assert len(caplog.records) <= 6
        assert compactions <= 2
        assert store.stats()["drops"]["io_error"] >= 100
        files.error = 0
        now[0] += 100
        keys = [key_of(n) for n in range(300, 304)]
        put(client, keys, NBYTES)
        assert store.flush().complete
        assert all(store.durable(keys))
        client.close()


def test_unreadable_blocks_are_logged_by_rate(caplog):
    memory = memoryview(bytearray(4096))
    with caplog.at_level(logging.WARNING):
        for number in range(500):
            assert block_io.fault(memory, key_of(number), 1, OSError(5, "sick")) == "io_error"
            assert block_io.fault(memory, key_of(number), 1, None) == "corrupt"
    assert len(caplog.records) <= 2


# --- what removes it


@pytest.mark.parametrize("what", ["folder", "slab", "superblock", "replaced", "moved"])
def test_a_store_whose_files_are_gone_says_so_and_goes_on_in_ram(tmp_path, what):
    path = tmp_path / "s"
    with make(path, fsync_interval_s=0.01) as store:
        old = fill(store, range(30), NBYTES)
        assert store.flush().complete
        if what == "folder":
            shutil.rmtree(path)
        elif what == "replaced":
            path.rename(tmp_path / "aside")
            path.mkdir(0o700)
        elif what == "moved":
            path.rename(tmp_path / "aside")
        else:
            (path / what).unlink()
        report = store.flush()
        assert not report.complete
        stats = store.stats()
        assert stats["disk_lost"]
        assert stats["disk_blocks"] == 0
        assert stats["drops"]["folder_lost"] == 30
        assert not any(store.durable(old))
        client = LocalShardClient(store)
        new = [key_of(n) for n in range(100, 104)]
        put(client, new, NBYTES)
        assert all(get(client, new, NBYTES))
        assert not store.flush().complete
        assert not any(store.durable(new))
        store.check_integrity()
        client.close()
    if what in ("folder", "moved"):
        assert not path.exists()
    shutil.rmtree(path, ignore_errors=True)
    with make(path) as store:
        assert len(store) == 0


def test_writes_under_way_when_the_folder_goes_are_not_reported_as_saved(tmp_path):
    told = []
    with make(tmp_path / "s", fsync="always", io_threads=0, on_written=told.extend) as store:
        client = LocalShardClient(store)
        put(client, [key_of(0)], NBYTES)
        shutil.rmtree(tmp_path / "s")
        put(client, [key_of(1)], NBYTES)  # its sync notices
        put(client, [key_of(2)], NBYTES)
        assert dict(told)[key_of(2)] == "folder_lost"
        assert not any(store.durable([key_of(n) for n in range(3)]))
        client.close()


def test_a_removed_lock_does_not_let_a_second_store_in(tmp_path):
    with make(tmp_path) as store:
        keys = fill(store, range(5), NBYTES)
        (tmp_path / "lock").unlink()
        with pytest.raises(StorageLockedError):
            make(tmp_path)
        assert store.flush().complete
        assert (tmp_path / "lock").exists(), "the lock is made anew"
        fill(store, range(5, 9), NBYTES)
        assert store.flush().complete
        with pytest.raises(StorageLockedError, match=str(os.getpid())):
            make(tmp_path)
    with make(tmp_path) as store:
        assert all(store.query(keys))


def test_a_lock_that_another_took_takes_the_disk_tier_out(tmp_path):
    with make(tmp_path) as store:
        fill(store, range(5), NBYTES)
        (tmp_path / "lock").unlink()
        # as a store does where the folder itself cannot be locked
        with open(tmp_path / "lock", "w") as other:
            os.fchmod(other.fileno(), 0o600)
            fcntl.flock(other, fcntl.LOCK_EX)
            before = len(os.listdir("/proc/self/fd"))
            assert not store.flush().complete
            assert "lock" in store.stats()["disk_lost"]
            assert len(os.listdir("/proc/self/fd")) == before


# --- what its files may hold


def test_a_gigantic_sparse_file_costs_neither_memory_nor_the_store(tmp_path):
    with make(tmp_path) as store:
        keys = fill(store, range(10), NBYTES)
    os.truncate(tmp_path / "log", 6 << 30)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "from litecache.storage import ShardStore\n"
        f"with ShardStore({str(tmp_path)!r}, storage_bytes=16 << 20, ram_bytes=4 << 20) as store:\n"
        "    print(sum(store.query([bytes.fromhex(k) for k in sys.argv[1:]])))\n"
    )
    run = [sys.executable, "-c", code, *(key.hex() for key in keys)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "10\n", done.stderr
    assert taken_bytes(tmp_path) <= 16 * MIB


def test_shared_memory_files_of_killed_shards_are_swept_and_those_of_live_ones_are_not(tmp_path):
    code = (
        "import os\nfrom litecache.storage import ShardStore\n"
        "store = ShardStore(None, ram_bytes=1 << 20, use_memfd=False)\n"
        "print(store.attach(os.getpid()).arena_path, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    left = killed.stdout.strip()
    assert left
    assert os.path.exists(left)
    live = ShardStore(None, ram_bytes=1 * MIB, use_memfd=False)
    mine = live.attach(os.getpid()).arena_path
    assert not os.path.exists(left)
    # a live owner that this process cannot see, as in another PID namespace
    foreign = "/dev/shm/litecache-4194999-abc"
    with open(foreign, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ShardStore(None, ram_bytes=1 * MIB, use_memfd=False).close()
        assert os.path.exists(foreign)
    assert os.path.exists(mine)
    ShardStore(None, ram_bytes=1 * MIB, use_memfd=False).close()
    assert not os.path.exists(foreign)
    live.close()


# --- shards of an earlier setting


def used(path: Path) -> int:
    return sum(folder.disk_used_bytes(str(shard)) for shard in path.iterdir())


def all_right(store: ShardStore, keys: list[bytes]) -> bool:
    return all(data == bytes_of(key, NBYTES) for key, data in store.fetch(keys))


def test_shards_of_an_earlier_setting_are_taken_in_and_the_bound_holds_all_the_while(tmp_path):
    cap, keys = 8 * MIB, []
    for shard in range(4):
        with make(tmp_path / f"shard-{shard}", storage_bytes=cap // 4) as store:
            keys += fill(store, range(100 * shard, 100 * shard + 14), NBYTES)
            store.pin(keys[-1:])
    with make(tmp_path / "shard-0", storage_bytes=cap, ram_bytes=1 * MIB, shards=1) as store:
        assert used(tmp_path) <= cap

        def done() -> bool:
            assert used(tmp_path) <= cap
            return [p.name for p in tmp_path.iterdir()] == ["shard-0"]

        wait_until(done, store)
        assert all_right(store, keys), "the old shards' blocks are read"
        wait_until(lambda: store.stats()["retired_bytes"] == 0, store)
        store.check_integrity()
    with make(tmp_path / "shard-0", storage_bytes=cap, shards=1) as store:
        assert all(store.query(keys))


def test_a_retired_shard_larger_than_its_share_is_cut_at_once(tmp_path):
    for shard in (1, 3, 5):
        with make(tmp_path / f"shard-{shard}", storage_bytes=8 * MIB) as store:
            fill(store, range(100 * shard, 100 * shard + 60), NBYTES)
    with make(tmp_path / "shard-1", storage_bytes=6 * MIB, shards=2) as store:
        assert used(tmp_path) <= 6 * MIB
        wait_until(lambda: sorted(p.name for p in tmp_path.iterdir()) == ["shard-1"], store)
        assert used(tmp_path) <= 6 * MIB
        store.check_integrity()


def test_a_live_shard_of_a_higher_number_is_left_alone(tmp_path):
    with make(tmp_path / "shard-1") as other:
        keys = fill(other, range(5), NBYTES)
        with make(tmp_path / "shard-0", shards=1) as store:
            assert len(store) == 0
        assert all(other.query(keys))
        assert other.flush().complete


def test_taking_in_goes_on_after_a_kill(tmp_path):
    with make(tmp_path / "shard-1") as store:
        keys = fill(store, range(100), NBYTES)
    code = (
        "import os\nfrom litecache.storage import ShardStore\n"
        "from litecache.storage.disk import retired, slab\n"
        "real = retired.Retired._give_room\n"
        "def deadly(self):\n    os.kill(os.getpid(), 9)\n"
        "retired.Retired._give_room = deadly\nslab.MAX_REQUEST_BYTES = 1 << 20\n"
        f"store = ShardStore({str(tmp_path / 'shard-0')!r}, storage_bytes=16 << 20, "
        "ram_bytes=4 << 20, shards=1)\n"
        "import time; time.sleep(60)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
    assert killed.returncode == -9
    with make(tmp_path / "shard-0", shards=1) as store:
        wait_until(lambda: not (tmp_path / "shard-1").exists(), store)
        assert all_right(store, keys)


# --- what the interval promises


@pytest.mark.parametrize("trouble", ["a write meanwhile", "a failing sync"])
def test_what_is_written_becomes_durable_within_the_interval_without_another_write(
    tmp_path, trouble
):
    keys = [key_of(n) for n in range(2)]
    with make(tmp_path, fsync_interval_s=0.05) as store:
        client, slab = LocalShardClient(store), store._tiers.disk.slab
        real, meanwhile = slab.sync, [keys[1]]

        def sync():
            if trouble == "a failing sync" and meanwhile:
                meanwhile.pop()
                raise OSError(errno.EIO, "sick")
            real()
            if meanwhile:
                put(client, [meanwhile.pop()], NBYTES)
                while any(store.awaits_disk(keys)):
                    store.wait_for_change(0.05)

        slab.sync = sync
        if trouble == "a failing sync":
            # distrusted blocks are dropped: what must recover is the log
            put(client, keys[:1], NBYTES)
            wait_until(lambda: not meanwhile, store)
            put(client, keys, NBYTES)
        else:
            put(client, keys[:1], NBYTES)
        wait_until(lambda: all(store.durable(keys)), store)
        client.close()


def test_verify_leaves_a_store_that_was_closed_cleanly_so(tmp_path):
    with make(tmp_path / "shard-0") as store:
        fill(store, range(3), NBYTES)
    before = (tmp_path / "shard-0" / "lock").read_bytes().split()[1]
    assert before == b"clean"
    assert verify_store(str(tmp_path))[0].ok
    assert (tmp_path / "shard-0" / "lock").read_bytes().split()[1] == before


def test_looking_at_a_store_changes_nothing_and_needs_no_right_to_write(tmp_path, monkeypatch):
    store = make(tmp_path / "shard-0")
    keys = fill(store, range(3), NBYTES)
    store.flush()
    store.abandon()
    lock = (tmp_path / "shard-0" / "lock").read_bytes()
    real = os.open

    def read_only(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real(path, flags, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", read_only)
        assert inspect_store(str(tmp_path))[0].blocks == 3
        assert verify_store(str(tmp_path))[0].ok
    assert (tmp_path / "shard-0" / "lock").read_bytes() == lock
    # after a power cut, too: what it left in doubt stays so
    (tmp_path / "shard-0" / "lock").write_bytes(b"1 another-boot".ljust(128))
    assert verify_store(str(tmp_path))[0].ok
    with make(tmp_path / "shard-0") as store:
        assert not any(store.durable(keys))


def test_a_small_store_that_is_overwritten_fast_drops_nothing_for_want_of_room_in_its_log(tmp_path):
    with ShardStore(str(tmp_path / "s"), storage_bytes=2_000_000, ram_bytes=16_000_000) as store:
        client = LocalShardClient(store)
        for first in range(0, 3000, 20):
            put(client, [key_of(n) for n in range(first, first + 20)], 8 * KIB)
        assert store.flush(30).complete
        stats = store.stats()
        assert stats["evictions"]["disk"] > 2000
        assert not stats["drops"]
        client.close()


def test_a_full_log_is_written_anew_after_a_failure_though_nothing_else_happens(
    tmp_path, monkeypatch
):
    real = durability.Durability._compact_locked

    def failing(self):
        return self._compaction.note(False)

    monkeypatch.setattr(durability.Durability, "_compact_locked", failing)
    with ShardStore(str(tmp_path / "s"), storage_bytes=2_000_000, ram_bytes=16_000_000) as store:
        client = LocalShardClient(store)
        first = 0
        while not store.stats()["drops"]:
            put(client, [key_of(n) for n in range(first, first + 20)], 8 * KIB)
            first += 20
        monkeypatch.setattr(durability.Durability, "_compact_locked", real)
        deadline = time.monotonic() + 60
        while store._durability._disk.log_full():
            assert time.monotonic() < deadline, "nobody writes the log anew"
            time.sleep(0.01)
        put(client, [key_of(first)], 8 * KIB)
        assert store.flush(30).complete
        store.clear("ram")
        assert get(client, [key_of(first)], 8 * KIB) == [True]
        client.close()
