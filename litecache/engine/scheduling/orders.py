"""What the scheduler hands to the engine: orders for the runner and for the transfer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from litecache.engine.scheduling.sequence import BlockRef
from litecache.engine.scheduling.step_plan import StepPlan
from litecache.hashing import BlockKey
from litecache.types import TokenDelta


class StageOrder(NamedTuple):
    """Ask the lower tiers for blocks: (group, index in the sequence) -> key, in reading order."""

    ticket: int
    blocks: dict[BlockRef, BlockKey]


class LoadOrder(NamedTuple):
    """Copy staged blocks into the pool: (group, index) -> block, in this order.

    The ticket's other leases end with it, unless `more` loads follow.
    """

    ticket: int
    blocks: dict[BlockRef, int]
    more: bool = False


class SaveOrder(NamedTuple):
    """Copy a published block down; the scheduler holds a reference until `on_saved`.

    `run_key` is the key of the first block of its run: it chooses the shard, so that a run of
    about 16 MiB lies together. `salt` is the request's, for its quota.
    """

    group: int
    block: int
    key: BlockKey
    parent: BlockKey
    run_key: BlockKey
    salt: str = ""


@dataclass
class Schedule:
    """Everything one call of the scheduler decided.

    Tickets name a request's dealings with the lower tiers. `discards`: leases that no load has
    taken end. `cancels`: loads end early. `touches`: stored blocks that a request found in the
    pool, of which the shards have heard nothing, tails first.
    """

    plan: StepPlan | None = None
    stages: list[StageOrder] = field(default_factory=list)
    loads: list[LoadOrder] = field(default_factory=list)
    discards: list[int] = field(default_factory=list)
    cancels: list[int] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    touches: list[BlockKey] = field(default_factory=list)
    deltas: list[tuple[str, TokenDelta]] = field(default_factory=list)
