"""The `Coordinator` actor: where blocks are, who is alive, which replica takes a request.

A thin shell over `LocationMap` and `Router`. All of its state is soft: after a restart the shards
see that it does not know their epoch and send their keys again. It imports neither torch nor any
engine, and it is never on the way of a token.
"""

from __future__ import annotations

import gc
import os
import uuid
from typing import Any

import ray

from litecache.actors.location_map import LocationMap, unpack_keys
from litecache.actors.router import Router


class Coordinator:
    """Plain class behind the actor.

    Args:
        group: name of the group.
        description: the group's settings, for those who join; plain values.
    """

    def __init__(self, group: str, description: dict[str, Any]) -> None:
        self._group = group
        self._description = description
        self._epoch = uuid.uuid4().hex
        self._locations = LocationMap()
        self._router = Router()
        gc.collect()
        gc.freeze()  # millions of keys would be looked through again and again

    def __repr__(self) -> str:
        return f"Coordinator({self._group})"

    async def describe(self) -> dict[str, Any]:
        """The group's settings."""
        return self._description

    async def info(self) -> dict[str, Any]:
        """Process and epoch."""
        context = ray.get_runtime_context()
        return {"pid": os.getpid(), "node_id": context.get_node_id(), "epoch": self._epoch}

    async def report_shard(
        self, shard_id: str, node_id: str, epoch: int, seq: int, added: bytes, removed: bytes
    ) -> bool:
        """Location deltas of a shard, and its heartbeat; False asks for a resync."""
        return self._locations.apply(
            shard_id, node_id, epoch, seq, unpack_keys(added), unpack_keys(removed)
        )

    async def begin_resync(self, shard_id: str, node_id: str, epoch: int, seq: int) -> bool:
        """A shard is about to send all its keys."""
        return self._locations.begin_resync(shard_id, node_id, epoch, seq)

    async def add_keys(self, shard_id: str, epoch: int, keys: bytes, last: bool) -> bool:
        """A part of a shard's keys."""
        return self._locations.add_keys(shard_id, epoch, unpack_keys(keys), last)

    async def report_replica(self, index: int, node_id: str, load: int) -> int:
        """Heartbeat of a replica; returns how many live shards other nodes have."""
        self._router.report(index, node_id, load)
        return self._locations.remote_shards(node_id)

    async def report_failure(self, index: int, reason: str) -> None:
        """A replica's process is about to end itself."""
        self._router.note_failure(index, reason)

    async def failures(self, index: int) -> list[str]:
        """Why a replica's process ended itself lately."""
        return self._router.failures(index)

    async def locate(self, keys: bytes, exclude_node: str) -> list[str | None]:
        """One shard on another node for each key."""
        return self._locations.locate(unpack_keys(keys), exclude_node)

    async def route(self, keys: bytes) -> int | None:
        """The replica for a prompt with these blocks."""
        unpacked = unpack_keys(keys)
        return self._router.route(unpacked, self._locations.prefix_by_node(unpacked))

    async def keys_of(self, shard_id: str) -> bytes:
        """What the map believes a shard to hold, for checks."""
        return b"".join(sorted(self._locations.keys_of(shard_id)))

    async def stats(self) -> dict[str, Any]:
        """Members and the size of the map."""
        return {
            **await self.info(),
            "keys": len(self._locations),
            "shards": self._locations.shards(),
            "replicas": self._router.replicas(),
        }
