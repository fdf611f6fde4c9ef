"""The log of a shard's folder: records, replay against a dict, compaction, upgrade of format 1."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from fault_files import FaultFiles
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_help import KIB, MIB, bytes_of, fill, key_of, puts, taken_bytes

from litecache.errors import StorageFormatError, StorageFullError
from litecache.storage import ShardStore
from litecache.storage.block_index import BlockIndex
from litecache.storage.disk import folder, log, upgrade
from litecache.storage.disk.files import Files
from litecache.storage.disk.inspect import inspect_store, verify_store
from litecache.storage.disk.log import (
    DELETE,
    FLAG_DOUBTFUL,
    PUT,
    RECORD,
    RECORD_BYTES,
    SYNC,
    Log,
    head,
    is_sound,
    name_records,
    of_kind,
    recover,
    replay,
    seal,
    write_new,
)
from litecache.storage.disk.tier import DiskTier

OLD_STORE = Path(__file__).with_name("store_of_format_1.tar.xz")


def slots(rows):
    return {row["key"].tobytes(): int(row["slot"]) for row in rows}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, RECORD_BYTES - 1), st.integers(0, 7), st.integers(0, 4))
def test_a_flipped_bit_costs_its_record_alone(at, bit, row):
    assert RECORD_BYTES == 96
    raw = bytearray(seal(puts(range(5)), 7))
    raw[row * RECORD_BYTES + at] ^= 1 << bit
    rows = np.frombuffer(bytes(raw), RECORD)
    kept = [key.tobytes() for key in rows[is_sound(rows)]["key"]]
    assert kept == [key_of(n) for n in range(5) if n != row]


STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "delete", "sync"]), st.integers(0, 8), st.integers(0, 8)),
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(STEPS, st.randoms(use_true_random=False), st.integers(0, 3))
def test_replay_equals_a_dict_whatever_is_lost_or_out_of_place(steps, draw, lose):
    """The highest number wins for each key and each slot; a put after the last sync is doubtful."""
    rows, model, synced = [], {}, 0
    for number, (kind, key, slot) in enumerate(steps, 1):
        record = of_kind({"put": PUT, "delete": DELETE, "sync": SYNC}[kind])
        record["seq"], record["slot"], record["pages"] = number, slot, 1
        record["key"] = np.frombuffer(key_of(key), "<u8")
        if kind == "sync":
            record["checksum"] = number - draw.randrange(2)
        rows.append(record)
    for _ in range(min(lose, len(rows))):
        rows.pop(draw.randrange(len(rows)))  # a damaged record
    by_slot = {}
    for record in rows:
        key, slot, seq = record["key"].tobytes(), int(record["slot"][0]), int(record["seq"][0])
        if record["kind"][0] == SYNC:
            synced = max(synced, int(record["checksum"][0]))
            continue
        model[key] = (slot, seq) if record["kind"][0] == PUT else None
        by_slot[slot] = seq
    kept = {k: v for k, v in model.items() if v is not None and by_slot[v[0]] == v[1]}
    stale = [record.copy() for record in rows if draw.random() < 0.2]
    draw.shuffle(rows)
    found = replay(np.concatenate([np.zeros(0, RECORD), *stale, *rows]), synced=0)
    assert slots(found.records) == {key: slot for key, (slot, _) in kept.items()}
    doubtful = {r["key"].tobytes() for r in found.records if r["flags"] & FLAG_DOUBTFUL}
    assert doubtful == {key for key, (_, seq) in kept.items() if seq > synced}
    assert found.seq == max((int(r["seq"][0]) for r in rows), default=0)


def test_keys_that_share_their_first_half_are_told_apart():
    rows = puts(range(4))
    rows["key"][:, 0] = 5
    rows["seq"] = [1, 2, 3, 4]
    again = rows[:2].copy()
    again["seq"], again["slot"] = [5, 6], [8, 9]
    found = replay(np.concatenate([rows, again]), synced=9)
    assert sorted(found.records["slot"].tolist()) == [2, 3, 8, 9]


@pytest.mark.parametrize("name", ["", "x", "é" * 200, "n" * 56, "n" * 57, "\udcff", "名" * 200])
def test_a_name_of_any_length_comes_back(name):
    rows = name_records(3, name)
    assert len(rows) == max(1, -(-len(name.encode(errors="surrogatepass")) // 56))
    found = replay(rows, synced=0)
    assert found.names[3] == name.encode(errors="surrogatepass").decode(errors="replace")
    if len(rows) > 1:
        assert replay(rows[1:], synced=0).names[3] == "unknown-3"


def open_log(files: Files, index: BlockIndex) -> Log:
    return Log(files, index, recover(files), lambda number, name: None)


def place(index: BlockIndex, numbers) -> np.ndarray:
    entries = []
    for n in numbers:
        entry = index.insert(key_of(n))
        index.disk[entry], index.pages[entry] = n + 1, 1
        entries.append(entry)
    return np.array(entries, np.int64)


def test_a_log_written_anew_keeps_what_came_meanwhile_and_the_names():
    files, index = FaultFiles(random.Random(0)), BlockIndex()
    book = open_log(files, index)
    long = "a name of more than one record " * 5
    number = book.name_number(long, 1 << 20)
    first = place(index, range(3))
    book.put(first)
    book.flush()
    seq = book.begin_compaction()
    book.put(place(index, [3]))
    book.removed(int(first[0]), 0)
    book.flush()
    book.put(place(index, [4]))

    def blocks():
        yield index.records(first)
        # told as they are by now: what came meanwhile has a higher number
        yield index.records(place(index, [6]))
        book.put(np.array([index.find(key_of(6))]))

    book.compact(seq, blocks(), lambda: None)
    book.put(place(index, [5]))
    book.flush()
    before = book.bytes
    assert files.size(book._fd) == before
    found = recover(files)
    assert slots(found.records) == {key_of(n): n for n in range(1, 7)}
    assert found.names[number] == long
    assert (found.seq, found.end, found.damaged) == (book.seq, before, 0)
    doubtful = sorted(int(s) for s in found.records[found.records["flags"] > 0]["slot"])
    assert doubtful == [3, 4, 5, 6], "what came after the captured sync is not vouched for"


def test_a_compaction_that_fails_leaves_the_old_log_in_force(monkeypatch):
    files, index = FaultFiles(random.Random(0)), BlockIndex()
    book = open_log(files, index)
    book.put(place(index, range(3)))
    for call in ("write", "sync", "rename"):
        seq = book.begin_compaction()
        book.put(place(index, [len(index)]))

        def refuse(*args):
            raise OSError(errno.EIO, "sick")

        with monkeypatch.context() as sick:
            sick.setattr(files, call, refuse)
            with pytest.raises(OSError, match="sick"):
                book.compact(seq, [index.records(np.arange(3))], lambda: None)
        assert not files.exists("log.new")
    book.flush()
    assert slots(recover(files).records) == {key_of(n): n for n in range(6)}


def test_records_of_an_older_file_on_the_same_sectors_are_ignored():
    files, index = FaultFiles(random.Random(0)), BlockIndex()
    book = open_log(files, index)
    book.put(place(index, range(3)))
    book.flush()
    stale = seal(puts(range(90, 93), slot=0, seq=50), epoch=book._epoch ^ 1)
    files.write(book._fd, [memoryview(stale)], book.bytes)
    assert slots(recover(files).records) == {key_of(n): n for n in range(3)}
    # without its head the file's epoch is that of most of its records
    files.write(book._fd, [memoryview(bytes(RECORD_BYTES))], 0)
    mine = seal(puts([7], slot=7, seq=60), epoch=book._epoch)
    files.write(book._fd, [memoryview(mine)], book.bytes + len(stale))
    found = recover(files)
    assert slots(found.records) == {**{key_of(n): n for n in range(3)}, key_of(7): 7}
    assert found.damaged == 1


def test_logs_of_other_versions_are_refused(monkeypatch):
    files = FaultFiles(random.Random(0))
    with monkeypatch.context() as future:
        future.setattr(log, "VERSION", 3)
        fd = files.open("log", create=True)
        files.write(fd, [memoryview(seal(head(0, 0), 1))], 0)
    with pytest.raises(StorageFormatError, match="version 3, this version reads 2"):
        recover(files)


def test_metadata_stays_within_what_the_bound_reserves_for_it(tmp_path):
    """Rewriting the smallest blocks over and over, compactions failing or not."""

    class Counting(Files):
        most = 0
        sick = False

        def write(self, fd, buffers, offset):
            done = super().write(fd, buffers, offset)
            taken = [f.stat().st_size for f in tmp_path.iterdir() if f.name.startswith("log")]
            self.most = max(self.most, sum(taken))
            return done

        def rename(self, source, target):
            if self.sick:
                raise OSError(errno.EIO, "sick")
            super().rename(source, target)

    files = Counting()
    with ShardStore(str(tmp_path), storage_bytes=1 * MIB, ram_bytes=1 * MIB, io_threads=0,
                    files=files) as store:  # fmt: skip
        disk = store._tiers.disk
        for round_ in range(30):
            files.sick = round_ % 3 == 0
            fill(store, range(100 * round_, 100 * round_ + 100), 4 * KIB, batch=20)
            slots_used = disk.space.slots_assigned
            room = log.META_FIXED_BYTES + log.META_SLOT_BYTES * slots_used
            assert files.most <= room + log.META_NAME_COPIES * disk.log.name_bytes
        files.sick = False
        assert store.flush().complete
        used = taken_bytes(tmp_path)
        assert used <= 1 * MIB


def open_tier(path: Path) -> DiskTier:
    return DiskTier(
        Files(),
        str(path),
        storage_bytes=1 << 40,
        index=BlockIndex(),
        policy="lru",
        on_evict=lambda entry: None,
        quotas={},
    )


def cpu_seconds_of_opening(path: Path, count: int) -> float:
    """Of a store with `count` blocks of 360 KiB; a sparse slab stands in for a real one."""
    segment = 64 << 20
    a_segment, pages = segment // (90 * 4096), segment // 4096
    blocks = np.arange(count)
    rows = of_kind(PUT, count)
    rows["key"] = np.random.default_rng(0).integers(0, 2**64, (count, 2), np.uint64)
    rows["slot"] = blocks // a_segment * pages + blocks % a_segment * 90
    rows["pages"] = 90
    path.mkdir(mode=0o700)
    open_tier(path).close(clean=True)
    files = Files()
    files.folder, _ = folder.open_folder(str(path))
    fd, _ = write_new(files, 1, [""], [rows], 5)
    files.close(fd)
    files.rename("log.new", "log")
    os.close(files.folder)
    os.truncate(path / "slab", (int(rows["slot"].max()) // pages + 1) * segment)
    begun = time.process_time()
    tier = open_tier(path)
    spent = time.process_time() - begun
    assert len(tier.on_disk()) == count
    tier.close(clean=True)
    return spent


def test_half_a_million_blocks_come_back_in_time_that_grows_with_their_number(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(folder, "disk_room_bytes", lambda path: 1 << 50)
    few = cpu_seconds_of_opening(tmp_path / "few", 50_000)
    assert cpu_seconds_of_opening(tmp_path / "many", 500_000) < 30 * few  # 100 were quadratic


# --- stores of format 1


@pytest.fixture
def old_store(tmp_path):
    with tarfile.open(OLD_STORE) as archive:
        archive.extractall(tmp_path, filter="data")
    for path in (tmp_path / "shard-0").iterdir():
        os.chown(path, os.geteuid(), os.getegid())
    return tmp_path / "shard-0"


OLD_KEYS = [key_of(n) for n in range(11) if n != 1]
OPTIONS = {"storage_bytes": 1 * MIB, "ram_bytes": 1 * MIB}


def check_old(store: ShardStore) -> None:
    for key, data in store.fetch(OLD_KEYS):
        assert data == bytes_of(key, 4 * KIB)
    assert store.query([key_of(1)]) == [False], "it had been removed"
    index = store._tiers.index
    assert [k for k in OLD_KEYS if index.pinned(index.find(k))] == [key_of(0)]
    store.check_integrity()


def test_a_store_of_format_1_is_read_and_upgraded(old_store):
    def names() -> set[str]:
        return {path.name for path in old_store.iterdir()}

    reports = inspect_store(str(old_store))
    assert reports[0].blocks == 10
    assert verify_store(str(old_store))[0].ok
    assert "snapshot" in names(), "looking changes nothing"
    with ShardStore(str(old_store), **OPTIONS) as store:
        check_old(store)
    assert names() == {"lock", "superblock", "slab", "log"}
    (after,) = inspect_store(str(old_store))
    for before, now in zip(reports[0].namespaces, after.namespaces, strict=True):
        assert (before.name, before.blocks, before.bytes) == (now.name, now.blocks, now.bytes)
    assert "more than forty bytes in it, ä" in str(after.namespaces)
    with ShardStore(str(old_store), **OPTIONS) as store:
        check_old(store)
        fill(store, range(100, 110), 4 * KIB)
        assert store.flush().complete


@pytest.mark.parametrize("call", ["write", "sync", "rename", "sync_folder", "unlink"])
def test_an_upgrade_that_is_cut_short_anywhere_loses_nothing(old_store, tmp_path, call):
    class CutError(Exception):
        """The process is gone."""

    for after in range(4):
        copy = tmp_path / f"copy-{after}"
        shutil.copytree(old_store, copy)
        copy.chmod(0o700)
        files = Files()
        real, left = getattr(files, call), [after]

        def cut(*args, real=real, left=left):
            if not left[0]:
                raise CutError
            left[0] -= 1
            return real(*args)

        setattr(files, call, cut)
        try:
            store = ShardStore(str(copy), files=files, **OPTIONS)
        except CutError:
            pass
        else:
            store.abandon()
        with ShardStore(str(copy), **OPTIONS) as store:
            check_old(store)


def test_an_upgrade_without_room_is_refused_with_what_it_needs(old_store, monkeypatch):
    def full(self, fd, buffers, offset):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as disk:
        disk.setattr(Files, "write", full)
        with pytest.raises(StorageFullError, match=r"format 1.*960 bytes"):
            ShardStore(str(old_store), **OPTIONS)
    with ShardStore(str(old_store), **OPTIONS) as store:
        check_old(store)


def test_a_damaged_store_of_format_1_is_never_misread(old_store, tmp_path):
    draw = random.Random(5)
    sound = {p.name: p.read_bytes() for p in old_store.iterdir()}
    for round_ in range(25):
        name = draw.choice(["snapshot", "journal"])
        raw = bytearray(sound[name])
        for _ in range(draw.randrange(1, 4)):
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        if not round_ % 5:
            del raw[draw.randrange(len(raw)) :]
        copy = tmp_path / f"copy-{round_}"
        shutil.copytree(old_store, copy)
        copy.chmod(0o700)
        (copy / name).write_bytes(raw)
        with ShardStore(str(copy), io_threads=0, **OPTIONS) as store:
            found = store.fetch(OLD_KEYS)
            assert all(data in (None, bytes_of(key, 4 * KIB)) for key, data in found)
            assert sum(data is not None for _, data in found) >= 3
            store.check_integrity()


def test_an_empty_list_of_blocks_of_format_1_is_read_as_none() -> None:
    assert len(upgrade._puts(b"")) == 0
