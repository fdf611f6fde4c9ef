"""A shard's figures, for `stats()` and the gauges."""

from __future__ import annotations

from ..metrics import Metrics
from .ram_tier import RamState
from .tiers import Tiers


def shard_stats(tiers: Tiers, epoch: int, clients: int, metrics: Metrics) -> dict[str, object]:
    """Counts and bytes, msgpack-able; under the store's lock.

    `hits`, `promotions` (disk to RAM), `demotions` (the RAM copy left, the disk has the block) and
    `evictions` are read from `metrics`, so they are a shard's own where it has its own.
    """
    ram, disk = tiers.ram, tiers.disk
    states = {
        state.name.lower(): sum(b.state is state for b in ram.by_slot.values())
        for state in RamState
    }
    used = sum(block.nbytes for block in ram.by_slot.values())
    result: dict[str, object] = {
        "epoch": epoch,
        "blocks": len(tiers.index),
        "ram_slots": states,
        "ram_bytes_used": used,
        "ram_bytes": ram.arena.arena_bytes,
        "clients": clients,
        "leases": sum(block.leases for block in ram.by_slot.values()),
        "disk_blocks": 0,
        "slab_bytes": 0,
        "journal_bytes": 0,
        "queued_reads": sum(len(request.blocks) for request in tiers.reads),
        "hits": _by_tier(metrics, "litecache_hits", "ram", "disk"),
        "promotions": int(metrics.value("litecache_promotions")),
        "demotions": int(metrics.value("litecache_demotions")),
        "drops": {k: int(v) for k, v in metrics.by_label("litecache_drops", "reason").items()},
        "evictions": _by_tier(metrics, "litecache_evictions", "ram", "disk", "expired"),
    }
    if disk is not None:
        result["disk_blocks"] = int((tiers.index.column("disk") != 0).sum())
        result["slab_bytes"] = disk.space.present * disk.space.segment_bytes
        result["journal_bytes"] = disk.log.bytes
        result["retired_bytes"] = disk.retired_bytes
        result["disk_lost"] = disk.lost or ""
        result["direct_io"] = disk.slab.direct
        result["damaged_records"] = disk.damaged_records
    return result


def _by_tier(metrics: Metrics, name: str, *tiers: str) -> dict[str, int]:
    return {tier: int(metrics.value(name, tier=tier)) for tier in tiers}


def set_gauges(metrics: Metrics, stats: dict[str, object]) -> None:
    """Copy the figures that are exported as gauges."""
    states = stats["ram_slots"]
    assert isinstance(states, dict)
    for state, count in states.items():
        metrics.set("litecache_arena_slots", count, state=state)
    metrics.set("litecache_slab_bytes", float(str(stats["slab_bytes"])))
