"""Why a prompt would be a hit or a miss now: which block lies where, what that would cost, and what
keeps the rest from matching. For `litecache explain`; nothing is changed by it.

Replicas and shards are asked as they are: one that does not answer is named, and the others tell
what they know. What is told of other prompts is where they part from this one, never what they say;
salts are compared and never shown.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from litecache.actors.calls import gather
from litecache.actors.group import Group
from litecache.actors.naming import CALL_TIMEOUT_S, role_of
from litecache.engine.engine_info import EngineInfo
from litecache.errors import GroupUnavailableError, LiteCacheError
from litecache.hashing import BlockKey, chain_keys
from litecache.storage.key_dict import join_keys
from litecache.storage.namespaces import may_hold, salt_digest, split_namespace
from litecache.storage.protocol import Place
from litecache.token_ids import TokenIds

# A shard that holds millions of blocks counts them by namespace.
_SHARD_TIMEOUT_S = 30.0


class BlockRun(NamedTuple):
    """Neighbouring blocks of the prompt that lie in the same places.

    Attributes:
        first, end: the blocks, `end` not included.
        pools, ram, disks: short names of the replicas and shards that hold them all.
    """

    first: int
    end: int
    pools: tuple[str, ...] = ()
    ram: tuple[str, ...] = ()
    disks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReplicaPlan:
    """What a replica would do with the prompt.

    Attributes:
        blocks: whole blocks that it could reuse, by where they lie for it: "gpu" (its pool),
            "pending" (being computed or loaded by another request), "ram", "disk", "remote".
        copied_tokens: behind those, copied from a block of the pool that begins alike.
        load_from, load_end: blocks that it would load; equal = none.
        first_token_s: predicted; None = it has no lower tiers, and so no cost model.
        compute_s, load_s: the same if all were computed that is not in the pool, or all that is
            found loaded (None = nothing is).
        queued_tokens, decodes: in front of it, and beside it.
        measured: the figures rest on what this replica measured, not on guesses.
        error: why it told nothing.
    """

    name: str
    blocks: dict[str, int] = field(default_factory=dict)
    copied_tokens: int = 0
    load_from: int = 0
    load_end: int = 0
    first_token_s: float | None = None
    compute_s: float | None = None
    load_s: float | None = None
    queued_tokens: int = 0
    decodes: int = 0
    measured: bool = False
    error: str = ""


@dataclass(frozen=True)
class Explanation:
    """All that is known of a prompt.

    Attributes:
        tokens, block_size, blocks: of the prompt; `blocks` whole ones.
        runs: all whole blocks in order.
        replicas: by index.
        known_blocks: from the front, that some tier of some replica could reuse.
        shared_tokens: behind those, that another prompt in a pool shares.
        reasons: sentences, the most telling first.
        unavailable: actors that told nothing, with the reason.
    """

    model: str
    form: str
    tokens: int
    block_size: int
    blocks: int
    runs: tuple[BlockRun, ...]
    replicas: tuple[ReplicaPlan, ...]
    known_blocks: int
    shared_tokens: int
    reasons: tuple[str, ...]
    unavailable: dict[str, str]

    @property
    def known_tokens(self) -> int:
        """Where the longest known prefix ends."""
        return self.known_blocks * self.block_size + self.shared_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        runs = [run._asdict() for run in self.runs]
        plain = {**dataclasses.asdict(self), "runs": runs, "known_tokens": self.known_tokens}
        return plain


class _Keys(NamedTuple):
    """What is looked for: the chains of each KV group, and first blocks under other salts."""

    chains: list[list[BlockKey]]
    others: list[BlockKey]

    @property
    def all(self) -> list[BlockKey]:
        return [*itertools.chain(*self.chains), *self.others]


def explain_prefix(
    group: Group, tokens: TokenIds, salt: str, missing: Mapping[str, str] | None = None
) -> Explanation:
    """Ask a group's actors about a prompt.

    Args:
        group: joined.
        tokens: the prompt.
        salt: its cache salt.
        missing: actors that are not asked, and why.

    Raises:
        CapacityError: the prompt can never fit.
        GroupUnavailableError: no replica answers.
    """
    info: EngineInfo = group.info
    size, blocks = info.block_size, len(tokens) // info.block_size
    roots = info.roots(salt)
    keys = _Keys(
        [chain_keys(root, tokens.array, size) for root in roots],
        [
            chain_keys(info.roots(other)[0], tokens.array[:size], size)[0]
            for other in _known_salts(group, salt)
            if blocks
        ],
    )
    shards = gather(
        group.shards, lambda s: s.view_prefix.remote(join_keys(keys.all)), _SHARD_TIMEOUT_S, "look"
    )
    replicas = {name: handle for name, handle in group.actors.items() if ":gpu:" in name}
    nodes = gather(replicas, lambda r: r.where.remote(), CALL_TIMEOUT_S, "where")
    unavailable = {**(missing or {}), **_errors({**shards, **nodes})}
    places = {name: answer[0] for name, answer in shards.items() if name not in unavailable}
    asked = {
        name: handle.view_prefix.remote(
            tokens, salt, _below(places, keys, nodes[name]["node_id"]), keys.others
        )
        for name, handle in replicas.items()
        if name not in unavailable
    }
    views = gather(asked, lambda ref: ref, _SHARD_TIMEOUT_S, "explain")
    unavailable |= _errors(views)
    told = {name: view for name, view in views.items() if name not in unavailable}
    if not told:
        raise GroupUnavailableError(f"no replica answers: {'; '.join(unavailable.values())}")
    best = max(told.values(), key=lambda view: (view.known, view.shared_tokens))
    behind = keys.chains[0][best.known - 1] if best.known else roots[0]
    followed = best.branches or _followed(group, behind, keys, best.known, unavailable)
    namespaces: Counter[str] = Counter()
    for name in places:
        namespaces.update(shards[name][1])
    other_salt = any(itertools.chain(*(view.others_known for view in told.values()))) or any(
        any(its[len(keys.all) - len(keys.others) :]) for its in places.values()
    )
    reasons = itertools.chain(
        _reasons(info, len(tokens), best, followed, other_salt),
        _elsewhere(info, salt, namespaces),
        _tiers_missing(group),
    )
    return Explanation(
        model=group.spec.source.short_name,
        form=_form(info.kv_dtype, info.tier_codec),
        tokens=len(tokens),
        block_size=size,
        blocks=blocks,
        runs=tuple(_runs(blocks, told, places, keys)),
        replicas=tuple(
            _plan_of(name, views.get(name), unavailable.get(name, ""))
            for name in sorted({*replicas, *(n for n in unavailable if ":gpu:" in n)})
        ),
        known_blocks=best.known,
        shared_tokens=best.shared_tokens,
        reasons=tuple(reasons),
        unavailable=unavailable,
    )


def _known_salts(group: Group, salt: str) -> list[str]:
    """Those that the group's settings name, and none; but for the prompt's own."""
    config = group.spec.config
    quotas = (config.salt_quotas, config.salt_ram_quotas, config.salt_pool_quotas)
    known = dict.fromkeys(["", config.cache_salt, *itertools.chain(*quotas)])
    return [other for other in known if other != salt]


def _errors(answers: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(a) for name, a in answers.items() if isinstance(a, LiteCacheError)}


def _below(places: Mapping[str, bytes], keys: _Keys, node_id: str) -> list[list[str]]:
    """Per KV group and block the source that a replica on that node would take it from."""
    order = sorted(places, key=lambda name: not _is_on(name, node_id))
    below: list[list[str]] = []
    at = 0
    for chain in keys.chains:
        sources = []
        for position in range(at, at + len(chain)):
            found = [
                (_tier(places[name][position], _is_on(name, node_id)), name)
                for name in order
                if places[name][position]
            ]
            rank, name = min(
                ((("ram", "disk", "remote").index(tier), name) for tier, name in found),
                default=(3, ""),
            )
            tier = ("ram", "disk", "remote", "")[rank]
            sources.append(f"{tier}:{name.split(':shard:', 1)[1]}" if tier else "")
        below.append(sources)
        at += len(chain)
    return below


def _is_on(shard: str, node_id: str) -> bool:
    return shard.split(":")[3] == node_id[:8]


def _tier(place: int, here: bool) -> str:
    if not here:
        return "remote"
    return "ram" if place & Place.RAM else "disk"


def _followed(
    group: Group, parent: BlockKey, keys: _Keys, known: int, unavailable: dict[str, str]
) -> bool:
    """Whether some shard has a block behind the known ones, which is not the prompt's."""
    if known >= len(keys.chains[0]):
        return False
    shards = {name: shard for name, shard in group.shards.items() if name not in unavailable}
    answers = gather(
        shards, lambda s: s.has_follower.remote(parent), _SHARD_TIMEOUT_S, "has_follower"
    )
    unavailable |= _errors(answers)
    return any(answer is True for answer in answers.values())


def _runs(
    blocks: int, views: Mapping[str, Any], places: Mapping[str, bytes], keys: _Keys
) -> Iterator[BlockRun]:
    starts = [sum(map(len, keys.chains[:group])) for group in range(len(keys.chains))]

    def everywhere(name: str, index: int) -> int:
        """The tiers of a shard that hold a block of every KV group."""
        held = int(Place.RAM | Place.DISK)
        for start in starts:
            held &= places[name][start + index]
        return held

    def of(index: int) -> BlockRun:
        held = {role_of(name): everywhere(name, index) for name in places}
        return BlockRun(
            0,
            0,
            tuple(role_of(name) for name, v in views.items() if v.sources[index] == "gpu"),
            tuple(name for name, its in held.items() if its & Place.RAM),
            tuple(name for name, its in held.items() if its & Place.DISK),
        )

    for run, same in itertools.groupby(range(blocks), key=of):
        indices = list(same)
        yield run._replace(first=indices[0], end=indices[-1] + 1)


def _plan_of(name: str, view: Any, error: str) -> ReplicaPlan:
    if view is None or error:
        return ReplicaPlan(role_of(name), error=error)
    tiers = Counter(source.partition(":")[0] for source in view.sources[: view.known])
    plan = view.plan
    return ReplicaPlan(
        name=role_of(name),
        blocks={tier: count for tier, count in tiers.items() if tier},
        copied_tokens=view.shared_tokens,
        load_from=plan.load_from if plan else 0,
        load_end=plan.load_end if plan else 0,
        first_token_s=plan.first_token_s if plan else None,
        compute_s=view.compute_s,
        load_s=view.load_s,
        queued_tokens=view.queued_tokens,
        decodes=view.decodes,
        measured=view.measured,
    )


def _reasons(
    info: EngineInfo, tokens: int, best: Any, followed: bool, other_salt: bool
) -> Iterator[str]:
    """What keeps the prompt, or what is behind its known beginning, from matching.

    Args:
        info: of the engine.
        tokens: of the prompt.
        best: what the replica that knows most of it said.
        followed: something else is known to come behind that.
        other_salt: its first block is known under another salt.
    """
    size = info.block_size
    known = best.known * size + best.shared_tokens
    if tokens <= size:
        yield (
            f"the prompt has {tokens} token(s): RAM and disk hold whole blocks of {size}, "
            "and the last token is always computed; only a pool can reuse so short a prompt"
        )
    elif best.known == tokens // size:
        yield "every whole block of it is known"
    if best.shared_tokens:
        yield (
            f"another prompt in a pool goes on alike up to token {known:,}, and differs there or "
            "ends: its block is copied that far"
        )
    elif followed:
        end = min(known + size, tokens)
        what = f"behind token {known:,} what is known goes on" if known else "other prompts begin"
        yield (
            f"{what} differently, within tokens {known:,} to {end - 1:,} (another question, "
            "another template, other white space)"
        )
    elif best.known < tokens // size:
        what = f"nothing is known behind token {known:,}" if known else "no such beginning is known"
        yield f"{what}: it was never computed or saved, has been evicted, or has expired"
    if other_salt and not best.known:
        yield "its first block is known under another salt: different salts share nothing"


def _elsewhere(info: EngineInfo, salt: str, namespaces: Mapping[str, int]) -> Iterator[str]:
    """What else the shards hold, which a prompt of this salt and model cannot reuse."""
    counts: Counter[str] = Counter()
    for name, count in namespaces.items():
        label, salted = split_namespace(name)
        if label == info.label:
            if not may_hold(name, salt_digest(salt)):
                whose = "of another salt" if salted else "without a salt"
                counts[f"of this model, {whose}"] += count
            continue
        counts[_difference(label, info)] += count
    for what, count in counts.most_common(8):
        yield f"the shards also hold {count:,} block(s) {what}: none of them can match"


_LABEL = re.compile(r"(?P<model>.*)@(?P<print>[0-9a-f]{12})/(?P<form>[^/]+)/(?P<size>\d+)")


def _difference(label: str, info: EngineInfo) -> str:
    found = _LABEL.fullmatch(label)
    if found is None:
        return "of an unknown model"
    if found["print"] != info.fingerprint[:12]:
        return f"of another model ({found['model'].rpartition('/')[2]}, or its other weights)"
    form = _form(info.kv_dtype, info.tier_codec)
    kv_dtype, _, codec = found["form"].partition(":")
    theirs = _form(kv_dtype, codec or None)
    if theirs != form:
        return f"of this model as {theirs} (kv_dtype, tier_codec), not {form}"
    return f"of this model with block_size {found['size']}, not {info.block_size}"


def _form(kv_dtype: str, codec: str | None) -> str:
    return f"{kv_dtype}, {codec} below" if codec else kv_dtype


def _tiers_missing(group: Group) -> Iterator[str]:
    config = group.spec.config
    if not group.shards:
        yield "the group has no shards that answer: only the pools can hold something"
    elif config.storage_dir is None:
        yield "the group has no disk tier (storage_dir): what leaves RAM is gone"
    if config.admission != "all":
        yield f"admission={config.admission}: not every block is written to the lower tiers"
    if config.ttl_s is not None:
        yield f"ttl_s={config.ttl_s:g}: older blocks are a miss"
