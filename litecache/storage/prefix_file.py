"""The stored KV of one prefix as a file: self-describing, checksummed, read and written in pieces.

    head     magic, version, bytes of the header and of the whole file, xxh3_64 of the header
    header   msgpack: what the blocks belong to, and the prefix's token ids
    blocks   for each block of tokens, and in it for each KV group: xxh3_64, the bytes
    trailer  xxh3_128 over all before it

Keys are not stored: whoever reads the file derives them from the token ids and its own namespace,
so no file can put a block under the key of other tokens. A checksum is no signature: the bytes are
as good as who wrote them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import secrets
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import msgpack
import xxhash

from ..errors import PrefixFileError, StorageError, StorageFullError, shorten
from ..token_ids import TokenIds
from .disk.files import NO_SPACE
from .protocol import PAGE_BYTES

VERSION = 1
MAX_HEADER_BYTES = 16 << 20
_MAGIC = b"LiteCache KV\r\n\x1a\0"
_HEAD = struct.Struct("<16sIIQQ")
_SUM = struct.Struct("<Q")
_TRAILER_BYTES = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PrefixHeader:
    """What the blocks of a file belong to.

    Attributes:
        label: of the model, for people.
        fingerprint, dtype, kv_dtype, codec, layout, block_size: of the engine that wrote them.
        group_shapes, block_bytes: per KV group.
        namespace: root keys of the KV groups without a salt: all else that changes KV bytes.
        salt: digest of the cache salt.
        tokens: of the prefix, in whole blocks.
    """

    label: str
    fingerprint: str
    dtype: str
    kv_dtype: str
    codec: str
    layout: int
    block_size: int
    group_shapes: tuple[str, ...]
    block_bytes: tuple[int, ...]
    namespace: bytes
    salt: str
    tokens: TokenIds

    @property
    def num_blocks(self) -> int:
        """Blocks of each KV group."""
        return len(self.tokens) // self.block_size

    def check_same(self, here: PrefixHeader) -> None:
        """Raise PrefixFileError unless blocks of this file are what the engine here would write."""
        for field in dataclasses.fields(self)[1:-2]:
            theirs, ours = getattr(self, field.name), getattr(here, field.name)
            if theirs != ours:
                raise PrefixFileError(
                    f"the file is of another {field.name} ({shorten(str(theirs))}) than the group "
                    f"({shorten(str(ours))})"
                )
        if self.salt != here.salt:
            raise PrefixFileError("the file was exported under another cache_salt: give that one")

    def pack(self) -> bytes:
        """As it is written."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        packed: bytes = msgpack.packb({**fields, "tokens": self.tokens.pack()})
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> PrefixHeader:
        """Inverse of `pack`.

        Raises:
            PrefixFileError: it cannot be.
        """
        try:
            fields = msgpack.unpackb(data, use_list=False)
            ids, width = fields["tokens"]
            if width not in (1, 2, 3, 4, 8) or len(ids) % width:
                raise ValueError("token ids of no known width")
            header = cls(**{**fields, "tokens": TokenIds.unpack(ids, width)})
            for field in dataclasses.fields(cls):
                kind = type(getattr(header, field.name)).__name__
                if not field.type.startswith(kind):
                    raise TypeError(f"{field.name} is of type {kind}")
            kinds = {*map(type, header.group_shapes)}, {*map(type, header.block_bytes)}
            if kinds != ({str}, {int}) or len(header.group_shapes) != len(header.block_bytes):
                raise TypeError("KV groups are not described")
            if header.block_size < 1 or min(header.block_bytes) < PAGE_BYTES:
                raise ValueError("blocks of no size")
            if not header.num_blocks or len(header.tokens) % header.block_size:
                raise ValueError("the tokens do not fill blocks")
        except Exception as error:  # whatever a stranger has packed
            reason = f"{type(error).__name__}: {error}"
            raise PrefixFileError(f"the file's header is not sound ({shorten(reason)})") from error
        return header

    def file_bytes(self, header_bytes: int) -> int:
        """Exact size of the file."""
        block = sum(self.block_bytes) + _SUM.size * len(self.block_bytes)
        return _HEAD.size + header_bytes + self.num_blocks * block + _TRAILER_BYTES


def write_prefix(path: str, header: PrefixHeader, blocks: Iterable[bytes]) -> int:
    """Write a file whole or not at all; its bytes.

    Args:
        path: replaced when all is on the disk.
        header: what the blocks belong to.
        blocks: in the file's order; as many and as large as the header says.

    Raises:
        StorageError: the file cannot be written.
    """
    packed = header.pack()
    if len(packed) > MAX_HEADER_BYTES:
        raise StorageError(f"the prefix needs a header of {len(packed):,} bytes: too long")
    total = header.file_bytes(len(packed))
    head = _HEAD.pack(_MAGIC, VERSION, len(packed), total, xxhash.xxh3_64_intdigest(packed))
    if os.path.exists(path) and not os.path.isfile(path):
        # the rename below would put a file in the place of a device
        raise StorageError(f"{shorten(path)} cannot be written: it is no regular file")
    folder = os.path.dirname(os.path.abspath(path))
    new = f"{folder}/.litecache-{secrets.token_hex(8)}"
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                state = xxhash.xxh3_128()
                for piece in (head, packed):
                    state.update(piece)
                    file.write(piece)
                for block in blocks:
                    for piece in (_SUM.pack(xxhash.xxh3_64_intdigest(block)), block):
                        state.update(piece)
                        file.write(piece)
                file.write(state.digest())
                file.flush()
                os.fsync(fd)
                assert os.fstat(fd).st_size == total, "blocks and header disagree"
            os.rename(new, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder_fd)
        finally:
            os.close(folder_fd)
    except OSError as error:
        kind = StorageFullError if error.errno in NO_SPACE else StorageError
        raise kind(f"{shorten(path)} cannot be written: {error.strerror}") from error
    return total


class PrefixFile:
    """A file opened for reading; it belongs to who opened it, who closes it.

    Args:
        path: of the file.
        here: the header that a file of the group at hand would have, its tokens aside.

    Attributes:
        header: the file's own.
        nbytes: of the file.

    Raises:
        PrefixFileError: it is no such file, damaged, of another version or foreign.
    """

    def __init__(self, path: str, here: PrefixHeader) -> None:
        with _reading(path):
            # without waiting: the path may be a pipe
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            self._file: BinaryIO = open(fd, "rb")  # noqa: SIM115 - closed by `close`
            try:
                self.header = self._read_header(fd)
                self.header.check_same(here)
            except BaseException:
                self._file.close()
                raise
        self._path = path

    def _read_header(self, fd: int) -> PrefixHeader:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise PrefixFileError("it is no regular file")
        head = self._file.read(_HEAD.size)
        if not head or head[: len(_MAGIC)] != _MAGIC[: len(head)]:
            raise PrefixFileError("it is no file of `litecache export`")
        if len(head) < _HEAD.size:
            raise PrefixFileError(f"it ends after {len(head)} bytes: truncated")
        _, version, header_bytes, total, checksum = _HEAD.unpack(head)
        if version != VERSION:
            raise PrefixFileError(f"it has version {version}, this LiteCache reads {VERSION}")
        if total != found.st_size:
            raise PrefixFileError(f"it has {found.st_size:,} of {total:,} bytes")
        if not 0 < header_bytes <= min(MAX_HEADER_BYTES, total):
            raise PrefixFileError(f"its header of {header_bytes:,} bytes is impossible")
        packed = self._file.read(header_bytes)
        if len(packed) != header_bytes or xxhash.xxh3_64_intdigest(packed) != checksum:
            raise PrefixFileError("its header is damaged")
        header, self.nbytes = PrefixHeader.unpack(packed), total
        if header.file_bytes(header_bytes) != total:
            raise PrefixFileError("its length is not that of its blocks")
        self._start, self._state = self._file.tell(), xxhash.xxh3_128(head + packed)
        return header

    def verify(self, progress: Progress = lambda done, total: None) -> None:
        """Read all of it and check every sum.

        Raises:
            PrefixFileError: something is damaged.
        """
        with _reading(self._path):
            for done, block in enumerate(self.blocks()):
                self._state.update(_SUM.pack(xxhash.xxh3_64_intdigest(block)))
                self._state.update(block)
                progress(done + 1, self.header.num_blocks * len(self.header.block_bytes))
            if self._file.read() != self._state.digest():
                raise PrefixFileError("its checksum over all is wrong")

    def blocks(self) -> Iterator[bytes]:
        """All blocks in the file's order, each checked as it comes.

        Raises:
            PrefixFileError: the next one is damaged.
        """
        with _reading(self._path):
            self._file.seek(self._start)
            for index in range(self.header.num_blocks):
                for group, nbytes in enumerate(self.header.block_bytes):
                    said, block = self._file.read(_SUM.size), self._file.read(nbytes)
                    if len(block) != nbytes or said != _SUM.pack(xxhash.xxh3_64_intdigest(block)):
                        raise PrefixFileError(f"block {index} of KV group {group} is damaged")
                    yield block

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Name the file in what is wrong with it."""
    try:
        yield
    except PrefixFileError as error:
        if str(error).startswith(shorten(path)):
            raise
        raise PrefixFileError(f"{shorten(path)} cannot be imported: {error}") from error
    except OSError as error:
        reason = "there is no such file" if error.errno == errno.ENOENT else error.strerror
        raise PrefixFileError(f"{shorten(path)} cannot be imported: {reason}") from error
