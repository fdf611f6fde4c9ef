"""What a group did so far and does right now, added up over its actors.

`CacheStats` are counters since the actors started; `RateMeter` makes rates and means of two looks
at them, for `litecache top`. The counters are those that the actors export (docs/running.md);
nothing is measured anew. A process that was restarted counts from zero: as with Prometheus, a
counter that went back has counted all of its value since.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from litecache.types import Tier

TIERS = tuple(tier.value for tier in Tier)
_Series = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class CacheStats:
    """Counters since the actors started, and their present state.

    Attributes:
        requests: ended requests by outcome.
        running, waiting: requests now.
        prompt_tokens: tokens of all prompts.
        found_tokens: of those, whose KV was found, by tier.
        reused_tokens: of those, not computed, by tier; the others were computed by plan.
        generated_tokens: tokens drawn.
        misses: looked up and not found, by "tier: reason".
        blocks: blocks of the pools by state.
        io_bytes: moved so far, by "direction tier".
        evictions, drops: by tier and by reason.
        latencies: name -> {"count", "mean"} in seconds.
        shards: per shard, what its store says of itself.
        unavailable: actors that did not answer.
    """

    requests: dict[str, int] = field(default_factory=dict)
    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    found_tokens: dict[str, int] = field(default_factory=dict)
    reused_tokens: dict[str, int] = field(default_factory=dict)
    generated_tokens: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)
    io_bytes: dict[str, int] = field(default_factory=dict)
    evictions: dict[str, int] = field(default_factory=dict)
    drops: dict[str, int] = field(default_factory=dict)
    latencies: dict[str, dict[str, float]] = field(default_factory=dict)
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    unavailable: tuple[str, ...] = ()

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were not computed."""
        return sum(self.reused_tokens.values()) / self.prompt_tokens if self.prompt_tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "hit_rate": self.hit_rate}

    @classmethod
    def from_status(cls, actors: Mapping[str, Mapping[str, Any]]) -> CacheStats:
        """Add up what `Group.status` returned."""
        answering = {name: actor for name, actor in actors.items() if "error" not in actor}
        snapshots = [a["metrics"] for a in answering.values() if "metrics" in a]
        engines = [a["engine"] for a in answering.values() if "engine" in a]
        blocks: Counter[str] = Counter()
        for engine in engines:
            blocks.update(engine["blocks"])  # states without a block stay, which `+` would drop
        counters = [counter for snapshot in snapshots for counter in snapshot["counters"]]

        def by(name: str, *labels: str, between: str = " ") -> dict[str, int]:
            """The sums of a counter by the values of some of its labels."""
            sums: Counter[str] = Counter()
            for counter, labelled, value in counters:
                if counter == f"litecache_{name}":
                    sums[between.join(labelled.get(label, "") for label in labels)] += int(value)
            return dict(sums)

        return cls(
            requests=by("requests", "outcome"),
            running=sum(int(engine["running"]) for engine in engines),
            waiting=sum(int(engine["waiting"]) for engine in engines),
            prompt_tokens=sum(by("prompt_tokens").values()),
            found_tokens=by("found_tokens", "tier"),
            reused_tokens=by("reused_tokens", "tier"),
            generated_tokens=sum(by("generated_tokens").values()),
            misses=by("misses", "tier", "reason", between=": "),
            blocks=dict(blocks),
            io_bytes=by("storage_bytes", "direction", "tier"),
            evictions=by("evictions", "tier"),
            drops=by("drops", "reason"),
            latencies=_latencies(snapshots),
            shards={name: dict(a["store"]) for name, a in answering.items() if "store" in a},
            unavailable=tuple(sorted(actors.keys() - answering.keys())),
        )


def _latencies(snapshots: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    found: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for snapshot in snapshots:
        for name, labels, histogram in snapshot["histograms"]:
            found[" ".join([name.removeprefix("litecache_"), *labels.values()])].append(histogram)
    counts = {key: sum(each["count"] for each in found[key]) for key in found}
    return {
        key: {"count": count, "mean": sum(each["sum"] for each in found[key]) / count}
        for key, count in counts.items()
    }


@dataclass(frozen=True)
class ReplicaRates:
    """A replica.

    Attributes:
        state: as `ActorView.state`; without figures all counts are 0.
        running, waiting: requests now.
        queued_tokens: of prompts, still to be computed, as the router counts them.
        blocks: of its pool by state.
        prefill_tokens_s, decode_tokens_s: computed of prompts, and drawn.
    """

    name: str
    state: str
    error: str = ""
    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    blocks: dict[str, int] = field(default_factory=dict)
    pool_bytes: int = 0
    prefill_tokens_s: float = 0.0
    decode_tokens_s: float = 0.0


@dataclass(frozen=True)
class ShardRates:
    """A shard.

    Attributes:
        state: as `ActorView.state`.
        blocks, disk_blocks: it holds, and how many of them on disk.
        queued_reads: waiting for the disk.
        read_s, write_s: mean seconds of a disk request, since the last look; None = there was none.
        read_bytes_s, write_bytes_s: of the disk.
        answer_s: it took to say that it is there; None = it did not.
    """

    name: str
    state: str
    error: str = ""
    blocks: int = 0
    disk_blocks: int = 0
    ram_bytes_used: int = 0
    ram_bytes: int = 0
    disk_bytes_used: int = 0
    storage_bytes: int = 0
    queued_reads: int = 0
    read_s: float | None = None
    write_s: float | None = None
    read_bytes_s: float = 0.0
    write_bytes_s: float = 0.0
    answer_s: float | None = None


@dataclass(frozen=True)
class TierRates:
    """One tier of all actors together.

    Attributes:
        used_bytes, total_bytes: of it; 0 and 0 = it is not there.
        hit_share: of the prompt tokens since the last look, whose KV came from here.
        reused_tokens: since the actors started.
        in_bytes_s, out_bytes_s: written to it, and read from it.
        evictions_s: blocks a second that left it to make room.
    """

    name: str
    used_bytes: int = 0
    total_bytes: int = 0
    hit_share: float = 0.0
    reused_tokens: int = 0
    in_bytes_s: float = 0.0
    out_bytes_s: float = 0.0
    evictions_s: float = 0.0


@dataclass(frozen=True)
class GroupRates:
    """A group between two looks, or (`seconds` 0) at the first one.

    Attributes:
        seconds: between the looks.
        prefill_tokens_s, decode_tokens_s: computed of prompts, and drawn.
        requests_s, failed_s: that ended, and of those with an error.
        hit_share: of the prompt tokens since the last look, that were not computed.
        hit_share_ever: the same since the actors started.
        ttft_s, inter_token_s: means since the last look, inside the engines; None = there was none.
        running, waiting: requests now.
        drops_s: blocks a second that were not saved, by reason.
        without_figures: actors that told none, each with the reason.
    """

    seconds: float = 0.0
    prefill_tokens_s: float = 0.0
    decode_tokens_s: float = 0.0
    requests_s: float = 0.0
    failed_s: float = 0.0
    hit_share: float | None = None
    hit_share_ever: float | None = None
    ttft_s: float | None = None
    inter_token_s: float | None = None
    running: int = 0
    waiting: int = 0
    tiers: tuple[TierRates, ...] = ()
    replicas: tuple[ReplicaRates, ...] = ()
    shards: tuple[ShardRates, ...] = ()
    coordinator: str = "gone"
    keys: int = 0
    drops_s: dict[str, float] = field(default_factory=dict)
    without_figures: dict[str, str] = field(default_factory=dict)


@dataclass
class _Seen:
    """An actor's figures at the last look that it answered, and what it has done before that."""

    at_s: float
    totals: dict[_Series, float]
    rates: dict[_Series, float] = field(default_factory=dict)
    changes: dict[_Series, float] = field(default_factory=dict)


class RateMeter:
    """Keeps each actor's last figures, and makes rates of the next ones.

    An actor that is busy keeps its last rates: it counts on, and will tell.
    """

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._looked_s: float | None = None

    def take(self, views: Mapping[str, Any], now_s: float) -> GroupRates:
        """The rates since the last look.

        Args:
            views: `ActorView`s by actor name.
            now_s: of a monotonic clock.
        """
        for name, view in views.items():
            if view.stats is not None:
                self._note(name, view.stats, now_s)
            elif view.state != "busy" and name in self._seen:
                self._seen[name].rates = {}
                self._seen[name].changes = {}
        seconds = now_s - self._looked_s if self._looked_s is not None else 0.0
        self._looked_s = now_s
        return _summed(views, {n: self._seen[n] for n in views if n in self._seen}, seconds)

    def _note(self, name: str, stats: Mapping[str, Any], now_s: float) -> None:
        totals = _totals(stats.get("metrics") or {})
        last = self._seen.get(name)
        seen = self._seen[name] = _Seen(now_s, totals)
        if last is None or now_s <= last.at_s:
            return
        for series, value in totals.items():
            before = last.totals.get(series, 0.0)
            change = value - before if value >= before else value
            seen.changes[series] = change
            seen.rates[series] = change / (now_s - last.at_s)


def _totals(metrics: Mapping[str, Any]) -> dict[_Series, float]:
    """Counters, and of each histogram its sum and count as two more."""
    totals: dict[_Series, float] = {}
    for name, labels, value in metrics.get("counters", ()):
        totals[name, tuple(sorted(labels.items()))] = float(value)
    for name, labels, value in metrics.get("histograms", ()):
        key = tuple(sorted(labels.items()))
        totals[f"{name}:sum", key] = float(value["sum"])
        totals[f"{name}:count", key] = float(value["count"])
    return totals


def _of(values: Mapping[_Series, float], name: str, **labels: str) -> float:
    """The sum of a counter's series that have these labels."""
    wanted = labels.items()
    return sum(
        value
        for (series, its), value in values.items()
        if series == f"litecache_{name}" and wanted <= dict(its).items()
    )


def _mean(changes: Mapping[_Series, float], name: str, **labels: str) -> float | None:
    count = _of(changes, f"{name}:count", **labels)
    return _of(changes, f"{name}:sum", **labels) / count if count else None


def _summed(views: Mapping[str, Any], seen: Mapping[str, _Seen], seconds: float) -> GroupRates:
    rates: Counter[_Series] = Counter()
    changes: Counter[_Series] = Counter()
    totals: Counter[_Series] = Counter()
    for each in seen.values():
        rates.update(each.rates)
        changes.update(each.changes)
        totals.update(each.totals)
    coordinators = [view for name, view in views.items() if name.endswith(":coordinator")]
    routed = _routed(coordinators)
    replicas = tuple(
        _replica(name, view, seen.get(name), routed)
        for name, view in views.items()
        if ":gpu:" in name
    )
    shards = tuple(
        _shard(name, view, seen.get(name)) for name, view in views.items() if ":shard:" in name
    )
    keys = [view.stats["keys"] for view in coordinators if view.stats is not None]
    asked = _of(totals, "prompt_tokens")
    reasons = {dict(its)["reason"] for (name, its) in rates if name == "litecache_drops"}
    return GroupRates(
        seconds=seconds,
        prefill_tokens_s=_of(rates, "computed_tokens"),
        decode_tokens_s=_of(rates, "generated_tokens"),
        requests_s=_of(rates, "requests"),
        failed_s=_of(rates, "requests", outcome="error"),
        hit_share=_hit_share(changes),
        hit_share_ever=_of(totals, "reused_tokens") / asked if asked else None,
        ttft_s=_mean(changes, "ttft_seconds"),
        inter_token_s=_mean(changes, "inter_token_seconds"),
        running=sum(replica.running for replica in replicas),
        waiting=sum(replica.waiting for replica in replicas),
        tiers=_tiers(replicas, shards, rates, changes, totals),
        replicas=replicas,
        shards=shards,
        coordinator=coordinators[0].state if coordinators else "gone",
        keys=keys[0] if keys else 0,
        drops_s={r: rate for r in sorted(reasons) if (rate := _of(rates, "drops", reason=r))},
        without_figures={
            name: view.error or view.state for name, view in views.items() if view.stats is None
        },
    )


def _hit_share(changes: Mapping[_Series, float]) -> float | None:
    """Of what was done for prompts, in tokens: what was reused and not computed."""
    reused, computed = _of(changes, "reused_tokens"), _of(changes, "computed_tokens")
    return reused / (reused + computed) if reused + computed else None


def _routed(coordinators: list[Any]) -> Mapping[Any, Mapping[str, Any]]:
    """What the router knows of the replicas, by index."""
    for view in coordinators:
        if view.stats is not None:
            known: Mapping[Any, Mapping[str, Any]] = view.stats.get("replicas", {})
            return known
    return {}


def _replica(
    name: str, view: Any, seen: _Seen | None, routed: Mapping[Any, Mapping[str, Any]]
) -> ReplicaRates:
    rates = seen.rates if seen is not None else {}
    engine = (view.stats or {}).get("engine", {})
    index = name.rpartition(":")[2]
    known = routed.get(int(index), {}) if index.isdigit() else {}
    return ReplicaRates(
        name=name,
        state=view.state,
        error=view.error,
        running=int(engine.get("running", 0)),
        waiting=int(engine.get("waiting", 0)),
        queued_tokens=int(known.get("load", 0)),
        blocks=dict(engine.get("blocks", {})),
        pool_bytes=int(engine.get("pool_bytes", 0)),
        prefill_tokens_s=_of(rates, "computed_tokens"),
        decode_tokens_s=_of(rates, "generated_tokens"),
    )


_SHARD_FIGURES = (
    "blocks", "disk_blocks", "ram_bytes_used", "ram_bytes", "disk_bytes_used", "storage_bytes",
    "queued_reads",
)  # fmt: skip


def _shard(name: str, view: Any, seen: _Seen | None) -> ShardRates:
    store = (view.stats or {}).get("store", {})
    rates, changes = (seen.rates, seen.changes) if seen is not None else ({}, {})
    disk = {"tier": Tier.DISK.value}
    return ShardRates(
        name=name,
        state=view.state,
        error=view.error or store.get("disk_lost", ""),
        **{figure: int(store.get(figure, 0)) for figure in _SHARD_FIGURES},
        read_s=_mean(changes, "io_seconds", direction="read"),
        write_s=_mean(changes, "io_seconds", direction="write"),
        read_bytes_s=_of(rates, "storage_bytes", direction="read", **disk),
        write_bytes_s=_of(rates, "storage_bytes", direction="write", **disk),
        answer_s=view.answer_s,
    )


def _tiers(
    replicas: tuple[ReplicaRates, ...],
    shards: tuple[ShardRates, ...],
    rates: Mapping[_Series, float],
    changes: Mapping[_Series, float],
    totals: Mapping[_Series, float],
) -> tuple[TierRates, ...]:
    pool_used = 0.0
    for replica in replicas:
        blocks = sum(replica.blocks.values())
        used = blocks - replica.blocks.get("free", 0)
        pool_used += replica.pool_bytes * used / blocks if blocks else 0
    fill = {
        "gpu": (int(pool_used), sum(replica.pool_bytes for replica in replicas)),
        "ram": (sum(s.ram_bytes_used for s in shards), sum(s.ram_bytes for s in shards)),
        "disk": (sum(s.disk_bytes_used for s in shards), sum(s.storage_bytes for s in shards)),
        "remote": (0, 0),
    }
    save = _of(rates, "copied_bytes", direction="save")
    loads = {tier: _of(rates, "copied_bytes", direction="load", tier=tier) for tier in TIERS}
    disk = {d: _of(rates, "storage_bytes", tier="disk", direction=d) for d in ("read", "write")}
    traffic = {
        "gpu": (sum(loads.values()), save),
        "ram": (save, loads["ram"] + loads["disk"]),
        "disk": (disk["write"], disk["read"]),
        "remote": (0.0, loads["remote"]),
    }
    asked = _of(changes, "reused_tokens") + _of(changes, "computed_tokens")
    return tuple(
        TierRates(
            name=tier,
            used_bytes=fill[tier][0],
            total_bytes=fill[tier][1],
            hit_share=_of(changes, "reused_tokens", tier=tier) / asked if asked else 0.0,
            reused_tokens=int(_of(totals, "reused_tokens", tier=tier)),
            in_bytes_s=traffic[tier][0],
            out_bytes_s=traffic[tier][1],
            evictions_s=_of(rates, "evictions", tier=tier),
        )
        for tier in TIERS
    )
