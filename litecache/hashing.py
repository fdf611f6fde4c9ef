"""Block keys: what identifies the KV of one block of tokens, everywhere and for ever.

A `BlockKey` is a 16-byte blake2b digest over (parent key, token ids). The chain starts at a root
key that stands for the namespace: everything that changes KV bytes. Nothing here depends on
Python's `hash`, on the process or on the machine, so keys outlive restarts.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

KEY_BYTES = 16
BlockKey = bytes

Field = str | int | float | bool | bytes | None | tuple["Field", ...]


def _encode(value: Field) -> bytes:
    """Encode one value so that no two different values share an encoding (type tag + length)."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"T" if value else b"F"
    if isinstance(value, int):
        body = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
        return b"i" + struct.pack("<I", len(body)) + body
    if isinstance(value, float):
        return b"f" + struct.pack("<d", value)
    if isinstance(value, str):
        raw = value.encode()
        return b"s" + struct.pack("<Q", len(raw)) + raw
    if isinstance(value, bytes):
        return b"b" + struct.pack("<Q", len(value)) + value
    if isinstance(value, tuple):
        return b"t" + struct.pack("<Q", len(value)) + b"".join(map(_encode, value))
    raise TypeError(f"cannot hash a {type(value).__name__}: {value!r}")


def root_key(namespace: Mapping[str, Field]) -> BlockKey:
    """Digest a namespace, independent of the order of its fields.

    Args:
        namespace: names and values of all that changes KV bytes (model fingerprint, dtype,
            group, block size, layout version, salt...).
    """
    items = tuple((name, namespace[name]) for name in sorted(namespace))
    return hashlib.blake2b(_encode(items), digest_size=KEY_BYTES, person=b"litecache-root").digest()


def block_key(parent: BlockKey, token_ids: npt.NDArray[np.int64]) -> BlockKey:
    """Digest one block of tokens after `parent`.

    Args:
        parent: key of the block before, or the root key.
        token_ids: int64 `[num_tokens]`, hashed as little-endian words.
    """
    digest = hashlib.blake2b(parent, digest_size=KEY_BYTES, person=b"litecache-block")
    digest.update(token_ids.astype("<i8", copy=False).tobytes())
    return digest.digest()


def chain_keys(
    root: BlockKey, token_ids: Sequence[int] | npt.NDArray[np.int64], block_size: int
) -> list[BlockKey]:
    """Keys of all full blocks of a sequence, in order.

    Args:
        root: the namespace's key.
        token_ids: `[num_tokens]`; a trailing partial block gets no key.
        block_size: tokens per block.
    """
    data = np.asarray(token_ids, dtype=np.int64).astype("<i8", copy=False).tobytes()
    size = block_size * 8
    keys: list[BlockKey] = []
    parent = root
    # A copy of a prepared state costs half of making one.
    prepared = hashlib.blake2b(digest_size=KEY_BYTES, person=b"litecache-block")
    for start in range(0, len(data) - size + 1, size):
        digest = prepared.copy()
        digest.update(parent + data[start : start + size])
        parent = digest.digest()
        keys.append(parent)
    return keys
