"""What a prompt would find and cost if it came now, for `litecache explain`; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

from litecache.engine.scheduling.below import FoundBelow
from litecache.engine.scheduling.cost_model import CostModel, LoadPlan
from litecache.engine.scheduling.loads import Crowd, Loads
from litecache.engine.scheduling.prefix_cache import PrefixCache
from litecache.engine.scheduling.prefix_index import MISSING, PENDING
from litecache.engine.scheduling.sequence import Sequence
from litecache.hashing import BlockKey
from litecache.types import Tier

PENDING_SOURCE = "pending"


class PrefixView(NamedTuple):
    """A prompt as a replica sees it.

    Attributes:
        sources: per whole block that could be reused, where it lies: "gpu" (in the pool),
            "pending" (another request computes or loads it), a source of the lower tiers
            ("ram:...", "disk:...", "remote:..."), or "". Where there are several KV groups, the
            worst of them.
        in_pool: blocks from the front that the pool holds.
        known: blocks from the front that some tier holds.
        shared_tokens: behind those, tokens that a block of the pool shares with the prompt.
        branches: the pool holds a block that follows the known ones, and is another.
        others_known: which of the other keys asked for the pool holds.
        plan: what would be loaded; None = this replica has no lower tiers.
        compute_s, load_s: predicted first token if all were computed, or all that is found loaded;
            None without a plan, and without anything to load.
        queued_tokens, decodes: what is in front of it, and beside it.
        measured: the predictions rest on steps that were measured, not on priors.
    """

    sources: tuple[str, ...]
    in_pool: int
    known: int
    shared_tokens: int
    branches: bool
    others_known: tuple[bool, ...]
    plan: LoadPlan | None = None
    compute_s: float | None = None
    load_s: float | None = None
    queued_tokens: int = 0
    decodes: int = 0
    measured: bool = False


def view_prefix(
    seq: Sequence,
    below: Seq[Seq[str]],
    others: Seq[BlockKey],
    cache: PrefixCache,
    loads: Loads,
    cost: CostModel | None,
    crowd: Crowd,
    now: float,
) -> PrefixView:
    """How the scheduler would see a request that has just come.

    Args:
        seq: of the request, known to nobody.
        below: per KV group and whole block, the source in the lower tiers, or "".
        others: keys of KV group 0 that are looked for as well.
        cache, loads, cost: of the scheduler.
        crowd: around it.
        now: of the engine's clock.
    """
    looked = cache.look(seq)
    end = len(looked[0])
    first = cache.present(looked)
    sources = [_worst(looked, below, index) for index in range(end)]
    known = cache.run_end(
        lambda g, i: looked[g][i] >= 0 or bool(below[g][i]) or looked[g][i] == PENDING, 0, end
    )
    shared, branches = _beyond(seq, cache, known)
    view = PrefixView(
        sources=tuple(sources),
        in_pool=first,
        known=known,
        shared_tokens=shared,
        branches=branches,
        others_known=tuple(key in cache.indexes[0] for key in others),
    )
    if cost is None:
        return view
    seq.num_computed = first * cache.block_size
    seq.ahead = [{i for i, b in enumerate(blocks) if b >= 0 and i >= first} for blocks in looked]
    held = {
        (group, index): its[index]
        for group, its in enumerate(below)
        for index in range(first, end)
        if its[index] and looked[group][index] == MISSING
    }
    seq.below.ask(seq.below.unasked(np.ones((len(below), end), dtype=bool)))
    seq.below.stage(FoundBelow.of(held))
    found = loads.found(seq, first)

    around = crowd._asdict()

    def plan(model: CostModel) -> LoadPlan:
        return model.plan(num_tokens=seq.num_tokens, start=first, found=found, now=now, **around)

    sources_found = {found.kinds[code].source for code in set(found.codes.tolist())}
    return view._replace(
        plan=plan(cost.fork()),
        compute_s=plan(cost.fork("none")).first_token_s,
        load_s=plan(cost.fork("all")).first_token_s
        if sources_found - {"", Tier.GPU.value}
        else None,
        queued_tokens=crowd.queued_tokens,
        decodes=crowd.num_decodes,
        measured=bool(cost.stats()["measured"]),
    )


def _worst(looked: Seq[Seq[int]], below: Seq[Seq[str]], index: int) -> str:
    """Where the copy of a block lies that is farthest away, over all groups."""
    order = [Tier.GPU.value, PENDING_SOURCE, "ram", "disk", "remote", ""]
    places = []
    for blocks, its in zip(looked, below, strict=True):
        if blocks[index] >= 0:
            places.append(Tier.GPU.value)
        else:
            pending = PENDING_SOURCE if blocks[index] == PENDING else ""
            places.append(its[index] or pending)
    return max(places, key=lambda source: order.index(source.partition(":")[0]))


def _beyond(seq: Sequence, cache: PrefixCache, known: int) -> tuple[int, bool]:
    """Tokens behind the known blocks that the pool shares with a sequence; what else follows."""
    rest = seq.tokens[known * cache.block_size :][: cache.block_size]
    parents = [seq.chain.parent(group, known) for group in range(len(cache.groups))]
    matches = [
        index.match_partial(parent, rest)
        for index, parent in zip(cache.indexes, parents, strict=True)
    ]
    shared = min(match.num_tokens if match is not None else 0 for match in matches)
    return shared, shared < len(rest) and cache.indexes[0].has_child(parents[0])
