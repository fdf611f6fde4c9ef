"""A dict from 16-byte keys that never makes one insert wait for millions of others to move.

A dict doubles when it is two thirds full and moves all its entries at once: half a second at six
million. Here a key's last byte chooses one of about a hundred dicts, so that none holds much more
than a hundredth of all keys. Two of them take three bytes where one takes two: they double at
different sizes, so that their spare room does not come all at one time. Shards and the coordinator
use it. Not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from ..errors import ConfigError
from ..hashing import KEY_BYTES, BlockKey

_Item = TypeVar("_Item")

BATCH_KEYS = 4096
"""As many keys as one hold of a lock may work on."""


def check_keys(keys: Sequence[BlockKey]) -> None:
    """Raise ConfigError unless all keys are 16 bytes."""
    if keys and set(map(len, keys)) != {KEY_BYTES}:
        bad = next(key for key in keys if len(key) != KEY_BYTES)
        raise ConfigError("key", bad, f"{KEY_BYTES} bytes")


def join_keys(keys: Sequence[BlockKey]) -> bytes:
    """Keys, one after the other; a thousand travel as one object.

    Raises:
        ConfigError: a key is not 16 bytes.
    """
    check_keys(keys)
    return b"".join(keys)


def split_keys(joined: bytes) -> list[BlockKey]:
    """Inverse of `join_keys`."""
    return [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]


def batches(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    """Pieces of at most `BATCH_KEYS` items; nothing of nothing."""
    if len(items) <= BATCH_KEYS:
        if items:
            yield items
        return
    for start in range(0, len(items), BATCH_KEYS):
        yield items[start : start + BATCH_KEYS]


class KeyDict:
    """Keys to numbers.

    Attributes:
        parts: the dicts, 256 references by a key's last byte; hot loops read them directly.
        dicts: each of them once.
    """

    def __init__(self) -> None:
        self.parts: list[dict[BlockKey, int]] = []
        while len(self.parts) < 256:
            self.parts += [{}] * (2 + len(self.parts) // 2 % 2)
        del self.parts[256:]
        self.dicts = list({id(part): part for part in self.parts}.values())

    def __len__(self) -> int:
        return sum(map(len, self.dicts))

    def __contains__(self, key: BlockKey) -> bool:
        return key in self.parts[key[-1]]

    def __iter__(self) -> Iterator[BlockKey]:
        for part in self.dicts:
            yield from part

    def find(self, key: BlockKey) -> int:
        """Number of a key, or -1."""
        return self.parts[key[-1]].get(key, -1)

    def get_many(self, keys: Sequence[BlockKey], default: int = -1) -> list[int]:
        """Numbers of keys.

        Raises:
            ConfigError: a key is not 16 bytes.
        """
        parts = self.parts
        with suppress(KeyError, IndexError):
            return [parts[key[-1]][key] for key in keys]
        check_keys(keys)  # one of another length is never there
        return [parts[key[-1]].get(key, default) for key in keys]
