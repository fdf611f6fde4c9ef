"""Filling: lease empty slots, publish what a client put into them."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError
from ..hashing import KEY_BYTES
from .key_dict import batches
from .protocol import PAGE_BYTES, CommitItem, CommitStatus, SlotRef
from .ram_tier import RamState
from .shard_parts import ShardParts

_MAX_NAMESPACE = 200


class Filling:
    """Answers `reserve` and `commit`.

    Args:
        parts: of the store.
        accepts_writes: False refuses `reserve`.
    """

    def __init__(self, parts: ShardParts, *, accepts_writes: bool) -> None:
        self._parts = parts
        self._accepts_writes = accepts_writes
        self._tiers = parts.tiers
        self._leases = parts.leases

    def reserve(self, client_id: int, block_bytes: int, n: int) -> list[SlotRef]:
        """See `ShardStore.reserve`."""
        if block_bytes <= 0 or block_bytes % PAGE_BYTES:
            raise ConfigError("block_bytes", block_bytes, f"a positive multiple of {PAGE_BYTES}")
        most = self._tiers.ram.arena.arena_bytes
        if block_bytes > most:
            # before anything is evicted for it in vain
            raise ConfigError(
                "block_bytes", block_bytes, f"at most the {most:,} bytes of the arena"
            )
        if n < 0:
            raise ConfigError("n", n, "zero or more")
        n = min(n, most // block_bytes)
        parts = self._parts
        parts.check_open()
        if self._accepts_writes and n:
            parts.growth.ensure(block_bytes // PAGE_BYTES, n)
        with parts.lock:
            client = parts.clients.get(client_id)
            if not self._accepts_writes or parts.closed:
                return []
            blocks = self._tiers.ram.allocate(block_bytes, n)
            self._tiers.ram.show_reserved(blocks)
            for block in blocks:
                self._leases.give(client, block)
        if len(blocks) < n:
            parts.metrics.inc("litecache_drops", n - len(blocks), reason="no_slot")
        return [SlotRef(block.slot, block.generation) for block in blocks]

    def commit(self, client_id: int, items: Sequence[CommitItem]) -> list[CommitStatus]:
        """See `ShardStore.commit`."""
        _check(items)
        statuses: list[CommitStatus] = []
        for batch in batches(items):
            statuses += self._commit(client_id, batch)
        self._parts.io.drain()
        return statuses

    def _commit(self, client_id: int, items: Sequence[CommitItem]) -> list[CommitStatus]:
        statuses: list[CommitStatus] = []
        parts, tiers = self._parts, self._tiers
        with parts.lock:
            client = parts.clients.get(client_id)
            there = dict(zip((keys := [i[2] for i in items]), tiers.find(keys), strict=True))
            # what is stored here and now is young anyway: its parents and old blocks were used
            used: list[int] = []
            for slot, generation, key, parent, namespace in items:
                held = tiers.ram.by_slot.get(slot)
                reserved = held is not None and held.state is RamState.RESERVED and not held.dead
                block = self._leases.end(client, slot, generation) if reserved else None
                if block is None:
                    statuses.append(CommitStatus.STALE)
                    continue
                known = there[key]
                if known >= 0:
                    self._leases.abandon(block)
                    tiers.consider_again(known)
                    used.append(known)
                    statuses.append(CommitStatus.EXISTS)
                    continue
                if parent not in there and (before := tiers.index.find(parent)) >= 0:
                    used.append(before)
                there[key] = tiers.publish(block, key, parent, namespace)
                statuses.append(CommitStatus.STORED)
            tiers.touch(used)
            if tiers.writes:
                parts.io.kick()
            parts.changed.notify_all()
        return statuses


def _check(items: Sequence[CommitItem]) -> None:
    for item in items:
        if len(item[2]) != KEY_BYTES or len(item[3]) != KEY_BYTES:
            raise ConfigError("key", item[2:4], f"{KEY_BYTES} bytes each for key and parent")
        if len(item[4]) > _MAX_NAMESPACE:
            raise ConfigError("namespace", item[4], f"at most {_MAX_NAMESPACE} characters")
