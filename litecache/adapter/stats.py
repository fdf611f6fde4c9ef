"""`CacheStats`: what the group did so far, added up over its actors."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


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
