"""Which replica of the model a request goes to.

The one whose load, in tokens, and what it would have to compute of the prompt add up to least. A
prefix counts where earlier requests with it were sent, as far as the pool of that replica goes
back (what lies in it is not reported, but it is there), and less where the shards of the
replica's node hold it, because it has to be loaded. Where no prefix matters this is the replica
with the least work in front of it.

What another replica's pool holds, and no shard, can be had, too: that one is asked to save it ahead
of all else (`Placement.holder`), and on the same node it is then loaded from RAM. So a prefix that
is asked for more than one replica can answer is copied to a second one, and not computed there.

Load is what a replica last reported and what was sent to it since, less what replicas compute in
such a time. A replica whose process ends itself says why before; one that a driver found silent is
no longer chosen. Both are chosen again from their next report on.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from litecache.actors.naming import MEMBER_TIMEOUT_S, REPORT_INTERVAL_S
from litecache.hashing import BlockKey

# A token that need not be computed outweighs so many that wait: whoever computes a prefix a second
# time makes all later requests wait, too; who loads one does not. With 1, a real trace finds 0.87
# to 0.92 of what one large cache finds, with 4, 0.97 to 0.98 (scripts/bench_routing.py).
REUSE_WORTH = 4
# What it takes to load a token from RAM or disk, in tokens that could be computed meanwhile.
LOAD_COST = 0.3
# The same for one that another replica of the node must save first.
MOVE_COST = 0.4
# An open request slows the others down by its decoding, and waits for one of them where all rows
# are taken.
ROW_TOKENS, WAITING_TOKENS = 16, 4096
# Keys remembered of all replicas together, about 200 bytes each.
MAX_REMEMBERED_KEYS = 1 << 19
# Failures of a replica are remembered for so long, and no more of them.
FAILURE_WINDOW_S, _FAILURES = 600.0, 64
# So soon the replicas' speed is forgotten by half.
_SPEED_HALF_LIFE_S = 60.0


class ReplicaLoad(NamedTuple):
    """What a replica has to do, as it reports it.

    Attributes:
        queued_tokens: of prompts, still to be computed.
        requests: that have not ended, running or waiting.
        rows: requests that may run at once; 0 = any number.
        pool_blocks: that its pool holds; 0 = any number.
        epoch: of its life; another one has an empty pool.
    """

    queued_tokens: int = 0
    requests: int = 0
    rows: int = 0
    pool_blocks: int = 0
    epoch: str = ""


class RoutedPrompt(NamedTuple):
    """What the choice of a replica depends on.

    Attributes:
        keys: of its whole blocks.
        num_tokens: of the prompt.
        leaves_blocks: others may find what it computes.
    """

    keys: Sequence[BlockKey]
    num_tokens: int
    leaves_blocks: bool = True


class Placement(NamedTuple):
    """Where a prompt goes.

    Attributes:
        replica: its index.
        holder: the replica whose pool holds more of the prompt than the chosen one can find by
            itself, and is to be asked for it; None = there is none.
        num_keys: how many leading keys the holder holds.
        same_node: the holder's shards are the chosen one's.
    """

    replica: int
    holder: int | None = None
    num_keys: int = 0
    same_node: bool = False


@dataclass
class _Replica:
    """A replica that reports.

    Attributes:
        silent: it did not answer somebody, and has not reported since.
        sent_tokens, sent_requests: to be computed, given to it since it reported.
        given_tokens: to be computed, given to it in all.
        turn: of the last request that it was given.
        pool: keys that requests left there, the one that will be forgotten first in front, and
            `given_tokens` by when they will have been computed.
    """

    node_id: str
    load: ReplicaLoad
    last_seen: float
    silent: bool = False
    sent_tokens: float = 0.0
    sent_requests: int = 0
    given_tokens: float = 0.0
    turn: int = -1
    pool: OrderedDict[BlockKey, float] = field(default_factory=OrderedDict)


class Router:
    """Chooses replicas; remembers where prefixes went.

    Args:
        block_size: tokens of a key.
        clock: monotonic seconds.
    """

    def __init__(
        self, block_size: int = 16, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._block_size = block_size
        self._replicas: dict[int, _Replica] = {}
        self._failures: defaultdict[int, deque[tuple[float, str]]]
        self._failures = defaultdict(lambda: deque(maxlen=_FAILURES))
        # of the busiest replica, and when that was
        self._tokens_per_s, self._speed_at = 0.0, 0.0
        self._turn = 0
        self._clock = clock

    def report(self, index: int, node_id: str, load: ReplicaLoad) -> None:
        """Take a replica for alive, with so much to do."""
        now = self._clock()
        known = self._replicas.get(index)
        if known is None or (known.node_id, known.load.epoch) != (node_id, load.epoch):
            self._replicas[index] = _Replica(node_id, load, now)
            return
        if now - known.last_seen >= REPORT_INTERVAL_S / 2:  # over less, a step's end makes it wild
            done = known.load.queued_tokens + known.sent_tokens - load.queued_tokens
            self._note_speed(done / (now - known.last_seen), now)
        known.load, known.last_seen, known.silent = load, now, False
        known.sent_tokens, known.sent_requests = 0.0, 0

    def note_failure(self, index: int, reason: str) -> None:
        """A replica's process is about to end itself: it gets no requests until it reports."""
        self._replicas.pop(index, None)
        self._failures[index].append((self._clock(), reason))

    def forget(self, index: int) -> None:
        """A replica is to go: it gets no requests, unless it reports again."""
        self._replicas.pop(index, None)

    def note_silence(self, index: int, silent_s: float) -> None:
        """Somebody has had no answer from a replica for so long.

        It gets no requests until it reports, unless it has reported in that time: then it does not
        answer that one alone.
        """
        replica = self._replicas.get(index)
        if replica is not None and replica.last_seen < self._clock() - silent_s:
            replica.silent = True

    def failures(self, index: int) -> list[str]:
        """Why a replica's process ended itself lately, the last reason last."""
        oldest = self._clock() - FAILURE_WINDOW_S
        return [reason for at, reason in self._failures[index] if at >= oldest]

    def place(
        self,
        prompt: RoutedPrompt,
        prefix_by_node: Mapping[str, int],
        *,
        avoid: Iterable[int] = (),
    ) -> Placement | None:
        """Choose a replica for a prompt; remember it where the prompt leaves blocks.

        Args:
            prompt: what is to be computed.
            prefix_by_node: how many of its leading keys each node's shards hold.
            avoid: replicas that are not to be chosen.

        Returns:
            Where it goes; None: no such replica is known to be alive.
        """
        now = self._clock()
        speed = self._speed(now)
        avoided = set(avoid)
        able = {
            index: replica
            for index, replica in self._replicas.items()
            if index not in avoided and self._is_live(replica)
        }
        in_pool = {index: _held(r.pool, prompt.keys) for index, r in able.items()}
        ready = {i: self._computed(r, in_pool[i], prompt, speed, now) for i, r in able.items()}
        best: tuple[float, int, int, float, Placement] | None = None
        for index, replica in able.items():
            in_node = max(in_pool[index], prefix_by_node.get(replica.node_id, 0))
            placed = self._with_holder(index, in_node, ready, prefix_by_node)
            pooled, found = (self._reusable(n, prompt) for n in (in_pool[index], in_node))
            moved = self._reusable(placed.num_keys, prompt) - found if placed.same_node else 0
            computed = prompt.num_tokens - found - moved
            loading = LOAD_COST * (found - pooled) + MOVE_COST * moved
            load = _waiting_tokens(replica, speed * (now - replica.last_seen))
            rank = (
                *(load + REUSE_WORTH * computed + loading, replica.turn, index),
                *(computed + loading, placed),
            )
            best = rank if best is None else min(best, rank)
        if best is None:
            return None
        *_, work, placed = best
        replica = self._replicas[placed.replica]
        replica.sent_tokens += work
        replica.given_tokens += work
        replica.sent_requests += 1
        replica.turn, self._turn = self._turn, self._turn + 1
        if prompt.leaves_blocks:
            self._remember(replica, prompt.keys)
        return placed

    def _computed(
        self, replica: _Replica, held: int, prompt: RoutedPrompt, speed: float, now: float
    ) -> int:
        """How many of the keys that went to a replica are computed there by now, as it seems."""
        waiting = _queued_tokens(replica, speed * (now - replica.last_seen))
        done, pool = replica.given_tokens - waiting, replica.pool
        return bisect_left(range(held), True, key=lambda at: pool[prompt.keys[at]] > done)

    def _with_holder(
        self, index: int, found: int, ready: Mapping[int, int], prefix_by_node: Mapping[str, int]
    ) -> Placement:
        """A placement, and who has more of the prompt than the `found` keys there, if anybody."""
        node = self._replicas[index].node_id
        others = [other for other in ready if other != index and ready[other] > found]
        if not others:
            return Placement(index)
        # of its own node before any other, of those the one that has most
        holder = max(others, key=lambda o: (self._replicas[o].node_id == node, ready[o]))
        same_node = self._replicas[holder].node_id == node
        if not same_node and max(prefix_by_node.values(), default=0) >= ready[holder]:
            return Placement(index)  # it finds that by itself
        return Placement(index, holder, ready[holder], same_node)

    def replicas(self) -> dict[int, dict[str, object]]:
        """Replica index to node, load in tokens, open requests and whether it is alive."""
        now = self._clock()
        speed = self._speed(now)
        return {
            index: {
                "node_id": r.node_id,
                "load": round(_waiting_tokens(r, speed * (now - r.last_seen))),
                "requests": r.load.requests + r.sent_requests,
                "alive": self._is_live(r),
            }
            for index, r in self._replicas.items()
        }

    def _is_live(self, replica: _Replica) -> bool:
        return not replica.silent and replica.last_seen >= self._clock() - MEMBER_TIMEOUT_S

    def _reusable(self, num_keys: int, prompt: RoutedPrompt) -> int:
        """Tokens of so many keys; the last token of a prompt is always computed."""
        return max(0, min(num_keys * self._block_size, prompt.num_tokens - 1))

    def _note_speed(self, tokens_per_s: float, now: float) -> None:
        if tokens_per_s >= self._speed(now):
            self._tokens_per_s, self._speed_at = tokens_per_s, now

    def _speed(self, now: float) -> float:
        return float(self._tokens_per_s * 0.5 ** ((now - self._speed_at) / _SPEED_HALF_LIFE_S))

    def _remember(self, replica: _Replica, keys: Sequence[BlockKey]) -> None:
        most = max(1, MAX_REMEMBERED_KEYS // len(self._replicas))
        most = min(most, replica.load.pool_blocks or most)
        pool = replica.pool
        # Tail first, so that the head of a chain is the last to be forgotten.
        for key in reversed(keys[:most]):
            pool.setdefault(key, replica.given_tokens)
            pool.move_to_end(key)
        while len(pool) > most:
            pool.popitem(last=False)


def _held(pool: Mapping[BlockKey, float], keys: Sequence[BlockKey]) -> int:
    """How many leading keys are in a pool, where heads are forgotten after their tails."""
    return bisect_left(range(len(keys)), True, key=lambda at: keys[at] not in pool)


def _queued_tokens(replica: _Replica, done_tokens: float) -> float:
    """Tokens that are still to be computed."""
    return max(0.0, replica.load.queued_tokens + replica.sent_tokens - done_tokens)


def _waiting_tokens(replica: _Replica, done_tokens: float) -> float:
    """What a new request finds in front of it, in tokens to be computed."""
    load = replica.load
    requests = load.requests + replica.sent_requests
    queued = _queued_tokens(replica, done_tokens)
    waiting = max(0, requests + 1 - load.rows) if load.rows else 0
    return queued + ROW_TOKENS * requests + WAITING_TOKENS * waiting
