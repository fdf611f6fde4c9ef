"""What the scheduler hands to the engine: orders for the runner and for the transfer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from litecache.engine.scheduling.below import NO_REFS, Numbers, Refs
from litecache.engine.scheduling.step_plan import StepPlan
from litecache.hashing import BlockKey
from litecache.storage.protocol import Retention
from litecache.types import TokenDelta


class StageOrder(NamedTuple):
    """Ask the lower tiers for blocks: references `[n, 2]` and their keys, in reading order."""

    ticket: int
    refs: Refs
    keys: list[BlockKey]


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
