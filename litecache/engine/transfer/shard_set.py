"""The shards of one node, as the transfer uses them: who gets a run, who holds a key."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from litecache.hashing import BlockKey
from litecache.metrics import Metrics
from litecache.storage.client import PendingStage, ShardClient
from litecache.storage.protocol import SlotRef, SlotState, StageResult, StageStatus
from litecache.types import Tier

logger = logging.getLogger(__name__)


class RemoteSource(Protocol):
    """Blocks on other nodes, found through the coordinator."""

    def locate(self, keys: Sequence[BlockKey]) -> list[str | None]:
        """Per key, the id of a remote shard that should hold it."""
        ...

    def fetch(self, shard_id: str, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Per key, the block's bytes; None = a miss."""
        ...


class Lease(NamedTuple):
    """A block found below: in a slot of a local shard, or (slot None) on a remote one.

    `source` is "tier:shard".
    """

    key: BlockKey
    tier: Tier
    shard_id: str
    shard: ShardClient | None
    slot: SlotRef | None
    source: str


class ShardSet:
    """Local shards, asked all at once.

    Args:
        shards: clients of the shards on this node.
        remote: asked for what no local shard has; None = nobody.
        metrics: counts misses by tier and reason.
    """

    def __init__(
        self, shards: Sequence[ShardClient], remote: RemoteSource | None, metrics: Metrics
    ) -> None:
        self._shards = list(shards)
        self._remote = remote
        self._metrics = metrics

    @property
    def shards(self) -> list[ShardClient]:
        """The local shards."""
        return list(self._shards)

    def replace(self, shards: Sequence[ShardClient]) -> None:
        """Ask these from now on; leases keep the client that gave them."""
        self._shards = list(shards)

    def choose(self, run_key: BlockKey) -> ShardClient | None:
        """The shard for a run of blocks, by rendezvous hash of the run's first key.

        A lost shard's runs go to the others: lookups ask all of them. None when all are lost.
        """
        return max(
            (shard for shard in self._shards if not shard.lost),
            key=lambda shard: hashlib.blake2b(run_key + shard.shard_id.encode()).digest(),
            default=None,
        )

    def query(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which keys some shard holds, be it another than `choose` names now."""
        held = [False] * len(keys)
        for shard in self._shards:
            missing = [position for position, there in enumerate(held) if not there]
            if shard.lost or not missing:
                continue
            try:
                answers = shard.query([keys[position] for position in missing])
            except Exception as error:
                self._note("query", shard.shard_id, error)
                continue
            for position, there in zip(missing, answers, strict=True):
                held[position] = there
        return held

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Tell every shard that blocks were used; what it does not hold it passes over."""
        for shard in self._shards if keys else ():
            try:
                shard.touch(keys)
            except Exception as error:
                self._note("touch", shard.shard_id, error)

    def stage(self, keys: Sequence[BlockKey]) -> list[Lease | None]:
        """Lease every block that some shard has; one lease per key."""
        answers = self._ask_all(keys)
        leases: list[Lease | None] = [None] * len(keys)
        reasons = ["absent"] * len(keys)
        spare: list[Lease] = []
        for shard, results in answers:
            shard_id = shard.shard_id
            ram, disk = (f"{tier.value}:{shard_id}" for tier in (Tier.RAM, Tier.DISK))
            for position, (status, slot, generation) in enumerate(results):
                if status is StageStatus.READY:
                    tier, source = Tier.RAM, ram
                elif status is StageStatus.LOADING:
                    tier, source = Tier.DISK, disk
                else:
                    if status is StageStatus.BUSY:
                        reasons[position] = "busy"
                    continue
                slot_ref = SlotRef(slot, generation)
                lease = Lease(keys[position], tier, shard_id, shard, slot_ref, source)
                other = leases[position]
                if other is None:
                    leases[position] = lease
                elif other.tier is Tier.DISK and tier is Tier.RAM:
                    leases[position] = lease
                    spare.append(other)
                else:
                    spare.append(lease)
        self.give_back(spare)
        self._ask_remote(keys, leases)
        missed = Counter(
            reason for found, reason in zip(leases, reasons, strict=True) if found is None
        )
        for reason, count in missed.items():
            self._metrics.inc("litecache_misses", count, tier="shard", reason=reason)
        return leases

    def fetch(self, leases: Sequence[Lease]) -> list[bytes | None]:
        """Bytes of blocks on one remote shard."""
        if self._remote is None or not leases:
            return [None] * len(leases)
        try:
            return self._remote.fetch(leases[0].shard_id, [lease.key for lease in leases])
        except Exception as error:
            self._note("fetch", leases[0].shard_id, error)
            return [None] * len(leases)

    def give_back(self, leases: Sequence[Lease]) -> None:
        """End leases: reads that have not begun are cancelled, the rest is released."""
        by_shard: dict[str, list[Lease]] = {}
        for lease in leases:
            if lease.shard is not None:
                by_shard.setdefault(lease.shard_id, []).append(lease)
        for shard_id, mine in by_shard.items():
            shard = mine[0].shard
            assert shard is not None
            try:
                loading = _still_loading(shard, mine)
                cancelled = shard.cancel([lease.key for lease in loading]) if loading else []
                gone = {id(le) for le, ended in zip(loading, cancelled, strict=True) if ended}
                rest = [le.slot for le in mine if id(le) not in gone and le.slot is not None]
                if rest:
                    shard.release(rest)
            except Exception as error:
                self._note("release", shard_id, error)

    def _ask_all(self, keys: Sequence[BlockKey]) -> list[tuple[ShardClient, list[StageResult]]]:
        """Every shard's answer; all are asked before the first is waited for."""
        asked: list[tuple[ShardClient, PendingStage]] = []
        answers: list[tuple[ShardClient, list[StageResult]]] = []
        for shard in self._shards:
            try:
                asked.append((shard, shard.stage_async(keys)))
            except Exception as error:
                self._note("stage", shard.shard_id, error)
        for shard, pending in asked:
            try:
                answers.append((shard, pending.result()))
            except Exception as error:
                self._note("stage", shard.shard_id, error)
        return answers

    def _ask_remote(self, keys: Sequence[BlockKey], leases: list[Lease | None]) -> None:
        missing = [position for position, lease in enumerate(leases) if lease is None]
        if self._remote is None or not missing:
            return
        try:
            places = self._remote.locate([keys[position] for position in missing])
        except Exception as error:
            self._note("locate", "coordinator", error)
            return
        local = {shard.shard_id for shard in self._shards}
        for position, shard_id in zip(missing, places, strict=True):
            if shard_id is not None and shard_id not in local:
                source = f"{Tier.REMOTE.value}:{shard_id}"
                leases[position] = Lease(keys[position], Tier.REMOTE, shard_id, None, None, source)

    def _note(self, call: str, shard_id: str, error: Exception) -> None:
        # A shard that fails is a miss, whatever the failure: the request computes instead.
        self._metrics.inc("litecache_shard_errors", call=call, kind=type(error).__name__)
        logger.warning("%s on shard %s failed: %s: %s", call, shard_id, type(error).__name__, error)


def _still_loading(shard: ShardClient, leases: Sequence[Lease]) -> list[Lease]:
    slots = [lease.slot for lease in leases if lease.slot is not None]
    numbers = np.fromiter([slot for slot, _ in slots], np.int64, len(slots))
    generations = np.fromiter([number for _, number in slots], np.uint64, len(slots))
    states = shard.arena.states(numbers, generations)
    return [leases[place] for place in np.flatnonzero(states == SlotState.LOADING).tolist()]
