"""Which shards hold which blocks, as the shards last reported it.

The coordinator's only big state, and a soft one: wrong entries cost a miss, never a wrong block.
Each key takes its place in a `KeyDict` and a set of shards, one number for all keys that the same
shards hold. Every call does bounded work: what a shard held is forgotten by giving it another bit,
and its old bit leaves the sets a few thousand keys at a time, with the calls that follow.

A shard reports from a thread that sleeps until keys change or the next heartbeat is due. Messages
carry its epoch and a sequence number; when the coordinator does not know what came before (it
restarted, a message was lost) everything is sent again. Without a coordinator nothing else stops.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from litecache.actors.naming import MEMBER_TIMEOUT_S, REPORT_INTERVAL_S
from litecache.errors import LiteCacheError
from litecache.hashing import BlockKey
from litecache.storage.key_dict import BATCH_KEYS, KeyDict, join_keys, split_keys
from litecache.storage.protocol import Deltas
from litecache.threads import start_service

if TYPE_CHECKING:
    from litecache.storage.shard_store import ShardStore

MAX_SHARDS = 64
# Changes are collected for this long: one message per burst of commits.
_COLLECT_S = 0.05

logger = logging.getLogger(__name__)


class LocationReport(NamedTuple):
    """What a shard says of its keys, and that it is alive.

    Attributes:
        shard_id, node_id, epoch: who and where it is, and in which life.
        seq: of this message; each follows the last, and a resync says which one it follows.
        added, removed: changes of its keys; with a resync all of its keys, in parts.
        part: of a resync, from 0; -1: only what has changed.
        last: the last part of a resync.
    """

    shard_id: str
    node_id: str
    epoch: int
    seq: int
    added: Sequence[BlockKey]
    removed: Sequence[BlockKey] = ()
    part: int = -1
    last: bool = False

    def packed(self) -> tuple[Any, ...]:
        """With keys as byte strings, as it travels."""
        return self._replace(added=join_keys(self.added), removed=join_keys(self.removed))  # type: ignore[arg-type]

    @classmethod
    def unpacked(cls, *fields: Any) -> LocationReport:
        """The inverse of `packed`."""
        report = cls(*fields)
        added, removed = split_keys(fields[4]), split_keys(fields[5])
        return report._replace(added=added, removed=removed)


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

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._holders = KeyDict()
        self._sets: dict[int, int] = {}
        # bits of shards that have gone: those to be taken out of the sets once the present round
        # is over, those being taken out, and what is left of that round
        self._gone = self._leaving = 0
        self._round: Iterator[BlockKey] = iter(())
        self._shards: dict[str, _Shard] = {}
        self._clock = clock

    def __len__(self) -> int:
        return len(self._holders)

    def report(self, report: LocationReport) -> bool:
        """Apply one message of a shard, once, and take it for alive.

        Returns:
            False when nothing was applied: changes do not follow what is known, so that the shard
            has to send all its keys; or a resync is not taken, because there are `MAX_SHARDS`
            shards already (part 0: its blocks stay local) or because another one overtook it.
        """
        if report.part == 0 and not self._begin_resync(report):
            return False
        resync = report.part >= 0
        shard = self._shards.get(report.shard_id)
        if shard is None or shard.epoch != report.epoch or shard.complete == resync:
            return False
        if not resync and report.seq - shard.seq not in (0, 1):
            return False
        shard.last_seen = self._clock()
        if resync:
            shard.complete = report.last
        elif report.seq == shard.seq:  # the answer to it was lost
            return True
        else:
            shard.node_id, shard.seq = report.node_id, report.seq
        self.forget()
        self._take_out(1 << shard.bit, report.removed)
        self._add(shard.bit, report.added)
        return True

    def _begin_resync(self, report: LocationReport) -> bool:
        """Forget what a shard held; its keys follow, and message `seq + 1` after them."""
        known = self._shards.pop(report.shard_id, None)
        gone = [known] if known is not None else self._drop_dead()
        self._gone |= sum(1 << shard.bit for shard in gone)
        if len(self._shards) >= MAX_SHARDS:
            return False
        free = ~self._bits()
        bit = (free & -free).bit_length() - 1
        fields = report.node_id, report.epoch, report.seq
        self._shards[report.shard_id] = _Shard(bit, *fields, False, self._clock())
        return True

    def _bits(self) -> int:
        """Those of all shards, also of those that have gone and still stand in some set."""
        return sum(1 << s.bit for s in self._shards.values()) | self._gone | self._leaving

    def forget(self, at_most: int = BATCH_KEYS) -> bool:
        """Take bits of shards that have gone out of the sets of some keys; False = all is done."""
        if not self._leaving:
            if not self._gone:
                return False
            self._leaving, self._gone = self._gone, 0
            self._round = (key for part in self._holders.dicts for key in list(part))
        keys = list(islice(self._round, at_most))
        self._take_out(self._leaving, keys)
        if len(keys) < at_most:
            self._leaving = 0
            self._sets.clear()
        return True

    def locate(self, keys: Sequence[BlockKey], exclude_node: str = "") -> list[str | None]:
        """For each key one live shard that holds it, not on `exclude_node`; None where none."""
        bits = {
            shard.bit: shard_id for shard_id, shard in self._live() if shard.node_id != exclude_node
        }
        wanted = sum(1 << bit for bit in bits)
        found: list[str | None] = []
        previous = -1
        for holders in self._holders.get_many(keys, 0):
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
        holders = self._holders.get_many(keys, 0)
        lengths = {}
        for node_id, mask in masks.items():
            missing = (i for i, bits in enumerate(holders) if not bits & mask)
            lengths[node_id] = next(missing, len(holders))
        return lengths

    def keys_of(self, shard_id: str) -> set[BlockKey]:
        """What the map believes a shard to hold."""
        shard = self._shards.get(shard_id)
        mine = 0 if shard is None else 1 << shard.bit
        return {key for part in self._holders.dicts for key in part if part[key] & mine}

    def shards(self) -> dict[str, dict[str, object]]:
        """Shard id to node, epoch, sequence number, whether it is alive and fully known."""
        live = dict(self._live())
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
        known, bits = self._bits(), {shard.bit for shard in self._shards.values()}
        assert len(bits) == len(self._shards), "two shards share a bit"
        gone = self._gone | self._leaving
        assert not any(gone >> bit & 1 for bit in bits), "a shard has the bit of one that has gone"
        for part in self._holders.dicts:
            for holders in part.values():
                assert holders, "a key without a holder"
                assert not holders & ~known, "an unknown holder"

    def _live(self) -> list[tuple[str, _Shard]]:
        oldest = self._clock() - MEMBER_TIMEOUT_S
        return [(name, s) for name, s in self._shards.items() if s.last_seen >= oldest]

    def _drop_dead(self) -> list[_Shard]:
        dead = self._shards.keys() - dict(self._live()).keys()
        return [self._shards.pop(name) for name in dead]

    def _add(self, bit: int, keys: Sequence[BlockKey]) -> None:
        parts, sets, mine = self._holders.parts, self._sets, 1 << bit
        for key in keys:
            part = parts[key[-1]]
            holders = part.get(key, 0) | mine
            part[key] = sets.setdefault(holders, holders)

    def _take_out(self, bits: int, keys: Iterable[BlockKey]) -> None:
        parts, sets = self._holders.parts, self._sets
        for key in keys:
            part = parts[key[-1]]
            holders = part.get(key, 0)
            left = holders & ~bits
            if left:
                part[key] = sets.setdefault(left, left)
            elif holders:
                del part[key]


class LocationReporter:
    """Reports one shard from a thread of its own, by `send` (see `LocationMap.report`)."""

    def __init__(
        self,
        store: ShardStore,
        send: Callable[[LocationReport], bool],
        shard_id: str,
        node_id: str,
        interval_s: float = REPORT_INTERVAL_S,
    ) -> None:
        self._store, self._send = store, send
        self._shard_id, self._node_id = shard_id, node_id
        self._interval_s = interval_s
        self._unsent: Deltas | None = None
        self._changed = threading.Event()
        self._stopped = threading.Event()
        self._thread = start_service(self._run, "location-report")

    def notify(self) -> None:
        """Keys may have changed: report soon."""
        self._changed.set()

    def close(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        self._changed.set()
        self._thread.join()

    def report(self) -> None:
        """Send what changed, or everything where the coordinator asks for it.

        Raises:
            LiteCacheError: the coordinator does not answer; the next report repairs it.
        """
        more = True
        while more:
            # A message whose answer was lost is sent again: a resync of a large shard is dear.
            deltas = self._unsent = self._unsent or self._store.drain_deltas()
            report = LocationReport(self._shard_id, self._node_id, *deltas[:4])
            more = deltas.more
            if (deltas.resync or not self._send(report)) and not self._send_all(report):
                return
            self._unsent = None

    def _send_all(self, report: LocationReport) -> bool:
        """Send all keys, in parts; False when they are not taken."""
        # Keys that change from here on are in the next deltas, too; applying them twice is right.
        keys = self._store.keys()
        for part, start in enumerate(range(0, max(1, len(keys)), BATCH_KEYS)):
            some, last = keys[start : start + BATCH_KEYS], start + BATCH_KEYS >= len(keys)
            if not self._send(report._replace(added=some, removed=(), part=part, last=last)):
                if part == 0:
                    self._unsent = None
                    logger.warning(
                        "%s: the coordinator follows no more shards; other nodes cannot use its "
                        "blocks",
                        self._shard_id,
                    )
                return False
        return True

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.report()
            except LiteCacheError as error:
                logger.info("%s: not reported: %s", self._shard_id, error)
            if self._changed.wait(self._interval_s):
                self._stopped.wait(_COLLECT_S)
                self._changed.clear()
