"""What the scheduler hands to the engine: the plan of a step, and orders for the transfer.

The plan is all that the model runner needs to know about one step. The runner executes it and
decides nothing, so that every rank of a tensor-parallel replica can execute the same plan. A
running request holds a *row* of the runner's persistent tables (token ids, block tables); a plan
carries only what changes in them, so that its size follows the step and not the context length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from litecache.engine.scheduling.below import NO_REFS, Numbers, Refs
from litecache.hashing import BlockKey
from litecache.storage.protocol import ALL_KEYS, Retention
from litecache.token_ids import TokenIds
from litecache.types import SamplingParams, TokenDelta, TokenLogprobs

PLAN_VERSION = 5


@dataclass(frozen=True)
class NewRow:
    """A request takes a row; what the row held before is void.

    Attributes:
        row: index into the runner's tables.
        token_ids: all tokens known so far.
        num_prompt_tokens: how many of them are prompt (the rest was generated before a
            preemption); sampling positions count from it.
        sampling: how its tokens are drawn.
    """

    row: int
    token_ids: TokenIds
    num_prompt_tokens: int
    sampling: SamplingParams

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", TokenIds(self.token_ids))
        if isinstance(self.sampling, dict):  # of `StepPlan.to_dict`
            object.__setattr__(self, "sampling", SamplingParams(**self.sampling))


@dataclass(frozen=True)
class RowGuide:
    """What a guided row is told before it steps.

    Attributes:
        row: which row.
        start: position of the first of `token_ids`.
        token_ids: the row's tokens from there on: the last one that it drew, and what its driver
            has appended.
        mask: of the tokens that this step may draw for it, see `litecache.types.mask_bytes`;
            empty where it draws none.
    """

    row: int
    start: int
    token_ids: tuple[int, ...]
    mask: bytes


@dataclass(frozen=True)
class TableUpdate:
    """Blocks enter a row's block table of one KV group from entry `start` on."""

    row: int
    group: int
    start: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True)
class BlockCopy:
    """Copy a whole block inside the pool of one KV group, before the forward (copy-on-write)."""

    group: int
    src: int
    dst: int


class RowStep(NamedTuple):
    """The tokens of one row that this step computes.

    A tuple, because every row has one in every step: numpy takes all of them at once.

    Attributes:
        row: which row.
        start: position of the first token; its id is known to the runner (from `NewRow` or
            because an earlier step sampled it).
        num_tokens: how many positions are computed.
        sample: how many of the last positions draw a token from their logits.
        cached: the KV of these positions is already in published blocks: attention reads it
            there, and what this step computes goes to the trash block (full prefix hit).
        logits: of so many of the last positions the logits are handed out, or with
            `SamplingParams.logprobs` the log-probabilities of the tokens that follow.
    """

    row: int
    start: int
    num_tokens: int
    sample: int
    cached: bool = False
    logits: int = 0


@dataclass(frozen=True)
class StepPlan:
    """One engine step. Rows of one token come first; order of work: rows, guides, tables, copies,
    forward.

    No two table updates name the same entry: a device writes all of them at once, in any order.
    A row may stand in a plan with several segments, in the order of their positions.
    `StepResult.tokens` follows the order of the sampled positions of `rows`.
    """

    step: int
    new_rows: tuple[NewRow, ...] = ()
    table_updates: tuple[TableUpdate, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    rows: tuple[RowStep, ...] = ()
    guides: tuple[RowGuide, ...] = ()
    version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        last: tuple[int, int, int] | None = None
        for row, group, start, end in sorted(
            (u.row, u.group, u.start, u.start + len(u.block_ids)) for u in self.table_updates
        ):
            assert last is None or last[:2] != (row, group) or last[2] <= start, (
                f"step {self.step} writes entry {start} of row {row}, group {group} twice"
            )
            last = (row, group, end)

    @property
    def num_tokens(self) -> int:
        """Positions computed in this step."""
        return sum(row.num_tokens for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for msgpack."""
        values = dataclasses.asdict(self)
        for row in values["new_rows"]:
            row["token_ids"] = list(row["token_ids"])
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StepPlan:
        """The inverse of `to_dict`."""
        rows = {name: tuple(kind(**_frozen(row)) for row in values[name]) for name, kind in _ROWS}
        steps = tuple(RowStep(*row) for row in values["rows"])
        return cls(**{**values, **rows, "rows": steps})


_ROWS: tuple[tuple[str, type[Any]], ...] = (
    ("new_rows", NewRow), ("table_updates", TableUpdate), ("copies", BlockCopy),
    ("guides", RowGuide),
)  # fmt: skip


def _frozen(value: Any) -> Any:
    """Lists, as msgpack gives them, back to tuples."""
    if isinstance(value, dict):
        return {name: _frozen(part) for name, part in value.items()}
    return tuple(_frozen(part) for part in value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class StepResult:
    """What a step gave.

    Attributes:
        step: number of the plan.
        tokens: one token id per sampled position, in the plan's order.
        invalid_rows: rows whose logits were not finite; their token is void.
        logprobs: of the samples of rows that ask for them, by their place in `tokens`.
        logits: by place in the plan's `rows`, what was handed out: `[RowStep.logits, vocab]` in the
            model's dtype, as bytes.
        prompt_logprobs: likewise, of rows that ask for log-probabilities.
        seconds: it took the device once that was through with the steps before; 0 = not measured.
    """

    step: int
    tokens: tuple[int, ...]
    invalid_rows: tuple[int, ...] = ()
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    logits: dict[int, bytes] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    seconds: float = 0.0


class Step(Protocol):
    """A step under way."""

    def ready(self) -> bool:
        """Whether `result` would return at once."""
        ...

    def result(self) -> StepResult:
        """Wait for what the step gives."""
        ...


class Executor(Protocol):
    """Who executes plans, in the order of the calls: a runner, or several that do the same."""

    def execute(self, plan: StepPlan) -> Step:
        """Start a step."""
        ...

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Prepare what would keep a first step waiting; told how much is done, of how much."""
        ...


class StageOrder(NamedTuple):
    """Ask the lower tiers for blocks: references `[n, 2]` and their keys, in reading order; no disk
    reads more of them than the first `reads`."""

    ticket: int
    refs: Refs
    keys: list[BlockKey]
    reads: int = ALL_KEYS


class LoadOrder(NamedTuple):
    """Copy staged blocks into the pool, in this order.

    Other orders of the ticket may follow; its leases end by a discard or a cancel.

    Attributes:
        ticket: of their lookup.
        refs: `[n, 2]`.
        blocks: of the pool, where each is copied to, `[n]`.
        steps: the last that uses that block, `[n]`: the copy waits for it.
    """

    ticket: int
    refs: Refs
    blocks: Numbers
    steps: Numbers


class CancelOrder(NamedTuple):
    """Copy none of these blocks unless it has begun; None = the whole ticket, its leases too."""

    ticket: int
    refs: Refs | None = None


class LoadReport(NamedTuple):
    """What has become of ordered blocks: each is told once.

    Attributes:
        ticket: of the order.
        landed: blocks that hold their bytes now, `[n, 2]`.
        lost: blocks into which nothing is copied, now or later, `[n, 2]`.
        failed: sources that did not answer as they must.
        at_s: when, by `time.monotonic`.
        waited: what landed was waited for; False = it had been read before it was ordered.
    """

    ticket: int
    landed: Refs = NO_REFS
    lost: Refs = NO_REFS
    failed: frozenset[str] = frozenset()
    at_s: float = 0.0
    waited: bool = True


class SaveOrder(NamedTuple):
    """Copy a published block down; the scheduler holds a reference until `on_saved`.

    `run_key` is the key of the first block of its run: it chooses the shard, so that a run of
    about 16 MiB lies together. `salt` is the request's, for its quota; `expires_s` (a Unix second;
    0: never) and `retention` go with the block, as in `CommitItem`.
    """

    group: int
    block: int
    key: BlockKey
    parent: BlockKey
    run_key: BlockKey
    salt: str = ""
    expires_s: int = 0
    retention: Retention = Retention.NORMAL


@dataclass
class Schedule:
    """Everything one call of the scheduler decided.

    Tickets name the dealings of one life of a request with the lower tiers. `discards`: leases that
    no load has taken end. `touches`: stored blocks that a request found in the pool, of which the
    shards have heard nothing, tails first. `token_gaps`: seconds between two tokens of a request,
    and how many requests they were the same for.
    """

    plan: StepPlan | None = None
    stages: list[StageOrder] = field(default_factory=list)
    loads: list[LoadOrder] = field(default_factory=list)
    discards: list[int] = field(default_factory=list)
    cancels: list[CancelOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    touches: list[BlockKey] = field(default_factory=list)
    deltas: list[tuple[str, TokenDelta]] = field(default_factory=list)
    token_gaps: dict[float, int] = field(default_factory=dict)
