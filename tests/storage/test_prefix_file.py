"""An export file is read whole and right, or refused with a reason."""

from __future__ import annotations

import dataclasses
import os
import stat
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
import xxhash

from litecache.errors import LiteCacheError, PrefixFileError, StorageError
from litecache.storage.prefix_file import PrefixFile, PrefixHeader, write_prefix
from litecache.token_ids import TokenIds

HEADER = PrefixHeader(
    label="model@fp/float32/4",
    fingerprint="fp",
    dtype="float32",
    kv_dtype="float32",
    codec="raw",
    layout=1,
    block_size=4,
    group_shapes=("full", "sliding"),
    block_bytes=(4096, 8192),
    namespace=bytes(32),
    salt="0011223344556677",
    tokens=TokenIds(range(100, 112)),
)
HERE = dataclasses.replace(HEADER, label="the same by another name", tokens=TokenIds())
BLOCKS = [np.random.default_rng(i).bytes(HEADER.block_bytes[i % 2]) for i in range(6)]
HEAD_BYTES = 40


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = str(tmp_path / "prefix.kv")
    assert write_prefix(path, HEADER, iter(BLOCKS)) == os.path.getsize(path)
    return path


def read(path: str, here: PrefixHeader = HERE) -> list[bytes]:
    """What an import reads, the file checked before."""
    file = PrefixFile(path, here)
    try:
        file.verify()
        return list(file.blocks())
    finally:
        file.close()


def packed_with(fields: dict[str, object], *, total: int | None = None) -> bytes:
    """A file whose header was forged and signed as the format wants."""
    packed = msgpack.packb({**msgpack.unpackb(HEADER.pack()), **fields})
    body = b"".join(struct.pack("<Q", xxhash.xxh3_64_intdigest(b)) + b for b in BLOCKS)
    size = HEAD_BYTES + len(packed) + len(body) + 16
    words = 1, len(packed), total or size, xxhash.xxh3_64_intdigest(packed)
    data = struct.pack("<16sIIQQ", b"LiteCache KV\r\n\x1a\0", *words) + packed + body
    return data + xxhash.xxh3_128_digest(data)


def test_what_was_written_is_read_with_the_header_and_only_by_its_owner(path: str) -> None:
    assert read(path) == BLOCKS
    file = PrefixFile(path, HERE)
    assert file.header == HEADER
    assert file.nbytes == os.path.getsize(path)
    file.close()
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.listdir(os.path.dirname(path)) == ["prefix.kv"]


def test_a_file_cut_at_any_place_is_refused(path: str) -> None:
    data = Path(path).read_bytes()
    header = len(HEADER.pack())
    first = HEAD_BYTES + header
    classes = {0, 1, 15, 16, 20, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + header // 2}
    classes |= {first - 1, first, first + 4, first + 8, first + 4096, first + 4104, first + 4112}
    classes |= {len(data) // 2, len(data) - 17, len(data) - 16, len(data) - 1}
    for length in sorted(classes):
        Path(path).write_bytes(data[:length])
        with pytest.raises(PrefixFileError, match="cannot be imported: "):
            read(path)
    Path(path).write_bytes(data + b"\0")
    with pytest.raises(PrefixFileError, match=f"has {len(data) + 1:,} of {len(data):,} bytes"):
        read(path)


def test_a_flipped_bit_anywhere_is_refused(path: str) -> None:
    data = Path(path).read_bytes()
    body = HEAD_BYTES + len(HEADER.pack())
    places = {*range(body), *range(body, len(data), 977), *range(len(data) - 16, len(data))}
    for place in sorted(places):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        Path(path).write_bytes(broken)
        with pytest.raises(PrefixFileError):
            read(path)


def test_a_file_of_a_newer_version_is_refused_by_its_number(path: str) -> None:
    data = bytearray(Path(path).read_bytes())
    data[16:20] = (2).to_bytes(4, "little")
    Path(path).write_bytes(data)
    with pytest.raises(PrefixFileError, match="it has version 2, this LiteCache reads 1"):
        read(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fingerprint", "another"),
        ("dtype", "bfloat16"),
        ("kv_dtype", "int8"),
        ("codec", "fp8"),
        ("layout", 2),
        ("block_size", 2),
        ("group_shapes", ("full", "full")),
        ("block_bytes", (4096, 4096)),
        ("namespace", b"another"),
        ("salt", "another"),
    ],
)
def test_a_foreign_file_is_refused_by_what_differs(path: str, field: str, value: object) -> None:
    here = dataclasses.replace(HERE, **{field: value})
    name = "cache_salt" if field == "salt" else field
    with pytest.raises(PrefixFileError, match=f"another {name}"):
        PrefixFile(path, here)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": (bytes(3 << 20), 1)},
        {"tokens": (b"", 1)},
        {"tokens": (bytes(12), 0)},
        {"tokens": (bytes(13), 1)},
        {"tokens": 7},
        {"block_bytes": (1 << 62, 1 << 62)},
        {"block_bytes": (4096, -8192)},
        {"block_bytes": ()},
        {"group_shapes": ("full",)},
        {"block_size": 0},
        {"block_size": True},
        {"label": None},
        {"another": 1},
    ],
    ids=range(13),
)
def test_a_forged_header_is_refused_without_its_memory(
    path: str, fields: dict[str, object]
) -> None:
    Path(path).write_bytes(packed_with(fields))
    tracemalloc.start()
    try:
        with pytest.raises(PrefixFileError, match="cannot be imported: "):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_header_longer_than_the_file_or_the_bound_is_refused(path: str) -> None:
    for length in (0, 1 << 20, (1 << 32) - 1):
        data = bytearray(packed_with({}))
        data[20:24] = length.to_bytes(4, "little")
        Path(path).write_bytes(data)
        with pytest.raises(PrefixFileError, match=r"header of [0-9,]* bytes is impossible"):
            read(path)


def test_a_file_that_changes_after_it_was_checked_gives_no_wrong_block(path: str) -> None:
    file = PrefixFile(path, HERE)
    file.verify()
    with open(path, "r+b") as other:
        other.seek(-100, os.SEEK_END)
        other.write(b"x")
    given = []
    with pytest.raises(PrefixFileError, match="block 2 of KV group 1 is damaged"):
        given.extend(file.blocks())
    file.close()


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "text", "empty"])
def test_what_is_no_export_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    make: dict[str, Callable[[], object]] = {
        "missing": lambda: None,
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "text": lambda: path.write_text("once upon a time"),
        "empty": lambda: path.write_bytes(b""),
    }
    make[kind]()
    with pytest.raises(PrefixFileError, match="cannot be imported: "):
        PrefixFile(str(path), HERE)


def test_any_name_that_a_file_may_have_is_written(tmp_path: Path) -> None:
    path = str(tmp_path / ("é" * 127))
    write_prefix(path, HEADER, iter(BLOCKS))
    assert read(path) == BLOCKS


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path: str) -> None:
    def failing() -> Iterator[bytes]:
        yield BLOCKS[0]
        raise RuntimeError("a shard has died")

    with pytest.raises(RuntimeError, match="a shard has died"):
        write_prefix(path, HEADER, failing())
    assert read(path) == BLOCKS
    assert os.listdir(os.path.dirname(path)) == ["prefix.kv"]
    for bad in ("/nowhere/at/all", os.path.dirname(path), "/dev/full/x"):
        with pytest.raises(StorageError, match="cannot be written"):
            write_prefix(bad, HEADER, iter(BLOCKS))
    pipe = f"{os.path.dirname(path)}/pipe"
    os.mkfifo(pipe)  # as good as /dev/null, in whose place there would be a file now
    with pytest.raises(StorageError, match="it is no regular file"):
        write_prefix(pipe, HEADER, iter(BLOCKS))
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)
    assert issubclass(PrefixFileError, LiteCacheError)
