"""The shards of one node, as the transfer uses them: who gets a run, who holds a key."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from litecache.hashing import BlockKey
from litecache.metrics import Metrics
from litecache.storage.client import PendingStage, ShardClient
from litecache.storage.protocol import ALL_KEYS, SlotRef, SlotState, StageResult, StageStatus
from litecache.types import Tier

logger = logging.getLogger(__name__)

Numbers = npt.NDArray[np.int64]
UNREAD = -2
# a NamedTuple's own constructor takes three times as long
_slot_ref = partial(tuple.__new__, SlotRef)


class RemoteSource(Protocol):
    """Blocks on other nodes, found through the coordinator."""

    def locate(self, keys: Sequence[BlockKey]) -> list[str | None]:
        """Per key, the id of a remote shard that should hold it."""
        ...

    def fetch(self, shard_id: str, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Per key, the block's bytes; None = a miss."""
        ...


class Origin(NamedTuple):
    """A tier of a shard; `shard` is None for one of another node, `name` is "tier:shard"."""

    name: str
    tier: Tier
    shard_id: str
    shard: ShardClient | None


class Leases(NamedTuple):
    """What has been found below of keys, in columns.

    Attributes:
        asked: keys, these leases' among them.
        places: of the leases' keys in `asked`, int64 `[n]`.
        origins: number of each one's origin in `of`, int64 `[n]`; -1 = nobody has it, `UNREAD` = a
            disk that was not to be read.
        slots: of local shards, int64 `[n]`; -1 = none.
        generations: of the slots, uint64 `[n]`.
        of: the origins.
    """

    asked: list[BlockKey]
    places: Numbers
    origins: Numbers
    slots: Numbers
    generations: npt.NDArray[np.uint64]
    of: tuple[Origin, ...]

    @classmethod
    def none(cls, keys: Sequence[BlockKey]) -> Leases:
        """Nobody has them."""
        nothing = np.full(len(keys), -1, dtype=np.int64)
        places, generations = np.arange(len(keys)), np.zeros(len(keys), np.uint64)
        return cls(list(keys), places, nothing, nothing.copy(), generations, ())

    @property
    def keys(self) -> list[BlockKey]:
        """Of the blocks."""
        return [*map(self.asked.__getitem__, self.places.tolist())]

    def part(self, places: Numbers) -> Leases:
        """Those at some places, in their order."""
        return Leases(
            self.asked,
            self.places[places],
            self.origins[places],
            self.slots[places],
            self.generations[places],
            self.of,
        )

    def and_more(self, more: Leases) -> Leases:
        """These, and more behind them."""
        of = tuple(dict.fromkeys((*self.of, *more.of)))
        numbers = [np.array([*map(of.index, one.of), -1])[one.origins] for one in (self, more)]
        return Leases(
            self.asked + more.asked,
            np.concatenate((self.places, more.places + len(self.asked))),
            np.concatenate(numbers),
            np.concatenate((self.slots, more.slots)),
            np.concatenate((self.generations, more.generations)),
            of,
        )

    def by_shard(self) -> list[tuple[str, ShardClient | None, Numbers]]:
        """Shards, and the places of what was found on each."""
        shards = list(dict.fromkeys((origin.shard_id, origin.shard) for origin in self.of))
        numbers = [shards.index((origin.shard_id, origin.shard)) for origin in self.of]
        of_each = np.array([*numbers, -1])[self.origins]
        parts = ((*shard, np.flatnonzero(of_each == n)) for n, shard in enumerate(shards))
        return [part for part in parts if len(part[2])]

    def tiers(self) -> set[Tier]:
        """Where they were found."""
        return {self.of[origin].tier for origin in np.unique(self.origins).tolist() if origin >= 0}


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
        there = [shard for shard in self._shards if not shard.lost]
        if len(there) < 2:
            return there[0] if there else None
        return max(
            there, key=lambda shard: hashlib.blake2b(run_key + shard.shard_id.encode()).digest()
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

    def stage(self, keys: Sequence[BlockKey], reads: int = ALL_KEYS) -> Leases:
        """Lease every block that some shard has, one lease per key; of keys behind the first
        `reads` what is in RAM."""
        leases = Leases.none(keys)
        busy, unread = np.zeros((2, len(keys)), dtype=bool)
        spare: list[Leases] = []
        for shard, results in self._ask_all(keys, reads):
            count = len(results)
            fields = np.fromiter(chain.from_iterable(results), np.int64, 3 * count)
            statuses, slots, generations = fields.reshape(count, 3).T
            name, number = shard.shard_id, len(leases.of)
            of = tuple(Origin(f"{t.value}:{name}", t, name, shard) for t in (Tier.RAM, Tier.DISK))
            leases = leases._replace(of=leases.of + of)
            ready = statuses == StageStatus.READY
            found = ready | (statuses == StageStatus.LOADING)
            busy |= statuses == StageStatus.BUSY
            unread |= statuses == StageStatus.ON_DISK
            # those of disks have odd numbers
            better = found & ((leases.origins < 0) | (ready & (leases.origins % 2 == 1)))
            mine = leases._replace(
                origins=np.where(ready, number, number + 1),
                slots=slots,
                generations=generations.astype(np.uint64),
            )
            spare.append(mine.part(np.flatnonzero(found & ~better)))
            spare.append(leases.part(np.flatnonzero(better & (leases.origins >= 0))))
            for column, other in zip(leases[2:5], mine[2:5], strict=True):
                column[better] = other[better]
        for one in spare:
            self.give_back(one)
        leases.origins[unread & (leases.origins < 0)] = UNREAD
        leases = self._ask_remote(leases)
        missed = leases.origins == -1
        for reason, which in (("busy", missed & busy), ("absent", missed & ~busy)):
            if which.any():
                times = int(which.sum())
                self._metrics.inc("litecache_misses", times, tier="shard", reason=reason)
        return leases

    def fetch(self, leases: Leases) -> list[bytes | None]:
        """Bytes of blocks on one remote shard."""
        if self._remote is None or not len(leases.places):
            return [None] * len(leases.places)
        shard_id = leases.of[int(leases.origins[0])].shard_id
        try:
            return self._remote.fetch(shard_id, leases.keys)
        except Exception as error:
            self._note("fetch", shard_id, error)
            return [None] * len(leases.places)

    def give_back(self, leases: Leases) -> None:
        """End leases: reads that have not begun are cancelled, the rest is released."""
        for shard_id, shard, places in leases.by_shard():
            if shard is None:
                continue
            try:
                states = shard.arena.states(leases.slots[places], leases.generations[places])
                loading = np.flatnonzero(states == SlotState.LOADING)
                if len(loading):
                    ended = np.array(shard.cancel(leases.part(places[loading]).keys), dtype=bool)
                    places = np.delete(places, loading[ended])
                if len(places):
                    pairs = (leases.slots[places].tolist(), leases.generations[places].tolist())
                    shard.release(list(map(_slot_ref, zip(*pairs, strict=True))))
            except Exception as error:
                self._note("release", shard_id, error)

    def _ask_all(
        self, keys: Sequence[BlockKey], reads: int
    ) -> list[tuple[ShardClient, list[StageResult]]]:
        """Every shard's answer; all are asked before the first is waited for."""
        asked: list[tuple[ShardClient, PendingStage]] = []
        answers: list[tuple[ShardClient, list[StageResult]]] = []
        for shard in self._shards:
            try:
                asked.append((shard, shard.stage_async(keys, reads=reads)))
            except Exception as error:
                self._note("stage", shard.shard_id, error)
        for shard, pending in asked:
            try:
                answers.append((shard, pending.result()))
            except Exception as error:
                self._note("stage", shard.shard_id, error)
        return answers

    def _ask_remote(self, leases: Leases) -> Leases:
        missing = np.flatnonzero(leases.origins == -1)
        if self._remote is None or not len(missing):
            return leases
        try:
            places = self._remote.locate(leases.part(missing).keys)
        except Exception as error:
            self._note("locate", "coordinator", error)
            return leases
        local = {shard.shard_id for shard in self._shards}
        of = dict.fromkeys(leases.of)
        for place, shard_id in zip(missing.tolist(), places, strict=True):
            if shard_id is not None and shard_id not in local:
                tier = Tier.REMOTE
                origin = Origin(f"{tier.value}:{shard_id}", tier, shard_id, None)
                of.setdefault(origin)
                leases.origins[place] = list(of).index(origin)
        return leases._replace(of=tuple(of))

    def _note(self, call: str, shard_id: str, error: Exception) -> None:
        # A shard that fails is a miss, whatever the failure: the request computes instead.
        self._metrics.inc("litecache_shard_errors", call=call, kind=type(error).__name__)
        logger.warning("%s on shard %s failed: %s: %s", call, shard_id, type(error).__name__, error)
