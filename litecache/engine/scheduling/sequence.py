"""One request as the scheduler sees it: its tokens, its blocks, how far it has come; and the
queues of those that wait and those that run."""

from __future__ import annotations

import bisect
import enum
import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from litecache.engine.scheduling.below import Below, BlockRef
from litecache.engine.scheduling.cost_model import LoadPlan
from litecache.engine.scheduling.prefix_index import TokenArray
from litecache.hashing import BlockKey, chain_keys
from litecache.types import Request, Tier, TokenLogprobs

PRIORITY_STEP_S = 10.0
"""One level of priority is worth so many seconds of waiting, so that nobody starves."""
TIERS = ("", *(tier.value for tier in Tier))
"""Where a block was found, by the numbers of `Sequence.tiers`."""
GPU, DISK = TIERS.index(Tier.GPU.value), TIERS.index(Tier.DISK.value)


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
    """Where a sequence stands; only RUNNING ones hold a row and a block table.

    STAGING ones wait for a lookup. There is no state for loads: they run beside the steps.
    """

    WAITING = enum.auto()
    STAGING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """State of one request inside the scheduler, which alone changes it.

    Computing goes from the front: positions below the cursor `num_computed` are done. Beyond it a
    block is *ahead* (its KV is there), *loading* (a copy is ordered), or a hole to be computed.

    Attributes:
        arrival: number of its arrival, unique in the scheduler's life.
        num_computed: the cursor: positions whose KV is there once all launched steps are done.
        num_confirmed: positions from the front whose KV is there for certain: a step has told so.
        num_in_flight: tokens that launched steps will sample and that are not known yet.
        num_published: blocks from the front that need no publishing any more.
        tables: per KV group, the block table: a block for every known token.
        changed: (group, index) of table entries that the runner has not been told.
        entered: the runner knows the row.
        last_step: the last plan with a step of this sequence.
        ahead: per KV group, indices of blocks from the cursor on that hold their KV.
        holes: per KV group, indices of blocks that the cursor has passed and that hold nothing: no
            window reaches them.
        copies: (group, source, target) of blocks to be copied as the row enters; the sources are
            referenced.
        tail: (start, end): positions that these copies fill, from a block's first on.
        void: a step that raised, and those behind it, which draw nothing for this request.
        life: counts preemptions; results of steps of an earlier life publish nothing.
        cached: the next step recomputes the last token of a full prefix hit.
        ticket: names its dealings with the lower tiers in this life; 0 = none.
        below: what the lower tiers were asked for in this life, hold of it, and load.
        asked_s: when they were asked, or would have been; -inf = not yet.
        lookup_worth_s: how long their answer is worth waiting for.
        awaits: while it waits, the block that another computes or loads; None = none.
        num_found: positions from the front whose KV the pool held when it came.
        load_run: where windows slide, the blocks that will be jumped over once all that loads has
            landed, those that no window reaches among them.
        reserve: per KV group, blocks of the pool kept for taking over what is late.
        num_landed: blocks that have landed since the plan was last made.
        plan: the first plan of what to load.
        planned_s: when it was made; None = nothing was found.
        tiers: where found blocks were, the reused ones and those computed by plan: by index, the
            number in `TIERS`, uint8 `[blocks]`.
        computed: tokens of found blocks that were computed, by tier.
        num_own: positions of the prompt that were computed.
        handed_out: by first position, logits of the segments that they are asked for,
        told: or their log-probabilities,
        num_handed_out: and how many positions that is.
        num_tail: positions that copies have filled, of no found block.
        announced: its first token has been told; `last_token_s`: when the last one was.
        guided: each of its tokens is one that its driver allows: it steps only with a `mask`.
        mask: of the tokens that may come next, see `Request.mask`; None from one token to the
            driver's next answer.
        asked_driver_s: since when it waits for that.
        num_told: of a guided row that has entered, tokens that the runner knows.
        unshared: it is "no-store", or its salt was deleted while it was open: nothing of it is
            published or saved.
    """

    def __init__(
        self, request: Request, roots: Seq[BlockKey], block_size: int, arrival: int, now: float
    ) -> None:
        self.request = request
        self.num_logits = request.logits
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
        self.arrival = arrival
        self.submitted_s = now
        self.begin_account()
        self.deadline_s = None if request.max_time_s is None else now + request.max_time_s
        self.status = SequenceStatus.WAITING
        self.row = -1
        self.num_in_flight = 0
        self.last_step = 0
        self.void = range(0)
        self.life = 0
        self.ticket = 0
        self.below = Below(len(roots))
        self.asked_s = -math.inf
        self.lookup_worth_s = 0.0
        self.awaits: int | None = None
        self.num_found = 0
        self.paused = False
        self.unshared = request.cache == "no-store"
        self.guided = request.mask is not None
        self.mask = request.mask
        self.asked_driver_s = math.inf
        self.num_told = 0
        self.announced = False
        self.last_token_s = now
        self.begin_life()

    def begin_life(self) -> None:
        """Nothing is computed, held or loading."""
        groups = len(self.chain.roots)
        self.tables: list[list[int]] = [[] for _ in range(groups)]
        self.changed: set[BlockRef] = set()
        self.entered = False
        self.num_computed = 0
        self.num_confirmed = 0
        self.num_published = 0
        self.ahead: list[set[int]] = [set() for _ in range(groups)]
        self.holes: list[set[int]] = [set() for _ in range(groups)]
        self.copies: list[tuple[int, int, int]] = []
        self.tail: tuple[int, int] | None = None
        self.cached = False
        self.load_run = range(0)
        self.reserve = [0] * groups
        self.num_landed = 0
        self.plan: LoadPlan | None = None
        self.planned_s: float | None = None
        self.handed_out: dict[int, bytes] = {}
        self.told: dict[int, tuple[TokenLogprobs, ...]] = {}
        self.num_handed_out = 0

    def begin_account(self) -> None:
        """Nothing of the prompt is found or computed."""
        self.tiers = np.zeros(-(-self.num_tokens // self.chain.block_size), np.uint8)
        self.computed: dict[str, int] = {}
        self.num_own = 0
        self.num_tail = 0

    def count_computed(self, start: int, count: int) -> None:
        """Positions before the first token are computed: which of them had been found?"""
        end = min(start + count, len(self.request.prompt))
        self.num_own += max(0, end - start)
        size = self.chain.block_size
        first, last = start // size, -(-end // size)
        tiers = self.tiers[first:last]
        if end <= start or not tiers.any():
            return
        tokens = np.full(len(tiers), size)
        tokens[0] -= start - first * size
        tokens[-1] -= last * size - end
        for tier in np.unique(tiers[tiers > 0]).tolist():
            name = TIERS[tier]
            self.computed[name] = self.computed.get(name, 0) + int(tokens[tiers == tier].sum())

    def account(self) -> tuple[dict[str, int], dict[str, int]]:
        """Tokens of the prompt by tier: what was found, and what of it was reused.

        The difference was computed by plan; with what was not found it makes up the prompt.
        """
        numbers, counts = np.unique(self.tiers[self.tiers > 0], return_counts=True)
        pairs = zip(numbers.tolist(), counts.tolist(), strict=True)
        found = {TIERS[tier]: count * self.chain.block_size for tier, count in pairs}
        if self.num_tail:
            found[Tier.GPU.value] = found.get(Tier.GPU.value, 0) + self.num_tail
        reused = {tier: found[tier] - self.computed.get(tier, 0) for tier in found}
        assert sum(reused.values()) + self.num_own == len(self.request.prompt), (
            f"{self.id}: {reused} reused and {self.num_own} computed of {len(self.request.prompt)}"
        )
        return found, {tier: tokens for tier, tokens in reused.items() if tokens}

    @property
    def order(self) -> tuple[float, int]:
        """Sort key: arrival, moved by priority; waiting long enough outweighs any priority."""
        return (self.submitted_s + self.request.priority * PRIORITY_STEP_S, self.arrival)

    @property
    def tokens(self) -> TokenArray:
        """All known tokens, a view."""
        return self._tokens[: self.num_tokens]

    @property
    def num_todo(self) -> int:
        """Positions that the next step could compute."""
        return self.num_tokens + self.num_in_flight - self.num_computed

    @property
    def wants_step(self) -> bool:
        """Another token may be sampled, counting those in flight; or logits are to be computed.

        A guided row samples one after the other: the driver's answer to one allows the next.
        """
        if self.num_logits:
            return self.num_todo > 0
        if self.guided and (self.mask is None or self.num_in_flight):
            return False
        return self.num_tokens + self.num_in_flight < self.max_tokens

    @property
    def num_reusable(self) -> int:
        """Positions from the front that need not be computed: the last one gives the next token,
        those whose logits are asked for give them."""
        return self.num_tokens - max(1, self.num_logits)

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
        waiting: requests without a row, STAGING ones included.
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

    def is_next(self, seq: Sequence) -> bool:
        """There is a row for it, and nothing else to prefill."""
        others = (other for other in self.waiting if other is not seq)
        decodes = all(other.num_todo <= 1 for other in self.running)
        return self.has_row and decodes and next(others, None) is None

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
