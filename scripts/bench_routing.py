"""Routing of a real trace: the product's router against round robin and one large replica.

    python scripts/bench_routing.py ../shared/traces/conversation.jsonl [--replicas 4 16 64]
        [--pool-tokens 400000] [--node-tokens 800000] [--per-node 1] [--load 0.7] [--requests N]
        [--json FILE] [--quick]

A simulation in virtual time, of the real `Router` and `LocationMap`, fed as replicas and shards
feed them (a heartbeat every two seconds), and of plain models of the rest: a replica computes one
prompt at a time with the speeds of an H200 and an 8B model, loads from its node's shards what its
pool does not hold, and decodes beside that; pool and shards forget the least recently used. Any
file of the format of `bench_trace.py` does. Arrivals are compressed until the tokens that one
replica with the summed bytes would have to compute arrive at `--load` of what all replicas compute.

Exit status 1 where a line does not hold: no replica computes more than 1.2 times the mean (4
replicas; 16: 1.5; 64: printed, its largest session alone is nearly that), hits at least 0.95 of
those of one replica with the summed bytes, p90 of the first token below round robin's, and without
shared prefixes mean and p90 at most 1.02 of round robin's; a hot prefix that one of two replicas
has, at 1.4 times what one computes, is not computed again, and p90 is below that of one replica.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import Report, Row, parser
from trace_model import BLOCK_TOKENS, SPEEDS, Speeds, Turn, read_trace

from litecache.actors.locations import LocationMap, LocationReport
from litecache.actors.naming import REPORT_INTERVAL_S
from litecache.actors.router import ReplicaLoad, RoutedPrompt, Router

BALANCE = {4: 1.2, 16: 1.5}
"""At most so many times the mean of computed tokens, by number of replicas."""
HITS, UNSHARED = 0.95, 1.02
# Of the model's geometry: bytes of a token, and seconds of a step that decodes.
TOKEN_BYTES, DECODE_S = 131_072, 0.01
ROWS = 256
MACHINE = Speeds(*SPEEDS)

Key = bytes


class Held:
    """Blocks that are held, the least recently used forgotten first, a prompt's tail before its
    head."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._keys: OrderedDict[Key, None] = OrderedDict()

    def prefix(self, keys: Sequence[Key]) -> int:
        """How many leading keys are held."""
        return next((i for i, key in enumerate(keys) if key not in self._keys), len(keys))

    def add(self, keys: Sequence[Key]) -> tuple[list[Key], list[Key]]:
        """Use keys now; those that are new, and those that had to go."""
        added = [key for key in keys if key not in self._keys]
        for key in reversed(keys):
            self._keys[key] = None
            self._keys.move_to_end(key)
        gone = []
        while len(self._keys) > self._blocks:
            gone.append(self._keys.popitem(last=False)[0])
        left = set(gone)
        return [key for key in added if key not in left], gone


@dataclass(eq=False)
class Asked:
    """A request of the trace."""

    turn: Turn
    arrives_s: float
    keys: list[Key]
    answer_keys: list[Key]
    first_s: float = math.nan


@dataclass(eq=False)
class Replica:
    """Computes prompts one after the other; `until_s` and `work` are of the present one."""

    node: int
    pool: Held
    waiting: deque[Asked] = field(default_factory=deque)
    until_s: float = 0.0
    began_s: float = 0.0
    work: int = 0
    decoding: int = 0
    computed: int = 0
    hits: int = 0
    busy_s: float = 0.0

    def load(self, now: float, pool_blocks: int) -> ReplicaLoad:
        """As an engine reports it."""
        tokens = sum(
            max(1, each.turn.length - BLOCK_TOKENS * self.pool.prefix(each.keys))
            for each in self.waiting
        )
        busy = self.until_s > now
        if busy:
            tokens += round(self.work * (self.until_s - now) / (self.until_s - self.began_s))
        requests = len(self.waiting) + self.decoding + busy
        return ReplicaLoad(tokens, requests, ROWS, pool_blocks, "life")


@dataclass(frozen=True)
class Sizes:
    """Of a cluster: replicas, how many of them are on a node, and the blocks of pool and node."""

    replicas: int
    per_node: int
    pool: int
    node: int


class Cluster:
    """Replicas and shards in virtual time.

    Args:
        sizes: of it.
        routed: by the product's router, else in turn.
        saves: what is computed is saved to the shards by itself, and not only when the router has
            a replica asked for it.
    """

    def __init__(self, sizes: Sizes, *, routed: bool, saves: bool = True) -> None:
        self.sizes = sizes
        self._saves = saves
        self.now = 0.0
        nodes = math.ceil(sizes.replicas / sizes.per_node)
        self.nodes = [Held(sizes.node * sizes.per_node) for _ in range(nodes)]
        self.replicas = [
            Replica(i // sizes.per_node, Held(sizes.pool)) for i in range(sizes.replicas)
        ]
        self._routed = routed
        self._turns = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._open = 0
        self._router = Router(BLOCK_TOKENS, clock=lambda: self.now)
        self._located = LocationMap(clock=lambda: self.now)
        self._seqs = [0] * nodes

    def run(self, requests: Sequence[Asked]) -> None:
        """Until every request has ended."""
        self._open = len(requests)
        for each in requests:
            self._at(each.arrives_s, partial(self._arrive, each))
        if self._routed:
            for node in range(len(self.nodes)):
                joins = LocationReport(f"s{node}", f"n{node}", 1, 0, (), part=0, last=True)
                self._located.report(joins)
                self._heartbeat(node)
            for index in range(len(self.replicas)):
                self._report(index)
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            act()

    def _at(self, when_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), act))

    def _report(self, index: int) -> None:
        replica = self.replicas[index]
        load = replica.load(self.now, self.sizes.pool)
        self._router.report(index, f"n{replica.node}", load)
        if self._open:
            # replicas do not report all at one time
            share = (index + 1) / len(self.replicas) if self.now == 0 else 1
            self._at(self.now + share * REPORT_INTERVAL_S, partial(self._report, index))

    def _heartbeat(self, node: int) -> None:
        self._changed(node, (), ())
        if self._open:
            self._at(self.now + REPORT_INTERVAL_S, partial(self._heartbeat, node))

    def _changed(self, node: int, added: Sequence[Key], gone: Sequence[Key]) -> None:
        if self._routed:
            self._seqs[node] += 1
            report = LocationReport(f"s{node}", f"n{node}", 1, self._seqs[node], added, gone)
            assert self._located.report(report)

    def _save(self, node: int, keys: Sequence[Key]) -> None:
        self._changed(node, *self.nodes[node].add(keys))

    def _arrive(self, asked: Asked) -> None:
        index: int | None = next(self._turns) % len(self.replicas)
        if self._routed:
            prompt = RoutedPrompt(asked.keys, asked.turn.length)
            placed = self._router.place(prompt, self._located.prefix_by_node(asked.keys))
            assert placed is not None, "no replica is alive"
            index = placed.replica
            if placed.holder is not None and placed.same_node:
                self._save(self.replicas[index].node, asked.keys[: placed.num_keys])
        replica = self.replicas[index]
        replica.waiting.append(asked)
        self._begin(replica)

    def _begin(self, replica: Replica) -> None:
        if replica.until_s > self.now or not replica.waiting:
            return
        asked = replica.waiting.popleft()
        length = asked.turn.length
        in_pool = replica.pool.prefix(asked.keys)
        found = max(in_pool, self.nodes[replica.node].prefix(asked.keys))
        reused = min(found * BLOCK_TOKENS, length - 1)
        loaded = max(0, reused - in_pool * BLOCK_TOKENS) * TOKEN_BYTES
        spent_s = float(MACHINE.prefill_s(reused, length)) + loaded / MACHINE.copy
        replica.hits += reused
        replica.computed += length - reused
        replica.busy_s += spent_s
        replica.work = length - reused
        replica.began_s, replica.until_s = self.now, self.now + spent_s
        self._at(replica.until_s, partial(self._first_token, replica, asked))

    def _first_token(self, replica: Replica, asked: Asked) -> None:
        asked.first_s = self.now - asked.arrives_s
        self._open -= 1
        replica.pool.add([*asked.keys, *asked.answer_keys])
        if self._saves:
            self._save(replica.node, asked.keys)
        replica.decoding += 1
        self._at(self.now + asked.turn.answer * DECODE_S, partial(self._end, replica))
        self._begin(replica)

    def _end(self, replica: Replica) -> None:
        replica.decoding -= 1


def requests_of(turns: Sequence[Turn], span_s: float, *, shared: bool) -> list[Asked]:
    """Requests that arrive within so many seconds; without shared prefixes each has its own."""
    first, last = turns[0].time_s, turns[-1].time_s
    scale = span_s / max(1e-9, last - first)
    made = []
    for number, turn in enumerate(turns):
        own = "" if shared else number
        keys = [_key(block, own) for block in turn.ids[: turn.length // BLOCK_TOKENS]]
        answer = [_key(i, f"answer {number}") for i in range(-(-turn.answer // BLOCK_TOKENS))]
        made.append(Asked(turn, (turn.time_s - first) * scale, keys, answer))
    return made


def _key(block: int, own: object) -> Key:
    return hashlib.blake2b(f"{block} {own}".encode(), digest_size=16).digest()


def one_large(requests: Iterable[Asked], sizes: Sizes) -> tuple[int, float]:
    """Prompt tokens that one replica with the summed bytes finds, one request after the other, and
    the seconds that it computes."""
    pool = Held(sizes.pool * sizes.replicas)
    node = Held(sizes.node * sizes.replicas)
    hits, seconds = 0, 0.0
    for asked in requests:
        length = asked.turn.length
        found = max(pool.prefix(asked.keys), node.prefix(asked.keys))
        reused = min(found * BLOCK_TOKENS, length - 1)
        hits += reused
        seconds += float(MACHINE.prefill_s(reused, length))
        pool.add([*asked.keys, *asked.answer_keys])
        node.add(asked.keys)
    return hits, seconds


def replay(turns: Sequence[Turn], sizes: Sizes, load: float, *, shared: bool) -> dict[str, Any]:
    """Both ways of routing, and the hits of one large replica."""
    hits, seconds = one_large(requests_of(turns, 1.0, shared=shared), sizes)
    span_s = seconds / sizes.replicas / load
    found: dict[str, Any] = {"hits": hits, "span_s": span_s}
    for name in ("router", "round robin"):
        cluster = Cluster(sizes, routed=name == "router")
        requests = requests_of(turns, span_s, shared=shared)
        cluster.run(requests)
        found[name] = cluster, np.array([asked.first_s for asked in requests])
    return found


def hot_prefix(
    replicas: int, *, tokens: int = 8192, own: int = 512, count: int = 400, load: float = 1.4
) -> tuple[Cluster, float, int]:
    """Requests with one prefix, which only the pool of the first one's replica has, at `load` times
    what one replica computes.

    Returns:
        The cluster, the 90th percentile of the time to the first token, and the least that can be
        computed in all.
    """
    prefix = tuple(range(tokens // BLOCK_TOKENS))
    rng = np.random.default_rng(0)
    gaps = rng.exponential(float(MACHINE.prefill_s(tokens, tokens + own)) / load, count)
    times = 2.5 * REPORT_INTERVAL_S + np.cumsum(gaps)
    turns = [
        Turn(time_s, tokens + own, 1, (*prefix, *range(number << 20, (number << 20) + own)))
        for number, time_s in enumerate([0.0, *times.tolist()], start=1)
    ]
    requests = requests_of(turns, turns[-1].time_s, shared=True)
    cluster = Cluster(Sizes(replicas, replicas, 1 << 20, 1 << 20), routed=True, saves=False)
    cluster.run(requests)
    waits = np.array([asked.first_s for asked in requests[1:]])
    return cluster, float(np.percentile(waits, 90)), tokens + len(turns) * own


def tell_hot(report: Report) -> bool:
    """Rows of a hot prefix on one replica and on two of one node."""
    (_, alone, _), (two, routed, least) = hot_prefix(1), hot_prefix(2)
    computed, share = sum(r.computed for r in two.replicas), routed / alone
    held = computed <= 1.01 * least and share < 1
    case = "2 replicas, one hot prefix"
    report.add(Row(case, "computed by both", computed, "tokens", least, computed / least,
                   "the prefix once and the rest, at most 1.01"))  # fmt: skip
    report.add(Row(case, "first token, p90", routed * 1e3, "ms", alone * 1e3, share,
                   f"one replica, below 1: {'held' if held else 'NOT held'}"))  # fmt: skip
    return held


def tell(report: Report, options: Any, turns: Sequence[Turn], count: int) -> bool:
    """Rows of one number of replicas; whether all promises held."""
    blocks = (options.pool_tokens // BLOCK_TOKENS, options.node_tokens // BLOCK_TOKENS)
    sizes = Sizes(count, options.per_node, *blocks)
    case, held = f"{count} replicas", True

    def row(metric: str, value: float, unit: str, limit: float, at_most: float | None,
            peer: str, *, at_least: float | None = None) -> None:  # fmt: skip
        nonlocal held
        ratio = value / limit if limit else math.inf
        good = (at_most is None or ratio <= at_most) and (at_least is None or ratio >= at_least)
        held = held and good
        bound = f"at most {at_most}" if at_most is not None else f"at least {at_least}"
        if at_most is not None or at_least is not None:
            peer += f", {bound}: {'held' if good else 'NOT held'}"
        report.add(Row(case, metric, value, unit, limit, ratio, peer, samples=len(turns)))

    for shared in (True, False):
        found = replay(turns, sizes, options.load, shared=shared)
        (ours, first), (turned, base) = found["router"], found["round robin"]
        kind = "" if shared else ", nothing shared"
        report.add(Row(case, f"arrivals last{kind}", found["span_s"], "s"))
        if shared:
            for name, cluster in (("router", ours), ("round robin", turned)):
                computed = np.array([replica.computed for replica in cluster.replicas])
                promised = BALANCE.get(count) if cluster is ours else None
                row(f"computed by the busiest, {name}", float(computed.max()), "tokens",
                    float(computed.mean()), promised, "the mean")  # fmt: skip
                hits = sum(replica.hits for replica in cluster.replicas)
                row(f"hits, {name}", hits, "tokens", found["hits"], None, "one large replica",
                    at_least=HITS if cluster is ours and count in BALANCE else None)  # fmt: skip
        for metric, of in (("mean", np.mean), ("p90", lambda s: np.percentile(s, 90))):
            bound = UNSHARED if not shared else 1.0 if metric == "p90" else None
            row(f"first token, {metric}{kind}", float(of(first)) * 1e3, "ms",
                float(of(base)) * 1e3, bound, "round robin")  # fmt: skip
    return held


def main() -> None:
    """Command line."""
    made = parser(__doc__ or "")
    made.add_argument("trace", type=Path, help="requests, one JSON object a line")
    made.add_argument("--replicas", type=int, nargs="+", default=[4, 16, 64])
    made.add_argument("--pool-tokens", type=int, default=400_000, help="of each replica")
    made.add_argument("--node-tokens", type=int, default=800_000, help="of shards, per replica")
    made.add_argument("--per-node", type=int, default=1, help="replicas that share a node's shards")
    made.add_argument("--load", type=float, default=0.7)
    made.add_argument("--requests", type=int, help="only the first so many")
    options = made.parse_args()
    if options.quick:
        options.replicas = options.replicas[:1]
    turns = read_trace(options.trace, 1)[: options.requests]
    if not turns:
        sys.exit(f"error: {options.trace} has no requests")
    report = Report("Routing", options.json, {"requests": len(turns)})
    held = [tell_hot(report), *(tell(report, options, turns, n) for n in options.replicas)]
    report.show()
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
