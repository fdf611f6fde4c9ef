"""Which keys came and went since they were last asked for, for those who track a shard."""

from __future__ import annotations

from itertools import compress, islice

from ..hashing import BlockKey
from .key_dict import BATCH_KEYS
from .protocol import Deltas

_MOST = 65_536


class Changes:
    """Net changes: a key that came and went is none. Bounded, and says when it forgot some.

    Args:
        epoch: of the shard.
    """

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._seq = 0
        self._came: dict[BlockKey, bool] = {}
        self._lost = False

    def note(self, key: BlockKey, *, added: bool) -> None:
        """The shard has a key now, or has it no more."""
        if self._came.pop(key, added) != added:
            return
        self._came[key] = added
        if len(self._came) > _MOST:
            self._came.clear()
            self._lost = True

    def drain(self) -> Deltas:
        """What has changed since the last call, or a part of it."""
        self._seq += 1
        keys = list(islice(self._came, BATCH_KEYS))
        came = [self._came.pop(key) for key in keys]
        added = list(compress(keys, came))
        removed = [key for key, was_added in zip(keys, came, strict=True) if not was_added]
        deltas = Deltas(self._epoch, self._seq, added, removed, self._lost, bool(self._came))
        self._lost = False
        return deltas
