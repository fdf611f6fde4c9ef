"""Which shards hold which blocks, as the shards last reported it.

The coordinator's only big state, and a soft one: wrong entries cost a miss, never a wrong block.
Each key takes 16 bytes, its place in the index and one 64-bit set of shards (`KeyTable`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from litecache.actors.naming import MEMBER_TIMEOUT_S
from litecache.hashing import KEY_BYTES, BlockKey
from litecache.storage.key_table import KeyTable

MAX_SHARDS = 64


def pack_keys(keys: Iterable[BlockKey]) -> bytes:
    """Keys as one byte string: a thousand keys pickle as one object."""
    return b"".join(keys)


def unpack_keys(packed: bytes) -> list[BlockKey]:
    """The inverse of `pack_keys`."""
    return [packed[i : i + KEY_BYTES] for i in range(0, len(packed), KEY_BYTES)]


@dataclass
class _Shard:
    """A shard that reports: `bit` in the sets, and the last message applied of which epoch."""

    bit: int
    node_id: str
    epoch: int
    seq: int
    complete: bool
    last_seen: float


class LocationMap:
    """Keys to the shards that hold them.

    A shard's messages carry its epoch and a sequence number. A message of an unknown epoch, or
    one that does not follow the last, is refused and the shard sends all its keys again.

    Args:
        member_timeout_s: silence after which a shard is not offered any more.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        member_timeout_s: float = MEMBER_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table = KeyTable({"shards": "Q"})
        self._shards: dict[str, _Shard] = {}
        self._member_timeout_s = member_timeout_s
        self._clock = clock

    def __len__(self) -> int:
        return len(self._table)

    def apply(
        self,
        shard_id: str,
        node_id: str,
        epoch: int,
        seq: int,
        added: Sequence[BlockKey],
        removed: Sequence[BlockKey],
    ) -> bool:
        """Apply one message of a shard, once, and take it for alive.

        Returns:
            False when the message does not follow what is known: then nothing was applied and the
            shard has to send everything by `begin_resync` and `add_keys`.
        """
        shard = self._shards.get(shard_id)
        if shard is None or shard.epoch != epoch or not shard.complete:
            return False
        if seq == shard.seq:  # the answer to it was lost
            shard.last_seen = self._clock()
            return True
        if seq != shard.seq + 1:
            return False
        shard.node_id, shard.seq, shard.last_seen = node_id, seq, self._clock()
        self._remove(shard.bit, removed)
        self._add(shard.bit, added)
        return True

    def begin_resync(self, shard_id: str, node_id: str, epoch: int, seq: int) -> bool:
        """Forget what a shard held; its keys follow, and message `seq + 1` after them.

        Returns:
            False when there are `MAX_SHARDS` shards already: this one's blocks stay local.
        """
        shard = self._shards.get(shard_id)
        if shard is None:
            self._drop_dead()
            used = {other.bit for other in self._shards.values()}
            bit = next((b for b in range(MAX_SHARDS) if b not in used), None)
            if bit is None:
                return False
        else:
            bit = shard.bit
            self._clear(bit)
        self._shards[shard_id] = _Shard(bit, node_id, epoch, seq, False, self._clock())
        return True

    def add_keys(self, shard_id: str, epoch: int, keys: Sequence[BlockKey], last: bool) -> bool:
        """Take a part of a resync; False when it was overtaken by another one."""
        shard = self._shards.get(shard_id)
        if shard is None or shard.epoch != epoch or shard.complete:
            return False
        self._add(shard.bit, keys)
        shard.complete, shard.last_seen = last, self._clock()
        return True

    def locate(self, keys: Sequence[BlockKey], exclude_node: str = "") -> list[str | None]:
        """For each key one live shard that holds it, not on `exclude_node`; None where none."""
        bits = {
            shard.bit: shard_id for shard_id, shard in self._live() if shard.node_id != exclude_node
        }
        wanted = sum(1 << bit for bit in bits)
        found: list[str | None] = []
        previous = -1
        for holders in self._holders(keys):
            holders &= wanted
            if not holders:
                found.append(None)
                continue
            # A run of blocks stays with one shard where it can: fewer, larger messages.
            if previous < 0 or not holders >> previous & 1:
                previous = (holders & -holders).bit_length() - 1
            found.append(bits[previous])
        return found

    def prefix_by_node(self, keys: Sequence[BlockKey]) -> dict[str, int]:
        """How many leading keys the live shards of each node hold together."""
        masks: dict[str, int] = {}
        for _, shard in self._live():
            masks[shard.node_id] = masks.get(shard.node_id, 0) | 1 << shard.bit
        holders = self._holders(keys)
        lengths = {}
        for node_id, mask in masks.items():
            missing = (i for i, bits in enumerate(holders) if not bits & mask)
            lengths[node_id] = next(missing, len(holders))
        return lengths

    def keys_of(self, shard_id: str) -> set[BlockKey]:
        """What the map believes a shard to hold."""
        shard = self._shards.get(shard_id)
        if shard is None:
            return set()
        entries = self._table.entries()
        held = self._table.column("shards")[entries].astype(np.uint64) >> np.uint64(shard.bit)
        return {self._table.key_at(int(e)) for e in entries[(held & np.uint64(1)).astype(bool)]}

    def shards(self) -> dict[str, dict[str, object]]:
        """Shard id to node, epoch, sequence number, whether it is alive and fully known."""
        live = {shard_id for shard_id, _ in self._live()}
        return {
            shard_id: {
                "node_id": shard.node_id,
                "epoch": shard.epoch,
                "seq": shard.seq,
                "complete": shard.complete,
                "alive": shard_id in live,
            }
            for shard_id, shard in self._shards.items()
        }

    def remote_shards(self, node_id: str) -> int:
        """Live shards on other nodes."""
        return sum(shard.node_id != node_id for _, shard in self._live())

    def check_integrity(self) -> None:
        """AssertionError unless every key has a holder and every holder is known."""
        self._table.check_integrity()
        known = sum(1 << shard.bit for shard in self._shards.values())
        bits = [shard.bit for shard in self._shards.values()]
        assert len(set(bits)) == len(bits), "two shards share a bit"
        for entry in self._table.entries():
            holders = int(self._table.shards[int(entry)])  # type: ignore[attr-defined]
            assert holders, "a key without a holder"
            assert not holders & ~known, "an unknown holder"

    def _live(self) -> list[tuple[str, _Shard]]:
        oldest = self._clock() - self._member_timeout_s
        return [(name, s) for name, s in self._shards.items() if s.last_seen >= oldest]

    def _drop_dead(self) -> None:
        live = {name for name, _ in self._live()}
        for name in [name for name in self._shards if name not in live]:
            self._clear(self._shards.pop(name).bit)

    def _holders(self, keys: Sequence[BlockKey]) -> list[int]:
        column = self._table.shards  # type: ignore[attr-defined]
        return [int(column[e]) if e >= 0 else 0 for e in self._table.find_many(keys).tolist()]

    def _add(self, bit: int, keys: Sequence[BlockKey]) -> None:
        mask = 1 << bit
        for key in keys:
            entry = self._table.find(key)
            if entry < 0:
                entry = self._table.insert(key)
            self._table.shards[entry] |= mask  # type: ignore[attr-defined]

    def _remove(self, bit: int, keys: Iterable[BlockKey]) -> None:
        keep = ~(1 << bit)
        for key in keys:
            entry = self._table.find(key)
            if entry < 0:
                continue
            holders = self._table.shards[entry] & keep  # type: ignore[attr-defined]
            self._table.shards[entry] = holders  # type: ignore[attr-defined]
            if not holders:
                self._table.remove(key)

    def _clear(self, bit: int) -> None:
        entries = self._table.entries()
        held = self._table.column("shards")[entries].astype(np.uint64) >> np.uint64(bit)
        mine = entries[(held & np.uint64(1)).astype(bool)]
        self._remove(bit, [self._table.key_at(int(entry)) for entry in mine])
