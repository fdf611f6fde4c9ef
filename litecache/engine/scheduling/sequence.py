"""One request as the scheduler sees it: its tokens, its blocks, how far it has come; and the
queues of those that wait and those that run."""

from __future__ import annotations

import bisect
import enum
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from litecache.engine.scheduling.prefix_index import TokenArray
from litecache.hashing import BlockKey, chain_keys
from litecache.types import Request

PRIORITY_STEP_S = 10.0
"""One level of priority is worth so many seconds of waiting, so that nobody starves."""


BlockRef = tuple[int, int]
"""(group, index of the block in its sequence)."""


@dataclass
class KeyChain:
    """The block keys of one sequence in every group, extended as its tokens become known.

    Attributes:
        roots: namespace key of each group.
        keys: per group, the keys of the sequence's full blocks.
    """

    roots: tuple[BlockKey, ...]
    block_size: int
    keys: list[list[BlockKey]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = self.keys or [[] for _ in self.roots]

    def extend(self, tokens: TokenArray) -> None:
        """Add the keys of blocks that `tokens`, the whole sequence so far, has filled."""
        known = len(self.keys[0])
        if len(tokens) < (known + 1) * self.block_size:
            return
        for group, keys in enumerate(self.keys):
            parent = keys[-1] if keys else self.roots[group]
            keys.extend(chain_keys(parent, tokens[known * self.block_size :], self.block_size))

    def parent(self, group: int, index: int) -> BlockKey:
        """Key of the block before block `index`."""
        return self.keys[group][index - 1] if index else self.roots[group]


class SequenceStatus(enum.Enum):
    """Where a sequence stands; only RUNNING ones hold a row and a block table."""

    WAITING = enum.auto()
    STAGING = enum.auto()
    LOADING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """State of one request inside the scheduler, which alone changes it.

    Attributes:
        ticket: number of its arrival, unique in the scheduler's life.
        num_computed: positions whose KV is computed or cached once all launched steps are done.
        num_in_flight: tokens that launched steps will sample and that are not known yet.
        num_published: blocks from the front that need no publishing any more.
        tables: per KV group, the block table.
        held: per KV group, blocks kept in the pool for this sequence while it waits (loaded).
        staged: blocks found below, leased, and in which tier.
        loading: the block that each of them is copied into, while a load is under way.
        tiers: where loaded blocks came from, by index of the block.
        life: counts preemptions; results of steps of an earlier life publish nothing.
        looked_up: the lower tiers were asked (in this life).
        complete_at: the pools' evictions when they held all its full blocks, None = never seen.
        cached: the next step recomputes the last token of a full prefix hit.
    """

    def __init__(
        self, request: Request, roots: Seq[BlockKey], block_size: int, ticket: int, now: float
    ) -> None:
        self.request = request
        self.id = request.request_id
        self.client_id = request.client_id
        self.eos_token_ids = request.sampling.eos_token_ids
        self.num_prompt = len(request.prompt) - request.num_resumed_tokens
        self.max_tokens = self.num_prompt + request.sampling.max_new_tokens
        self._tokens = np.empty(max(self.max_tokens, len(request.prompt)), dtype=np.int64)
        self._tokens[: len(request.prompt)] = request.prompt.array
        self.num_tokens = len(request.prompt)
        self.chain = KeyChain(tuple(roots), block_size)
        self.chain.extend(self.tokens)
        self.ticket = ticket
        self.submitted_s = now
        self.deadline_s = None if request.max_time_s is None else now + request.max_time_s
        self.status = SequenceStatus.WAITING
        self.row = -1
        self.tables: list[list[int]] = [[] for _ in roots]
        self.held: list[list[int]] = [[] for _ in roots]
        self.staged: dict[BlockRef, str] = {}
        self.loading: dict[BlockRef, int] = {}
        self.tiers: dict[int, str] = {}
        self.reused: dict[str, int] | None = None
        self.num_computed = 0
        self.num_in_flight = 0
        self.num_published = 0
        self.life = 0
        self.looked_up = False
        self.complete_at: int | None = None
        self.cached = False
        self.paused = False
        self.announced = False

    @property
    def order(self) -> tuple[float, int]:
        """Sort key: arrival, moved by priority; waiting long enough outweighs any priority."""
        return (self.submitted_s + self.request.priority * PRIORITY_STEP_S, self.ticket)

    @property
    def tokens(self) -> TokenArray:
        """All known tokens, a view."""
        return self._tokens[: self.num_tokens]

    @property
    def num_todo(self) -> int:
        """Positions that the next step could compute."""
        return self.num_tokens + self.num_in_flight - self.num_computed

    @property
    def wants_token(self) -> bool:
        """Another token may be sampled, counting those in flight."""
        return self.num_tokens + self.num_in_flight < self.max_tokens

    def append(self, token: int) -> None:
        """Add a sampled token."""
        self._tokens[self.num_tokens] = token
        self.num_tokens += 1
        if not self.num_tokens % self.chain.block_size:
            self.chain.extend(self.tokens)


class RequestQueues:
    """Waiting and running requests, each list in the order of `Sequence.order`.

    Args:
        max_requests: rows.

    Attributes:
        waiting: requests without a row, STAGING and LOADING ones included.
        running: requests with a row; the last one is the first to give way.
    """

    def __init__(self, max_requests: int) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._max_requests = max_requests
        self._free_rows = list(range(max_requests - 1, -1, -1))

    @property
    def has_row(self) -> bool:
        """Another request may start."""
        return bool(self._free_rows)

    def add(self, seq: Sequence) -> None:
        """Queue a request."""
        bisect.insort(self.waiting, seq, key=lambda s: s.order)

    def start(self, seq: Sequence) -> None:
        """A waiting request takes a row."""
        self.waiting.remove(seq)
        bisect.insort(self.running, seq, key=lambda s: s.order)
        seq.status = SequenceStatus.RUNNING
        seq.row = self._free_rows.pop()

    def preempt(self, seq: Sequence) -> None:
        """A running request gives its row back and waits again."""
        self.remove(seq)
        seq.row = -1
        seq.status = SequenceStatus.WAITING
        self.add(seq)

    def remove(self, seq: Sequence) -> None:
        """Take a request out of the queue that it is in."""
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._free_rows.append(seq.row)
        else:
            self.waiting.remove(seq)

    def check_integrity(self) -> None:
        """Assert that no row is lost and the queue is in order."""
        rows = [seq.row for seq in self.running]
        assert sorted(rows + self._free_rows) == list(range(self._max_requests)), "a row is lost"
        assert sorted(self.waiting, key=lambda s: s.order) == self.waiting, "queue out of order"
