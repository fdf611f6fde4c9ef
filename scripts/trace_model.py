"""Traces of conversations without an engine: read, split, made into tokens, and simulated.

What bench_trace.py replays and compares with: an LRU of the same bytes, ideal plans on one GPU and
one disk, and how a queue of requests went.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from litecache.engine.tier_engine import Tokens

BLOCK_TOKENS = 512
# seconds of a step, a token, a token behind a token; bytes per second of disk and copy
SPEEDS = (5e-3, 23.2e-6, 9.5e-10, 1.8e9, 50e9)


@dataclass(frozen=True)
class Turn:
    """A request of the trace: when it comes, in seconds, and its lengths in tokens."""

    time_s: float
    length: int
    answer: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Speeds:
    """Of a simulated machine."""

    step_s: float
    token_s: float
    pair_s: float
    disk: float
    copy: float

    def prefill_s(self, first: Any, end: Any) -> Any:
        """Seconds of computing positions `first` to `end`."""
        tokens = end - first
        spent = tokens * self.token_s + self.pair_s * (end * end - first * first) / 2
        return spent + self.step_s * np.ceil(tokens / 8192)


def read_trace(path: Path, divide: int) -> list[Turn]:
    """The requests of a file, in the order of their times.

    Raises:
        SystemExit: a line is not of the format; tells which.
    """
    turns = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            length, ids = int(row["input_length"]), tuple(map(int, row["hash_ids"]))
            if len(ids) != math.ceil(length / BLOCK_TOKENS):
                raise ValueError(f"{len(ids)} hash_ids for {length} tokens")
            answer = max(1, int(row["output_length"]) // divide)
            turn = Turn(float(row["timestamp"]) / 1e3, max(1, length // divide), answer, ids)
        except (KeyError, TypeError, ValueError) as error:
            sys.exit(f"error: {path}:{number} is no request of a trace: {error!r}")
        turns.append(turn)
    return sorted(turns, key=lambda turn: turn.time_s)


def sessions(turns: Sequence[Turn]) -> dict[int, list[Turn]]:
    """Requests by conversation: by the first block that is not common to many of them."""
    counts = Counter(block for turn in turns for block in set(turn.ids))
    common = {block for block, count in counts.items() if count > max(16, len(turns) / 20)}
    found: dict[int, list[Turn]] = {}
    for turn in turns:
        first = next((block for block in turn.ids if block not in common), turn.ids[-1])
        found.setdefault(first, []).append(turn)
    return found


def split_sessions(turns: Sequence[Turn], share: float, seed: int) -> tuple[list[Turn], list[Turn]]:
    """A share of the sessions, and the others, each in the order of their times."""
    groups = list(sessions(turns).values())
    order = np.random.default_rng(seed).permutation(len(groups))
    cut = round(len(groups) * share)
    parts = []
    for chosen in (order[:cut], order[cut:]):
        part = [turn for index in chosen for turn in groups[index]]
        parts.append(sorted(part, key=lambda turn: turn.time_s))
    return parts[0], parts[1]


class Prompts:
    """Tokens of a trace's blocks, each by a generator seeded with its id."""

    def __init__(self, vocab: int, divide: int) -> None:
        self._vocab, self.block = vocab, BLOCK_TOKENS // divide
        self._blocks: dict[int, Tokens] = {}

    def of(self, turn: Turn) -> Tokens:
        """The prompt of a request."""
        return np.concatenate([self._tokens(block) for block in turn.ids])[: turn.length]

    def _tokens(self, block: int) -> Tokens:
        if block not in self._blocks:
            rng = np.random.default_rng(block)
            self._blocks[block] = rng.integers(10, self._vocab - 10, size=self.block)
        return self._blocks[block]


class Lru:
    """A cache of trace blocks that forgets the least recently used, the tail of a prompt first.

    Args:
        tokens: that fit.
        block: tokens of a trace block.
    """

    def __init__(self, tokens: float, block: int) -> None:
        self._room, self._block = tokens / block, block
        self._held: OrderedDict[Any, float] = OrderedDict()
        self._used = 0.0

    def found(self, turn: Turn) -> int:
        """Tokens of the longest prefix that is held; one token is always left to compute."""
        count = 0
        while count < len(turn.ids) and turn.ids[count] in self._held:
            count += 1
        return min(count * self._block, turn.length - 1)

    def add(self, turn: Turn) -> None:
        """A request was computed: its prompt and answer are the newest."""
        answer = (turn.answer + turn.length % self._block) / self._block
        whole = turn.ids[: turn.length // self._block]
        entries = [(("answer", turn.time_s, turn.ids), answer), *((b, 1.0) for b in whole[::-1])]
        for key, size in entries:
            self._used += size - self._held.pop(key, 0.0)
            self._held[key] = size
        while self._used > self._room and self._held:
            self._used -= self._held.popitem(last=False)[1]


def uncached(turns: Iterable[Turn], tokens: float, block: int) -> list[int]:
    """Per request, the tokens that an LRU of this size makes it compute."""
    cache = Lru(tokens, block)
    left = []
    for turn in turns:
        left.append(turn.length - cache.found(turn))
        cache.add(turn)
    return left


def lru_found(turns: Iterable[Turn], tokens: float, block: int) -> int:
    """Prompt tokens that an LRU of this size would have found, of all requests."""
    turns = list(turns)
    return sum(turn.length for turn in turns) - sum(uncached(turns, tokens, block))


def simulate(
    turns: Sequence[Turn], arrivals: Sequence[float], speeds: Speeds, token_bytes: float,
    pool: float, ram: float, disk: float, block: int,
) -> list[float]:  # fmt: skip
    """Seconds to each first token under ideal plans, GPU and disk each one at a time.

    Args:
        turns, arrivals: requests, and when they come.
        speeds: of the machine.
        token_bytes: KV bytes of a token.
        pool, ram, disk: bytes of the tiers.
        block: tokens of a trace block.
    """
    tiers = [Lru(size / token_bytes, block) for size in (pool, ram, max(ram, disk))]
    gpu_free = disk_free = 0.0
    taken = []
    for turn, now in zip(turns, arrivals, strict=True):
        in_pool, in_ram, on_disk = (tier.found(turn) for tier in tiers)
        in_ram, on_disk = max(in_pool, in_ram), max(in_pool, in_ram, on_disk)
        meet = np.arange(in_pool, on_disk + 1, block)
        from_disk = (on_disk - np.maximum(meet, in_ram)) * token_bytes
        from_ram = np.maximum(0, in_ram - meet) * token_bytes
        loaded = np.maximum(
            now + from_ram / speeds.copy,
            np.where(from_disk > 0, max(now, disk_free) + from_disk / speeds.disk, 0.0),
        )
        front = max(now, gpu_free) + np.where(meet > in_pool, speeds.prefill_s(in_pool, meet), 0)
        ready = np.maximum(front, loaded) + speeds.prefill_s(on_disk, turn.length)
        best = int(np.argmin(ready))
        gpu_free = float(ready[best])
        if from_disk[best] > 0:
            disk_free = max(now, disk_free) + float(from_disk[best]) / speeds.disk
        taken.append(gpu_free - now)
        for tier in tiers:
            tier.add(turn)
    return taken


def arrivals_at(turns: Sequence[Turn], rate: float) -> list[float]:
    """Times of the trace, in seconds from the first, compressed so that so many come a second."""
    span = (len(turns) - 1) / rate
    first, last = turns[0].time_s, turns[-1].time_s
    return [(turn.time_s - first) / max(1e-9, last - first) * span for turn in turns]


class Queue(NamedTuple):
    """How a replay went.

    Attributes:
        rate: requests that came a second.
        open: of those that had come, unanswered ones at each arrival.
        growth: of that number, requests a minute, over the second half of the arrivals.
    """

    rate: float
    open: list[int]
    growth: float

    @classmethod
    def of(cls, asked: Sequence[float], ended: Sequence[float]) -> Queue:
        """From when each request came and was answered."""
        came, left = np.array(asked), np.sort(np.array(ended))
        open_ = np.arange(1, len(came) + 1) - np.searchsorted(left, came)
        half = len(came) // 2
        growth = 0.0
        if len(came) - half > 2 and came[-1] > came[half]:
            growth = float(np.polyfit(came[half:], open_[half:], 1)[0]) * 60
        rate = (len(came) - 1) / max(1e-9, came[-1] - came[0])
        return cls(rate, open_.tolist(), growth)
